"""AITER proofs 2 and 4: AITER's own Triton kernels through our adapters, without an AMD GPU. Through
benchmarks/aiter_check.py, which does the same on an NVIDIA GPU (proof 3). The kernels are those of the published wheel;
set AITER_SOURCE to a checkout of ROCm/aiter for newer ones.
"""

import importlib.util
import json
import os
from pathlib import Path
import shutil
import subprocess
import sys

import pytest

import aiter_shim
from test_aiter_signatures import wheel  # noqa: F401

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "aiter_check.py"


@pytest.fixture(scope="session")
def newer(tmp_path_factory):
    """A newer source tree, reduced to the files that the script names, so that the list is known to be complete."""
    if not os.environ.get("AITER_SOURCE"):
        pytest.skip("AITER_SOURCE does not name a checkout of ROCm/aiter")
    source, reduced = Path(os.environ["AITER_SOURCE"]), tmp_path_factory.mktemp("aiter")
    for name in aiter_shim.files(source):
        (reduced / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / name, reduced / name)
    return reduced


def check(tmp_path, source, *arguments, interpret=False):
    """Run the script in a process of its own (kernels are interpreted or compiled for the whole process). Returns its
    JSON line.
    """
    environment = {
        **os.environ,
        "TRITON_CACHE_DIR": str(tmp_path),
        "TRITON_INTERPRET": "1" if interpret else "0",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [sys.executable, SCRIPT, "--aiter-source", source, *arguments], capture_output=True, text=True, env=environment
    )
    assert done.stdout.strip().startswith(("ok", "BAD")) and done.returncode in (0, 1), (
        done.stdout[-2000:] + done.stderr[-2000:]
    )
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert result["ok"], "\n".join(line for line in done.stdout.splitlines() if line.startswith("BAD"))
    return result["cases"]


def names(cases, slug):
    return {c["case"] for c in cases if c["backend"] == slug}


ALL = {
    "plain",
    "odd length",
    "more keys than queries",
    "scale 0.05",
    "BHSD memory",
    "slices of fused qkv",
    "grouped heads",
    "batch 2",
    "keys with a common offset",
}


def test_the_wheels_mha_is_exact_in_the_interpreter(tmp_path, wheel):  # noqa: F811
    """Output within twice PyTorch's own fp16 error, log-sum-exp within float32 rounding, also merged from two halves of
    the keys.
    """
    cases = check(tmp_path, wheel, "--backends", "aiter-triton", interpret=True)
    assert names(cases, "aiter-triton") == ALL and {c["how"] for c in cases} == {"one call", "two halves"}


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_the_wheels_mha_compiles_for_instinct(tmp_path, wheel, arch):  # noqa: F811
    cases = check(tmp_path, wheel, "--compile", arch, "--backends", "aiter-triton")
    assert {c["need_lse"] for c in cases} == {False, True} and all(c["bytes"] > 5000 for c in cases)


def test_newer_mha_and_sage_in_the_interpreter(tmp_path, newer):
    cases = check(tmp_path, newer, interpret=True)
    assert names(cases, "aiter-triton") == names(cases, "aiter-sage") == ALL


@pytest.mark.parametrize(
    "arch, backends, kernels",
    [
        ("gfx942", ["aiter-triton", "aiter-sage"], {"sage_quant_kernel", "sage_fwd"}),
        (
            "gfx950",
            ["aiter-triton", "aiter-sage", "aiter-sage-mxfp4"],
            {"sage_quant_kernel", "sage_fwd", "sage_fwd_mxfp4", "_downcast_to_mxfp"},
        ),
        ("gfx90a", ["aiter-triton"], {"attn_fwd"}),
        ("gfx1100", ["aiter-triton"], {"attn_fwd"}),
        ("gfx1201", ["aiter-triton"], {"attn_fwd"}),
    ],
)
def test_newer_kernels_compile_for_amd(tmp_path, newer, arch, backends, kernels):
    cases = check(tmp_path, newer, "--compile", arch, "--backends", *backends)
    assert {c["backend"] for c in cases} == set(backends) and kernels <= {c["kernel"] for c in cases}


@pytest.mark.parametrize(
    "arch", ["gfx90a", "gfx1100", "gfx1101", "gfx1102", "gfx1150", "gfx1151", "gfx1200", "gfx1201"]
)
def test_every_tile_that_is_tried_compiles_without_spilling(tmp_path, newer, arch):
    """And two work groups fit beside each other, by registers and by LDS."""
    cases = check(tmp_path, newer, "--compile", arch, "--tiles", "--backends", "aiter-triton")
    assert len(cases) >= 2 and len({c["tile"] for c in cases}) == len(cases)
    for case in cases:
        assert case["spilled"] == case["scratch"] == 0 and case["groups"] >= 2, case


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_flydsl_attention_compiles_for_rdna4(dtype):
    """AITER's kernel by FlyDSL's own compiler, without ROCm: no register is spilled, two work groups share the LDS."""
    if not os.environ.get("AITER_SOURCE") or importlib.util.find_spec("flydsl") is None:
        pytest.skip("AITER_SOURCE does not name a checkout of ROCm/aiter, or flydsl is not installed")
    if not (Path(os.environ["AITER_SOURCE"]) / "aiter/ops/flydsl/kernels/flash_attn_func_gfx1201.py").is_file():
        pytest.skip("this AITER has another FlyDSL kernel for gfx1201")
    done = subprocess.run(
        [sys.executable, SCRIPT.parent.parent / "tests" / "flydsl_compile.py", os.environ["AITER_SOURCE"], dtype],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    used = json.loads(done.stdout.splitlines()[-1])
    assert used["code_object"] and used["wavefront_size"] == 32
    assert used["vgpr_spill_count"] == used["private_segment_fixed_size"] == 0 and used["vgpr_count"] <= 256
    assert 0 < 2 * used["group_segment_fixed_size"] <= 131072


def test_a_code_object_is_told_from_other_files():
    header = bytearray(64)
    header[:5], header[18:20], header[48:52] = (
        b"\x7fELF\x02",
        (224).to_bytes(2, "little"),
        (0x54C).to_bytes(4, "little"),
    )
    assert aiter_shim.is_code_object(bytes(header), "gfx942") and not aiter_shim.is_code_object(bytes(header), "gfx950")
    assert not aiter_shim.is_code_object(Path(sys.executable).read_bytes()[:64], "gfx942")
