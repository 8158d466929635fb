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


def test_fused_blocks_equal_cores_in_the_interpreter(small_models, tmp_path):
    pytest.importorskip("triton")
    done = run(
        ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", HERE / "fast_blocks_interpreted.py"],
        tmp_path,
        "1",
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout.splitlines()[-1]


@pytest.mark.parametrize("arch", ["gfx942", "gfx950", "gfx1201", "sm90"])
def test_the_kernels_compile_for_gpus_that_are_not_here(arch, tmp_path):
    pytest.importorskip("triton")
    done = run([HERE / "fast_kernels_compile.py", arch], tmp_path, "0")
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = json.loads(done.stdout.splitlines()[-1])["kernels"]
    assert all(k["ok"] for k in kernels) and {"_residual_norm", "_qkv", "_swiglu"} <= {k["name"] for k in kernels}
    assert ("_quantise" in {k["name"] for k in kernels}) == (arch != "gfx942")
