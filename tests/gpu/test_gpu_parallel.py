"""Two GPUs compute one image: NCCL, symmetric memory, kills and cancels, and memory afterwards.

benchmarks/parallel.py does it, in processes of its own. On a CPU its workers talk gloo.
"""

import json
import os
import subprocess
import sys

import pytest

from devices import on_cpu
from flux2_pack.attention.parallel import symmetric_memory
from pack import ROOT

pytestmark = pytest.mark.gpu(gpus=2)
MIB = 2**20


def parallel(comfy, file, *words, **environment):
    """What benchmarks/parallel.py writes about two GPUs."""
    here = {"FLUX2_CPU_RANKS": "2"} if on_cpu() else {}
    script = ROOT / "benchmarks" / "parallel.py"
    done = subprocess.run(
        [sys.executable, str(script), "--gpus", "2", *map(str, words), "--json", str(file)],
        env={**os.environ, "COMFYUI_PATH": comfy, **here, **environment},
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert file.is_file(), done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(file.read_text()), done


@pytest.mark.parametrize("fast", [False, True], ids=["core's blocks", "fast blocks"])
@pytest.mark.parametrize("symmetric", ["0", "1"], ids=["NCCL", "symmetric memory"])
def test_every_kind_of_image_is_that_of_one_gpu_in_float32(comfy, tmp_path, symmetric, fast):
    if on_cpu() and (fast or symmetric == "1"):
        pytest.skip("there is nothing to try of it on a CPU")
    flags = ["--checks", *(["--fast"] if fast else [])]
    made, done = parallel(comfy, tmp_path / "made.json", *flags, **{symmetric_memory.SWITCH: symmetric})
    assert done.returncode == 0 and all(row["error"] <= made["allowed"] for row in made["checks"]), made["checks"]
    assert {(row["ulysses"], row["ring"]) for row in made["checks"]} == {(2, 1), (1, 2)}
    wanted = "symmetric memory)" if symmetric == "1" else "all-to-all"
    assert all(wanted in row["transport"] for row in made["checks"] if row["ulysses"] == 2), made["checks"]


@pytest.mark.parametrize("symmetric", ["0", "1"], ids=["NCCL", "symmetric memory"])
def test_kills_and_cancels_leave_no_process_and_no_memory(comfy, tmp_path, symmetric):
    """The model of the rounds takes 1.7 GB on each GPU; libraries keep some of what they allocate."""
    if on_cpu() and symmetric == "1":
        pytest.skip("there is nothing to try of it on a CPU")
    rounds = 2 if on_cpu() else 8
    made, done = parallel(comfy, tmp_path / "made.json", "--rounds", rounds, **{symmetric_memory.SWITCH: symmetric})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert made["processes_left"] == [] and made["slowest_seconds"]["cancel"] < 10, made
    for before, after in zip(made["gpu_bytes_before"], made["gpu_bytes_after"]):
        assert after - before < 512 * MIB, made
