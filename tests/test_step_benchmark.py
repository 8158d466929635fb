"""The step and klein benchmarks at small sizes: every peer computes the same thing, the table and the JSON are written.
Speed is for GPUs.

Each runs once as a child process, as its user would start it, with Triton's interpreter in the place of a GPU.
"""

import json
import os
import subprocess
import sys

import pytest

import pack


def run(script, *arguments, target, whole=True):
    """(data of the JSON file, standard output) of a benchmark that ran to its end. whole: with Triton and diffusers,
    and cases in its result.
    """
    if whole:
        pytest.importorskip("triton")
        pytest.importorskip("diffusers")
    command = [
        sys.executable,
        pack.ROOT / "benchmarks" / script,
        "--small",
        "--compiler",
        "eager",
        "--json",
        target,
        *arguments,
    ]
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, **({"TRITON_INTERPRET": "1"} if whole else {})},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    data = json.loads(target.read_text())
    assert (
        json.loads(done.stdout.splitlines()[-1]) == data
        and {"machine", "versions", "command", *(["cases"] if whole else [])} <= data.keys()
        and "FILE" in data["command"]
    )
    return data, done.stdout


def test_every_peer_takes_the_same_step_of_bf16_and_fp8_weights(comfy, tmp_path):
    data, said = run(
        "step.py",
        "--cases",
        "bf16-1024",
        "fp8-1024",
        "--rounds",
        "1",
        "--peers",
        "core",
        "core-compiled",
        "diffusers",
        "ours",
        "core+sdpa-math",
        "core+flash4",
        "ours-cudnn-fp8-fused",
        target=tmp_path / "step.json",
    )
    plain, fp8 = data["cases"]
    assert [case["name"] for case in data["cases"]] == ["bf16-1024", "fp8-1024"] and plain["tokens"] == 12
    for case, timed in (
        (plain, {"core", "core-compiled", "diffusers", "ours", "core+sdpa-math"}),
        (fp8, {"core", "core-compiled", "ours", "core+sdpa-math"}),
    ):
        rows = {row["peer"]: row for row in case["rows"]}
        assert {peer for peer, row in rows.items() if "ms" in row} == timed, said
        assert all(
            rows[peer]["error_to_core"] < 1e-5
            and rows[peer]["rounds"] == 1
            and rows[peer]["min_ms"] <= rows[peer]["ms"]
            for peer in timed
        )
        assert (
            "'flash4' cannot run here" in rows["core+flash4"]["reason"]
            and "'cudnn-fp8' cannot run here" in rows["ours-cudnn-fp8-fused"]["reason"]
            and case["core_ms"] == rows["core"]["ms"]
            and case["ours_ms"] == rows["ours"]["ms"]
        )
    assert (
        plain["diffusers_ms"] == plain["diffusers_eager_ms"]
        and fp8["diffusers_ms"] is None
        and "no path for ComfyUI's fp8" in said
    )


def test_the_benchmark_node_without_a_server(tmp_path):
    """What docs/speed.md is made from; the program that also lends AITER's kernels to another card."""
    target = tmp_path / "speed-here.json"
    command = [
        sys.executable,
        pack.ROOT / "benchmarks" / "speed.py",
        "--weights",
        "small",
        "--sizes",
        "128x128",
        "--backends",
        "sdpa-math",
        "flash4",
        "--call-repeat",
        "2",
        "--step-repeat",
        "1",
        "--save",
        target,
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    data = json.loads(target.read_text())
    timed = {(row["backend"], row["call"] == "step") for row in data["rows"] if row["timing"]}
    assert ("sdpa-math", False) in timed and ("sdpa-math", True) in timed and data["missing"]["flash4"]
    assert (
        data["weights"] == "random weights, FLUX.2 small"
        and data["command"].endswith("--save FILE")
        and str(tmp_path) not in target.read_text()
    )


def test_the_work_of_a_step_is_that_of_its_products_and_attention(comfy):
    """Counted by PyTorch's own counter on a small model, and the published size by hand."""
    sys.path.append(str(pack.ROOT / "benchmarks"))
    try:
        import full_size
        import step
        import torch
        from torch.utils.flop_counter import FlopCounterMode

        with torch.inference_mode():
            patcher = full_size.build(full_size.SMALL, torch.float32)
            inputs = full_size.step_inputs(patcher, 256, 1, reference_pixels=64, text_tokens=100)
            with FlopCounterMode(display=False) as counter:
                full_size.step(patcher, inputs)
        assert counter.get_total_flops() == pytest.approx(step.flops(full_size.SMALL, 256 + 16, 100), rel=0.02)
        assert step.flops(full_size.DEV, 4096, 512) == pytest.approx(2.84e14, rel=0.01)
    finally:
        sys.path.remove(str(pack.ROOT / "benchmarks"))


def test_a_ceiling_is_the_fastest_that_the_products_ran_and_no_step_is_above_it(comfy, monkeypatch):
    """A median over runs at falling clocks was 1.3 times slower than a step (int8 on an H200)."""
    monkeypatch.syspath_prepend(str(pack.ROOT / "benchmarks"))
    import step

    ms = {(2, 18): [4.0, 1.0, 2.0], (8, 2): [3.0, 9.0, 1.0]}
    limit = step.Ceiling({"hidden_size": 2}, 5, "bf16", "cpu")
    assert limit.tflops is None and limit.share(1.0) is None
    limit.times = {((2, 18), 0): ms[2, 18], ((2, 18), 1): [7.0], ((8, 2), 0): ms[8, 2]}
    expected = 2 * 5 * (2 * 18 + 8 * 2) / (1.0 + 1.0) / 1e9
    assert limit.tflops == pytest.approx(expected)
    assert limit.share(expected / 2) == 0.5 and limit.share(expected) == 1.0
    assert limit.share(expected * 1.316) is None
    limit.round()
    assert all(len(times) == 6 for (_, number), times in limit.times.items() if number == 0)


def test_no_stored_result_is_above_its_ceiling():
    for file in (pack.ROOT / "benchmarks" / "results").glob("*step*.json"):
        for case in json.loads(file.read_text())["cases"]:
            shares = [row["share_of_ceiling"] for row in case.get("rows", ()) if row.get("share_of_ceiling")]
            assert all(share <= 1 for share in shares), file.name


def test_whole_pictures_of_klein(comfy, tmp_path):
    data, said = run(
        "klein.py",
        "--cases",
        "klein-9b",
        "--rounds",
        "1",
        "--peers",
        "core",
        "diffusers",
        target=tmp_path / "klein.json",
    )
    (case,) = data["cases"]
    assert case["name"] == "klein-9b-64" and all(case[column] > 0 for column in ("core_ms", "diffusers_ms")), said
    assert 0 < case["prompt_in_bf16"]["conditioning"] < 0.05 and 0 < case["prompt_in_bf16"]["latents"] < 0.05
    assert all(row["picture"] == [1, 64, 64, 3] and row["stages"]["encode"] > 0 for row in case["rows"])


def test_one_prompt_through_every_encoder(comfy, tmp_path):
    data, said = run("encode.py", "--rounds", "1", target=tmp_path / "encode.json")
    for case in data["cases"]:
        errors = {row["peer"]: row.get("error") for row in case["rows"]}
        assert None not in errors.values(), said
        assert errors["core"] == 0 and errors["diffusers"] < 1e-5, "float32 on a CPU"
        assert 0 < errors["ours-bf16"] < 0.05 and case["ours_bf16_ms"] > 0 and case["diffusers_ms"] > 0
