"""Backend cudnn-fp8: on a fake of cuDNN in Triton's interpreter, its kernels compiled for Hopper, and its refusals."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

import cudnn_fake
from flux2_pack.attention import registry
from flux2_pack.attention.call import call_of
from flux2_pack.attention.device import Device
from test_fast_blocks import run

HERE = Path(__file__).parent
HOPPER = Device("nvidia", "sm90", "an H200")


@pytest.fixture
def adapter(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setitem(sys.modules, "cudnn", cudnn_fake.module())
    monkeypatch.delitem(sys.modules, "flux2_pack.attention.backends.cudnn_fp8", raising=False)
    monkeypatch.setattr(registry, "_modules", {})
    return registry.adapter("cudnn-fp8", HOPPER)


@pytest.mark.parametrize("file", ["cudnn_fp8_interpreted.py", "fp8_qkv_interpreted.py"])
def test_in_the_interpreter(file, small_models, tmp_path):
    """The adapter alone, and with q, k and v from the fused blocks."""
    pytest.importorskip("triton")
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", HERE / file]
    done = run(words, tmp_path, "1")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout.splitlines()[-1]


@pytest.mark.parametrize("arch", ["sm90", "sm100"])
def test_its_kernels_compile_for_gpus_that_are_not_here(arch, tmp_path):
    pytest.importorskip("triton")
    done = run([HERE / "cudnn_fp8_compile.py", arch], tmp_path, "0")
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = json.loads(done.stdout.splitlines()[-1])
    assert all(k["ok"] for k in kernels)
    own = {"_observe", "_conclude", "_quantise", "_restore", "_learn"}
    assert {k["name"] for k in kernels} == own | {"_qkv_fp8", "_attention_output", "_swiglu"}


def call(**changes):
    t = torch.empty(1, 256, 4, 128, dtype=torch.bfloat16)
    return dataclasses.replace(call_of(t, t, t), device=HOPPER, **changes)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"dtype": torch.float32}, "bfloat16, float16"),
        ({"head_dim": 96}, "head size 64 or 128"),
        ({"head_dim": 256}, "head size 64 or 128"),
        ({"kv_heads": 2}, "as many key/value heads"),
        ({"mask": "full"}, "no attention mask"),
        ({"last_offset": 2**31}, "32-bit"),
    ],
)
def test_it_refuses_in_words_what_it_cannot_compute(adapter, changes, sentence):
    assert adapter.unsupported(call()) == [] and adapter.unsupported(call(need_lse=True, mask="keys")) == []
    (reason,) = adapter.unsupported(call(**changes))
    assert sentence in reason


@pytest.mark.parametrize("version, works", [(91900, True), (90100, True), (90000, False), (91000, False)])
def test_versions_of_cudnn(adapter, version, works):
    sys.modules["cudnn"].backend_version = lambda: version
    assert (adapter.missing() == []) is works


@pytest.mark.parametrize(
    "device",
    [Device("nvidia", "sm89", "an RTX 4090"), Device("amd", "gfx950", "an MI355X"), Device("cpu", "x86", "a CPU")],
)
def test_other_hardware_is_refused_by_name(device):
    assert any("It needs" in reason for reason in registry.unavailable("cudnn-fp8", device))


def test_without_the_library_the_hint_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "cudnn", None)
    monkeypatch.delitem(sys.modules, "flux2_pack.attention.backends.cudnn_fp8", raising=False)
    monkeypatch.setattr(registry, "_modules", {})
    with pytest.raises(registry.AttentionRefused, match="pip install nvidia-cudnn-frontend"):
        registry.adapter("cudnn-fp8", HOPPER)
