"""The number format in which a text encoder computes: how far bf16 and float32 are from transformers and from each
other, what the difference does to a latent, that padding is hidden as ComfyUI's mask hides it, and that kept prompts
know the format.

transformers computes the same weights in float32 and in bf16 on the CPU. Not covered here: full width and speed
(benchmarks/klein.py).
"""

import pytest
import torch

import small_models as maker
from test_loaders import PROMPT, ids_of, mistral_40, relative_error, small_qwen, transformers_mistral

KINDS = {"mistral3": ((10, 20, 30), 11), "qwen3-4b": ((9, 18, 27), 151643)}


@pytest.fixture(scope="module")
def load(comfy):
    from flux2_pack.flux2.loading import load

    return load


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory):
    """(name, path of a small encoder, its weights)."""
    weights = mistral_40() if request.param == "mistral3" else small_qwen()
    path = maker.write(tmp_path_factory.mktemp(request.param) / "encoder.safetensors", weights)
    return request.param, path, weights


def transformers_qwen(weights):
    from transformers import Qwen3Config, Qwen3Model

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
    model = Qwen3Model(config).eval()
    model.load_state_dict({name.removeprefix("model."): value for name, value in weights.items()})
    return model


def reference_states(name, weights, tokens, dtype):
    """What transformers has at FLUX.2's layers, (1, T, 3 * 64) float32, padding behind its attention mask."""
    taps, pad = KINDS[name]
    model = (transformers_mistral if name == "mistral3" else transformers_qwen)(weights).to(dtype)
    ids = ids_of(tokens)
    states = model(ids, attention_mask=(ids != pad).long(), output_hidden_states=True).hidden_states
    return torch.cat([states[tap] for tap in taps], dim=-1).float()


def test_both_formats_agree_with_transformers(load, kind):
    name, path, weights = kind
    exact, rounded = (load.load_text_encoder(path, precision=precision) for precision in ("float32", "bf16"))
    tokens = exact.tokenize(PROMPT)
    states = {dtype: reference_states(name, weights, tokens, dtype) for dtype in (torch.float32, torch.bfloat16)}
    result = rounded.encode_from_tokens(tokens)
    assert relative_error(exact.encode_from_tokens(tokens), states[torch.float32]) <= 1e-5
    assert result.dtype == torch.float32, "the conditioning is of ComfyUI's type"
    theirs = relative_error(states[torch.bfloat16], states[torch.float32])
    ours = relative_error(result, states[torch.float32])
    assert 0 < ours <= 1.2 * theirs, f"bf16 here is {ours:.1e} from float32, in transformers {theirs:.1e}"


def test_auto_is_float32_where_bf16_is_not_native(load, kind, monkeypatch):
    import comfy.model_management
    from flux2_pack.flux2.loading import encoder_precision

    _, path, _ = kind
    clips = [load.load_text_encoder(path, precision=precision) for precision in ("auto", "float32")]
    tokens = clips[0].tokenize(PROMPT)
    assert torch.equal(*(clip.encode_from_tokens(tokens) for clip in clips))
    cpu = torch.device("cpu")
    assert [encoder_precision.resolved(name, cpu) for name in ("auto", "bf16")] == ["float32", "bf16"]
    monkeypatch.setattr(comfy.model_management, "should_use_bf16", lambda device: device.type == "cuda")
    assert encoder_precision.resolved("auto", torch.device("cuda")) == "bf16"


def masked_by_comfyui(clip, name):
    """The same clip, whose layers compute with ComfyUI's mask."""
    from flux2_pack.flux2.loading import encoder_attention

    for layer in encoder_attention.attention_layers(getattr(clip.cond_stage_model, name)):
        layer._forward_pre_hooks.clear()
        layer._forward_pre_hooks_with_kwargs.clear()
    return clip


@pytest.mark.parametrize("prompt", ["", PROMPT, "word " * 600, f"{PROMPT}<|endoftext|> more"])
def test_two_calls_without_a_mask_are_comfyuis_mask(load, kind, prompt, monkeypatch):
    """In float32, where nothing hides behind rounding: the padding, behind the prompt and in the middle of it."""
    from flux2_pack.flux2.loading import encoder_precision
    from flux2_pack.flux2.loading.encoder_families import FAMILIES

    name, path, _ = kind
    passes = []

    def begin_in_float32(self, module, args, kwargs):
        self.length = kwargs["num_tokens"][0] if self.padded_behind and kwargs["num_tokens"][0] else None
        passes.append((self, self.length))

    monkeypatch.setattr(encoder_precision.Pass, "begin", begin_in_float32)
    clip = load.load_text_encoder(path, precision="bf16")
    tokens = clip.tokenize(prompt)
    result = clip.encode_from_tokens(tokens)
    assert passes[0][1] > 0 and passes[0][0].length is None, "a prompt's length is forgotten with it"
    expected = masked_by_comfyui(clip, FAMILIES[name].name).encode_from_tokens(tokens)
    assert relative_error(result, expected) <= 1e-5


@pytest.mark.parametrize(
    "row, expected",
    [([5, 6, 0, 0], True), ([5, 6], True), ([0, 0, 5], False), ([0], False), ([5, "embedding", 0], True),
     ([5, 0, "embedding"], False), ([], False)],
)  # fmt: skip
def test_where_padding_stands(comfy, row, expected):
    from flux2_pack.flux2.loading.encoder_precision import is_padded_behind

    assert is_padded_behind(row, 0) is expected


def test_a_list_of_prompts_is_encoded_as_each_alone(load, kind):
    from flux2_pack.flux2.prompts import encode

    clip = load.load_text_encoder(kind[1], precision="bf16")
    texts = ["a cat", "a dog in a long, long sentence about dogs", "a house"]
    tokens = [encode.prompt_tokens.tokenize(clip, text, None)[0] for text in texts]
    for (alone,), (together,) in zip(map(clip.encode_from_tokens_scheduled, tokens), encode.one_pass(clip, tokens)):
        assert relative_error(together[0], alone[0]) <= 2e-2, "bf16 rounding"


def test_hidden_states_are_joined_as_comfyui_joins_them(load, kind):
    """And weighted prompts, which this pack's tokenizers never make, go ComfyUI's way."""
    from flux2_pack.flux2.loading.encoder_families import FAMILIES

    family = FAMILIES[kind[0]]
    network = load.load_text_encoder(kind[1], precision="bf16").cond_stage_model
    rows = [[(5, 1.0), (6, 1.0), (7, 1.0)], [(8, 1.0), (9, 1.0), (10, 1.0)]]
    ours, none, extra = network.encode_token_weights({family.name: rows})
    theirs, pooled, mask = super(type(network), network).encode_token_weights({family.name: rows})
    assert torch.equal(ours, theirs) and none is pooled is None and ours.shape == (1, 6, 192)
    assert torch.equal(extra["attention_mask"], mask["attention_mask"]) and extra.keys() == mask.keys()
    heavier = network.encode_token_weights({family.name: [[(token, 1.5) for token, _ in rows[0]]]})[0]
    assert not torch.equal(heavier, ours[:, :3])


def test_weights_that_need_no_cast_are_not_asked_about(load, kind, monkeypatch):
    """bf16 weights on the device of the pass: ComfyUI's casting is left out, and back afterwards. Others keep it."""
    import comfy.ops
    from flux2_pack.flux2.loading.encoder_families import FAMILIES

    clip = load.load_text_encoder(kind[1], precision="bf16")
    inner = getattr(clip.cond_stage_model, FAMILIES[kind[0]].name)
    inner.transformer.to(torch.bfloat16)
    layer = inner.transformer.model.layers[1]
    layer.mlp.up_proj.float()  # as a weight that was kept in another format
    asked, plain = [], comfy.ops.cast_bias_weight
    monkeypatch.setattr(
        comfy.ops, "cast_bias_weight", lambda module, *a, **kw: asked.append(module) or plain(module, *a, **kw)
    )
    clip.cond_stage_model.encode_token_weights(clip.tokenize(PROMPT))
    assert {type(m).__name__ for m in asked} <= {"Linear", "Embedding"} and layer.mlp.up_proj in asked
    assert layer.mlp.gate_proj not in asked
    assert all(m.comfy_cast_weights for m in inner.modules() if isinstance(m, torch.nn.Linear))


def test_an_error_in_a_pass_leaves_nothing_behind(load, kind, monkeypatch):
    """A cancel between two layers, then a prompt that ComfyUI's mask is for."""
    from flux2_pack.flux2.loading.encoder_families import FAMILIES

    name, path, _ = kind
    clip = load.load_text_encoder(path, precision="bf16")
    model = getattr(clip.cond_stage_model, FAMILIES[name].name).transformer.model
    tokens = clip.tokenize(PROMPT)
    expected = clip.encode_from_tokens(tokens)
    with monkeypatch.context() as patch:
        patch.setattr(model.layers[3], "forward", lambda **_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            clip.encode_from_tokens(tokens)
    hook = next(iter(model.layers[0].self_attn._forward_pre_hooks.values()))
    assert hook.__self__.length is None and hook.__self__.weights is None
    assert torch.equal(clip.encode_from_tokens(tokens), expected)


def test_encoded_padding_is_computed_in_the_same_format(load, tmp_path):
    path = maker.write(tmp_path / "mistral.safetensors", mistral_40())
    clips = [load.load_text_encoder(path, padding="reference", precision=name) for name in ("float32", "bf16")]
    exact, rounded = (clip.encode_from_tokens(clip.tokenize(PROMPT)) for clip in clips)
    assert rounded.shape == (1, 512, 192) and 1e-4 < relative_error(rounded[:, 0], exact[:, 0]) < 2e-2


def test_what_bf16_does_to_a_latent(load, small_models):
    """The small model's sampled latents from a prompt in both formats: the effect is that of rounding the prompt."""
    import comfy.sample

    model = load.load_model(small_models["model"])
    latent, noise = torch.zeros(1, 128, 4, 4), torch.randn(1, 128, 4, 4, generator=torch.Generator().manual_seed(1))
    sampled = []
    for precision in ("float32", "bf16"):
        clip = load.load_text_encoder(small_models["text_encoder"], precision=precision)
        prompt = clip.encode_from_tokens_scheduled(clip.tokenize(PROMPT))
        sampled.append(
            comfy.sample.sample(
                model, noise, 4, 1.0, "euler", "simple", prompt, prompt, latent, disable_pbar=True, seed=1
            )
        )
    assert 0 < relative_error(sampled[1], sampled[0]) < 2e-2


def test_kept_prompts_know_the_format(load, small_models, tmp_path):
    from flux2_pack.flux2.loading import lazy_clip
    from flux2_pack.flux2.prompts import encode
    from flux2_pack.flux2.prompts.cache import PromptCache

    cache = PromptCache(tmp_path, 1e9)

    def clip_in(precision):
        source = lazy_clip.EncoderSource(str(small_models["text_encoder"]), precision=precision)
        return lazy_clip.text_encoder(
            source, lambda: load.load_text_encoder(source.path, precision=precision), when_needed=True
        )

    hits = [encode.encode(clip_in(name), PROMPT, cache).hit for name in ("float32", "auto", "bf16", "bf16", "float32")]
    assert hits == [False, True, False, True, True], "on a CPU auto is float32"


def test_the_chosen_attention_still_computes_in_bf16(comfy, load, small_models):
    from flux2_pack.nodes import attention

    clip = load.load_text_encoder(small_models["text_encoder"], precision="bf16")
    tokens = clip.tokenize(PROMPT)
    expected = clip.encode_from_tokens(tokens)
    chosen = attention.choose_encoder_attention(clip, "sdpa-math")
    result = chosen.encode_from_tokens(tokens)
    run = chosen.patcher.attachments["flux2_attention"].log.current
    assert run.calls == 30 and 0 <= relative_error(result, expected) <= 2e-2


def test_weights_that_are_loaded_again_keep_the_format(load, small_models):
    clip = load.load_text_encoder(small_models["text_encoder"], precision="bf16")
    tokens = clip.tokenize(PROMPT)
    factory, arguments = clip.patcher.cached_patcher_init[:2]
    again = clip.clone()
    again.patcher = factory(*arguments, disable_dynamic=True)
    again.cond_stage_model = again.patcher.model
    assert torch.equal(again.encode_from_tokens(tokens), clip.encode_from_tokens(tokens))
