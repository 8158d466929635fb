"""What cores newer than the oldest promised one do differently, by stand-ins made from their behaviour: attention that
a block's own file chooses (0.34), q, k and v in containers (0.33, for FLUX later), where weights lie on disk (0.38).

Each is used where a core has it and changes nothing where it has not; no version is read anywhere. On a core that has
containers the real ones are taken. Float32 on the CPU, small models, in process.
"""

from functools import wraps
import importlib
import inspect
import re
import types

import pytest
import torch

from test_select_model import (  # noqa: F401  (fixtures)
    STEPS,
    assert_same,
    conditioning,
    flux2,
    flux2_context,
    report,
    sample,
    select,
    tools,
)

BLOCKS = 6


class Container:
    """A tensor that can be taken out once."""

    def __init__(self, tensor):
        self.tensor = tensor

    def take(self):
        if self.tensor is None:
            raise RuntimeError("taken twice")
        tensor, self.tensor = self.tensor, None
        return tensor


def newer_attention(core, container):
    """An attention function that answers as newer cores' do, around a core's own function `core`."""

    @wraps(core)
    def attention(q, k, v, heads, preferred_attention=None, **kwargs):
        taken = [tensor.take() if isinstance(tensor, container) else tensor for tensor in (q, k, v)]
        empty = "optimized_attention_override" not in (kwargs.get("transformer_options") or {})
        if empty and "_inside_attn_wrapper" not in kwargs and getattr(preferred_attention, "function", None):
            return preferred_attention.function(*taken, heads, **kwargs)
        return core(*taken, heads, **kwargs)

    return attention


@pytest.fixture
def newer(tools, flux2, monkeypatch):  # noqa: F811
    """FLUX's attention as in newer cores. Gives the calls that a block's own choice got: the first double block and the
    last single block of the model have one, the others have none.
    """
    import comfy.ldm.flux.layers as layers
    import comfy.ldm.flux.math as flux_math
    import comfy.ldm.modules.attention as core

    container, seen = getattr(core, "AttentionTensorContainer", Container), []
    optimized = newer_attention(flux_math.optimized_attention, container)

    def attention(q, k, v, pe, mask=None, transformer_options={}, preferred_attention=None):
        if pe is not None:
            q, k = flux_math.apply_rope(q, k, pe)
        heads = q.shape[1]
        return flux_math.optimized_attention(
            *(container(tensor) for tensor in (q, k, v)),
            heads,
            skip_reshape=True,
            mask=mask,
            transformer_options=transformer_options,
            preferred_attention=preferred_attention,
        )

    def chosen_by_a_block(q, k, v, heads, mask=None, skip_reshape=False, transformer_options=None, **kwargs):
        seen.append((transformer_options["block_type"], transformer_options["block_index"]))
        return core.attention_pytorch.__wrapped__(q, k, v, heads, mask=mask, skip_reshape=skip_reshape) * 1.25

    monkeypatch.setattr(flux_math, "optimized_attention", optimized)
    for module in (flux_math, layers):
        monkeypatch.setattr(module, "attention", attention)
    network = flux2.model.diffusion_model
    for kind in ("double", "single"):
        for block in getattr(network, f"{kind}_blocks"):
            monkeypatch.setattr(block, "comfy_attention", types.SimpleNamespace(function=None), raising=False)
    chosen = [("double", 0), ("single", len(network.single_blocks) - 1)]
    for kind, number in chosen:
        getattr(network, f"{kind}_blocks")[number].comfy_attention.function = chosen_by_a_block
    return types.SimpleNamespace(seen=seen, chosen=chosen, network=network)


def expected_of(newer, tools, model):  # noqa: F811
    """The latents of a core whose blocks hand their own choice on, made here by handing it on for them."""
    positive = conditioning(flux2_context())

    def put_in(func, *args, transformer_options=None, **kwargs):
        block = transformer_options["block_type"], transformer_options["block_index"]
        own = getattr(newer.network, f"{block[0]}_blocks")[block[1]].comfy_attention.function
        return (own or func)(*args, transformer_options=transformer_options, **kwargs)

    clone = model.clone()
    clone.model_options.setdefault("transformer_options", {})["optimized_attention_override"] = put_in
    out = sample(tools, clone, positive)
    assert newer.seen == newer.chosen * STEPS
    newer.seen.clear()
    return out


def test_what_is_left_to_core_is_what_the_blocks_file_asks_for(tools, flux2, newer):  # noqa: F811
    positive, expected = conditioning(flux2_context()), expected_of(newer, tools, flux2)
    left = select(tools, flux2, "comfyui")
    out = sample(tools, left, positive)
    assert newer.seen == newer.chosen * STEPS
    assert_same(out, expected)
    text, data = report(tools, left, out)
    assert data["calls"] == STEPS * BLOCKS and "chosen_by_a_block" in text
    assert "attention_pytorch" in text or "attention_sub_quad" in text, "the other blocks are the core's own"


def test_a_backend_that_is_chosen_computes_every_block(tools, flux2, newer):  # noqa: F811
    positive = conditioning(flux2_context())
    for kind, number in newer.chosen:
        getattr(newer.network, f"{kind}_blocks")[number].comfy_attention.function = None
    expected = sample(tools, flux2, positive)
    for kind, number in newer.chosen:
        getattr(newer.network, f"{kind}_blocks")[number].comfy_attention.function = pytest.fail
    chosen = select(tools, flux2, "sdpa-math")
    out = sample(tools, chosen, positive)
    assert_same(out, expected)
    assert report(tools, chosen, out)[1]["calls"] == STEPS * BLOCKS, "q, k and v came out of their containers"


def test_an_observer_changes_nothing(tools, flux2, newer):  # noqa: F811
    from flux2_pack.attention.override import Observer
    from flux2_pack.flux2 import attention_slot

    expected = expected_of(newer, tools, flux2)
    watched = attention_slot.observed(flux2, Observer(None), "test")
    assert_same(sample(tools, watched, conditioning(flux2_context())), expected)
    assert newer.seen == newer.chosen * STEPS


@pytest.mark.parametrize("backend", [None, "comfyui"])
def test_compiled_blocks_hand_the_choice_on(tools, flux2, newer, backend):  # noqa: F811
    from flux2_pack.flux2.compiled import blocks

    expected = expected_of(newer, tools, flux2)
    clone = select(tools, flux2, backend) if backend else flux2.clone()
    blocks.install(clone, blocks.CompilePlan(backend="eager"))
    assert_same(sample(tools, clone, conditioning(flux2_context())), expected)
    log = blocks.plan_of(clone).log
    assert sum(log.compiled.values()) == STEPS * BLOCKS, log.as_text()
    assert newer.seen == newer.chosen * STEPS


@pytest.mark.parametrize("patched", [False, True])
def test_fused_blocks_hand_the_choice_on(tools, flux2, newer, patched):  # noqa: F811
    """The part of a fused block around its kernels, which want a GPU: with q, k and v as they come from one."""
    from flux2_pack.flux2.fused import blocks

    q, k, v = torch.randn(3, 1, 8, 2, 128)
    patches = {"attn1_patch": [lambda q, k, v, **given: {"q": q, "k": k, "v": v}]} if patched else {}
    outs = {}
    for number in (0, 1):
        block = newer.network.double_blocks[number]
        options = {"block_type": "double", "block_index": number, "patches": patches}
        outs[number] = blocks.attention(
            lambda pe, place=None: (q, k, v), None, None, None, options, {}, blocks.own_choice(block)
        )
    assert newer.seen == [("double", 0)]
    torch.testing.assert_close(outs[0], outs[1] * 1.25, rtol=1e-5, atol=1e-6)


def test_several_gpus_hand_the_choice_on(tools, flux2, newer):  # noqa: F811
    from flux2_pack.flux2 import attention_slot
    from flux2_pack.flux2.parallel.attention import ShardedAttention
    from flux2_pack.flux2.parallel.workers import patch_transfer

    options = attention_slot.with_choices_of_blocks(newer.network, {"block_type": "double", "block_index": 0})
    sharded = ShardedAttention(types.SimpleNamespace(sharded=None), None, None)
    q, k, v = torch.randn(3, 1, 8, 2, 128)
    local = sharded._local(pytest.fail, None, {"transformer_options": options})
    out, lse = local(q, k, v, mask=None, scale=None, need_lse=False)
    assert out.shape == q.shape and lse is None and newer.seen == [("double", 0)]
    assert patch_transfer.encode_patches(None, options) == [], "every rank asks its own blocks"


# What is asked for with a default, because not every layer, tensor or format has it: a core that renamed one would be
# answered by the default, in silence.
ASKED_WITH_A_DEFAULT = {
    "comfy.ops": "layout_type quant_format _full_precision_mm comfy_force_cast_weights input_scale pre_quant_scale _v "
    "_orig_shape weight_function bias_function weight_comfy_model_dtype",
    "comfy.sd": "cached_patcher_init",
    "comfy.latent_formats": "latent_rgb_factors_reshape",
    "comfy.ldm.flux.model": "context_in_dim num_heads double_blocks single_blocks",
    "comfy.ldm.modules.diffusionmodules.model": "tanh_out carried ch down",
    "comfy_api.torch_helpers.torch_compile": "torch_compile_kwargs",
    "comfy_kitchen.tensor.base": "_qdata _layout_cls _params",
    "comfy_kitchen.tensor.int8": "convrot convrot_groupsize transposed",
}


@pytest.mark.parametrize("module", ASKED_WITH_A_DEFAULT)
def test_names_that_are_asked_for_with_a_default_are_there(tools, module):  # noqa: F811
    code = inspect.getsource(importlib.import_module(module))
    gone = [name for name in ASKED_WITH_A_DEFAULT[module].split() if not re.search(rf"\b{name}\b", code)]
    assert gone == []


def test_a_core_without_such_choices_gets_no_word_of_them(tools, flux2):  # noqa: F811
    from flux2_pack.flux2 import attention_slot
    from flux2_pack.flux2.fused import blocks

    network, options = flux2.model.diffusion_model, {"block_type": "double"}
    if any(hasattr(block, "comfy_attention") for block in network.double_blocks):
        pytest.skip("this core has them")
    assert attention_slot.with_choices_of_blocks(network, options) is options
    assert blocks.own_choice(network.double_blocks[0]) == {}


def test_weights_still_say_which_file_they_are_from_when_core_builds(tools, small_models, monkeypatch):  # noqa: F811
    """Newer cores mark the storages of what load_torch_file reads, and look at the marks where they build a model, a
    text encoder or a VAE, to decide whether weights stay on a fast disk. So tensors must come there in their storages.
    """
    from flux2_pack.flux2.loading import load

    sd, read, built = tools.comfy.sd, tools.comfy.utils.load_torch_file, {}

    def marking(*args, **kwargs):
        weights = read(*args, **kwargs)
        for tensor in (weights[0] if isinstance(weights, tuple) else weights).values():
            tensor.untyped_storage().from_a_file = True
        return weights

    def looked_at(name, build, weights_of):
        def building(*args, **kwargs):
            built[name] = dict(weights_of(*args, **kwargs))
            return build(*args, **kwargs)

        return building

    monkeypatch.setattr(tools.comfy.utils, "load_torch_file", marking)
    for owner, name, weights_of in (
        (sd, "load_diffusion_model_state_dict", lambda weights, *args: weights),
        (sd.CLIP, "__init__", lambda self, *args, state_dict, **kwargs: state_dict[0]),
        (sd.VAE, "__init__", lambda self, sd, **kwargs: sd),
    ):
        monkeypatch.setattr(owner, name, looked_at(owner.__name__, getattr(owner, name), weights_of))
    load.load_model(str(small_models["model"]))
    load.load_text_encoder(str(small_models["text_encoder"]))
    load.load_vae(str(small_models["vae"]))
    for weights in built.values():
        lost = [key for key, tensor in weights.items() if not hasattr(tensor.untyped_storage(), "from_a_file")]
        assert weights and not lost, lost[:5]
    assert len(built) == 3
