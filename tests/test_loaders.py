"""Loading FLUX.2 through ComfyUI: the small files, agreement with diffusers and transformers, reloading, and what the
nodes say of bad input.

Reference results come from diffusers and transformers with the same weights, in float32 on the CPU. Not covered: the
published checkpoints.
"""

import copy
import json

import pytest
import torch

import small_models as maker

PROMPT = "Add a cool hat to the cat"


@pytest.fixture(scope="module")
def load(comfy):
    from flux2_pack.flux2.loading import load

    return load


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These matrices are tiny: threads that wait for each other on a busy machine make them five times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


def relative_error(value, reference):
    return ((value - reference).norm() / reference.norm()).item()


def float_transformer(model):
    return model.model.diffusion_model.to(device="cpu", dtype=torch.float32)


# --- the small files -------------------------------------------------------------------------------------------------


def test_small_files_load_sample_and_decode(load, small_models):
    import comfy.sample

    model = load.load_model(small_models["model"])
    clip = load.load_text_encoder(small_models["text_encoder"])
    vae = load.load_vae(small_models["vae"])
    prompt = clip.encode_from_tokens_scheduled(clip.tokenize(PROMPT))
    latent = torch.zeros(1, 128, 4, 6)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(1))
    sampled = comfy.sample.sample(
        model, noise, 2, 1.0, "euler", "simple", prompt, prompt, latent, disable_pbar=True, seed=1
    )
    picture = vae.decode(sampled)
    assert sampled.isfinite().all() and not torch.equal(sampled, noise)
    assert picture.shape == (1, 64, 96, 3) and picture.isfinite().all() and picture.std() > 0
    assert vae.encode(picture).shape == (1, 128, 4, 6)


def test_a_prompt_of_another_width_is_refused_in_words(load, small_models):
    import comfy.sample
    from flux2_pack.flux2.checkpoints.header import CheckpointError

    model = load.load_model(small_models["model"])
    prompt = [[torch.zeros(1, 8, 7680), {}]]
    latent = torch.zeros(1, 128, 2, 2)
    with pytest.raises(CheckpointError, match="reads prompts 192 wide.*this prompt is 7680 wide, from Qwen3 4B"):
        comfy.sample.sample(model, latent, 1, 1.0, "euler", "simple", prompt, prompt, latent, disable_pbar=True, seed=1)


@pytest.mark.parametrize("kind, arguments", [("model", ("bf16",)), ("text_encoder", ("cpu",)), ("vae", ("fp32",))])
def test_cached_patcher_init_loads_the_same_weights_again(load, small_models, kind, arguments):
    loaded = getattr(load, f"load_{kind}")(small_models[kind], *arguments)
    patcher = getattr(loaded, "patcher", loaded)
    factory, parameters = patcher.cached_patcher_init
    again = factory(*parameters, disable_dynamic=True)
    first, second = patcher.model.state_dict(), again.model.state_dict()
    assert again.model is not patcher.model and first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert patcher.clone().cached_patcher_init == patcher.cached_patcher_init


@pytest.mark.parametrize("name", ["bf16", "fp8"])
def test_weight_dtype_is_the_type_in_memory(load, small_models, name):
    model = load.load_model(small_models["model"], name)
    assert model.model.diffusion_model.img_in.weight.dtype == load.WEIGHT_DTYPES[name]


@pytest.mark.parametrize("name", ["bf16", "fp16", "fp32"])
def test_vae_precision_is_the_type_in_memory(load, small_models, name):
    vae = load.load_vae(small_models["vae"], name)
    assert vae.vae_dtype == vae.first_stage_model.decoder.conv_in.weight.dtype == load.PRECISIONS[name]


# --- diffusion model against diffusers
# ---------------------------------------------------------------------------------

VARIANTS = {"dev": dict(guidance=True), "klein": dict(guidance=False, double=1, single=3)}


def original_and_diffusers(folder, **variant):
    """The same random weights as an original file and, through diffusers' own converter, as a sharded diffusers folder
    with its model.

    Returns (file, folder, model).
    """
    from diffusers import Flux2Transformer2DModel
    from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers

    weights = maker.diffusion_model(dtype=torch.float32, **variant)
    maker.write(folder / "original.safetensors", weights)
    model = Flux2Transformer2DModel(
        num_layers=variant.get("double", 2),
        num_single_layers=variant.get("single", 4),
        attention_head_dim=128,
        num_attention_heads=2,
        joint_attention_dim=192,
        timestep_guidance_channels=256,
        guidance_embeds=variant["guidance"],
        in_channels=128,
    )
    model.load_state_dict(
        convert_flux2_transformer_checkpoint_to_diffusers({name: value.clone() for name, value in weights.items()})
    )
    model.save_pretrained(folder / "transformer", max_shard_size="8MB")
    return folder / "original.safetensors", folder / "transformer", model.eval()


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request, tmp_path_factory):
    """(name, file, folder, model) of each kind of FLUX.2, made once."""
    return request.param, *original_and_diffusers(tmp_path_factory.mktemp(request.param), **VARIANTS[request.param])


@pytest.fixture(scope="module")
def dev(tmp_path_factory):
    """(file, model) with guidance. A test that changes the model changes a copy."""
    file, _, model = original_and_diffusers(tmp_path_factory.mktemp("dev"), guidance=True)
    return file, model


def grid(time, height, width):
    """Position ids (H*W, 4) of one latent: time, row, column, 0."""
    return torch.cartesian_prod(torch.tensor([time]), torch.arange(height), torch.arange(width), torch.tensor([0]))


def run_diffusers(model, latents, prompt, sigma, guidance):
    """latents: list of (1, 128, H, W), the picture first and then references. Returns the prediction for the picture,
    same shape.
    """
    tokens = torch.cat([latent.flatten(2).transpose(1, 2) for latent in latents], dim=1)  # (1, S, 128)
    ids = torch.cat([grid(10 * number, *latent.shape[2:]) for number, latent in enumerate(latents)])[None]
    text_ids = torch.cartesian_prod(
        torch.tensor([0]), torch.tensor([0]), torch.tensor([0]), torch.arange(prompt.shape[1])
    )[None]
    out = model(
        hidden_states=tokens,
        encoder_hidden_states=prompt,
        timestep=sigma,
        guidance=guidance,
        img_ids=ids,
        txt_ids=text_ids,
        return_dict=False,
    )[0]
    height, width = latents[0].shape[2:]
    return out[:, : height * width].transpose(1, 2).reshape(1, 128, height, width)


@pytest.mark.parametrize("references", [0, 1, 2])
def test_diffusion_model_agrees_with_diffusers(load, variant, references):
    name, original, folder, reference = variant
    generator = torch.Generator().manual_seed(2)
    latents = [torch.randn(1, 128, 6 - number, 4 + number, generator=generator) for number in range(1 + references)]
    prompt = torch.randn(1, 20, 192, generator=generator)
    sigma, guidance = torch.tensor([0.7]), torch.tensor([4.0]) if name == "dev" else None
    expected = run_diffusers(reference, latents, prompt, sigma, guidance)
    for path in (original, folder):
        model = float_transformer(load.load_model(path))
        result = model(latents[0], sigma, prompt, guidance=guidance, ref_latents=latents[1:] or None)
        assert relative_error(result, expected) <= 1e-5


def test_single_diffusers_file_gives_the_weights_of_the_original(load, tmp_path, dev):
    original, reference = dev
    reference.save_pretrained(tmp_path / "single")
    file = tmp_path / "single" / "diffusion_pytorch_model.safetensors"
    first, second = (load.load_model(path).model.diffusion_model.state_dict() for path in (original, file))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def quantised(weights, layers):
    """ComfyUI's quantised format: fp8 weights with a scale each, named in the metadata."""
    for layer in layers:
        weight = weights[f"{layer}.weight"].float()
        scale = weight.abs().max() / 448
        weights[f"{layer}.weight"] = (weight / scale).to(torch.float8_e4m3fn)
        weights[f"{layer}.weight_scale"] = scale
    return weights, {
        "_quantization_metadata": json.dumps(
            {"format_version": "1.0", "layers": {layer: {"format": "float8_e4m3fn"} for layer in layers}}
        )
    }


def test_mixed_precision_model_loads_as_quantised(load, tmp_path):
    from flux2_pack.flux2.checkpoints.header import CheckpointError

    weights, metadata = quantised(maker.diffusion_model(), ["single_blocks.0.linear1", "double_blocks.1.img_mlp.0"])
    path = maker.write(tmp_path / "mixed.safetensors", weights, metadata)
    maker.write(tmp_path / "plain.safetensors", maker.diffusion_model())
    generator = torch.Generator().manual_seed(3)
    inputs = (
        torch.randn(1, 128, 4, 4, generator=generator),
        torch.tensor([0.5]),
        torch.randn(1, 9, 192, generator=generator),
    )
    results = [
        load.load_model(file).model.diffusion_model(*inputs, guidance=torch.tensor([4.0]))
        for file in (path, tmp_path / "plain.safetensors")
    ]
    assert 0 < relative_error(*results) < 0.05
    with pytest.raises(CheckpointError, match="already quantised .*fp8 scaled.* in 2 layers"):
        load.load_model(path, "bf16")


# --- text encoder against transformers --------------------------------------------------------------------------------


def mistral_40():
    return maker.text_encoder(layers=40, final_norm=True, dtype=torch.float32)


def transformers_mistral(weights):
    from transformers import MistralConfig, MistralModel

    config = MistralConfig(
        vocab_size=maker.VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=40,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=128,
        rms_norm_eps=1e-5,
        rope_theta=1e9,
        sliding_window=None,
    )
    if hasattr(config, "rope_parameters"):
        config.rope_parameters = {"rope_type": "default", "rope_theta": 1e9}
    model = MistralModel(config).eval()
    model.load_state_dict(
        {name.removeprefix("model."): value for name, value in weights.items() if name != "tekken_model"}
    )
    return model


def ids_of(tokens):
    return torch.tensor([[entry[0] for entry in row] for row in next(iter(tokens.values()))])


def test_hidden_states_agree_with_transformers(load, tmp_path):
    weights = mistral_40()
    clip = load.load_text_encoder(maker.write(tmp_path / "mistral.safetensors", weights))
    tokens = clip.tokenize(PROMPT)
    states = transformers_mistral(weights)(ids_of(tokens), output_hidden_states=True).hidden_states
    expected = torch.cat([states[tap] for tap in (10, 20, 30)], dim=-1)  # (1, T, 3 * 64)
    result = clip.encode_from_tokens(tokens)
    assert result.shape == expected.shape
    for part, tap in zip(result.chunk(3, dim=-1), expected.chunk(3, dim=-1)):
        assert relative_error(part, tap) <= 1e-5


def test_layers_above_the_last_tap_change_nothing_and_are_not_loaded(load, tmp_path):
    """Core's loader keeps all 40 layers: build its encoder from its own classes with these dimensions."""
    import comfy.sd
    import comfy.text_encoders.flux as flux

    weights = mistral_40()
    ours = load.load_text_encoder(maker.write(tmp_path / "mistral.safetensors", weights))
    sizes = {
        "vocab_size": maker.VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 40,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    target = load.Target(flux.flux2_te(dtype_llama=torch.float32), flux.Flux2Tokenizer)
    tokenizer = {"mistral3_24b_tokenizer_class": type(ours.tokenizer.mistral3_24b)}
    core = comfy.sd.CLIP(
        target, tokenizer_data=tokenizer, state_dict=[weights], model_options={"mistral3_24b_model_config": sizes}
    )
    tokens = ours.tokenize(PROMPT)
    assert torch.equal(ours.encode_from_tokens(tokens), core.encode_from_tokens(tokens))
    layers = [len(clip.cond_stage_model.mistral3_24b.transformer.model.layers) for clip in (ours, core)]
    assert layers == [30, 40] and ours.cond_stage_model.mistral3_24b.transformer.model.norm is None


def write_folder(folder, weights, config, shards=3, extra=None):
    """A Hugging Face folder: shards, index, config.json."""
    names = sorted(weights)
    files = {
        name: f"model-{1 + number * shards // len(names):05}-of-{shards:05}.safetensors"
        for number, name in enumerate(names)
    }
    for file in dict.fromkeys(files.values()):
        maker.write(folder / file, {name: weights[name] for name in names if files[name] == file})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


TEXT_CONFIG = {
    "hidden_size": 64,
    "num_hidden_layers": 40,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 128,
    "intermediate_size": 128,
    "vocab_size": maker.VOCABULARY,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e9,
}
MISTRAL_CONFIG = {
    "architectures": ["Mistral3ForConditionalGeneration"],
    "model_type": "mistral3",
    "text_config": TEXT_CONFIG,
}


def hugging_face(weights, prefix):
    """The weights under the key prefix of a Mistral 3 with vision, with some of the vision tower and the head."""
    renamed = {prefix + name.removeprefix("model."): value for name, value in weights.items() if name != "tekken_model"}
    return renamed | {"lm_head.weight": torch.zeros(8, 64), "vision_tower.patch_conv.weight": torch.zeros(4, 3, 2, 2)}


@pytest.mark.parametrize("tokenizer", ["tekken.json", "tokenizer.json"])
@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_hugging_face_folder_gives_what_the_single_file_gives(load, tmp_path, prefix, tokenizer):
    weights = mistral_40()
    single = load.load_text_encoder(maker.write(tmp_path / "mistral.safetensors", weights))
    folder = write_folder(tmp_path / "repo" / "text_encoder", hugging_face(weights, prefix), MISTRAL_CONFIG)
    (tmp_path / "repo" / "tokenizer").mkdir()
    ready = single.tokenizer.mistral3_24b.tokenizer
    text = maker.tekken().decode() if tokenizer == "tekken.json" else ready.backend_tokenizer.to_str()
    (tmp_path / "repo" / "tokenizer" / tokenizer).write_text(text)
    clip = load.load_text_encoder(folder)
    tokens = clip.tokenize(PROMPT)
    assert tokens == single.tokenize(PROMPT)
    assert torch.equal(clip.encode_from_tokens(tokens), single.encode_from_tokens(tokens))
    assert ("tekken_model" if tokenizer == "tekken.json" else "tokenizer_json") in clip.get_sd()


def scaled_fp8(weights):
    """The older scaled format of ComfyUI: fp8 weights with scale_weight, marked by the tensor scaled_fp8."""
    for name in [name for name in weights if name.endswith("_proj.weight")]:
        scale = weights[name].abs().max().float() / 448
        weights[name] = (weights[name].float() / scale).to(torch.float8_e4m3fn)
        weights[name.replace(".weight", ".scale_weight")] = scale
    return {**weights, "scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}


@pytest.mark.parametrize(
    "make",
    [
        lambda weights: (scaled_fp8(weights), None),
        lambda weights: quantised(weights, [name[:-7] for name in weights if name.endswith("_proj.weight")]),
    ],
)
def test_fp8_text_encoder_is_close_to_the_full_one(load, tmp_path, make):
    plain = load.load_text_encoder(maker.write(tmp_path / "plain.safetensors", maker.text_encoder()))
    weights, metadata = make(maker.text_encoder())
    fp8 = load.load_text_encoder(maker.write(tmp_path / "fp8.safetensors", weights, metadata))
    tokens = plain.tokenize(PROMPT)
    assert 0 < relative_error(fp8.encode_from_tokens(tokens), plain.encode_from_tokens(tokens)) < 0.1


def small_qwen(width=64, layers=36):
    weights = maker.text_encoder(hidden=width, layers=layers, final_norm=True, dtype=torch.float32)
    w = maker.Weights("qwen", torch.float32)
    w.uniform("model.embed_tokens.weight", (151936, width), -1, 1)  # the tokenizer that ComfyUI ships has all these ids
    for index in range(layers):
        for name in ("q_norm", "k_norm"):
            w.norm(f"model.layers.{index}.self_attn.{name}", maker.HEAD)
    return {name: value for name, value in weights.items() if name != "tekken_model"} | w.tensors


def test_qwen3_hidden_states_agree_with_transformers(load, tmp_path):
    from transformers import Qwen3Config, Qwen3Model

    weights = small_qwen()
    clip = load.load_text_encoder(maker.write(tmp_path / "qwen.safetensors", weights))
    config = Qwen3Config(
        vocab_size=151936,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=36,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=128,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
    )
    if hasattr(config, "rope_parameters"):
        config.rope_parameters = {"rope_type": "default", "rope_theta": 1e6}
    reference = Qwen3Model(config).eval()
    reference.load_state_dict({name.removeprefix("model."): value for name, value in weights.items()})
    tokens = clip.tokenize(PROMPT)
    ids = ids_of(tokens)
    result = clip.encode_from_tokens(tokens)
    length = int((ids != 151643).sum())  # the rest is padding, which the reference masks
    states = reference(ids[:, :length], output_hidden_states=True).hidden_states
    expected = torch.cat([states[tap] for tap in (9, 18, 27)], dim=-1)
    assert relative_error(result[:, :length], expected) <= 1e-5
    assert len(clip.cond_stage_model.qwen3_4b.transformer.model.layers) == 27
    folder = write_folder(
        tmp_path / "text_encoder",
        weights,
        {
            **TEXT_CONFIG,
            "num_hidden_layers": 36,
            "vocab_size": 151936,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "model_type": "qwen3",
        },
    )
    assert torch.equal(load.load_text_encoder(folder).encode_from_tokens(tokens), result)


# --- tokens ----------------------------------------------------------------------------------------------------------

AWKWARD = [
    "",
    " ",
    "a",
    "Hello,  world!\n\n\ttabs",
    "\U0001f408‍\U0001f3a9 emoji \U0001f1eb\U0001f1f7",
    "[INST] not [/INST] </s> <pad>",
    "[IMG]cat[IMG]",
    "שלום عالم right-to-left",
    "日本語の文章。",
    "don't can't WE'LL 12345.678",
    "é e\u0301 \u00a0\u200b",
    "structured responses " * 300,
]


@pytest.fixture(scope="module")
def small_clip(load, small_models):
    return load.load_text_encoder(small_models["text_encoder"])


@pytest.mark.parametrize("prompt", AWKWARD)
def test_tokens_agree_with_transformers(small_clip, tmp_path, prompt):
    """The reference drops [IMG], fills the chat template and lets Mistral's tekken converter of transformers
    tokenise.
    """
    mistral = pytest.importorskip("transformers.integrations.mistral")
    if not hasattr(mistral, "tokenizer"):
        pytest.skip("this transformers has no tekken converter that reads a file")
    (tmp_path / "tekken.json").write_bytes(maker.tekken())
    reference = mistral.tokenizer.MistralConverter(str(tmp_path / "tekken.json")).converted()
    text = small_clip.tokenizer.llama_template.format(prompt.replace("[IMG]", ""))
    assert ids_of(small_clip.tokenize(prompt))[0].tolist() == [1] + reference.encode(text).ids


def test_template_is_that_of_diffusers(small_clip):
    from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE

    assert small_clip.tokenizer.llama_template == f"[SYSTEM_PROMPT]{SYSTEM_MESSAGE}[/SYSTEM_PROMPT][INST]{{}}[/INST]"


# --- VAE against diffusers
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def diffusers_vae(tmp_path_factory):
    """diffusers' autoencoder with random weights and lively statistics, and its folder."""
    from diffusers import AutoencoderKLFlux2

    torch.manual_seed(4)
    vae = AutoencoderKLFlux2(decoder_block_out_channels=(32, 64, 128, 128)).eval()
    vae.bn.running_mean.uniform_(-0.1, 0.1)
    vae.bn.running_var.uniform_(0.5, 1.5)
    folder = tmp_path_factory.mktemp("vae") / "vae"
    vae.save_pretrained(folder)
    return vae, folder


def test_vae_agrees_with_diffusers(load, diffusers_vae):
    reference, folder = diffusers_vae
    vae = load.load_vae(folder, "fp32")
    picture = torch.rand(1, 64, 96, 3, generator=torch.Generator().manual_seed(5))
    moments = reference.encode(picture.movedim(-1, 1) * 2 - 1).latent_dist.mode()  # (1, 32, 8, 12)
    folded = torch.nn.functional.pixel_unshuffle(moments, 2)  # (1, 128, 4, 6)
    mean, std = (
        reference.bn.running_mean.view(1, -1, 1, 1),
        (reference.bn.running_var + reference.config.batch_norm_eps).sqrt().view(1, -1, 1, 1),
    )
    expected = (folded - mean) / std
    assert relative_error(vae.encode(picture), expected) <= 1e-5
    decoded = reference.decode(torch.nn.functional.pixel_shuffle(expected * std + mean, 2)).sample
    assert relative_error(vae.decode(expected), ((decoded + 1) / 2).clamp(0, 1).movedim(1, -1)) <= 1e-5


def test_tiles_of_any_size_give_nearly_the_whole_picture(load, diffusers_vae):
    """Core's VAE Decode (Tiled) on our VAE: sizes in pixels, a multiple of the 16 pixels of one latent place; one tile
    is the whole.
    """
    from nodes import VAEDecodeTiled

    vae = load.load_vae(diffusers_vae[1], "fp32")
    latent = {"samples": torch.randn(1, 128, 12, 16, generator=torch.Generator().manual_seed(5))}
    whole = vae.decode(latent["samples"].clone())
    errors = [
        relative_error(VAEDecodeTiled().decode(vae, latent, size, overlap)[0], whole)
        for size, overlap in ((512, 64), (128, 32))
    ]
    assert errors[0] <= 1e-5 and errors[1] < 0.3


# --- LoRA ------------------------------------------------------------------------------------------------------------

DIFFUSERS_LAYERS = {  # diffusers' module -> shape of its weight
    "transformer_blocks.0.attn.to_q": (256, 256),
    "transformer_blocks.0.attn.to_v": (256, 256),
    "transformer_blocks.1.attn.add_k_proj": (256, 256),
    "transformer_blocks.1.attn.to_out.0": (256, 256),
    "transformer_blocks.0.ff.linear_in": (1536, 256),
    "transformer_blocks.0.ff_context.linear_out": (256, 768),
    "single_transformer_blocks.2.attn.to_qkv_mlp_proj": (2304, 256),
    "single_transformer_blocks.3.attn.to_out": (256, 1024),
}
ORIGINAL_LAYERS = {
    "double_blocks.0.img_attn.qkv": (768, 256),
    "double_blocks.1.txt_attn.proj": (256, 256),
    "double_blocks.0.txt_mlp.0": (1536, 256),
    "single_blocks.1.linear1": (2304, 256),
    "single_blocks.2.linear2": (256, 1024),
}


def low_rank(name, shape, rank=4):
    """(down, up), seeded by the name."""
    w = maker.Weights(name, torch.float32)
    w.linear("down", rank, shape[1])
    w.linear("up", shape[0], rank)
    return w.tensors["down.weight"], w.tensors["up.weight"]


def pair(prefix, down, up, names=("lora_down", "lora_up")):
    return {f"{prefix}.{names[0]}.weight": down, f"{prefix}.{names[1]}.weight": up}


LAYOUTS = {  # layout -> (layers, tensors of one layer)
    "diffusers": (DIFFUSERS_LAYERS, lambda name, down, up: pair(f"transformer.{name}", down, up, ("lora_A", "lora_B"))),
    "lycoris": (DIFFUSERS_LAYERS, lambda name, down, up: pair(f"lycoris_{name.replace('.', '_')}", down, up)),
    "kohya": (
        ORIGINAL_LAYERS,
        lambda name, down, up: (
            pair(f"lora_unet_{name.replace('.', '_')}", down, up)
            | {f"lora_unet_{name.replace('.', '_')}.alpha": torch.tensor(float(len(down)))}
        ),
    ),
    "original": (
        ORIGINAL_LAYERS,
        lambda name, down, up: pair(f"diffusion_model.{name}", down, up, ("lora_A", "lora_B")),
    ),
}


def lora_result(load, original, lora):
    """Output of our MODEL with a LoRA applied by ComfyUI's ordinary path, and the inputs it was given."""
    import comfy.sd

    model, _ = comfy.sd.load_lora_for_models(load.load_model(original), None, lora, 1.0, 0.0)
    model.patch_model()
    generator = torch.Generator().manual_seed(6)
    latent, prompt = torch.randn(1, 128, 4, 4, generator=generator), torch.randn(1, 9, 192, generator=generator)
    sigma, guidance = torch.tensor([0.3]), torch.tensor([4.0])
    return model.model.diffusion_model(latent, sigma, prompt, guidance=guidance), ([latent], prompt, sigma, guidance)


def add_to_reference(reference, original, changes):
    """Add weight changes to diffusers' model; those in original names go through diffusers' own converter."""
    from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers
    from safetensors.torch import load_file

    if set(changes) <= set(DIFFUSERS_LAYERS):
        for name, change in changes.items():
            reference.get_submodule(name).weight += change
        return
    weights = load_file(original)
    for name, change in changes.items():
        weights[f"{name}.weight"] += change
    reference.load_state_dict(convert_flux2_transformer_checkpoint_to_diffusers(weights))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lora_gives_what_diffusers_gives(load, dev, layout):
    """diffusers merges a LoRA as weight + up @ down."""
    original, reference = dev[0], copy.deepcopy(dev[1])
    layers, write = LAYOUTS[layout]
    factors = {name: low_rank(name, shape) for name, shape in layers.items()}
    result, inputs = lora_result(
        load, original, {key: value for name, pair in factors.items() for key, value in write(name, *pair).items()}
    )
    before = run_diffusers(reference, *inputs)
    add_to_reference(reference, original, {name: up @ down for name, (down, up) in factors.items()})
    assert relative_error(result, run_diffusers(reference, *inputs)) <= 1e-5 < relative_error(result, before)


def test_lokr_gives_the_kronecker_product(load, dev):
    original, reference = dev[0], copy.deepcopy(dev[1])
    factors = {}
    for name, (rows, columns) in DIFFUSERS_LAYERS.items():
        w = maker.Weights(name, torch.float32)
        w.linear("w1", 4, 4)
        w.linear("w2", rows // 4, columns // 4)
        factors[name] = w.tensors["w1.weight"], w.tensors["w2.weight"]
    lora = {
        f"lycoris_{name.replace('.', '_')}.lokr_w{number}": value
        for name, pair in factors.items()
        for number, value in enumerate(pair, 1)
    }
    result, inputs = lora_result(load, original, lora)
    add_to_reference(reference, original, {name: torch.kron(*pair) for name, pair in factors.items()})
    assert relative_error(result, run_diffusers(reference, *inputs)) <= 1e-5


# --- the reference's padding, and the whole pipeline
# --------------------------------------------------------------------


def test_reference_padding_is_what_transformers_has_there(load, tmp_path):
    """transformers with 512 tokens, padded on the left behind its attention mask."""
    weights = mistral_40()
    clip = load.load_text_encoder(maker.write(tmp_path / "mistral.safetensors", weights), padding="reference")
    tokens = clip.tokenize(PROMPT)
    ids = ids_of(tokens)
    padded = torch.nn.functional.pad(ids, (512 - ids.shape[1], 0), value=11)
    states = transformers_mistral(weights)(
        padded, attention_mask=(padded != 11).long(), output_hidden_states=True
    ).hidden_states
    expected = torch.cat([states[tap] for tap in (10, 20, 30)], dim=-1)
    result = clip.encode_from_tokens(tokens)
    assert result.shape == (1, 512, 192)
    assert relative_error(result, expected) <= 1e-5
    assert load.load_text_encoder(tmp_path / "mistral.safetensors").encode_from_tokens(tokens).shape == (
        1,
        ids.shape[1],
        192,
    )


def test_long_prompts_are_cut_with_the_reference_s_padding_alone(load, small_models, caplog):
    """Their tokens agree with diffusers over the server (test_reference); core passes them on whole."""
    clips = {
        padding: load.load_text_encoder(small_models["text_encoder"], padding=padding) for padding in load.PADDINGS
    }
    tokens = clips["zeros"].tokenize("structured responses " * 300)
    whole, cut = (clip.encode_from_tokens(tokens) for clip in clips.values())
    assert whole.shape[1] == ids_of(tokens).shape[1] > 512 == cut.shape[1]
    assert relative_error(cut, whole[:, :512]) <= 1e-5  # a causal model: what follows changes nothing before it
    assert f"has {whole.shape[1]} tokens" in caplog.text and "first 512" in caplog.text


def test_klein_prompts_are_cut_too(load, tmp_path):
    file = maker.write(tmp_path / "qwen.safetensors", small_qwen(layers=27))
    clips = [load.load_text_encoder(file, padding=padding) for padding in load.PADDINGS]
    lengths = [
        [clip.encode_from_tokens(clip.tokenize(prompt)).shape[1] for clip in clips]
        for prompt in (PROMPT, "word " * 600)
    ]
    assert lengths[0] == [512, 512] and lengths[1][0] > 600 and lengths[1][1] == 512


@pytest.mark.parametrize("references", [0, 1])
def test_sampled_latents_agree_with_the_pipeline_of_diffusers(load, dev, diffusers_vae, references):
    """The same noise, sigmas, prompt and reference picture through ComfyUI's sampler and through Flux2Pipeline, text
    padded with zeros in both.
    """
    import comfy.samplers
    import node_helpers
    import numpy
    from PIL import Image
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2Pipeline

    original, transformer = dev
    vae, folder = diffusers_vae
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False)
    pipeline = Flux2Pipeline(scheduler=scheduler, vae=vae, text_encoder=None, tokenizer=None, transformer=transformer)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(8)
    prompt = torch.randn(1, 30, 192, generator=generator)
    noise = torch.randn(1, 128, 6, 6, generator=generator)
    sigmas = torch.tensor([1.0, 0.8, 0.5, 0.2, 0.0])
    pictures = [numpy.random.default_rng(9).integers(0, 255, (96, 96, 3), dtype=numpy.uint8) for _ in range(references)]
    expected = pipeline(
        image=[Image.fromarray(picture) for picture in pictures] or None,
        prompt_embeds=torch.nn.functional.pad(prompt, (0, 0, 512 - 30, 0)),
        latents=noise.clone(),
        height=96,
        width=96,
        sigmas=sigmas[:-1].tolist(),
        num_inference_steps=4,
        guidance_scale=4.0,
        output_type="latent",
    ).images
    conditioning = [[prompt, {"guidance": 4.0}]]
    if references:
        encoded = load.load_vae(folder, "fp32").encode(torch.from_numpy(pictures[0]).float()[None] / 255)
        conditioning = node_helpers.conditioning_set_values(conditioning, {"reference_latents": [encoded]}, append=True)
    model = load.load_model(original)
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(conditioning, conditioning)
    guider.set_cfg(1.0)
    result = guider.sample(
        noise, torch.zeros_like(noise), comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True, seed=0
    )
    # The pipeline returns its tokens (1, S, 128). It goes through timesteps of a thousandth and back, and ComfyUI
    # through the denoised picture at each step: four steps measure 8e-6 apart, where one forward pass is 2e-7.
    assert relative_error(result.flatten(2).transpose(1, 2), expected) <= 4e-5
