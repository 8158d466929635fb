"""AITER proof 1: what the backends pass binds to AITER's own signatures, read from source and never imported: the
published wheel, and the newer versions recorded in data/aiter_signatures.json with commit and file.
"""

import os
from pathlib import Path

import pytest
import torch

import aiter_shim
from aiter_fakes import MAIN, TABLE, Library
from test_aiter import GFX1250, MI355, RX9070, SLUGS, tensors

IN_CHECKOUT = [  # every function that the backends call, or ask for
    *(("aiter/ops/mha.py", name) for name in ("flash_attn_func", "flash_attn_fp8_pertensor_func")),
    *(("aiter/ops/triton/attention/mha.py", name) for name in ("flash_attn_func", "mha_set_impl")),
    ("aiter/ops/triton/attention/fav3_sage.py", "fav3_sage_wrapper_func"),
    ("aiter/ops/triton/attention/fav3_sage_attention_mxfp4_wrapper.py", "fav3_sage_mxfp4_wrapper"),
    *(("aiter/ops/mha_v4.py", name) for name in ("mha_v4", "mha_v4_packed", "scale_modes_for_formats")),
    *(("aiter/ops/mha_v4.py", name) for name in ("native_fp8_format", "mha_v4_q_multiplier", "quantize_fp8")),
    *(("aiter/ops/mha_v4.py", name) for name in ("quantize_mxfp8_q", "quantize_mxfp8_k")),
    *(("aiter/ops/flydsl/fmha_kernels.py", f"flydsl_flash_attn_{kind}") for kind in ("func", "batch_func")),
    ("aiter/ops/flydsl/fp8_quant.py", "flydsl_fp8_quant"),
]
MUST_RUN = {"aiter", "aiter-fp8", "aiter-triton", "aiter-sage", "aiter-sage-mxfp4", "aiter-flydsl", "aiter-v4-fp8"}
IN_WHEEL = [
    ("aiter/ops/mha.py", "flash_attn_func"),
    ("aiter/ops/mha.py", "flash_attn_fp8_pertensor_func"),
    ("aiter/ops/triton/mha.py", "flash_attn_func"),
]


def recorded(path, name, source):
    return {"file": path, "name": name, "parameters": aiter_shim.parameters((source / path).read_text(), name)}


@pytest.fixture(scope="session")
def wheel():
    try:
        return aiter_shim.wheel_source()
    except OSError as error:
        pytest.skip(str(error))


@pytest.fixture
def published(wheel, monkeypatch, tmp_path):
    return (
        Library(monkeypatch, tmp_path)
        .provide([recorded(path, name, wheel) for path, name in IN_WHEEL])
        .tiles("MI300X", "MI350X")
    )


@pytest.mark.parametrize("file, slug", [("aiter", "aiter"), ("aiter_triton", "aiter-triton")])
@pytest.mark.parametrize("need_lse", [False, True])
def test_our_call_binds_to_the_published_wheel(published, file, slug, need_lse):
    adapter = published.backend(file).ADAPTERS[slug]
    assert adapter.missing() == []
    q = tensors()[0]
    out, lse = adapter.attend(*tensors(), need_lse=need_lse)  # the fake binds its arguments to the wheel's signature
    assert out.shape == q.shape and (lse.shape == (2, 4, 37) if need_lse else lse is None)


@pytest.mark.parametrize("file, slug", SLUGS)
def test_our_call_binds_to_a_checkout(monkeypatch, tmp_path, file, slug):
    """AITER_SOURCE: what a backend can run there it calls with arguments that are known there; what it cannot, it says.
    Functions that moved are found again under another file's name, or named as missing."""
    if not os.environ.get("AITER_SOURCE"):
        pytest.skip("AITER_SOURCE does not name a checkout of ROCm/aiter")
    source = Path(os.environ["AITER_SOURCE"])
    found = [recorded(path, name, source) for path, name in IN_CHECKOUT if defines(source / path, name)]
    library = Library(monkeypatch, tmp_path).provide(found)
    module = library.on(RX9070 if slug == "aiter-flydsl" else MI355, file)
    adapter = module.ADAPTERS[slug]
    missing = adapter.missing()
    assert not missing or slug not in MUST_RUN, missing
    if not missing:
        generator = torch.Generator().manual_seed(5)  # 128: what the first FlyDSL takes
        q, k, v = (torch.randn(1, 128, 4, 128, generator=generator).bfloat16() for _ in range(3))
        for need_lse in [False, True] if adapter.limits.lse and slug != "aiter-flydsl" else [False]:
            assert adapter.attend(q, k, v, need_lse=need_lse)[0].shape == q.shape


def defines(file, name):
    """Whether a source file has a function of this name that is its own, not one that it imports."""
    return file.is_file() and f"\ndef {name}(" in file.read_text()


def test_the_published_wheel_says_what_it_lacks(published):
    """Its fp8 function takes no scales, and it has neither SageAttention nor MHA v4."""
    fp8 = published.backend("aiter").ADAPTERS["aiter-fp8"].missing()
    assert len(fp8) == 1 and "unexpected keyword argument 'q_descale'" in fp8[0]
    for file, slug in SLUGS:
        if "sage" in slug or "v4" in slug:
            assert published.backend(file).ADAPTERS[slug].missing(), slug


def test_the_table_names_commits_and_files():
    for version in TABLE["versions"]:
        assert len(version["commit"]) == 40 and version["date"] and version["why"]
        assert all(
            f["file"].startswith("aiter/") and f["parameters"]
            for f in version["functions"]
            if f["name"] != "native_fp8_format"
        )


@pytest.mark.parametrize("file, slug", SLUGS)
def test_our_call_binds_to_the_recorded_main(monkeypatch, tmp_path, file, slug):
    library = Library(monkeypatch, tmp_path).provide(MAIN)
    adapter = library.on(GFX1250 if slug == "aiter-flydsl" else MI355, file).ADAPTERS[slug]
    assert adapter.missing() == []
    for need_lse in [False, True] if adapter.limits.lse else [False]:
        adapter.attend(*tensors(), scale=0.1, need_lse=need_lse)
    called = {
        key: set(given)
        for key, fake in library.fakes.items()
        for given in fake.calls
        if key.split(":")[1] not in ("scale_modes_for_formats", "native_fp8_format")
    }
    assert called and all(any(t in given for t in ("q", "input", "softmax_scale", "impl")) for given in called.values())


def test_parameters_are_read_as_python_reads_them():
    text = "def f(a, b: int, c=None, *, d=1, e) -> int:\n    pass\n"
    assert aiter_shim.parameters(text, "f") == [
        ["a", "required"],
        ["b", "required"],
        ["c", "optional"],
        ["*", "marker"],
        ["d", "optional"],
        ["e", "required"],
    ]
