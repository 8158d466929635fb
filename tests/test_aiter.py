"""The AITER backends over a stand-in for the library: what they pass, what they return, what they refuse, and every way
the library can be broken or old. Signatures are in test_aiter_signatures.py, AITER's own kernels in
test_aiter_kernels.py.
"""

import json
import sys
import threading
import time

import pytest
import torch

import aiter_fakes
from aiter_fakes import MAIN, Library
from flux2_pack.attention import autotune, reference, registry
from flux2_pack.attention.call import AttentionCall, AttentionRefused
from flux2_pack.attention.device import Device
from flux2_pack.attention.dispatch import AttentionDispatcher

MI300, MI355, MI250 = (
    Device("amd", "gfx942", "AMD Instinct MI300X"),
    Device("amd", "gfx950", "AMD Instinct MI355X"),
    Device("amd", "gfx90a", "AMD Instinct MI250"),
)
RX9070, GFX1250 = Device("amd", "gfx1201", "AMD Radeon RX 9070 XT"), Device("amd", "gfx1250", "AMD Instinct")
W7900, H200 = Device("amd", "gfx1100", "AMD Radeon PRO W7900"), Device("nvidia", "sm90", "NVIDIA H200")
FILES = {
    "aiter": ["aiter", "aiter-fp8"],
    "aiter_flydsl": ["aiter-flydsl", "aiter-flydsl-fp8"],
    "aiter_triton": ["aiter-triton", "aiter-sage", "aiter-sage-mxfp4"],
    "aiter_v4": [
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
    ],
}
SLUGS = [(file, slug) for file, slugs in FILES.items() for slug in slugs]
WITH_LSE = ["aiter", "aiter-triton", "aiter-sage", "aiter-sage-mxfp4", *FILES["aiter_v4"]]


@pytest.fixture
def empty(monkeypatch, tmp_path):
    """An `aiter` without functions."""
    return Library(monkeypatch, tmp_path)


@pytest.fixture
def library(empty):
    """An `aiter` as main was when its signatures were recorded."""
    return empty.provide(MAIN).tiles("gfx942", "gfx950")


def tensors(lengths=(37, 37), heads=(4, 4), dtype=torch.bfloat16, batch=2, offset=0.0):
    generator = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(batch, s, h, 128, generator=generator).to(dtype)
        for s, h in ((lengths[0], heads[0]), (lengths[1], heads[1]), (lengths[1], heads[1]))
    )
    return q, k + (offset * torch.randn(128, generator=generator)).to(dtype), v


def call(device=MI300, **changed):
    facts = dict(
        batch=1, q_len=4608, kv_len=4608, heads=48, kv_heads=48, head_dim=128, dtype=torch.bfloat16, device=device
    )
    return AttentionCall(**{**facts, **changed})


def bound(dtype, slug):
    """fp8 rounds to 3 bits: 2**-4 at worst, less on average, twice (v, and q and k through the scores). The other fakes
    only round to dtype or bf16.
    """
    return 0.06 if slug in ("aiter-fp8", "aiter-flydsl-fp8") else 2 * torch.finfo(torch.bfloat16).eps


# --- run, end to end -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file, slug", SLUGS)
@pytest.mark.parametrize("scale", [None, 0.05])
def test_every_backend_computes_attention(library, file, slug, scale):
    q, k, v = tensors((37, 61))
    out, lse = library.on(RX9070 if file == "aiter_flydsl" else MI355, file).ADAPTERS[slug].attend(q, k, v, scale=scale)
    assert out.shape == q.shape and out.dtype == q.dtype and lse is None
    assert reference.relative_error(out, reference.attend(q, k, v, scale=scale)[0]) < bound(q.dtype, slug)


@pytest.mark.parametrize("file, slug", [(f, s) for f, s in SLUGS if s in WITH_LSE])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_log_sum_exp_is_that_of_the_keys_as_given(library, file, slug, heads):
    q, k, v = tensors((37, 61), heads=heads, offset=3.0)
    out, lse = library.backend(file).ADAPTERS[slug].attend(q, k, v, scale=0.07, need_lse=True)
    want_out, want_lse = reference.attend(q, k, v, scale=0.07)
    assert lse.shape == (2, 4, 37) and lse.dtype == torch.float32
    # centring rounds keys to bf16 once more, and a scale of one's own rounds mxfp4's queries: 2**-9 of a score, each,
    # and scores reach 30 here
    assert (lse - want_lse).abs().max() < (0.1 if "sage" in slug else 1e-5)
    assert reference.relative_error(out, want_out) < 4 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("commit", ["bc5ea32c19", "acfcfe609b", "940eeb1d8e", "e404860"])
def test_log_sum_exp_of_sage_is_right_in_versions_that_got_it_wrong(empty, commit):
    """Before aiter #3334 keys were always centred and the log-sum-exp was that of the centred keys."""
    q, k, v = tensors((37, 61), offset=3.0)
    adapter = empty.provide(aiter_fakes.version(commit)).backend("aiter_triton").ADAPTERS["aiter-sage"]
    assert not adapter.missing() and adapter.limits.lse
    lse = adapter.attend(q, k, v, need_lse=True)[1]
    assert (lse - reference.attend(q, k, v)[1]).abs().max() < 0.1
    assert (sage_alone(adapter, q, k, v) - reference.attend(q, k, v)[1]).abs().max() > 1, (
        "the fake does not show the defect"
    )


def sage_alone(adapter, q, k, v):
    return adapter.function(q, k, v, layout="bshd", softmax_scale=128**-0.5, return_lse=True)[1]


@pytest.mark.parametrize(
    "commit, slug",
    [
        ("bf111b2bab", "aiter-sage"),
        ("cef49e3c25", "aiter-sage"),
        ("cef49e3c25", "aiter-sage-mxfp4"),
        ("acfcfe609b", "aiter-sage-mxfp4"),
    ],
)
def test_versions_without_log_sum_exp_say_so_and_compute(empty, commit, slug):
    adapter = empty.provide(aiter_fakes.version(commit)).backend("aiter_triton").ADAPTERS[slug]
    assert not adapter.missing()
    assert adapter.unsupported(call(need_lse=True)) == ["It cannot return the log-sum-exp, which ring attention needs."]
    q, k, v = tensors()
    assert reference.relative_error(adapter.attend(q, k, v)[0], reference.attend(q, k, v)[0]) < 0.02


def test_scale_is_always_passed(library):
    q, k, v = tensors()
    library.backend("aiter").ADAPTERS["aiter"].attend(q, k, v)
    assert library.last("ops/mha.py:flash_attn_func")["softmax_scale"] == 128**-0.5


def test_strides_reach_exact_kernels_untouched(library):
    """No copies: views of BHSD memory and slices of a fused tensor go to the kernel as they are."""
    fused = torch.randn(1, 20, 2, 3 * 128, dtype=torch.bfloat16)
    q, k, v = fused[..., :128], fused[..., 128:256], torch.randn(1, 2, 20, 128, dtype=torch.bfloat16).transpose(1, 2)
    for file, slug in (("aiter", "aiter"), ("aiter_triton", "aiter-triton")):
        library.backend(file).ADAPTERS[slug].attend(q, k, v)
        given = library.last("ops/mha.py:flash_attn_func" if slug == "aiter" else "attention/mha.py:flash_attn_func")
        assert all(given[n] is t for n, t in zip("qkv", (q, k, v)))


def test_sage_gets_bhsd_memory_without_a_copy_and_other_strides_copied(library):
    adapter = library.backend("aiter_triton").ADAPTERS["aiter-sage"]
    memory = [torch.randn(1, 2, 20, 128, dtype=torch.bfloat16) for _ in range(3)]
    adapter.attend(*(t.transpose(1, 2) for t in memory))
    given = library.last("fav3_sage_wrapper_func")
    assert given["layout"] == "bhsd" and all(given[n].data_ptr() == t.data_ptr() for n, t in zip("qkv", memory))
    fused = torch.randn(1, 20, 2, 3 * 128, dtype=torch.bfloat16)
    adapter.attend(fused[..., :128], fused[..., 128:256], fused[..., 256:])
    assert library.last("fav3_sage_wrapper_func")["layout"] == "bshd"


def test_mxfp4_scale_goes_into_the_queries(library):
    q, k, v = tensors(dtype=torch.float16)
    adapter = library.backend("aiter_triton").ADAPTERS["aiter-sage-mxfp4"]
    adapter.attend(q, k, v)
    assert torch.equal(library.last("fav3_sage_mxfp4_wrapper")["q"], q)
    adapter.attend(q, k, v, scale=2 * 128**-0.5)
    assert torch.equal(library.last("fav3_sage_mxfp4_wrapper")["q"], 2 * q)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e4m3fnuz])
@pytest.mark.parametrize("size", [0.0, 1e-30, 1.0, 1e30])
def test_fp8_quantisation_keeps_values_of_any_size(library, dtype, size):
    t = torch.randn(2, 9, 3, 128, generator=torch.Generator().manual_seed(2)).bfloat16() * size
    values, descale = library.backend("aiter").per_tensor_fp8(t, dtype)
    assert values.dtype == dtype and descale.shape == (1,) and descale.dtype == torch.float32
    back = values.float() * descale
    assert torch.isfinite(back).all()
    step = t.float().abs() * 2**-4 + descale * 2**-9  # half a step of 3 bits, and of the smallest subnormal
    assert ((back - t.float()).abs() <= step).all()


# --- FlyDSL ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", [RX9070, GFX1250])
@pytest.mark.parametrize("scale", [None, 0.05])
def test_flydsl_computes_on_each_architecture(library, device, scale):
    q, k, v = tensors((37, 61))
    adapter = library.on(device, "aiter_flydsl").ADAPTERS["aiter-flydsl"]
    assert adapter.missing() == [] and adapter.unsupported(call(device)) == []
    out, lse = adapter.attend(q, k, v, scale=scale)
    assert lse is None and reference.relative_error(out, reference.attend(q, k, v, scale=scale)[0]) < 0.01


@pytest.mark.parametrize("device", [RX9070, MI355])
@pytest.mark.parametrize("scale", [None, 0.05])
def test_flydsl_fp8_puts_the_scale_into_that_of_the_queries(library, device, scale):
    q, k, v = tensors((37, 61))
    adapter = library.on(device, "aiter_flydsl").ADAPTERS["aiter-flydsl-fp8"]
    assert adapter.missing() == [] and adapter.unsupported(call(device)) == []
    out = adapter.attend(q, k, v, scale=scale)[0]
    assert out.dtype == q.dtype
    assert reference.relative_error(out, reference.attend(q, k, v, scale=scale)[0]) < bound(q.dtype, "aiter-flydsl-fp8")
    used = library.last(":flydsl_flash_attn_func" if device is RX9070 else ":flydsl_flash_attn_batch_func")
    assert used.get("softmax_scale") is None, "a scale of its own would compile a kernel of its own"
    assert bool(library.fakes["aiter/ops/flydsl/fp8_quant.py:flydsl_fp8_quant"].calls) == (device is RX9070)


def test_flydsl_gives_the_log_sum_exp_on_gfx1250_alone(library):
    q, k, v = tensors((37, 61), heads=(4, 2))
    adapter = library.on(GFX1250, "aiter_flydsl").ADAPTERS["aiter-flydsl"]
    out, lse = adapter.attend(q, k, v, scale=0.07, need_lse=True)
    want_out, want_lse = reference.attend(q, k, v, scale=0.07)
    assert (lse - want_lse).abs().max() < 1e-5 and reference.relative_error(out, want_out) < 0.01
    assert adapter.unsupported(call(GFX1250, need_lse=True, kv_heads=8)) == []
    assert adapter.unsupported(call(RX9070, need_lse=True)) == [
        "On gfx1201 it cannot return the log-sum-exp, which ring attention needs."
    ]


def test_flydsl_passes_views_of_one_image_and_copies_a_batch(library):
    """ComfyUI's memory is (B, H, S, D). gfx1250's kernel takes its strides but finds the second image by length."""
    adapter = library.on(GFX1250, "aiter_flydsl").ADAPTERS["aiter-flydsl"]
    for batch in (1, 2):
        memory = [torch.randn(batch, 2, 20, 128, dtype=torch.bfloat16).transpose(1, 2) for _ in range(3)]
        out, _ = adapter.attend(*memory)
        given = library.last(":flydsl_flash_attn_batch_func")
        assert all((given[n] is t) == (batch == 1) for n, t in zip("qkv", memory))
        assert reference.relative_error(out, reference.attend(*memory)[0]) < 0.01


def test_flydsl_refuses_exactly(library):
    adapters = library.on(RX9070, "aiter_flydsl").ADAPTERS
    bf16, fp8 = adapters["aiter-flydsl"], adapters["aiter-flydsl-fp8"]
    assert bf16.unsupported(call(RX9070, kv_heads=8)) == [
        "On gfx1201 it needs as many key/value heads as query heads, and this call has 8 and 48."
    ]
    assert bf16.unsupported(call(RX9070, kv_len=349_440)) == []
    assert bf16.unsupported(call(RX9070, kv_len=349_600)) == [
        "On gfx1201 it takes less than 4 GiB of values per image, and this call has more."
    ]
    assert bf16.unsupported(call(GFX1250, head_dim=64)) == ["On gfx1250 it takes head size 128, and this model has 64."]
    assert fp8.unsupported(call(MI355, kv_heads=8)) == [] and len(fp8.unsupported(call(RX9070, kv_heads=8))) == 1
    assert registry.unavailable("aiter-flydsl", MI355)[0].endswith(
        "AITER has FlyDSL attention in bf16 for gfx1201 and gfx1250, in fp8 for gfx950 and gfx1201."
    )


def test_the_first_flydsl_takes_only_lengths_without_padding(empty):
    """It let padding take part in the softmax (up to 0.5 %), took no scale and had no fp8."""
    module = empty.provide(aiter_fakes.version("62c4b35")).on(RX9070, "aiter_flydsl")
    adapter, fp8 = module.ADAPTERS["aiter-flydsl"], module.ADAPTERS["aiter-flydsl-fp8"]
    assert adapter.missing() == [] and "'q_descale'" in fp8.missing()[0]
    assert adapter.unsupported(call(RX9070)) == []
    assert "pads lengths without a mask" in adapter.unsupported(call(RX9070, q_len=4600, kv_len=4600))[0]
    assert "4608 queries and 512 keys" in adapter.unsupported(call(RX9070, kv_len=512))[0]
    q, k, v = tensors((128, 128))
    for scale in (None, 0.05):
        out = adapter.attend(q, k, v, scale=scale)[0]
        assert reference.relative_error(out, reference.attend(q, k, v, scale=scale)[0]) < 0.02
    assert adapter.unsupported(call(GFX1250)) == [
        "This build of AITER has FlyDSL attention for gfx1250 with head size 192 only."
    ]


def test_flydsl_that_has_no_kernel_says_so_instead_of_falling_through(library):
    adapter = library.on(GFX1250, "aiter_flydsl").ADAPTERS["aiter-flydsl"]
    q, k, v = (t[..., :64] for t in tensors())
    with pytest.raises(RuntimeError, match="has no FlyDSL kernel for this call on AMD Instinct"):
        adapter.attend(q, k, v)


def test_aiter_without_flydsl_names_it(library, monkeypatch):
    monkeypatch.delitem(sys.modules, "aiter.ops.flydsl.fmha_kernels")
    error = ModuleNotFoundError("No module named 'flydsl'")
    monkeypatch.setattr("sys.meta_path", [failing("aiter.ops.flydsl.fmha_kernels", error), *sys.meta_path])
    for slug in FILES["aiter_flydsl"]:
        adapter = library.backend("aiter_flydsl").ADAPTERS[slug]
        assert "No module named 'flydsl'" in adapter.missing()[0]
        assert adapter.unsupported(call(RX9070, mask="full")), "asking what a missing part supports is no error"
    with pytest.raises(AttentionRefused, match="pip install flydsl"):
        registry.adapter("aiter-flydsl", RX9070)


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, mode",
    [
        ({}, 1),
        ({"aiter_rounding": "nearest even"}, 0),
        ({"aiter_rounding": "nearest away"}, 1),
        ({"aiter_rounding": "toward zero"}, 2),
    ],
)
def test_rounding_is_an_option_of_a_new_adapter(library, options, mode):
    registered = library.backend("aiter").ADAPTERS["aiter"]
    registered.with_options(**options).attend(*tensors())
    assert library.last("ops/mha.py:flash_attn_func")["how_v3_bf16_cvt"] == mode
    registered.attend(*tensors())
    assert library.last("ops/mha.py:flash_attn_func")["how_v3_bf16_cvt"] == 1, "the shared adapter has changed"


def test_unknown_rounding_is_refused_with_the_valid_ones(library):
    with pytest.raises(ValueError, match="'nearest even', 'nearest away', 'toward zero', not 'up'"):
        library.backend("aiter").ADAPTERS["aiter"].with_options(aiter_rounding="up")


# --- which kernel ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "device, dtype, q_len, kernel",
    [
        (MI300, torch.bfloat16, 129, "fmha_v3 assembly, rounding nearest away"),
        (MI355, torch.bfloat16, 129, "fmha_v3 assembly"),
        (MI300, torch.bfloat16, 128, "CK tile"),
        (MI300, torch.float16, 4608, "CK tile"),
        (MI250, torch.bfloat16, 4608, "CK tile"),
    ],
)
def test_kernel_names_follow_the_dispatch(library, monkeypatch, device, dtype, q_len, kernel):
    module = library.backend("aiter")
    monkeypatch.setattr(module, "describe", lambda _: device)
    q = torch.empty(1, q_len, 2, 128, dtype=dtype)
    assert module.ADAPTERS["aiter"].kernel(q, q, q) == kernel


def test_kernel_names_without_composable_kernel_and_with_opus(library, monkeypatch):
    module = library.backend("aiter")
    monkeypatch.setattr(module, "describe", lambda _: MI355)
    q = torch.empty(1, 200, 2, 128, dtype=torch.bfloat16)
    monkeypatch.setenv("AITER_ENABLE_FMHA_OPUS", "1")
    monkeypatch.setattr(library.package, "fmha_fwd_bf16_opus_fwd", None, raising=False)
    assert module.ADAPTERS["aiter"].kernel(q, q, q).startswith("OPUS")
    library.package.core.ENABLE_CK = False
    assert module.ADAPTERS["aiter"].kernel(q, q, q) == "AITER Triton mha (ENABLE_CK=0)"
    assert module.ADAPTERS["aiter-fp8"].kernel(q, q, q) == "AITER Triton mha_v3, fp8 (ENABLE_CK=0)"


# --- Triton's two implementations ------------------------------------------------------------------------------------


def implementations(library, monkeypatch, device):
    """What mha_set_impl was told during one call on `device`."""
    module, told = library.backend("aiter_triton"), []
    monkeypatch.setattr(module, "describe", lambda _: device)
    module.MHA._MHA_IMPL = "default"
    module.MHA.mha_set_impl = told.append
    module.ADAPTERS["aiter-triton"].attend(*tensors())
    return told, module.ADAPTERS["aiter-triton"]


@pytest.mark.parametrize("device", [W7900, MI250])
def test_radeon_uses_the_second_implementation_and_puts_the_switch_back(library, monkeypatch, device):
    told, adapter = implementations(library, monkeypatch, device)
    assert told == ["dao_ai", "default"]
    assert adapter.unsupported(call(device)) == []
    assert "2147483648" in adapter.unsupported(call(device, last_offset=2**31))[0]


def test_instinct_uses_the_first_implementation_with_64_bit_offsets(library, monkeypatch):
    told, adapter = implementations(library, monkeypatch, MI300)
    assert told == [] and adapter.unsupported(call(MI300, last_offset=2**33)) == []


def test_the_switch_is_put_back_when_the_kernel_fails(library, monkeypatch):
    module, told = library.backend("aiter_triton"), []
    monkeypatch.setattr(module, "describe", lambda _: W7900)
    module.MHA._MHA_IMPL, module.MHA.mha_set_impl = "default", told.append
    module.MHA.flash_attn_func.compute = lambda given: 1 / 0
    with pytest.raises(ZeroDivisionError):
        module.ADAPTERS["aiter-triton"].attend(*tensors())
    assert told == ["dao_ai", "default"]


def test_two_threads_never_share_the_switch(library, monkeypatch):
    """Two GPUs, two threads: while one launches, the other must neither see nor leave its implementation."""
    module, seen = library.backend("aiter_triton"), []
    monkeypatch.setattr(module, "describe", lambda _: W7900)
    module.MHA._MHA_IMPL = "default"
    module.MHA.mha_set_impl = lambda name: setattr(module.MHA, "_MHA_IMPL", name)
    launch = module.MHA.flash_attn_func.compute

    def slow(given):
        seen.append(module.MHA._MHA_IMPL)
        time.sleep(0.05)
        seen.append(module.MHA._MHA_IMPL)
        return launch(given)

    module.MHA.flash_attn_func.compute = slow
    threads = [threading.Thread(target=module.ADAPTERS["aiter-triton"].attend, args=tensors()) for _ in range(4)]
    for thread in threads:
        thread.start()
        time.sleep(0.02)
    for thread in threads:
        thread.join()
    assert seen == ["dao_ai"] * 8 and module.MHA._MHA_IMPL == "default"


def test_a_build_without_tiles_for_a_gpu_says_so(library):
    adapter = library.backend("aiter_triton").ADAPTERS["aiter-triton"]
    assert adapter.unsupported(call(Device("amd", "gfx1103", "Radeon 780M"))) == [
        "This build of AITER has no tile sizes of its Triton attention for gfx1103."
    ]


# --- its tiles -------------------------------------------------------------------------------------------------------


class Tuned:
    """Triton's tuner as the second implementation has it: a list of configurations, one of which launches."""

    def __init__(self):
        self.configs = ["AITER's own"]


@pytest.fixture
def dao(library):
    """A build that can be given tiles: `library` with the modules of the second implementation."""
    library.module("aiter.ops.triton._triton_kernels.flash_attn_triton_amd.fwd_prefill", attn_fwd=Tuned())
    library.module("aiter.ops.triton._triton_kernels.flash_attn_triton_amd.utils", FWD_CONF_OVERRIDE=None)
    return library


def with_switch(library, device):
    """aiter-triton on a device, over a library whose switch switches."""
    module = library.on(device, "aiter_triton")
    module.MHA._MHA_IMPL = "default"
    module.MHA.mha_set_impl = lambda name: setattr(module.MHA, "_MHA_IMPL", name)
    return module, module.ADAPTERS["aiter-triton"]


@pytest.mark.parametrize(
    "arch", ["gfx90a", "gfx1100", "gfx1101", "gfx1102", "gfx1150", "gfx1151", "gfx1200", "gfx1201"]
)
def test_every_architecture_without_a_tuned_tile_has_several_to_try(dao, arch):
    device = Device("amd", arch, "AMD")
    _, adapter = with_switch(dao, device)
    tried = adapter.variants(call(device))
    assert list(tried)[0] == "AITER's own tile" and len(tried) > 2 and tried["AITER's own tile"] is adapter


def test_instinct_has_a_tile_of_its_own_and_nothing_is_tried(dao):
    assert list(with_switch(dao, MI300)[1].variants(call(MI300))) == ["AITER's own tile"]


def test_a_tile_launches_alone_and_the_list_is_put_back(dao):
    module, adapter = with_switch(dao, W7900)
    launched, compute = [], module.MHA.flash_attn_func.compute

    def launch(given):
        launched.append((module.MHA._MHA_IMPL, list(module.DAO_KERNEL.attn_fwd.configs)))
        return compute(given)

    module.MHA.flash_attn_func.compute = launch
    q, k, v = tensors()
    for name, variant in adapter.variants(call(W7900)).items():
        out, lse = variant.attend(q, k, v, need_lse=True)
        assert reference.relative_error(out, reference.attend(q, k, v)[0]) < 0.01 and lse.shape == (2, 4, 37)
        implementation, configs = launched[-1]
        assert implementation == "dao_ai" and len(configs) == 1
        if variant is not adapter:
            assert configs[0].num_warps == variant.tile.warps and configs[0].num_stages == 1
            assert configs[0].kwargs["BLOCK_M"] == variant.tile.queries and "PRE_LOAD_V" in configs[0].kwargs
            assert f"tile {variant.tile.queries}x{variant.tile.keys}" in variant.kernel(q, k, v)
        assert module.DAO_KERNEL.attn_fwd.configs == ["AITER's own"] and module.MHA._MHA_IMPL == "default"
    assert len(launched) == len({str(configs) for _, configs in launched}) > 2


def test_a_tile_that_does_not_launch_leaves_the_list_as_it_was(dao):
    module, adapter = with_switch(dao, W7900)
    module.MHA.flash_attn_func.compute = lambda given: 1 / 0
    with pytest.raises(ZeroDivisionError):
        list(adapter.variants(call(W7900)).values())[1].attend(*tensors())
    assert module.DAO_KERNEL.attn_fwd.configs == ["AITER's own"] and module.MHA._MHA_IMPL == "default"


@pytest.mark.parametrize("arch", ["gfx1100", "gfx1151"])
def test_the_users_own_tile_wins_and_is_named(dao, monkeypatch, arch):
    """Also where AITER has a tile of its own in the other implementation (gfx1151), which would not read it."""
    dao.tiles("gfx1151")
    device, own = Device("amd", arch, "AMD"), '{"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4}'
    module, adapter = with_switch(dao, device)
    q, k, v = tensors()
    assert adapter.implementation(arch) == ("default" if arch == "gfx1151" else "dao_ai")
    monkeypatch.setenv(module.CONFIG_VARIABLE, own)
    assert adapter.kernel(q, k, v).endswith(f"{module.CONFIG_VARIABLE} is set and AITER ignores it)")
    monkeypatch.setattr(module.DAO_SETTINGS, "FWD_CONF_OVERRIDE", object())  # AITER read it while it was imported
    assert adapter.kernel(q, k, v) == f"AITER Triton mha (dao_ai, tile of {module.CONFIG_VARIABLE}: {own})"
    assert list(adapter.variants(call(device))) == ["AITER's own tile"] and adapter.unsupported(call(device)) == []


@pytest.fixture
def timed_tiles(dao, monkeypatch):
    """A machine that can time tiles: (module, adapter, milliseconds by tile name, names of what ran)."""
    module, adapter = with_switch(dao, W7900)
    speeds, last = {"AITER's own tile": 9.0, "dao_ai 64x32, 4 warps": 5.0}, []
    bound = autotune.bound

    def noted(chosen, *rest):
        run = bound(chosen, *rest)
        name = str(chosen.tile or "AITER's own tile") if hasattr(chosen, "tile") else "sdpa"
        return lambda: last.append(name) or run()

    monkeypatch.setattr(autotune, "can_time", lambda device: True)
    monkeypatch.setattr(autotune, "bound", noted)
    monkeypatch.setattr(autotune, "stream_ms", lambda run: run() is not None and speeds.get(last[-1], 7.0))
    return module, adapter, speeds, last


def test_the_fastest_tile_is_used_and_remembered_per_card(timed_tiles, tmp_path):
    module, adapter, speeds, last = timed_tiles
    q, k, v = tensors()
    tuner = autotune.Tuner(tmp_path / "auto.json")
    chosen = tuner.variant("aiter-triton", adapter, call(W7900), q, k, v)
    assert str(chosen.tile) == "dao_ai 64x32, 4 warps" and "64x32, 4 warps, the fastest measured here" in chosen.kernel(
        q, k, v
    )
    speeds["dao_ai 64x64, 4 warps"] = 1.0
    last.clear()
    for again in (tuner, autotune.Tuner(tmp_path / "auto.json")):  # in this process, and in the next one
        assert again.variant("aiter-triton", adapter, call(W7900), q, k, v).tile == chosen.tile
    assert last == [], "nothing is measured twice"
    other = Device("amd", "gfx1100", "AMD Radeon RX 7900 XTX")
    assert str(tuner.variant("aiter-triton", adapter, call(other), q, k, v).tile) == "dao_ai 64x64, 4 warps"


def test_a_tile_that_fails_or_is_wrong_is_not_used(timed_tiles, tmp_path):
    module, adapter, speeds, _ = timed_tiles
    speeds.update({"dao_ai 64x32, 4 warps": 1.0, "dao_ai 64x64, 4 warps": 2.0, "dao_ai 128x32, 8 warps": 3.0})
    compute = module.MHA.flash_attn_func.compute

    def launch(given):
        config = module.DAO_KERNEL.attn_fwd.configs[0]
        tile = getattr(config, "kwargs", {}).get("BLOCK_M"), getattr(config, "kwargs", {}).get("BLOCK_N")
        if tile == (64, 32):
            raise RuntimeError("out of resource: shared memory")
        return compute(given) * (1.5 if tile == (64, 64) else 1.0)

    module.MHA.flash_attn_func.compute = launch
    chosen = autotune.Tuner(tmp_path / "auto.json").variant("aiter-triton", adapter, call(W7900), *tensors())
    assert str(chosen.tile) == "dao_ai 128x32, 8 warps"
    (entry,) = json.loads((tmp_path / "auto.json").read_text()).values()
    reasons = {row["backend"]: row["reason"] for row in entry["candidates"]}
    assert "out of resource" in reasons["dao_ai 64x32, 4 warps"] and "rejected" in reasons["dao_ai 64x64, 4 warps"]


def test_auto_and_an_explicit_choice_launch_the_fastest_tile(timed_tiles, monkeypatch, tmp_path):
    """Through the dispatcher, as every model and Benchmark call goes."""
    monkeypatch.setattr("flux2_pack.attention.call.describe", lambda _: W7900)
    monkeypatch.setattr(registry, "AUTO_ORDER", ["sdpa", "aiter-triton"])
    speeds = timed_tiles[2]
    for backend in ("aiter-triton", "auto"):
        speeds["sdpa"] = 8.0  # slower than the best tile, faster than AITER's own
        dispatcher = AttentionDispatcher(backend, tuner=autotune.Tuner(tmp_path / f"{backend}.json"))
        dispatcher.attend(*tensors())
        (entry,) = dispatcher.log.current.as_data()["entries"]
        assert entry["backend"] == "aiter-triton" and "64x32, 4 warps" in entry["kernel"], entry


def test_builds_that_cannot_be_given_a_tile_have_none_to_try(library):
    _, adapter = with_switch(library, W7900)
    assert list(adapter.variants(call(W7900))) == ["AITER's own tile"]


# --- refusals --------------------------------------------------------------------------------------------------------


def test_v4_refuses_by_architecture_dtype_heads_size_mask_and_lse(library):
    adapters = library.backend("aiter_v4").ADAPTERS
    assert adapters["aiter-v4-i8fp8"].unsupported(call(MI300)) == []
    assert adapters["aiter-v4-mxfp4"].unsupported(call(MI355)) == []
    assert adapters["aiter-v4-mxfp4"].unsupported(call(MI300)) == [
        "AITER has this kernel for gfx950, and this GPU is gfx942."
    ]
    wrong = call(MI355, dtype=torch.float16, kv_heads=8, head_dim=64, mask="full", need_lse=True)
    assert len(adapters["aiter-v4-fp8"].unsupported(wrong)) == 4
    assert adapters["aiter-v4-bf16"].unsupported(call(MI355, need_lse=True)) == []
    assert adapters["aiter-v4-i8fp8"].unsupported(call(MI300, need_lse=True)) == [
        "AITER raises for its log-sum-exp on gfx942: it is validated on gfx950 alone."
    ]
    assert adapters["aiter-v4-fp8"].unsupported(call(MI355, kv_len=512)) == [], "any lengths"


def test_fp8_names_the_wrong_format_that_aiter_chose(library):
    adapter = library.backend("aiter").ADAPTERS["aiter-fp8"]
    assert adapter.unsupported(call(MI355)) == []
    assert adapter.unsupported(call(MI300)) == [
        (
            "AITER took float8_e4m3fn for this GPU, which computes in float8_e4m3fnuz (aiter #3807). Start with "
            "GPU_ARCHS=gfx942."
        )
    ]
    library.package.dtypes.fp8 = torch.uint8
    assert adapter.missing() == ["AITER knows no fp8 format for this GPU (it names uint8)."]


@pytest.mark.parametrize("file, slug", SLUGS)
def test_nothing_takes_a_mask_or_float32(library, file, slug):
    reasons = library.backend(file).ADAPTERS[slug].unsupported(call(MI355, mask="full", dtype=torch.float32))
    assert any("mask" in r for r in reasons) and any("float32" in r for r in reasons)


# --- libraries that are broken, old, or partly there ------------------------------------------------------------------


def reasons(slug, device=MI300):
    return registry.unavailable(slug, device)


def failing(module, error):
    """A finder that raises when `module` is imported."""

    class Finder:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == module:
                raise error

    return Finder


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("ROCm version file not found"),
        OSError("libamdhip64.so"),
        KeyError("gfx"),
        ModuleNotFoundError("No module named 'aiter'"),
    ],
)
def test_any_failure_at_import_is_a_reason(monkeypatch, error):
    """`import aiter` on a machine without ROCm is a RuntimeError, not an ImportError."""
    aiter_fakes.forget(monkeypatch)
    monkeypatch.setattr("sys.meta_path", [failing("aiter", error), *sys.meta_path])
    for slug in ("aiter", "aiter-fp8", "aiter-triton", "aiter-sage"):
        found = reasons(slug)
        assert len(found) == 1 and type(error).__name__ in found[0] and str(error) in found[0]
    with pytest.raises(AttentionRefused, match="AITER cannot be imported"):
        registry.adapter("aiter", MI300)


def test_rows_and_adapters_are_the_same_backends_on_the_same_hardware(library):
    assert {slug for slug in registry.ROWS if slug.startswith("aiter")} == {slug for _, slug in SLUGS}
    for slug, adapter in library.backend("aiter_v4").ADAPTERS.items():
        assert registry.row(slug).hardware.archs == {"amd": adapter.archs}
        assert registry.row(slug).exact == (slug == "aiter-v4-bf16")


def test_all_is_well_with_main(library):
    for file, slug in SLUGS:
        assert library.backend(file).ADAPTERS[slug].missing() == [], slug
    assert reasons("aiter") == [] and reasons("aiter-triton", W7900) == []


def test_an_nvidia_gpu_is_named_whatever_is_installed(library):
    assert reasons("aiter", H200) == ["It needs an AMD GPU, and this model runs on an NVIDIA GPU (sm90)."]


def test_an_empty_library_lacks_everything_by_name(empty):
    assert reasons("aiter") == ["This build of AITER has no flash_attn_func."]
    assert reasons("aiter-fp8") == ["This build of AITER has no flash_attn_fp8_pertensor_func."]
    for slug, part in (("aiter-triton", "attention.mha"), ("aiter-sage", "fav3_sage")):
        assert len(reasons(slug)) == 1 and part in reasons(slug)[0]
    for slug, adapter in empty.backend("aiter_v4").ADAPTERS.items():
        assert len(adapter.missing()) == 1 and "aiter.ops.mha_v4" in adapter.missing()[0], slug


def test_one_broken_part_leaves_the_others(library, monkeypatch):
    """A part that raises while it is imported, not as ImportError."""
    monkeypatch.delitem(sys.modules, "aiter.ops.triton.attention.fav3_sage")
    monkeypatch.setattr(
        "sys.meta_path", [failing("aiter.ops.triton.attention.fav3_sage", RuntimeError("no HIP here")), *sys.meta_path]
    )
    adapters = library.backend("aiter_triton").ADAPTERS
    assert (
        adapters["aiter-triton"].missing() == [] and "RuntimeError: no HIP here" in adapters["aiter-sage"].missing()[0]
    )
    assert adapters["aiter-sage"].unsupported(call(need_lse=True)), "asking what a missing part supports is no error"


def test_old_flat_module_names_are_found(empty, monkeypatch):
    flat = [
        {**f, "file": "aiter/ops/triton/mha.py"}
        for f in MAIN
        if f["file"].endswith("attention/mha.py") and f["name"] == "flash_attn_func"
    ]
    empty.provide(flat).tiles("MI300X")
    module = empty.backend("aiter_triton")
    adapter = module.ADAPTERS["aiter-triton"]
    assert adapter.missing() == [] and adapter.unsupported(call(MI300)) == []
    assert adapter.unsupported(call(W7900)) == [
        "This build of AITER has no tile sizes of its Triton attention for gfx1100."
    ]
    q, k, v = tensors()
    monkeypatch.setattr(module, "describe", lambda _: MI300)
    assert reference.relative_error(adapter.attend(q, k, v)[0], reference.attend(q, k, v)[0]) < 0.01


def test_triton_only_aiter_has_no_name_for_fp8(library):
    """AITER_TRITON_ONLY=1, automatic on Windows."""
    del library.package.dtypes
    adapters = library.backend("aiter_triton").ADAPTERS
    assert adapters["aiter-triton"].missing() == [] and adapters["aiter-sage"].missing() == [
        "This build of AITER has no dtypes."
    ]


def changed(function, change):
    return {**function, "parameters": change(function["parameters"])}


CHANGES = [
    (lambda p: [x for x in p if x[0] != "softmax_scale"], "unexpected keyword argument 'softmax_scale'"),
    (lambda p: p + [["*", "marker"], ["new", "required"]], "'new'"),
]


@pytest.mark.parametrize(
    "file, slug, ending",
    [
        ("aiter", "aiter", "ops/mha.py:flash_attn_func"),
        ("aiter_triton", "aiter-triton", "attention/mha.py:flash_attn_func"),
        ("aiter_triton", "aiter-sage", "fav3_sage_wrapper_func"),
        ("aiter_v4", "aiter-v4-fp8", ":mha_v4"),
        ("aiter_v4", "aiter-v4-mxfp8", ":mha_v4"),
    ],
)
@pytest.mark.parametrize("change, words", CHANGES)
def test_a_changed_signature_is_a_sentence_and_not_a_crash(empty, file, slug, ending, change, words):
    empty.provide([changed(f, change) if f"{f['file']}:{f['name']}".endswith(ending) else f for f in MAIN])
    found = empty.backend(file).ADAPTERS[slug].missing()
    assert len(found) == 1 and words in found[0], found


def v4_of(empty, commit):
    return empty.provide(aiter_fakes.version(commit)).backend("aiter_v4").ADAPTERS


@pytest.mark.parametrize("commit, known", [("e404860", False), ("0055212", True), ("1013b75", True)])
def test_builds_before_bf16_say_so(empty, commit, known):
    adapters = v4_of(empty, commit)
    for slug in ("aiter-v4-bf16", "aiter-v4-bf16fp8"):
        found = adapters[slug].missing()
        assert found == [] if known else len(found) == 1 and "does not know BF16 queries" in found[0], found
    assert adapters["aiter-v4-fp8"].missing() == [] and adapters["aiter-v4-mxfp8"].missing() == []


@pytest.mark.parametrize(
    "commit, function", [("e404860", ":mha_v4_packed"), ("0055212", ":mha_v4_packed"), ("1013b75", ":mha_v4")]
)
def test_mxfp8_is_told_by_scale_modes_or_packed_here(empty, commit, function):
    q, k, v = tensors((37, 61))
    out, _ = v4_of(empty, commit)["aiter-v4-mxfp8"].attend(q, k, v, scale=0.05)
    per_32, per_tensor = aiter_fakes.AttentionScaleMode.E8M0_PER_1X32, aiter_fakes.AttentionScaleMode.F32_PER_TENSOR
    given = empty.last(function)
    assert [given[f"{n}_scale_mode"] for n in "qkv"] == [per_32, per_32, per_tensor]
    assert reference.relative_error(out, reference.attend(q, k, v, scale=0.05)[0]) < bound(q.dtype, "aiter-v4-mxfp8")


@pytest.mark.parametrize("commit", ["e404860", "0055212"])
def test_v4_builds_that_raise_for_the_log_sum_exp_are_not_asked(empty, commit):
    """They have the parameter `return_lse` and raise for it."""
    assert v4_of(empty, commit)["aiter-v4-fp8"].unsupported(call(MI355, need_lse=True)) == [
        "It cannot return the log-sum-exp, which ring attention needs."
    ]


def test_the_exact_v4_is_a_candidate_of_auto():
    assert "aiter-v4-bf16" in registry.AUTO_ORDER and "aiter-v4-bf16fp8" not in registry.AUTO_ORDER


@pytest.mark.parametrize("commit", ["e404860", "0540e3f"])
def test_current_sage_binds_without_q_smooth(empty, commit):
    adapter = empty.provide(aiter_fakes.version(commit)).backend("aiter_triton").ADAPTERS["aiter-sage"]
    assert adapter.missing() == [] and adapter.limits.lse
    q, k, v = tensors()
    assert reference.relative_error(adapter.attend(q, k, v)[0], reference.attend(q, k, v)[0]) < 0.02


def test_a_v4_without_a_format_says_which(library):
    aiter_v4 = library.backend("aiter_v4")
    library.fakes["aiter/ops/mha_v4.py:scale_modes_for_formats"].compute = lambda given: (
        1 / 0 if given["v_format"] == aiter_fakes.F.MXFP4 else None
    )
    assert aiter_v4.ADAPTERS["aiter-v4-mxfp4"].missing() == []
    assert aiter_v4.ADAPTERS["aiter-v4-f4f4"].missing() == [
        (
            "This build's MHA v4 does not know MXFP4 queries and keys with MXFP4 values (ZeroDivisionError: division "
            "by zero)."
        )
    ]
