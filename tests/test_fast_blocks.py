"""Fused blocks: against core's in Triton's interpreter, and compiled for GPUs that are not here. Both in processes of
their own.
"""

import json
import os
from pathlib import Path
import subprocess
import sys

import pytest

HERE = Path(__file__).parent
PARTS = [pytest.param("quick", marks=pytest.mark.quick), "not quick"]  # of the tests in the interpreter


def run(words, tmp_path, interpret):
    environment = {
        **os.environ,
        "TRITON_CACHE_DIR": str(tmp_path / "triton"),
        "TRITON_INTERPRET": interpret,
        "CUDA_VISIBLE_DEVICES": "",
    }
    return subprocess.run(
        [sys.executable, *words], env=environment, cwd=HERE.parent, capture_output=True, text=True, timeout=1500
    )


@pytest.mark.parametrize("part", PARTS)
def test_fused_blocks_equal_cores_in_the_interpreter(small_models, tmp_path, part):
    pytest.importorskip("triton")
    words = ["-m", "pytest", "-q", "-m", part, "-p", "no:cacheprovider", "--tb=short"]
    done = run([*words, HERE / "fast_blocks_interpreted.py"], tmp_path, "1")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout.splitlines()[-1]


# of a SIMD: vector registers for each lane of a wave; of the unit with four SIMDs: bytes of LDS; lanes of a wave. From
# AMD's instruction set guides of CDNA 2 to 4 and RDNA 3 and 4; Radeon's LDS is that of a work group processor
UNITS = {
    "gfx90a": (512, 64 * 1024, 64),
    "gfx942": (512, 64 * 1024, 64),
    "gfx950": (512, 160 * 1024, 64),
    "gfx1100": (1536, 128 * 1024, 32),
    "gfx1151": (1536, 128 * 1024, 32),
    "gfx1201": (1536, 128 * 1024, 32),
}
NVIDIA_ONLY = ("num_ctas", "maxnreg", "num_consumer_groups", "launch_pdl", "launch_cooperative_grid", "inline_asm")


def compiled_for(script, archs, tmp_path):
    """{architecture: [what a script that compiles kernels says of each]}."""
    pytest.importorskip("triton")
    done = run([HERE / script, *archs], tmp_path, "0")
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {row["arch"]: row["kernels"] for row in rows}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return compiled_for("fast_kernels_compile.py", [*UNITS, "sm90"], tmp_path_factory.mktemp("compiled"))


@pytest.mark.parametrize("arch", [*UNITS, "sm90"])
def test_the_kernels_compile_for_gpus_that_are_not_here(arch, compiled):
    """And on AMD two waves of each fit on a SIMD, so that one computes while the other waits for memory."""
    kernels = compiled[arch]
    assert all(k["ok"] for k in kernels)
    assert {k["name"] for k in kernels} == {"_residual_norm", "_qkv", "_swiglu", "_quantise", "_dequantise"}
    if arch in UNITS:
        registers, lds, wave = UNITS[arch]
        for kernel in kernels:
            assert kernel["wave"] == wave and kernel["spilled"] == 0 and 0 < 2 * kernel["registers"] <= registers, (
                kernel
            )
            groups = -(-8 * wave // kernel["threads"])  # workgroups that fill four SIMDs twice
            assert groups * (kernel["lds"] + kernel["shared"]) <= lds and kernel["threads"] <= 1024, kernel


def test_no_kernel_asks_for_what_only_nvidias_compiler_knows():
    for file in (HERE.parent / "flux2" / "fused" / "kernels").glob("*.py"):
        assert not [word for word in NVIDIA_ONLY if word in file.read_text()], file


def test_launches_are_computed_with_plain_integers():
    """As Triton's own functions do, which cost microseconds on the host in every launch: nothing calls those."""
    triton = pytest.importorskip("triton")
    from flux2_pack.attention.tiles import cdiv, next_power_of_2

    for size in [*range(1, 300), 4608, 16896, 55296, 2**31 + 1]:
        assert next_power_of_2(size) == triton.next_power_of_2(size)
        assert all(cdiv(size, tile) == triton.cdiv(size, tile) for tile in (1, 7, 32, 2048))
    for folder in ("flux2", "attention"):
        for file in (HERE.parent / folder).rglob("*.py"):
            text = file.read_text().replace("triton.cdiv and triton.next_power_of_2 give", "")
            assert "triton.cdiv" not in text and "triton.next_power_of_2" not in text, file


def test_forwards_are_put_in_place_and_taken_back():
    import torch
    from flux2_pack.flux2.module_forward import forwards_as

    plain, kept = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    other = kept.forward = lambda x: x
    with pytest.raises(ZeroDivisionError), forwards_as({plain: lambda x: x + 1, kept: lambda x: x + 2}):
        assert plain(1) == 2 and kept(1) == 3
        with forwards_as({plain: lambda x: x + 5}):
            assert plain(1) == 6
        assert plain(1) == 2
        1 / 0
    assert "forward" not in vars(plain) and kept.forward is other
