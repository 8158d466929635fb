"""Compiled blocks on the GPU that is here: inductor's kernels through the node, and every backend inside a graph."""

import json
import os
import subprocess
import sys

import pytest
import torch

from devices import TOLERANCE, on_cpu
from pack import ROOT

pytestmark = pytest.mark.gpu
SIZES = {"hidden_size": 512, "depth": 2, "depth_single_blocks": 4, "context_in_dim": 256, "guidance_embed": True}


@pytest.fixture
def inductors_cache(monkeypatch, tmp_path):
    from flux2_pack.flux2.compiled import toolchain

    monkeypatch.setenv(toolchain.CACHE_VARIABLE, str(tmp_path))


@torch.inference_mode()
def test_inductor_compiles_blocks_through_the_node(comfy, device, inductors_cache, monkeypatch):
    import full_size
    from flux2_pack.flux2.compiled import blocks, toolchain
    from flux2_pack.nodes.speed import Flux2CompileBlocks

    if reason := toolchain.unavailable(device):
        pytest.skip(reason)
    if device.type == "cpu":  # the search for vector instructions takes a minute
        monkeypatch.setattr(torch._inductor.config.cpp, "simdlen", 1)
    monkeypatch.setattr(torch._inductor.config, "compile_threads", 1)
    torch._dynamo.reset()
    for dtype in (torch.float32,) if device.type == "cpu" else (torch.float32, torch.bfloat16):
        model = full_size.build(SIZES, dtype)
        fast = Flux2CompileBlocks.execute(model).args[0]
        for pixels in (128, 144):
            given = full_size.step_inputs(model, pixels, text_tokens=16)
            expected, found = full_size.step(model, given).float(), full_size.step(fast, given).float()
            error = ((found - expected).norm() / expected.norm()).item()
            assert error <= TOLERANCE[str(dtype).removeprefix("torch.")], (dtype, pixels)
        data = blocks.plan_of(fast).log.as_data()
        assert data["compiled"] == 2 * 6 and data["eager"] == {}, data


def test_every_backend_runs_inside_a_graph_without_a_break(comfy, tmp_path):
    """In a process of its own, whose settings of torch.compile are a user's: benchmarks/compile_check.py."""
    compiler, file = "aot_eager" if on_cpu() else "inductor", tmp_path / "made.json"
    words = [ROOT / "benchmarks" / "compile_check.py", "--compiler", compiler, "--json", file]
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        env={**os.environ, "COMFYUI_PATH": comfy},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    cases = json.loads(file.read_text())["cases"]
    dtype = "float32" if on_cpu() else "bfloat16"
    for case in cases:
        assert max(case["errors"]) <= TOLERANCE[dtype] and case["calls"] == 2 * 2 * 6 and case["graphs"] <= 4, case
    assert {"auto", "sdpa", "sdpa-math"} <= {case["backend"] for case in cases}
