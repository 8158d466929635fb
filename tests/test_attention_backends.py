"""Every backend that runs here against float32, over the whole registry; and the adapters of libraries that are not
here, on fakes.
"""

import contextlib
from dataclasses import replace
import importlib
import sys
import types

import pytest
import torch

from devices import gpus, quantised_tolerance
from flux2_pack.attention import reference, registry
from flux2_pack.attention.adapter import lse_bhs
from flux2_pack.attention.call import AttentionRefused, call_of
from flux2_pack.attention.device import Device, describe

DEVICE = torch.device("cuda" if gpus() else "cpu")
RUNNABLE = [slug for slug in registry.ROWS if not registry.unavailable(slug, describe(DEVICE))]


def tensors(b=2, q_len=130, kv_len=77, heads=4, kv_heads=4, d=64, dtype=torch.float32, views=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    made = []
    for s, h in ((q_len, heads), (kv_len, kv_heads), (kv_len, kv_heads)):
        t = torch.randn(b, h, s, d, generator=g).transpose(1, 2) if views else torch.randn(b, s, h, d, generator=g)
        made.append(t.to(DEVICE, dtype))
    return made


def adapter_for(slug, *qkv, **changes):
    reasons = registry.unsupported(slug, call_of(*qkv, **changes))
    if reasons:
        pytest.skip(" ".join(reasons))
    return registry.adapter(slug, describe(DEVICE))


def allowed(slug, q, k, v, mask=None, scale=None):
    """Twice the error that PyTorch's plain attention makes in the same dtype, and a float32 rounding floor; of an
    approximate backend what its number format earns. Not by an adapter of ours: a fault in what they share would widen
    it.
    """
    if not registry.row(slug).exact:
        return quantised_tolerance(slug)
    exact, _ = reference.attend(q, k, v, mask=mask, scale=scale)
    heads_first = (t.repeat_interleave(q.shape[2] // t.shape[2], dim=2).transpose(1, 2) for t in (q, k, v))
    mask = mask if mask is None or mask.dtype == torch.bool else mask.to(q.dtype)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        plain = torch.nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=mask, scale=scale)
    return max(2 * reference.relative_error(plain.transpose(1, 2), exact), 2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("views", [False, True])
@pytest.mark.parametrize("keys", [77, 128])
@pytest.mark.parametrize("slug", RUNNABLE)
def test_output_against_float32(slug, keys, dtype, views):
    q, k, v = tensors(kv_len=keys, dtype=dtype, views=views)
    adapter = adapter_for(slug, q, k, v)
    before = [t.clone() for t in (q, k, v)]
    out, lse = adapter.attend(q, k, v)
    assert out.shape == q.shape and out.dtype == dtype and lse is None
    assert all(torch.equal(t, b) for t, b in zip((q, k, v), before)), "a kernel must not write to its inputs"
    assert reference.relative_error(out, reference.attend(q, k, v)[0]) <= allowed(slug, q, k, v)


@pytest.mark.parametrize("slug", RUNNABLE)
def test_scale_is_used(slug):
    q, k, v = tensors(kv_len=128, dtype=torch.float32 if DEVICE.type == "cpu" else torch.bfloat16)
    adapter = adapter_for(slug, q, k, v)
    exact, _ = reference.attend(q, k, v, scale=0.4)
    tolerance = allowed(slug, q, k, v, scale=0.4)
    assert reference.relative_error(adapter.attend(q, k, v, scale=0.4)[0], exact) <= tolerance
    assert reference.relative_error(adapter.attend(q, k, v)[0], exact) > 0.3


@pytest.mark.parametrize("slug", RUNNABLE)
def test_log_sum_exp_is_natural_and_in_batch_head_query_order(slug):
    q, k, v = tensors(
        b=2, q_len=33, heads=3, kv_heads=3, dtype=torch.float32 if DEVICE.type == "cpu" else torch.bfloat16
    )
    adapter = adapter_for(slug, q, k, v, need_lse=True)
    out, lse = adapter.attend(q, k, v, need_lse=True)
    exact_out, exact_lse = reference.attend(q, k, v)
    assert lse.shape == (2, 3, 33) and lse.dtype == torch.float32
    assert (lse - exact_lse).abs().max() < (1e-5 if registry.row(slug).exact else 0.05)
    assert reference.relative_error(out, exact_out) <= allowed(slug, q, k, v)


@pytest.mark.parametrize("slug", RUNNABLE)
def test_grouped_heads(slug):
    q, k, v = tensors(kv_len=128, heads=4, kv_heads=2, dtype=torch.float32 if DEVICE.type == "cpu" else torch.bfloat16)
    adapter = adapter_for(slug, q, k, v)
    exact, _ = reference.attend(q, k, v)
    assert reference.relative_error(adapter.attend(q, k, v)[0], exact) <= allowed(slug, q, k, v)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("slug", RUNNABLE)
def test_tensors_with_heads_first_give_the_same(slug, heads, kv_heads, masked):
    """ComfyUI's own layout, which some libraries want too: the path of every call of the model and of the encoders."""
    dtype = torch.float32 if DEVICE.type == "cpu" else torch.bfloat16
    q, k, v = tensors(kv_len=128, heads=heads, kv_heads=kv_heads, dtype=dtype)
    adapter = adapter_for(slug, q, k, v, mask_kind="full" if masked else "none")
    if adapter.attend_heads_first is None:
        pytest.skip("its library wants (B, S, H, D), and attend is tested")
    mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=DEVICE).tril(3)[None, None] if masked else None
    out = adapter.attend_heads_first(*(t.transpose(1, 2) for t in (q, k, v)), mask, 0.3).transpose(1, 2)
    exact, _ = reference.attend(q, k, v, mask=mask, scale=0.3)
    assert reference.relative_error(out, exact) <= allowed(slug, q, k, v, mask=mask, scale=0.3)


@pytest.mark.parametrize("slug", [s for s in RUNNABLE if s.startswith("sdpa")])
def test_masks_on_the_kernels_that_take_them(slug):
    q, k, v = tensors(dtype=torch.float32 if DEVICE.type == "cpu" else torch.bfloat16)
    adapter = adapter_for(slug, q, k, v, mask_kind="full")
    causal = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=DEVICE).tril(3)[None, None]
    for mask in (causal, torch.zeros(causal.shape, device=DEVICE).masked_fill(~causal, -3.0)):
        out, _ = adapter.attend(q, k, v, mask=mask)
        assert reference.relative_error(out, reference.attend(q, k, v, mask=mask)[0]) <= allowed(
            slug, q, k, v, mask=mask
        )


def test_the_reference_is_the_definition():
    q, k, v = tensors(b=1, q_len=600, kv_len=9, heads=2, kv_heads=1)
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double().repeat_interleave(2, 2)) * 64**-0.5
    out, lse = reference.attend(q, k, v, dtype=torch.float64)
    torch.testing.assert_close(
        out, torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.double().repeat_interleave(2, 2))
    )
    torch.testing.assert_close(lse, scores.exp().sum(-1).log())


def test_a_log_sum_exp_of_another_layout_is_an_error_not_a_guess():
    q = torch.zeros(2, 33, 3, 8)
    assert lse_bhs(torch.zeros(2, 3, 64, 1), q).shape == (2, 3, 33)
    for wrong in ((2, 33, 3), (3, 66), (2, 3, 32)):
        with pytest.raises(RuntimeError, match="log-sum-exp of shape"):
            lse_bhs(torch.zeros(wrong), q)


# --- adapters on fakes: what is passed, in which layout, and how results are read


def flash_like(calls, lse="asked"):
    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, return_attn_probs=False):
        calls.append({"scale": softmax_scale, "shape": tuple(q.shape)})
        out, sums = reference.attend(q, k, v, scale=softmax_scale)
        return (out.to(q.dtype), sums, None) if return_attn_probs else out.to(q.dtype)

    return flash_attn_func


def fake(monkeypatch, **modules):
    for name, content in modules.items():
        module = types.ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name.replace("__", "."), module)


def load(backend, monkeypatch):
    name = f"flux2_pack.attention.backends.{backend}"
    monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module(name)
    monkeypatch.delitem(sys.modules, name)
    return module


def fake_flash4(calls):
    def flash_attn_func(q, k, v, qv=None, softmax_scale=None, causal=False, return_lse=False):
        calls.append({"scale": softmax_scale, "shape": tuple(q.shape)})
        out, sums = reference.attend(q, k, v, scale=softmax_scale)
        return out.to(q.dtype), sums if return_lse else None

    return flash_attn_func


def fake_flash3_old(calls):
    def flash_attn_func(q, k, v, softmax_scale=None, causal=False):
        calls.append({"scale": softmax_scale, "shape": tuple(q.shape)})
        out, sums = reference.attend(q, k, v, scale=softmax_scale)
        return out.to(q.dtype), sums

    return flash_attn_func


def fake_sage(calls):
    def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False):
        assert tensor_layout == "NHD"
        calls.append({"scale": sm_scale, "shape": tuple(q.shape)})
        out, sums = reference.attend(q, k, v, scale=sm_scale)
        return (out.to(q.dtype), sums) if return_lse else out.to(q.dtype)

    return sageattn


def fake_kitchen(calls):
    def int8_attention(q, k, v, *, scale=None, attn_mask=None):
        calls.append({"scale": scale, "shape": tuple(q.transpose(1, 2).shape)})
        return (
            reference.attend(*(t.transpose(1, 2) for t in (q, k, v)), scale=scale, mask=attn_mask)[0]
            .transpose(1, 2)
            .to(q.dtype)
        )

    return int8_attention


def fake_sage3(calls):
    def sageattn3_blackwell(q, k, v, is_causal=False):
        calls.append({"scale": None, "shape": tuple(q.transpose(1, 2).shape)})
        return reference.attend(*(t.transpose(1, 2) for t in (q, k, v)))[0].transpose(1, 2).to(q.dtype)

    return sageattn3_blackwell


def fake_xformers(calls):
    def with_lse(q, k, v, scale=None):
        calls.append({"scale": scale, "shape": tuple(q.shape)})
        out, sums = reference.attend(q, k, v, scale=scale)
        return out.to(q.dtype), torch.nn.functional.pad(sums, (0, 31))

    return {
        "memory_efficient_attention": lambda *a, **kw: with_lse(*a, **kw)[0],
        "memory_efficient_attention_forward_requires_grad": with_lse,
    }


FAKES = {
    "flash2": ("flash2", lambda calls: {"flash_attn": {"flash_attn_func": flash_like(calls)}}),
    "flash3": ("flash3", lambda calls: {"flash_attn_interface": {"flash_attn_func": flash_like(calls)}}),
    "flash3 early": ("flash3", lambda calls: {"flash_attn_interface": {"flash_attn_func": fake_flash3_old(calls)}}),
    "flash4": ("flash4", lambda calls: {"flash_attn": {}, "flash_attn__cute": {"flash_attn_func": fake_flash4(calls)}}),
    "sage2": (
        "sage",
        lambda calls: {"sageattention": {"sageattn": fake_sage(calls), "sageattn_qk_int8_pv_fp8_cuda": None}},
    ),
    "sage3": ("sage3", lambda calls: {"sageattn3": {"sageattn3_blackwell": fake_sage3(calls)}}),
    "comfy-int8": (
        "comfy_int8",
        lambda calls: {
            "comfy_kitchen": {"int8_attention": fake_kitchen(calls), "int8_attention_is_available": lambda: True}
        },
    ),
    "xformers": ("xformers", lambda calls: {"xformers": {}, "xformers__ops": fake_xformers(calls)}),
}


@pytest.mark.parametrize("name", FAKES)
def test_adapters_of_absent_libraries_pass_layout_and_scale_and_read_results(name, monkeypatch):
    file, modules = FAKES[name]
    calls = []
    fake(monkeypatch, **modules(calls))
    adapter = load(file, monkeypatch).ADAPTERS[name.split()[0]]
    assert adapter.missing() == []
    q, k, v = tensors(dtype=torch.float16, views=True, heads=4, kv_heads=4)
    out, lse = adapter.attend(q, k, v, scale=0.3)
    exact, exact_lse = reference.attend(q, k, v, scale=0.3)
    assert reference.relative_error(out, exact) < 2e-3 and lse is None
    assert calls[-1]["shape"] == tuple(q.shape) and calls[-1]["scale"] in (0.3, None if name == "sage3" else 0.3)
    if adapter.limits.lse:
        out, lse = adapter.attend(q, k, v, scale=0.3, need_lse=True)
        torch.testing.assert_close(lse, exact_lse)
        assert reference.relative_error(out, exact) < 2e-3


def test_sage_1_does_not_get_to_write_to_the_callers_keys(monkeypatch):
    def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, smooth_k=True):
        if smooth_k:
            k -= k.mean(dim=1, keepdim=True)  # as version 1.0.6 does
        return reference.attend(q, k, v, scale=sm_scale)[0].to(q.dtype)

    fake(monkeypatch, sageattention={"sageattn": sageattn})
    q, k, v = tensors(dtype=torch.float16)
    k += 3
    before = k.clone()
    out, _ = load("sage", monkeypatch).ADAPTERS["sage1"].attend(q, k, v)
    assert torch.equal(k, before) and reference.relative_error(out, reference.attend(q, k, v)[0]) < 5e-3


def test_sages_triton_kernels_refuse_keys_that_do_not_fill_their_blocks(monkeypatch):
    """They have no mask for the rest of a block: 0.28 of the output was lost at 77 keys on an H200."""
    modules = {"sageattention": {"sageattn": fake_sage([]), "sageattn_qk_int8_pv_fp8_cuda": None}}
    fake(monkeypatch, **modules)
    adapters = load("sage", monkeypatch).ADAPTERS

    def reasons(slug, arch, kv_len, mask="none"):
        call = call_of(*tensors(kv_len=kv_len, dtype=torch.float16), mask)
        return adapters[slug].unsupported(replace(call, device=Device("nvidia", arch, "a card")))

    for slug, arch in (("sage1", "sm90"), ("sage1", "sm86"), ("sage2", "sm86")):
        assert "multiples of 64, and this call has 77 keys." in reasons(slug, arch, 77)[0]
        assert "a mask that hides some of the keys" in reasons(slug, arch, 128, "keys")[0]
        assert reasons(slug, arch, 128) == []
    assert reasons("sage2", "sm90", 77) == [] == reasons("sage2", "sm89", 77, "keys")


def test_sage_versions_are_told_apart(monkeypatch):
    fake(monkeypatch, sageattention={"sageattn": fake_sage([])})
    adapters = load("sage", monkeypatch).ADAPTERS
    assert adapters["sage1"].missing() == [] and "version 1" in adapters["sage2"].missing()[0]


def test_flash_attn_on_rocm_says_when_it_is_aiter_under_another_name(monkeypatch):
    fake(monkeypatch, flash_attn={"flash_attn_func": flash_like([])})
    adapter = load("flash2", monkeypatch).ADAPTERS["flash2"]
    q, k, v = tensors(dtype=torch.float16)
    assert adapter.kernel(q, k, v) is None
    fake(monkeypatch, aiter_flash_attn_triton_amd={})
    assert "AITER Triton" in adapter.kernel(q, k, v)
    fake(monkeypatch, flash_attn_2_cuda={})
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "Composable Kernel" in adapter.kernel(q, k, v)


# --- the registry


def test_slugs_are_a_contract():
    """Saved workflows hold them: add at will, never rename or remove."""
    assert {
        "auto",
        "sdpa",
        "sdpa-flash",
        "sdpa-cudnn",
        "sdpa-efficient",
        "sdpa-math",
        "flash2",
        "flash3",
        "flash4",
        "aiter",
        "aiter-triton",
        "aiter-flydsl",
        "aiter-flydsl-fp8",
        "aiter-fp8",
        "aiter-v4-bf16",
        "aiter-v4-bf16fp8",
        "aiter-v4-i8fp8",
        "aiter-v4-fp8",
        "aiter-v4-mxfp8",
        "aiter-v4-f8f6",
        "aiter-v4-mxfp6",
        "aiter-v4-f6f6",
        "aiter-v4-f6f4",
        "aiter-v4-mxfp4",
        "aiter-v4-f4f4",
        "aiter-sage",
        "aiter-sage-mxfp4",
        "sage1",
        "sage2",
        "sage3",
        "cudnn-fp8",
        "comfy-int8",
        "xformers",
    } <= set(registry.SLUGS)
    assert set(registry.AUTO_ORDER) == {slug for slug, row in registry.ROWS.items() if row.exact} - {"sdpa-math"}


def test_an_unknown_slug_lists_the_valid_ones():
    with pytest.raises(ValueError, match="no attention backend 'flash9'.*sdpa-cudnn"):
        registry.row("flash9")


@pytest.mark.parametrize(
    "error",
    [RuntimeError("ROCm version file not found"), OSError("libamdhip64.so: cannot open"), ImportError("no kernels")],
)
def test_whatever_an_import_raises_becomes_a_reason(error, monkeypatch):
    def broken(name, package):
        raise error

    monkeypatch.setattr(registry.importlib, "import_module", broken)
    monkeypatch.setattr(registry, "_modules", {})
    reasons = registry.unavailable("aiter", Device("amd", "gfx942", "AMD Instinct MI300X"))
    assert len(reasons) == 1 and str(error) in reasons[0] and type(error).__name__ in reasons[0]


def test_whatever_a_library_raises_when_it_is_asked_becomes_a_reason(monkeypatch):
    """The list of all backends and a benchmark ask every one of them."""
    from types import SimpleNamespace

    def missing():
        raise AttributeError("module 'aiter' has no attribute 'dtypes'\nmore")

    module = SimpleNamespace(ADAPTERS={"aiter": SimpleNamespace(missing=missing)})
    monkeypatch.setattr(registry, "_modules", {"aiter": (module, None)})
    device = Device("amd", "gfx942", "AMD Instinct MI300X")
    said = "cannot be asked whether it runs here (AttributeError: module 'aiter' has no attribute 'dtypes')."
    (reason,) = registry.unavailable("aiter", device)
    assert reason.endswith(said) and "more" not in reason
    with pytest.raises(AttentionRefused, match="cannot be asked"):
        registry.adapter("aiter", device)


def test_a_refusal_has_hardware_library_and_hint(monkeypatch):
    with pytest.raises(AttentionRefused) as caught:
        registry.adapter("flash4", Device("amd", "gfx942", "AMD Instinct MI300X"))
    text = str(caught.value)
    assert "NVIDIA" in text and "gfx942" in text
    assert "pip install" not in text and "auto finds one" in text, "installing would not help"
    monkeypatch.setattr(registry, "_modules", {"flash4": (None, "ModuleNotFoundError: No module named 'flash_attn'")})
    with pytest.raises(AttentionRefused, match=r"cannot be imported.*\n.* -m pip install --pre flash-attn-4"):
        registry.adapter("flash4", Device("nvidia", "sm90", "NVIDIA H100"))


def test_a_library_of_other_hardware_is_not_imported(monkeypatch):
    """Some of them end the process on a wrong card."""

    def imported(name, package):
        raise AssertionError(f"{name} was imported")

    monkeypatch.setattr(registry.importlib, "import_module", imported)
    monkeypatch.setattr(registry, "_modules", {})
    for slug, row in registry.ROWS.items():
        for device in (Device("amd", "gfx000", "x"), Device("nvidia", "sm30", "x"), Device("npu", "npu", "x")):
            if row.hardware.reasons(device):
                assert registry.unavailable(slug, device) == row.hardware.reasons(device)
    assert registry._modules == {}


def test_a_failure_of_a_test_call_is_not_remembered(monkeypatch):
    """Memory that another job held is no verdict: the next question is answered anew."""
    from flux2_pack.attention.backends import sdpa

    monkeypatch.setattr(registry, "_passed", set())
    with monkeypatch.context() as short:
        short.setattr(sdpa, "public", lambda *_: torch.empty(2**50))
        (reason,) = registry.probe("sdpa", "cpu", torch.float32, 64)
        assert "can't allocate memory" in reason or "not enough memory" in reason
    assert registry.probe("sdpa", "cpu", torch.float32, 64) == []
    with monkeypatch.context() as remembered:
        remembered.setattr(registry, "test_call", None)
        assert registry.probe("sdpa", "cpu", torch.float32, 64) == []


@pytest.mark.parametrize("slug", ["sdpa", "sdpa-flash", "sdpa-math"])
def test_the_probe_runs_a_real_call(slug):
    assert registry.probe(slug, DEVICE, torch.float32 if DEVICE.type == "cpu" else torch.bfloat16, 128) == []


def test_the_probe_reports_failures_and_wrong_results(monkeypatch):
    monkeypatch.setattr(registry, "_passed", set())
    adapters = registry._module("sdpa")[0].ADAPTERS

    class Broken(type(adapters["sdpa"])):
        def run(self, *args):
            raise RuntimeError("no kernel image")

    class Wrong(type(adapters["sdpa"])):
        def run(self, q, k, v, *rest):
            return v.roll(1, dims=1), None

    monkeypatch.setitem(adapters, "sdpa", Broken())
    assert "no kernel image" in registry.probe("sdpa", "cpu", torch.float32, 64)[0]
    monkeypatch.setitem(adapters, "sdpa", Wrong())
    assert "wrong result" in registry.probe("sdpa", "cpu", torch.float32, 128)[0]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("slug", ["sdpa-efficient", "sdpa-flash", "sdpa-cudnn"])
def test_a_named_kernel_is_never_given_grouped_heads(slug, masked, monkeypatch):
    """ROCm's memory-efficient kernel takes none. Heads first, as ComfyUI's text encoders call; computed by PyTorch."""
    import torch.nn.functional as F
    from flux2_pack.attention.backends import sdpa

    q, k, v = torch.randn(1, 4, 6, 64), torch.randn(1, 2, 6, 64), torch.randn(1, 2, 6, 64)
    mask, plain, seen = torch.ones(6, 6).tril().bool() if masked else None, F.scaled_dot_product_attention, []

    def exact(q, k, v, attn_mask=None, scale=None, enable_gqa=False):
        seen.append((q.shape[1], k.shape[1], v.shape[1], enable_gqa))
        return plain(q, k, v, attn_mask=attn_mask, scale=scale)

    monkeypatch.setattr(
        sdpa.ADAPTERS[slug], "operator", lambda q, k, v, scale, lse: (exact(q, k, v, None, scale), None)
    )
    monkeypatch.setattr(sdpa, "sdpa_kernel", lambda backend: contextlib.nullcontext())
    monkeypatch.setattr(sdpa.F, "scaled_dot_product_attention", exact)
    out = sdpa.ADAPTERS[slug].attend_heads_first(q, k, v, mask, 0.1)
    assert seen == [(4, 4, 4, False)]
    torch.testing.assert_close(out, plain(q, k, v, attn_mask=mask, scale=0.1, enable_gqa=True))
