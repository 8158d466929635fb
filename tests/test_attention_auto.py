"""auto: what it measures, rejects, remembers, and does where nothing can be timed. Timings are given by the test, never
asserted.
"""

import json

import pytest
import torch

from flux2_pack.attention import registry, autotune
from flux2_pack.attention.call import call_of
from flux2_pack.attention.device import describe
from flux2_pack.attention.dispatch import AttentionDispatcher
from flux2_pack.attention.autotune import Tuner, bucket

QKV = [torch.randn(1, 300, 2, 64, generator=torch.Generator().manual_seed(n)) for n in range(3)]


@pytest.fixture
def timed(monkeypatch):
    """Pretend that this machine can time, with these milliseconds per backend. Returns the dict and a list of what was
    timed.
    """
    speeds, asked = {"sdpa": 3.0, "sdpa-flash": 2.0, "sdpa-math": 1.0}, []
    monkeypatch.setattr(registry, "AUTO_ORDER", ["sdpa", "sdpa-flash", "sdpa-math"])
    monkeypatch.setattr(autotune, "can_time", lambda device: True)
    original = autotune.bound

    def bound(adapter, *rest):
        run = original(adapter, *rest)
        run.slug = next(s for s, a in registry._module("sdpa")[0].ADAPTERS.items() if a is adapter)
        return run

    def elapsed(run):
        asked.append(run.slug)
        return speeds[run.slug]

    monkeypatch.setattr(autotune, "bound", bound)
    monkeypatch.setattr(autotune, "stream_ms", elapsed)
    return speeds, asked


def test_the_fastest_exact_backend_wins_and_is_asked_once(timed):
    dispatcher = AttentionDispatcher("auto", tuner=Tuner())
    for _ in range(3):
        dispatcher.attend(*QKV)
    (entry,) = dispatcher.log.current.as_data()["entries"]
    assert entry["backend"] == "sdpa-math" and entry["calls"] == 3 and "fastest of 3" in entry["why"]
    assert timed[1][:3] == ["sdpa", "sdpa-flash", "sdpa-math"]
    assert [timed[1].count(s) for s in ("sdpa", "sdpa-flash", "sdpa-math")] == [1, 1, autotune.ROUNDS], (
        "the slow ones leave the race after its first round"
    )
    table = dispatcher.log.current.as_text()
    assert "2.000 ms" in table and "relative error" in table


def test_a_fast_but_wrong_backend_is_rejected_with_its_error(timed, monkeypatch):
    math = type(registry._module("sdpa")[0].ADAPTERS["sdpa-math"])
    monkeypatch.setattr(math, "run", lambda self, q, k, v, mask, scale, need_lse: (v * 1.01, None))
    slug, table = Tuner().choose(call_of(*QKV), *QKV)
    rejected = next(c for c in table.candidates if c.backend == "sdpa-math")
    assert slug == "sdpa-flash" and "rejected: error above" in rejected.reason


def test_the_race_goes_around_all_that_are_close(monkeypatch):
    order, speeds = [], {"a": iter([1.0, 9.0] + [1.0] * 9), "b": iter([1.1] * 11), "c": iter([4.0] * 11)}
    monkeypatch.setattr(autotune, "stream_ms", lambda run: order.append(run()) or next(speeds[order[-1]]))
    found = autotune.race({name: lambda name=name: name for name in "abc"})
    assert found == {"a": 1.0, "b": 1.1, "c": 4.0} and "".join(order).startswith("abcab") and order.count("c") == 1


def test_a_backend_that_fails_is_a_row_with_its_reason(timed, monkeypatch):
    def out_of_memory(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(type(registry._module("sdpa")[0].ADAPTERS["sdpa-math"]), "run", out_of_memory)
    slug, table = Tuner().choose(call_of(*QKV), *QKV)
    failed = next(c for c in table.candidates if c.backend == "sdpa-math")
    assert slug == "sdpa-flash" and failed.ms is None and "out of memory" in failed.reason


def test_when_pytorchs_own_kernel_fails_nothing_is_trusted_and_it_gets_to_say_why(timed, monkeypatch, tmp_path):
    def out_of_memory(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(type(registry._module("sdpa")[0].ADAPTERS["sdpa"]), "run", out_of_memory)
    slug, table = Tuner(tmp_path / "auto.json").choose(call_of(*QKV), *QKV)
    reasons = {c.backend: c.reason for c in table.candidates}
    assert (
        slug == "sdpa" and "out of memory" in reasons["sdpa"] and "nothing to check it against" in reasons["sdpa-flash"]
    )
    assert "nothing could be measured" in table.as_text() and not (tmp_path / "auto.json").exists()


def test_measurements_are_kept_between_processes_and_survive_a_broken_file(timed, tmp_path):
    file = tmp_path / "folder" / "auto.json"
    assert Tuner(file).choose(call_of(*QKV), *QKV)[0] == "sdpa-math"
    timed[1].clear()
    slug, table = Tuner(file).choose(call_of(*QKV), *QKV)
    assert slug == "sdpa-math" and timed[1] == [] and "earlier" in table.why
    for content in ("{not json", "[1, 2]", json.dumps({"x": 3, "y": {"chosen": "sdpa"}})):
        file.write_text(content)
        assert Tuner(file).choose(call_of(*QKV), *QKV)[0] == "sdpa-math"
    assert json.loads(file.read_text())


def test_another_length_dtype_or_head_count_is_another_measurement(timed):
    chooser = Tuner()
    chooser.choose(call_of(*QKV), *QKV)
    for changed in ([t[:, :100] for t in QKV], [t.to(torch.bfloat16) for t in QKV], [t[:, :, :1] for t in QKV]):
        timed[1].clear()
        chooser.choose(call_of(*changed), *changed)
        assert timed[1]


def test_neighbouring_lengths_share_one(timed):
    assert bucket(4608) == bucket(4600) != bucket(8704)
    assert all(bucket(n) >= n and bucket(n) <= n * 1.125 + 1 for n in range(1, 20000, 37))
    chooser = Tuner()
    chooser.choose(call_of(*QKV), *QKV)
    timed[1].clear()
    shorter = [t[:, :299] for t in QKV]
    chooser.choose(call_of(*shorter), *shorter)
    assert timed[1] == []


def test_where_nothing_can_be_timed_the_order_decides():
    slug, table = Tuner().choose(call_of(*QKV), *QKV)
    assert slug == "sdpa" and "fixed order" in table.why
    assert [c.backend for c in table.candidates] == autotune.candidates(describe("cpu"))


def test_masks_take_part(timed):
    mask = torch.ones(1, 1, 1, 300, dtype=torch.bool)
    mask[..., :9] = False
    dispatcher = AttentionDispatcher("auto", tuner=Tuner())
    out, _ = dispatcher.attend(*QKV, mask=mask)
    expected, _ = AttentionDispatcher("sdpa").attend(*QKV, mask=mask)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-6)


# --- what is kept may not cost an image ------------------------------------------------------------------------------


@pytest.mark.parametrize("why", ["a file in the way", "a folder that refuses", "a full disk"])
def test_a_disk_that_refuses_costs_only_the_file(timed, tmp_path, monkeypatch, caplog, why):
    file = tmp_path / "user" / "auto.json"
    if why == "a file in the way":
        file.parent.write_text("")
    elif why == "a folder that refuses":
        monkeypatch.setattr(autotune.os, "replace", lambda *_: (_ for _ in ()).throw(PermissionError(13, "in use")))
    else:
        monkeypatch.setattr(autotune.json, "dump", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left")))
    chooser = Tuner(file)
    assert chooser.choose(call_of(*QKV), *QKV)[0] == "sdpa-math"
    assert "cannot be kept" in caplog.text
    assert not file.is_file() and (file.parent.is_file() or list(file.parent.iterdir()) == []), "nothing is left over"
    timed[1].clear()
    assert chooser.choose(call_of(*QKV), *QKV)[0] == "sdpa-math" and timed[1] == [], "this process remembers"


@pytest.mark.parametrize(
    "change",
    [
        lambda entry: entry["candidates"][0].update(speedup=2.0),
        lambda entry: entry["candidates"][0].pop("error"),
        lambda entry: entry.update(version=7),
    ],
)
def test_a_file_of_another_version_is_read_as_far_as_it_goes(timed, tmp_path, change):
    file = tmp_path / "auto.json"
    Tuner(file).choose(call_of(*QKV), *QKV)
    known = json.loads(file.read_text())
    for entry in known.values():
        change(entry)
    file.write_text(json.dumps(known))
    timed[1].clear()
    slug, found = Tuner(file).choose(call_of(*QKV), *QKV)
    assert slug == "sdpa-math" and found.why.startswith("measured earlier") and timed[1] == []
    assert "sdpa-math" in found.as_text()


@pytest.mark.parametrize(
    "entry",
    [
        {"chosen": 3, "candidates": []},
        {"chosen": "sdpa", "candidates": 3},
        {"chosen": "sdpa", "candidates": [3]},
        {"chosen": "sdpa", "candidates": [{"ms": 1.0}]},
        {"chosen": "sdpa", "candidates": [{"backend": "sdpa", "ms": "fast"}]},
        {"chosen": "sdpa", "candidates": [{"backend": "sdpa", "reason": None}]},
    ],
)
def test_an_entry_of_another_shape_is_measured_again(timed, tmp_path, entry):
    file = tmp_path / "auto.json"
    Tuner(file).choose(call_of(*QKV), *QKV)
    file.write_text(json.dumps({key: entry for key in json.loads(file.read_text())}))
    timed[1].clear()
    assert Tuner(file).choose(call_of(*QKV), *QKV)[0] == "sdpa-math" and timed[1]


def test_a_file_that_is_no_file_is_not_waited_for(timed, tmp_path):
    import os

    os.mkfifo(tmp_path / "auto.json")
    assert Tuner(tmp_path / "auto.json").choose(call_of(*QKV), *QKV)[0] == "sdpa-math"
    deep = tmp_path / "deep.json"
    deep.write_text("[" * 100_000)
    assert Tuner(deep).choose(call_of(*QKV), *QKV)[0] == "sdpa-math"


@pytest.mark.parametrize("when", ["while it is checked", "while it is timed"])
def test_memory_that_is_short_for_a_moment_is_not_remembered(timed, tmp_path, monkeypatch, when):
    math, file = type(registry._module("sdpa")[0].ADAPTERS["sdpa-math"]), tmp_path / "auto.json"
    real, calls = math.run, []

    def run(self, *arguments):
        calls.append(1)
        if len(calls) == (1 if when == "while it is checked" else 2):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, *arguments)

    monkeypatch.setattr(math, "run", run)
    chooser = Tuner(file)
    assert chooser.choose(call_of(*QKV), *QKV)[0] == "sdpa-flash" and not file.exists()
    assert chooser.choose(call_of(*QKV), *QKV)[0] == "sdpa-math" and file.exists()
