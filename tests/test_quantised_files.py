"""Quantised checkpoints: every format that the installed ComfyUI computes loads and gives what its numbers stand for,
files of other tools are converted or refused by name, and conversions account for every tensor.

The oracle is the same model loaded from the dequantised weights (comfy-kitchen's own dequantisation), in float32. Not
covered: products in low precision on a GPU.
"""

import json

import pytest
import torch

import small_models as maker
from pack import ROOT
from flux2_pack.flux2.checkpoints import identify, keys, quantisation, validate, variants
from flux2_pack.flux2.checkpoints.header import CheckpointError, open_checkpoint

LAYERS = ("single_blocks.0.linear1", "double_blocks.1.img_mlp.0", "double_blocks.0.txt_attn.qkv")


@pytest.fixture(scope="module")
def load(comfy):
    from flux2_pack.flux2.loading import load

    return load


@pytest.fixture(scope="module")
def examine(comfy):
    from flux2_pack.flux2.loading import examine

    return examine


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


FORMATS = {
    "fp8": ("float8_e4m3fn", {"scale": "recalculate"}, {}),
    "fp8 e5m2": ("float8_e5m2", {"scale": "recalculate"}, {}),
    "nvfp4": ("nvfp4", {}, {}),
    "mxfp8": ("mxfp8", {}, {}),
    "int8": ("int8_tensorwise", {}, {}),
    "int8 a scale for each row": ("int8_tensorwise", {"per_channel": True}, {}),
    "int8 ConvRot": (
        "int8_tensorwise",
        {"per_channel": True, "convrot": True, "convrot_groupsize": 64},
        {"convrot": True, "convrot_groupsize": 64},
    ),
    "w4a4": ("convrot_w4a4", {"convrot_groupsize": 64}, {"convrot_groupsize": 64}),
    # ComfyUI 0.33 and newer
    "w4a8": ("asym_w4a8_int8", {"convrot_groupsize": 64}, {"convrot_groupsize": 64, "group_size": 16}),
}


def quantise(weights, layers, case, prefix=""):
    """(weights with `layers` quantised, their dequantised twin, marks)."""
    import comfy.quant_ops

    name, options, mark = FORMATS[case]
    if name not in comfy.quant_ops.QUANT_ALGOS:
        pytest.skip(f"this ComfyUI does not know {name}")
    layout = comfy.quant_ops.get_layout_class(comfy.quant_ops.QUANT_ALGOS[name]["comfy_tensor_layout"])
    weights, plain, marks = dict(weights), dict(weights), {}
    for layer in layers:
        weight = weights.pop(f"{layer}.weight").float()
        data, params = layout.quantize(weight, **options)
        tensors = layout.state_dict_tensors(data, params)
        for ending, tensor in tensors.items():
            weights[f"{layer}.weight{ending}"] = tensor.contiguous()
        rows, columns = weight.shape
        plain[f"{layer}.weight"] = layout.dequantize(data, params)[:rows, :columns].to(weight.dtype)
        marks[prefix + layer] = {"format": name, **mark}
    return weights, plain, marks


def predicted(load, path):
    generator = torch.Generator().manual_seed(3)
    latent, context = torch.randn(1, 128, 4, 4, generator=generator), torch.randn(1, 9, 192, generator=generator)
    model = load.load_model(str(path)).model.diffusion_model
    return model(latent, torch.tensor([0.5]), context, guidance=torch.tensor([4.0])).float()


def error(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("case", FORMATS)
@pytest.mark.parametrize("marked_by", ["metadata", "tensors"])
def test_every_format_gives_what_its_numbers_stand_for(load, examine, tmp_path, case, marked_by):
    weights, plain, marks = quantise(maker.diffusion_model(dtype=torch.float32), LAYERS, case)
    metadata = {"_quantization_metadata": json.dumps({"layers": marks})} if marked_by == "metadata" else None
    for layer, mark in marks.items() if marked_by == "tensors" else ():
        weights[f"{layer}.comfy_quant"] = torch.frombuffer(bytearray(json.dumps(mark).encode()), dtype=torch.uint8)
    path = maker.write(tmp_path / "quantised.safetensors", weights, metadata)
    found, plainly = (predicted(load, file) for file in (path, maker.write(tmp_path / "plain.safetensors", plain)))
    # what is multiplied in low precision also quantises its input: fp8 and nvfp4 on a CPU do
    assert error(found, plainly) < (0.12 if case in ("nvfp4", "fp8 e5m2", "w4a4") else 0.05)
    text = examine.describe_path(str(path))
    words = quantisation.words(next(iter(marks.values())))
    assert f"{words} in 3 layers" in text and f", {words}: " in text and "refuses" not in text


def test_int8_scales_in_one_row_are_those_of_the_rows(load, tmp_path):
    """Stored as (rows,) they would scale the columns wherever weights are widened, as behind a LoRA."""
    weights, plain, marks = quantise(maker.diffusion_model(dtype=torch.float32), LAYERS, "int8 a scale for each row")
    for layer in LAYERS:
        weights[f"{layer}.weight_scale"] = weights[f"{layer}.weight_scale"].reshape(-1)
    text = {"_quantization_metadata": json.dumps({"layers": marks})}
    model = load.load_model(str(maker.write(tmp_path / "x.safetensors", weights, text)))
    for layer in LAYERS:
        weight = model.model.diffusion_model.get_submodule(layer).weight
        assert error(weight.dequantize().float(), plain[f"{layer}.weight"]) < 0.01


@pytest.mark.parametrize("case", ["fp8", "int8", "int8 a scale for each row"])
@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "transformer.", "model.diffusion_model."])
def test_every_prefix_of_a_quantised_file_is_stripped(load, tmp_path, case, prefix):
    weights, plain, marks = quantise(maker.diffusion_model(dtype=torch.float32), LAYERS, case)
    named = {prefix + name: value for name, value in weights.items()}
    text = json.dumps({"layers": marks})  # without the prefix, as ComfyUI writes it
    path = maker.write(tmp_path / "quantised.safetensors", named, {"_quantization_metadata": text})
    assert identify.number_format(open_checkpoint(path))[0].startswith("mixed precision: ")
    twin = maker.write(tmp_path / "plain.safetensors", {prefix + name: value for name, value in plain.items()})
    assert error(predicted(load, path), predicted(load, twin)) < 0.05


def in_diffusers_keys(weights):
    """The small model in diffusers' keys."""
    variant = identify.identify(open_checkpoint(weights)).variant
    from safetensors.torch import load_file

    ours, theirs = load_file(weights), {}
    for name, source in keys.model_sources(variant).items():
        value = ours[name] if name in ours else ours[name.replace("_norm.weight", "_norm.scale")]
        if source.how == keys.SWAP_HALVES:
            value = torch.cat(value.chunk(2)[::-1])
        for part, piece in zip(source.names, value.chunk(len(source.names))):
            theirs[part] = piece.clone()
    return theirs


DIFFUSERS_LAYERS = (
    "single_transformer_blocks.0.attn.to_qkv_mlp_proj",
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.0.attn.to_k",
    "transformer_blocks.0.attn.to_v",
    "norm_out.linear",
)


@pytest.mark.parametrize("case", ["int8", "int8 a scale for each row"])
@pytest.mark.parametrize("described", [True, False])
def test_int8_in_diffusers_keys_is_converted_while_loading(load, examine, tmp_path, case, described):
    """Files of vistralis' kind: int8 with a scale for each row or tensor, diffusers' keys, and no word about it."""
    original = maker.write(tmp_path / "ours.safetensors", maker.diffusion_model(dtype=torch.float32))
    weights, plain, marks = quantise(in_diffusers_keys(original), DIFFUSERS_LAYERS, case)
    metadata = {"_quantization_metadata": json.dumps({"layers": marks})} if described else None
    path = maker.write(tmp_path / "int8.safetensors", weights, metadata)
    twin = maker.write(tmp_path / "plain.safetensors", plain)
    assert error(predicted(load, path), predicted(load, twin)) < 0.05
    said = "taken as they are, without a rotation" in examine.describe_path(str(path))
    assert said != described


def test_a_rotation_that_is_not_described_is_refused(load, tmp_path):
    """Files of solphor's kind: the name speaks of a rotation, the scales do not."""
    original = maker.write(tmp_path / "ours.safetensors", maker.diffusion_model(dtype=torch.float32))
    weights, _, _ = quantise(in_diffusers_keys(original), DIFFUSERS_LAYERS, "int8 a scale for each row")
    path = maker.write(tmp_path / "Flux2-INT8-Convrot.safetensors", weights)
    with pytest.raises(
        CheckpointError, match="quantised with scales that no ComfyUI metadata describes, and with a rot"
    ):
        load.load_model(str(path))


def test_parts_that_cannot_be_joined_are_refused(load, tmp_path):
    """fp8 has one scale for a layer: q, k and v with one each cannot become one weight."""
    original = maker.write(tmp_path / "ours.safetensors", maker.diffusion_model(dtype=torch.float32))
    weights, _, marks = quantise(in_diffusers_keys(original), DIFFUSERS_LAYERS, "fp8")
    text = {"_quantization_metadata": json.dumps({"layers": marks})}
    with pytest.raises(CheckpointError, match="transformer_blocks.0.attn.to_q .*cannot be joined to one"):
        load.load_model(str(maker.write(tmp_path / "fp8.safetensors", weights, text)))


def test_a_conversion_accounts_for_every_tensor(load, tmp_path):
    original = maker.write(tmp_path / "ours.safetensors", maker.diffusion_model(dtype=torch.float32))
    weights = in_diffusers_keys(original) | {"transformer_blocks.0.attn.to_q.input_offset": torch.zeros(1)}
    with pytest.raises(CheckpointError, match="1 of its tensors have no place in the model, such as .*input_offset"):
        load.load_model(str(maker.write(tmp_path / "x.safetensors", weights)))


# --- text encoders ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["fp8", "int8", "int8 a scale for each row"])
def test_a_quantised_embedding_is_read(load, tmp_path, case):
    layers = ("model.embed_tokens", "model.layers.0.mlp.up_proj")
    weights, plain, marks = quantise(maker.text_encoder(dtype=torch.float32), layers, case)
    text = {"_quantization_metadata": json.dumps({"layers": marks})}
    clips = [
        load.load_text_encoder(str(maker.write(tmp_path / name, *content)))
        for name, content in {"q.safetensors": (weights, text), "plain.safetensors": (plain,)}.items()
    ]
    a, b = (clip.encode_from_tokens(clip.tokenize("a cat with a hat")) for clip in clips)
    assert error(a, b) < 0.02


def test_an_embedding_in_groups_is_refused(load, tmp_path):
    weights, _, marks = quantise(maker.text_encoder(dtype=torch.float32), ("model.embed_tokens",), "mxfp8")
    text = {"_quantization_metadata": json.dumps({"layers": marks})}
    with pytest.raises(
        CheckpointError, match="an embedding quantised as mxfp8, of which ComfyUI cannot read single rows"
    ):
        load.load_text_encoder(str(maker.write(tmp_path / "x.safetensors", weights, text)))


# --- other number formats, other quantisers --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fnuz, torch.float8_e5m2fnuz])
def test_the_formats_of_the_installed_safetensors_are_known(load, tmp_path, dtype):
    weights = maker.diffusion_model(dtype=torch.float32)
    small = {name: value.to(dtype).float() if value.ndim == 2 else value for name, value in weights.items()}
    stored = {name: value.to(dtype) if value.ndim == 2 else value for name, value in weights.items()}
    found, expected = (
        predicted(load, maker.write(tmp_path / f"{number}.safetensors", content))
        for number, content in enumerate((stored, small))
    )
    assert error(found, expected) < 0.02


OTHERS = {
    "bitsandbytes": {"single_blocks.0.linear1.SCB": torch.zeros(4)},
    "quanto": {
        "single_blocks.0.linear1.weight._data": torch.zeros(4),
        "single_blocks.0.linear1.weight._scale": torch.zeros(1),
    },
    "SDNQ": {"single_blocks.0.linear1.svd_up": torch.zeros(4)},
    "compressed-tensors": {"single_blocks.0.linear1.weight_packed": torch.zeros(4)},
}


@pytest.mark.parametrize("who", OTHERS)
def test_other_quantisers_are_called_by_name(load, tmp_path, who):
    path = maker.write(tmp_path / "x.safetensors", maker.diffusion_model() | OTHERS[who])
    with pytest.raises(CheckpointError, match=f"quantised by {who}.*use the bf16 file") as said:
        load.load_model(str(path))
    assert "amaged" not in str(said.value)


def test_a_quantiser_that_only_config_json_names_is_called_by_it(load, tmp_path):
    original = maker.write(tmp_path / "ours.safetensors", maker.diffusion_model())
    maker.write(tmp_path / "folder" / "diffusion_pytorch_model.safetensors", in_diffusers_keys(original))
    (tmp_path / "folder" / "config.json").write_text('{"quantization_config": {"quant_method": "torchao"}}')
    with pytest.raises(CheckpointError, match="quantised by torchao, as its config.json says"):
        load.load_model(str(tmp_path / "folder"))


def test_packed_weights_are_counted_in_numbers(examine, tmp_path):
    """A text projection of 4 bits is half as wide in the file as the prompts that it reads."""
    weights, _, marks = quantise(maker.diffusion_model(dtype=torch.float32), ("txt_in",), "nvfp4")
    text = {"_quantization_metadata": json.dumps({"layers": marks})}
    path = maker.write(tmp_path / "x.safetensors", weights, text)
    assert weights["txt_in.weight"].shape[1] == 96
    assert identify.identify(open_checkpoint(path)).variant.text_width == 192


# --- VAE and Qwen3-VL ------------------------------------------------------------------------------------------------


def test_a_decoder_alone_decodes_and_says_that_it_cannot_encode(load, tmp_path):
    whole = maker.vae()
    half = {name: value for name, value in whole.items() if not name.startswith("encoder.")}
    assert len(half) < len(whole)
    a, b = (
        load.load_vae(str(maker.write(tmp_path / name, weights)), "fp32")
        for name, weights in {"whole.safetensors": whole, "half.safetensors": half}.items()
    )
    latent = torch.randn(1, 128, 4, 4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(a.decode(latent.clone()), b.decode(latent.clone()))
    with pytest.raises(CheckpointError, match="has a decoder alone"):
        b.encode(torch.zeros(1, 64, 64, 3))


@pytest.mark.parametrize("where", ["file", "folder"])
@pytest.mark.parametrize("sees", [False, True])
def test_the_rotary_base_is_the_models_own_and_is_said(load, examine, tmp_path, where, sees):
    from test_loaders import small_qwen

    weights = small_qwen()
    if sees:
        weights = {name.replace("model.", "model.language_model.", 1): value for name, value in weights.items()}
        weights["model.visual.patch_embed.proj.weight"] = torch.zeros(4, 3, 2, 2)
    path = maker.write(tmp_path / "qwen" / "model.safetensors", weights)
    if where == "folder":
        (tmp_path / "qwen" / "config.json").write_text(json.dumps({"rope_theta": 7e6}))
        path = tmp_path / "qwen"
    base = 7e6 if where == "folder" else 5e6 if sees else 1e6
    clip = load.load_text_encoder(str(path))
    text = examine.describe_path(str(path))
    assert clip.cond_stage_model.qwen3_4b.transformer.model.config.rope_theta == base
    assert f"Rotary base: {base:.0f}" in text and ("Qwen3-VL" in text) == sees


def test_a_cut_encoder_refuses_to_write(load, small_models):
    clip = load.load_text_encoder(str(small_models["text_encoder"]))
    with pytest.raises(CheckpointError, match="cannot write text. Load the same file with the node Load CLIP"):
        clip.generate(clip.tokenize("a cat"), max_length=2)


# --- VRAM ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room, said", [(80 * 2**30, "it fits"), (2**20, "does not fit whole")])
def test_model_info_says_what_a_run_needs(examine, small_models, monkeypatch, room, said):
    import comfy.model_management as management

    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(management, "get_torch_device", lambda: gpu)
    monkeypatch.setattr(management, "is_device_cpu", lambda device: False)
    monkeypatch.setattr(management, "get_total_memory", lambda device=None: room)
    monkeypatch.setattr(management, "unet_dtype", lambda **options: torch.bfloat16)
    monkeypatch.setattr(management, "unet_manual_cast", lambda *options: None)
    text = examine.describe_path(str(small_models["model"]))
    assert "VRAM at 1024 x 1024: " in text and said in text


def results(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


@pytest.mark.parametrize(
    "cases, sizes", [(("fp8-1024", "fp8-2048"), (1024, 2048)), (("bf16-1024-ref1", "bf16-2048"), ((1024, 1), 2048))]
)
def test_the_working_memory_is_what_was_measured(examine, cases, sizes):
    """Peaks of ComfyUI's own model at two sizes, with the same weights: their difference, within 3 %."""
    peaks = {
        case["name"]: row["peak_gib"] * 2**30
        for case in results("step-h200")["cases"]
        for row in case["rows"]
        if row["peer"] == "core"
    }
    side, references = sizes[0] if isinstance(sizes[0], tuple) else (sizes[0], 0)
    small = examine.working_memory(6144, side, side, references)
    more = examine.working_memory(6144, sizes[1], sizes[1]) - small
    assert peaks[cases[1]] - peaks[cases[0]] == pytest.approx(more, rel=0.03)


def test_what_is_beside_a_step_is_what_was_measured(examine):
    """The whole card during 8 steps at 1024 x 1024, of a model of 3.0 GiB and width 3072: within 5 %."""
    for case in results("memory-h200")["cases"]:
        if case["name"] != "layer by layer":
            taken = case["gib_during"] * 2**30 - case["gib_before"] * 2**30
            reckoned = 3.0 * 2**30 + examine.working_memory(3072, 1024, 1024) + examine.BESIDE
            assert taken == pytest.approx(reckoned, rel=0.05)


# --- formats of newer versions of ComfyUI -----------------------------------------------------------------------------


def w4a8_file(path, **changes):
    """A file of w4a8 in one layer, by its header alone: what ComfyUI 0.33 reads. changes: tensors by ending."""
    weights, layer = maker.diffusion_model(), LAYERS[0]
    rows, columns = weights.pop(f"{layer}.weight").shape
    parts = {
        "weight": torch.zeros(rows, columns // 2, dtype=torch.int8),
        "weight_s_rel": torch.zeros(rows, columns // 16, dtype=torch.float8_e4m3fn),
        "weight_s_channel": torch.ones(rows),
        "weight_codebook": torch.zeros(16),
    } | changes
    weights |= {f"{layer}.{ending}": tensor for ending, tensor in parts.items() if tensor is not None}
    mark = {"format": "asym_w4a8_int8", "group_size": 16, "convrot_groupsize": 64}
    return maker.write(path, weights, {"_quantization_metadata": json.dumps({"layers": {layer: mark}})})


@pytest.mark.parametrize("kind, version", [("asym_w4a8_int8", "0.33"), ("awq_w4a16", "0.38")])
def test_a_format_of_a_newer_comfyui_is_named_with_its_version(load, examine, tmp_path, monkeypatch, kind, version):
    """By what the installed ComfyUI says that it computes, not by its version number."""
    import comfy.quant_ops

    weights = maker.diffusion_model()
    weights[f"{LAYERS[0]}.weight"] = torch.zeros(2304, 128, dtype=torch.int8)
    text = {"_quantization_metadata": json.dumps({"layers": {LAYERS[0]: {"format": kind}}})}
    file = maker.write(tmp_path / "newer.safetensors", weights, text)
    older = {name: row for name, row in comfy.quant_ops.QUANT_ALGOS.items() if name != kind}
    monkeypatch.setattr(comfy.quant_ops, "QUANT_ALGOS", older)
    with pytest.raises(CheckpointError, match=f"quantised as {kind}, .*ComfyUI {version} or newer computes it"):
        load.load_model(str(file))
    said = examine.describe_path(str(file))
    assert quantisation.FORMATS[kind].words in said and "refuses it" in said and f"ComfyUI {version}" in said


W4A8_FAULTS = {
    "scales of other groups": ({"weight_s_rel": torch.zeros(2304, 8, dtype=torch.float8_e4m3fn)}, "share a scale"),
    "no scales of groups": ({"weight_s_rel": None}, "without weight_s_rel"),
    "no scales of rows": ({"weight_s_channel": None}, "without weight_s_channel"),
    "too few codes": ({"weight_codebook": torch.zeros(15)}, "15 numbers in F32 as weight_codebook"),
    "numbers off centre": ({"weight_correction": torch.zeros(16, 2304)}, "weight_correction., which ComfyUI does not"),
    "not packed": ({"weight": torch.zeros(2304, 256, dtype=torch.int8)}, "is no int4 ConvRot with int8 products"),
}


@pytest.mark.parametrize("fault", W4A8_FAULTS)
def test_a_damaged_w4a8_file_is_refused_before_comfyui_reads_it(examine, tmp_path, fault):
    """A stand-in for a core that computes it: by the table alone, for the layout is checked by the header."""
    changes, words = W4A8_FAULTS[fault]
    checkpoint = open_checkpoint(w4a8_file(tmp_path / "x.safetensors", **changes))
    found = identify.expect(checkpoint, identify.MODEL)
    with pytest.raises(CheckpointError, match=words):
        validate.check_model(checkpoint, found, "as stored")


def test_a_whole_w4a8_file_passes_the_checks(tmp_path):
    checkpoint = open_checkpoint(w4a8_file(tmp_path / "x.safetensors"))
    validate.check_model(checkpoint, identify.expect(checkpoint, identify.MODEL), "as stored")
    assert "int4 ConvRot with int8 products (w4a8) in 1 layers" in identify.number_format(checkpoint)[0]
