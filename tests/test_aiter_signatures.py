"""AITER proof 1: what the backends pass binds to AITER's own signatures, read from source and never imported: the
published wheel, and the newer versions recorded in data/aiter_signatures.json with commit and file.
"""

import pytest
import torch

import aiter_shim
from aiter_fakes import MAIN, TABLE, Library
from test_aiter import GFX1250, MI355, SLUGS, tensors

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
