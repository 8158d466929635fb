"""q, k, v written in fp8 by the fused blocks, and attention's fp8 output as the next product's input: the kernels in
Triton's interpreter, cuDNN's part by cudnn_fake, against float32. Run by test_cudnn_fp8.py in a process of its own.
"""

import dataclasses
import functools

import pytest
import torch

import cudnn_fp8_interpreted
import pack
from cudnn_fp8_interpreted import LOSS
from fast_blocks_interpreted import forward, fp8_checkpoint, inputs, tools  # noqa: F401
from flux2_pack.attention import reference, registry
from flux2_pack.attention.call import Hardware

backend = cudnn_fp8_interpreted.backend
HEADS, SIZE = 3, 64


@pytest.fixture
def adapter(backend):  # noqa: F811
    return backend.ADAPTERS["cudnn-fp8"]


def products(text=40, image=100, batch=1, seed=0, values=1.0, shift=0.0):
    """(txt, img) as the qkv products of a double block leave them; keys and values are off 0."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(3 * HEADS * SIZE, generator=torch.Generator().manual_seed(7)) * shift
    made = [torch.randn(batch, length, 3 * HEADS * SIZE, generator=generator) + mean for length in (text, image)]
    for t in made:
        t[..., 2 * HEADS * SIZE :] *= values
    return made


def norms(seed=1):
    """(q weight, k weight) of text and of image."""
    generator = torch.Generator().manual_seed(seed)
    return [tuple(1 + 0.3 * torch.randn(SIZE, generator=generator) for _ in range(2)) for _ in range(2)]


def rope(tokens, batch=1, seed=2):
    angle = torch.randn(batch, 1, tokens, SIZE // 2, generator=torch.Generator().manual_seed(seed)) * 3
    return torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).unflatten(-1, (2, 2)).contiguous()


def exact(txt, img, weights, pe):
    """q, k, v (B, S, H, D) by the kernel that writes them as they are."""
    from flux2_pack.flux2.fused.kernels.qkv import joint_qkv, single_qkv

    if txt is None:
        return single_qkv(img, HEADS, weights[1], pe)
    return joint_qkv(txt, img, HEADS, *weights, pe)


def written(txt, img, weights, pe, kept):
    from flux2_pack.flux2.fused.kernels.qkv import joint_qkv, single_qkv

    if txt is None:
        return single_qkv(img, HEADS, weights[1], pe, fp8=kept)
    return joint_qkv(txt, img, HEADS, *weights, pe, fp8=kept)


def output(raw):
    from flux2_pack.flux2.fused.kernels.attention_output import attention_output

    return attention_output(raw).unflatten(-1, (HEADS, SIZE))


def error(raw, q, k, v):
    return reference.relative_error(output(raw), reference.attend(q, k, v)[0])


@pytest.mark.parametrize("text, image, batch", [(40, 100, 1), (33, 31, 2), (1, 64, 1), (0, 90, 2), (600, 1000, 1)])
def test_what_the_kernel_writes(backend, adapter, text, image, batch):  # noqa: F811
    """Of a double block, or (no text) of a single one, whose tensor is wider than q, k and v."""
    txt, img = products(text, image, batch, shift=1.0)
    if not text:
        txt, img = None, torch.cat([img, img], -1)
    weights, pe = norms(), rope(text + image, batch)
    q, k, v = exact(txt, img, weights, pe)
    _, kept = adapter.attend_keeping(q, k, v)
    before = kept.means.clone()
    q8, k8, v8, scales, means = written(txt, img, weights, pe, kept)
    assert torch.equal(means, before) and kept.means is not means, "of this call, and not overwritten by it"
    k_mean, v_mean = means.view(batch, HEADS, 2, SIZE).unbind(2)
    for stored, scale, plain in (
        (q8, scales[0], q @ kept.turn),
        (k8, scales[1], (k - k_mean[:, None]) @ kept.turn),
        (v8, scales[2], v - v_mean[:, None]),
    ):
        assert stored.is_contiguous() and stored.dtype == torch.float8_e4m3fn and stored.shape == plain.shape
        assert reference.relative_error(stored.float() * scale, plain) < 0.03
        assert stored.float().abs().max() < 448, "nothing was cut"
    assert torch.allclose(scales[3], 1 / scales[2])
    # what is left for the next call: means of sampled tiles of 32, all of them up to 32 tiles; the values' range
    next_k, next_v = kept.means.view(batch, HEADS, 2, SIZE).unbind(2)
    close = 1e-5 if text + image < 900 else 0.3
    assert (next_k - k.mean(1)).abs().max() < close and (next_v - v.mean(1)).abs().max() < close
    top = (v - v_mean[:, None]).abs().max()
    assert torch.isclose(kept.scales[2], torch.maximum(scales[2], 4 * top / 448), rtol=1e-5) and kept.cuts.item() == 0


def test_the_error_is_no_larger_than_with_passes_of_its_own(adapter):
    """Over the calls of a sampling whose numbers drift: means and ranges come from the call before."""
    weights, pe, kept = norms(), rope(140), None
    for step in range(4):
        txt, img = products(seed=step, values=1 + 0.5 * step, shift=2.0 + 0.2 * step)
        q, k, v = exact(txt, img, weights, pe)
        alone = reference.relative_error(adapter.attend(q, k, v)[0], reference.attend(q, k, v)[0])
        if kept is None:
            raw, kept = adapter.attend_keeping(q, k, v)
            assert torch.allclose(output(raw), adapter.attend(q, k, v)[0], atol=1e-6), "the same, restored elsewhere"
        else:
            raw = adapter.attend_written(*written(txt, img, weights, pe, kept), dtype=q.dtype)
        assert error(raw, q, k, v) < max(1.15 * alone, 0.02) < LOSS
    assert kept.cuts.item() == 0


def test_values_that_are_suddenly_larger_are_cut_counted_and_fit_in_the_next_call(adapter):
    weights, pe = norms(), rope(140)
    txt, img = products()
    _, kept = adapter.attend_keeping(*exact(txt, img, weights, pe))
    limit = (kept.scales[2] * 448).item()
    txt, img = products(values=100.0)
    q, k, v = exact(txt, img, weights, pe)
    means = kept.means.clone().view(1, HEADS, 2, SIZE)[:, :, 1]
    raw = adapter.attend_written(*written(txt, img, weights, pe, kept), dtype=q.dtype)
    assert torch.isfinite(output(raw)).all() and error(raw, q, k, v) > LOSS
    beyond = ((v - means[:, None]).abs() > limit * (1 + 1e-6)).sum().item()
    assert kept.cuts.item() == beyond > 100
    raw = adapter.attend_written(*written(txt, img, weights, pe, kept), dtype=q.dtype)
    assert error(raw, q, k, v) < LOSS and kept.cuts.item() == beyond


def test_norm_weights_that_are_zero_or_large_stay_finite(adapter):
    pe = rope(140)
    for factor in (0.0, 1e4):
        weights = [tuple(factor * w for w in pair) for pair in norms()]
        txt, img = products()
        q, k, v = exact(txt, img, weights, pe)
        _, kept = adapter.attend_keeping(q, k, v, scale=1e-9)
        raw = adapter.attend_written(*written(txt, img, weights, pe, kept), dtype=q.dtype, scale=1e-9)
        found = reference.relative_error(output(raw), reference.attend(q, k, v, scale=1e-9)[0])
        assert found < LOSS


def test_attentions_output_as_the_next_products_input(adapter):
    """Parts of it, as it is and over a layer's scale; and beside SwiGLU."""
    from flux2_pack.flux2.fused.kernels.attention_output import attention_output
    from flux2_pack.flux2.fused.kernels.formats import FP8_ROW, FP8_TENSOR, Format
    from flux2_pack.flux2.fused.kernels.swiglu import swiglu

    weights, pe = norms(), rope(140, 2)
    q, k, v = exact(*products(batch=2, shift=1.0), weights, pe)
    raw, kept = adapter.attend_keeping(q, k, v)
    whole = raw.data.float() * raw.scale + raw.means.view(2, 1, HEADS, 2, SIZE)[:, :, :, 1]
    assert torch.allclose(whole, adapter.attend(q, k, v)[0], atol=1e-6)
    whole, scale = whole.flatten(2), torch.tensor(0.01)
    to = Format(FP8_TENSOR, scale)
    for start, stop in ((0, 40), (40, 140), (7, 7)):
        part = whole[:, start:stop]
        assert torch.allclose(attention_output(raw, start, stop), part, atol=1e-6)
        quantised = attention_output(raw, start, stop, to=to)
        assert quantised.data.dtype == torch.float8_e4m3fn and quantised.scale is scale
        assert quantised.data.shape == part.shape and quantised.dtype == torch.float32
        if start != stop:
            assert reference.relative_error(quantised.data.float() * scale, part) < 0.03
    with pytest.raises(ValueError, match="scale per row"):
        attention_output(raw, to=Format(FP8_ROW))
    mlp = torch.randn(2, 140, 256, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(swiglu(mlp, raw), swiglu(mlp, whole), atol=1e-6)
    one, other = swiglu(mlp, raw, to=to), swiglu(mlp, whole, to=to)
    assert (one.data.float() != other.data.float()).float().mean() < 1e-3  # a rounding that was a tie
    assert torch.allclose(swiglu(mlp, raw, to=Format(FP8_ROW)).scale, swiglu(mlp, whole, to=Format(FP8_ROW)).scale)


# --- in a model ------------------------------------------------------------------------------------------------------


@pytest.fixture
def here(backend, monkeypatch):  # noqa: F811
    """The backend may run on this CPU, in float32."""
    anywhere = dataclasses.replace(registry.row("cudnn-fp8"), hardware=Hardware({}, anywhere=True))
    monkeypatch.setitem(registry.ROWS, "cudnn-fp8", anywhere)
    monkeypatch.setattr(registry, "_modules", {})
    monkeypatch.setattr(registry, "_passed", set())
    module = registry._module("cudnn_fp8")[0]  # not the one of `backend`: it is imported anew
    limits = dataclasses.replace(module.CudnnFp8.limits, dtypes=(torch.float32,))
    monkeypatch.setattr(module.CudnnFp8, "limits", limits)
    monkeypatch.setattr(module, "handle_of", lambda device: None)
    return module


@pytest.fixture
def flux2(tools, small_models):  # noqa: F811
    return tools.comfy.sd.load_diffusion_model(str(small_models["model"]), model_options={"dtype": torch.float32})


def fused(tools, model, monkeypatch, on=True, **options):  # noqa: F811
    monkeypatch.setenv("FLUX2_FP8_QKV", "1" if on else "0")
    selected = tools.attention.Flux2SelectAttention.execute(model, options.pop("backend", "cudnn-fp8"), **options)
    return tools.node.execute(selected.args[0]).args[0]


def fp8_data(tools, model):  # noqa: F811
    return tools.fast_blocks.log_of(model).as_data().get("fp8_attention")


def distance(out, expected):
    assert torch.isfinite(out).all()
    return ((out - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("case", [{}, {"batch": 2, "references": 1}], ids=str)
def test_a_forward_pass(tools, flux2, here, monkeypatch, case):  # noqa: F811
    """The second one is written in fp8, as far off core's as the backend with its own passes is."""
    given = inputs(case)
    expected = forward(flux2, given)
    plain = fused(tools, flux2, monkeypatch, on=False)
    alone = distance(forward(plain, given), expected)
    assert fp8_data(tools, plain) is None
    model, calls = fused(tools, flux2, monkeypatch), []
    monkeypatch.setattr(here.CudnnFp8, "attend", None)  # nobody calls it now
    for step in range(3):
        out = forward(model, given)
        calls.append(fp8_data(tools, model))
        assert distance(out, expected) < 1.3 * alone + 1e-4
    assert calls == [{"calls": 6 * n, "written": 6 * (n - 1), "cut": 0} for n in (1, 2, 3)]
    (entry,) = tools.attention.attention_slot.dispatcher_of(model).log.current.as_data()["entries"]
    assert entry["backend"] == "cudnn-fp8" and entry["calls"] == 18
    text = tools.fast_blocks.log_of(model).as_text()
    assert "12 of 18 attention calls of cudnn-fp8; 0 values" in text
    tools.fast_blocks.log_of(model).begin()
    assert fp8_data(tools, model) == {"calls": 0, "written": 0, "cut": 0}, "a sampling depends on no other"


def test_other_sizes_begin_anew_and_the_same_seed_gives_the_same(tools, flux2, here, monkeypatch):  # noqa: F811
    model, outs = fused(tools, flux2, monkeypatch), []
    for _ in range(2):
        tools.fast_blocks.log_of(model).begin()
        outs.append([forward(model, inputs(case)) for case in ({}, {"tokens": 5}, {}, {"tokens": 5})])
        assert fp8_data(tools, model)["written"] == 12
    assert all(torch.equal(one, two) for one, two in zip(*outs))


def test_what_cannot_be_computed_so_is_computed_as_before(tools, flux2, here, monkeypatch):  # noqa: F811
    given = inputs({})
    for options in ({"backend": "sdpa-math"}, {"edge_backend": "sdpa-math", "first_blocks": 2, "last_blocks": 4}):
        model = fused(tools, flux2, monkeypatch, **options)
        assert distance(forward(model, given), forward(flux2, given)) < 1e-6
        assert fp8_data(tools, model)["calls"] == 0
        assert "no call was computed so" in tools.fast_blocks.log_of(model).as_text()
    some = fused(tools, flux2, monkeypatch, edge_backend="sdpa-math", first_blocks=2)
    for _ in range(2):
        forward(some, given)
    assert fp8_data(tools, some) == {"calls": 8, "written": 4, "cut": 0}

    patched = fused(tools, flux2, monkeypatch)
    patched.set_model_attn1_output_patch(lambda attn, extra: attn * 1.5)
    core = flux2.clone()
    core.set_model_attn1_output_patch(lambda attn, extra: attn * 1.5)
    for _ in range(2):
        assert distance(forward(patched, given), forward(core, given)) < 0.05
    assert fp8_data(tools, patched)["calls"] == 0


def test_the_benchmarks_peer_has_it_on_and_leaves_the_switch_alone(tools, flux2, here, monkeypatch):  # noqa: F811
    monkeypatch.syspath_prepend(str(pack.ROOT / "benchmarks"))
    monkeypatch.delenv("FLUX2_FP8_QKV", raising=False)
    import os
    import peers

    setting = peers.Setting(flux2, {}, "bf16", "sdpa-math", "eager")
    assert fp8_data(tools, peers.fast_fp8_qkv(setting)) == {"calls": 0, "written": 0, "cut": 0}
    assert "FLUX2_FP8_QKV" not in os.environ
    assert fp8_data(tools, peers.fast(setting, "checkpoint", "cudnn-fp8")) is None


@pytest.mark.parametrize("wrapped", [False, True], ids=["under its own name", "named as core's by functools.wraps"])
def test_another_packs_attention_function_is_not_passed_by(tools, flux2, here, monkeypatch, wrapped):  # noqa: F811
    from comfy.ldm.flux import math

    original = math.optimized_attention

    def louder(*args, **kwargs):
        return original(*args, **kwargs) * 1.2

    monkeypatch.setattr(math, "optimized_attention", functools.wraps(original)(louder) if wrapped else louder)
    model = fused(tools, flux2, monkeypatch)
    for _ in range(2):
        assert distance(forward(model, inputs({})), forward(flux2, inputs({}))) < 0.05
    assert fp8_data(tools, model)["calls"] == 0


def test_the_projections_of_an_fp8_checkpoint_get_attentions_output_in_fp8(tools, here, monkeypatch):  # noqa: F811
    from comfy.quant_ops import QuantizedTensor

    given, without_scale = inputs({}), "double_blocks.0.img_attn.proj"
    exact_model = fp8_checkpoint(tools, monkeypatch, False, without_scale)
    expected, core, seen = forward(exact_model, given), fp8_checkpoint(tools, monkeypatch, True, without_scale), {}
    for name, layer in core.model.diffusion_model.named_modules():
        if getattr(layer, "layout_type", None):
            layer.register_forward_pre_hook(lambda _, given, name=name: seen.update({name: given[0]}))
    alone = distance(forward(fused(tools, core, monkeypatch, on=False), given), expected)
    model = fused(tools, core, monkeypatch)
    for _ in range(2):
        seen.clear()
        out = forward(model, given)
        assert distance(out, expected) < 1.3 * alone
        assert all(isinstance(x, QuantizedTensor) for x in seen.values()) and len(seen) == 2 * 2 * 4 + 4 * 2
        assert seen.pop(without_scale).params.scale.item() == 1
        assert {x.params.scale.item() for x in seen.values()} == {torch.tensor(0.02).item()}
