"""benchmarks/timeline.py: what it makes of a trace, by hand, and one picture of the small model on a CPU."""

import json

import pytest

import pack
from test_step_benchmark import run

MS = 1000  # a trace counts microseconds


@pytest.fixture
def timeline(monkeypatch, comfy):
    monkeypatch.syspath_prepend(str(pack.ROOT / "benchmarks"))
    import timeline

    return timeline


def event(category, name, start, length, correlation=None):
    args = {} if correlation is None else {"args": {"correlation": correlation}}
    return {"cat": category, "name": name, "ts": start * MS, "dur": length * MS, **args}


def test_a_trace_by_hand(timeline):
    """Two steps; the GPU runs behind the host, overlaps in one place and has nothing to do in another."""
    events = [
        *(
            event("user_annotation", name, start, length)
            for name, start, length in (
                ("sample", 10, 60),
                ("step 2", 40, 20),
                ("encode", 0, 10),
                ("step 1", 15, 20),
                ("decode", 70, 30),
            )
        ),
        event("cuda_runtime", "cudaLaunchKernel", 1, 0.01, 1),
        event("kernel", "encoder", 2, 6, 1),
        event("cuda_runtime", "cudaLaunchKernel", 16, 0.01, 2),
        event("cuda_driver", "cuLaunchKernelEx", 17, 0.01, 3),
        event("kernel", "product", 20, 10, 2),
        event("kernel", "on another stream", 25, 10, 3),
        event("cuda_runtime", "cudaMemcpyAsync", 36, 0.01, 4),
        event("gpu_memcpy", "Memcpy DtoH", 38, 2, 4),
        event("cuda_runtime", "cudaStreamSynchronize", 36.5, 3, 5),
        event("cuda_runtime", "cudaLaunchKernel", 45, 0.01, 6),
        event("cuda_runtime", "cudaLaunchKernel", 58, 0.01, 7),
        event("kernel", "first of step 2", 46, 4, 6),
        event("kernel", "last of step 2", 59, 5, 7),
        event("cuda_runtime", "cudaDeviceSynchronize", 75, 20, 8),
        event("cpu_op", "aten::mm", 16, 1),
    ]
    rows = {row.pop("stage"): row for row in timeline.rows_of(events)}
    assert list(rows) == [
        "encode",
        "before the first step",
        "step 1",
        "between steps 1 and 2",
        "step 2",
        "behind the last step",
        "decode",
    ]
    assert rows["encode"] == {"host_ms": 10, "waits_ms": 0, "launches": 1, "gpu_ms": 6, "gpu_idle_ms": 0}
    assert rows["before the first step"] == {
        "host_ms": 5,
        "waits_ms": 0,
        "launches": 0,
        "gpu_ms": 0,
        "gpu_idle_ms": None,
    }
    assert rows["step 1"] == {"host_ms": 20, "waits_ms": 0, "launches": 2, "gpu_ms": 15, "gpu_idle_ms": 0}
    assert rows["between steps 1 and 2"] == {
        "host_ms": 5,
        "waits_ms": 3,
        "launches": 1,
        "gpu_ms": 2,
        "gpu_idle_ms": 0,
    }
    assert rows["step 2"] == {"host_ms": 20, "waits_ms": 0, "launches": 2, "gpu_ms": 9, "gpu_idle_ms": 9}
    assert rows["behind the last step"]["host_ms"] == 10 and rows["decode"]["waits_ms"] == 20
    whole = {"peer": "ours", "picture": {"ms": 90.0}, "profiled_ms": 100.0}
    text = timeline.table([{**whole, "stages": timeline.rows_of(events)}, {"peer": "core", "reason": "no room"}])
    assert "step 2" in text and "core: not run. no room" in text


def test_one_picture_on_a_cpu(comfy, tmp_path):
    words = ("--peers", "core", "--rounds", "1", "--warm-up", "0", "--pixels", "32", "--traces", tmp_path / "traces")
    data, said = run("timeline.py", *words, target=tmp_path / "timeline.json", whole=False)
    (row,) = data["rows"]
    names = [stage["stage"] for stage in row["stages"]]
    assert "reason" not in row, said
    assert names[0] == "encode" and names[-1] == "decode" and len(names) == 2 + 4 + 3 + 2
    assert all(stage["host_ms"] >= 0 and stage["gpu_ms"] is None for stage in row["stages"])
    steps = [stage["host_ms"] for stage in row["stages"] if stage["stage"].startswith("step ")]
    assert len(steps) == 4 and min(steps) > 0.1
    assert row["profiled_ms"] >= sum(steps) and row["picture"]["ms"] > 0
    assert json.loads((tmp_path / "traces" / "klein-9b-core.json").read_text())["traceEvents"]
