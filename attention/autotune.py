"""auto, measured: the fastest exact backend on the model's own tensors, checked against float32 first.

The first call of each shape bucket times every exact backend that accepts it; the answer is remembered for the process
and, when a file is given, across processes. Where nothing can be timed (a CPU, a stream under capture) the registry's
order decides.
"""

from dataclasses import dataclass
import json
import os
from pathlib import Path
import statistics
import tempfile
import threading

import torch

from . import reference, registry
from .call import dtype_name
from .masks import attend_kept

WARM_UP, ROUNDS = 2, 9
OUT_OF_THE_RACE = 1.5  # a candidate this many times slower than the best after the first round is not timed again
# a candidate may be twice as far from float32 as PyTorch's own kernel (flash-attention's tests use the same factor)
ERROR_FACTOR = 2.0
ERROR_FLOOR = 1e-6  # below this both are rounding noise of float32
SAMPLE_ROWS, SAMPLE_HEADS = 128, 2


@dataclass
class TimedBackend:
    """One row of the table: milliseconds (median) and relative error, or the reasons why it has none."""

    backend: str
    ms: float | None = None
    error: float | None = None
    reason: str = ""

    def as_text(self):
        figures = f"{self.ms:8.3f} ms  relative error {self.error:.1e}" if self.ms is not None else "not timed"
        return f"    {self.backend:<16}{figures}  {self.reason}".rstrip()


@dataclass
class AutoChoice:
    """What auto measured for one call, and what it chose."""

    call: str
    device: str
    chosen: str
    why: str
    candidates: list

    def as_data(self):
        return {
            "call": self.call,
            "device": self.device,
            "chosen": self.chosen,
            "why": self.why,
            "candidates": [vars(c) for c in self.candidates],
        }

    def as_text(self):
        lines = [f"auto on {self.device}, {self.call}: {self.chosen} ({self.why})"]
        lines += [c.as_text() for c in sorted(self.candidates, key=lambda c: (c.ms is None, c.ms or 0))]
        return "\n".join(lines)


def bucket(length):
    """Lengths that share a measurement: rounded up to an eighth of the power of two below, so at most 12.5 % apart."""
    step = max(1, 1 << max(0, length.bit_length() - 4))
    return -(-length // step) * step


def bucket_key(call):
    """What the best kernel depends on, as a string that is stable between processes."""
    versions = ",".join(f"{slug}={registry.adapter(slug, call.device).version()}" for slug in candidates(call.device))
    return "|".join(
        map(
            str,
            (
                call.device.name,
                call.device.arch,
                dtype_name(call.dtype),
                call.batch,
                bucket(call.q_len),
                bucket(call.kv_len),
                call.heads,
                call.kv_heads,
                call.head_dim,
                call.mask,
                call.need_lse,
                versions,
            ),
        )
    )


def candidates(device):
    """Exact backends that are available on a device, in the registry's order."""
    return [slug for slug in registry.AUTO_ORDER if not registry.unavailable(slug, device)]


def can_time(device_type):
    return device_type == "cuda" and not torch.cuda.is_current_stream_capturing()


class Tuner:
    """Chooses for `auto`. file: where choices are kept between processes, or None."""

    def __init__(self, file=None):
        self.file = Path(file) if file else None
        self._known = self._read()
        self._tables, self._variants = {}, {}
        self._lock = threading.RLock()  # choose measures backends, and of each its fastest variant

    def choose(self, call, q, k, v, mask=None, kept=None, scale=None):
        """(slug, AutoChoice) for these tensors. AttentionRefused never: PyTorch's own kernel accepts everything."""
        key = bucket_key(call)
        with self._lock:
            table = (
                self._tables.get(key)
                or self._remembered(key, call)
                or self._decide(key, call, q, k, v, mask, kept, scale)
            )
            self._tables[key] = table
            return table.chosen, table

    def variant(self, slug, adapter, call, q, k, v, mask=None, kept=None, scale=None):
        """The fastest of an adapter's variants on these tensors, itself an Adapter. Measured on the first call of a
        shape and remembered like the choices of `auto`; where nothing can be timed, the adapter as it is.
        """
        variants = adapter.variants(call)
        if len(variants) < 2 or not can_time(q.device.type):
            return adapter
        key = f"{slug}: {', '.join(variants)}|{bucket_key(call)}"
        with self._lock:
            if key not in self._variants:
                chosen = self._known.get(key, {}).get("chosen")
                self._variants[key] = (
                    chosen
                    if chosen in variants
                    else self._fastest_variant(key, call, variants, q, k, v, mask, kept, scale)
                )
            return variants[self._variants[key]]

    def _fastest_variant(self, key, call, variants, q, k, v, mask, kept, scale):
        rows, runners, own_error = [TimedBackend(name) for name in variants], {}, None
        for row in rows:  # the first is the library's own choice: the others may not be further from float32
            run = check(row, lambda row=row: variants[row.backend], q, k, v, mask, kept, scale)
            own_error = row.error if own_error is None else own_error
            if row.error is not None and row.error > max(ERROR_FACTOR * own_error, ERROR_FLOOR):
                row.reason = f"rejected: error above {ERROR_FACTOR:g} times {own_error:.1e}"
            elif run is not None:
                runners[row.backend] = run
        for name, ms in race(runners).items():
            next(row for row in rows if row.backend == name).ms = ms
        timed = [row for row in rows if row.ms is not None]
        if not timed:  # memory is short for measuring: let the library's own choice try
            return rows[0].backend
        best = min(timed, key=lambda row: row.ms)
        why = f"fastest of {len(timed)}, measured on this call"
        self._remember(key, AutoChoice(str(call), str(call.device), best.backend, why, rows))
        return best.backend

    def _decide(self, key, call, q, k, v, mask, kept, scale):
        rows = [
            TimedBackend(slug, reason=" ".join(registry.unsupported(slug, call))) for slug in candidates(call.device)
        ]
        accepted = [c for c in rows if not c.reason]
        if not can_time(q.device.type):
            return AutoChoice(
                str(call),
                str(call.device),
                accepted[0].backend,
                "nothing can be timed here, so the fixed order decides",
                rows,
            )
        sdpa_error = None
        runners = {}
        for candidate in accepted:  # sdpa is first in the order, so its error is known before the others are judged
            run = check(
                candidate,
                lambda c=candidate: self._adapter(c.backend, call, q, k, v, mask, kept, scale),
                q,
                k,
                v,
                mask,
                kept,
                scale,
            )
            sdpa_error = candidate.error if candidate.backend == "sdpa" else sdpa_error
            if candidate.error is not None and sdpa_error is None:
                candidate.reason = "not used: PyTorch's own kernel failed, so there is nothing to check it against"
            elif candidate.error is not None and candidate.error > max(ERROR_FACTOR * sdpa_error, ERROR_FLOOR):
                candidate.reason = f"rejected: error above {ERROR_FACTOR:g} times PyTorch's own {sdpa_error:.1e}"
            elif run is not None:
                runners[candidate.backend] = run
        for candidate, ms in zip(accepted, map(race(runners).get, (c.backend for c in accepted))):
            candidate.ms = ms
        if not runners:  # memory is short for measuring: let PyTorch try the call itself
            return AutoChoice(
                str(call),
                str(call.device),
                accepted[0].backend,
                "nothing could be measured here, the reasons are below",
                rows,
            )
        best = min((c for c in accepted if c.ms is not None and not c.reason), key=lambda c: c.ms)
        table = AutoChoice(
            str(call),
            str(call.device),
            best.backend,
            f"fastest of {len(accepted)} exact backends, measured on this call",
            rows,
        )
        self._remember(key, table)
        return table

    def _adapter(self, slug, call, *tensors):
        return self.variant(slug, registry.adapter(slug, call.device), call, *tensors)

    def _remembered(self, key, call):
        entry = self._known.get(key)
        if entry and entry["chosen"] in registry.ROWS and not registry.unsupported(entry["chosen"], call):
            return AutoChoice(
                str(call),
                str(call.device),
                entry["chosen"],
                "measured earlier on this machine",
                [TimedBackend(**c) for c in entry["candidates"]],
            )
        return None

    def _read(self):
        try:
            known = json.loads(self.file.read_text()) if self.file else {}
            return {k: e for k, e in known.items() if isinstance(e, dict) and {"chosen", "candidates"} <= e.keys()}
        except (OSError, ValueError, AttributeError):  # no file yet, or one that somebody edited: measure again
            return {}

    def _remember(self, key, table):
        if not self.file:
            return
        self._known = {**self._read(), key: {"chosen": table.chosen, "candidates": [vars(c) for c in table.candidates]}}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=self.file.parent, delete=False) as handle:
            json.dump(self._known, handle, indent=1)
        os.replace(handle.name, self.file)  # another process reads the old file or the new one, never half of it


def check(candidate, adapter, q, k, v, mask, kept, scale):
    """Run a TimedBackend once on the tensors and fill in its error, or its reason when it fails. adapter: a function
    that returns the Adapter. Returns the function that runs it, or None.
    """
    try:
        run = bound(adapter(), q, k, v, mask, kept, scale)
        candidate.error = sample_error(run(), q, k, v, mask, scale)
        return run
    except (
        Exception
    ) as error:  # out of memory, a kernel that does not launch: this candidate is out, the picture goes on
        candidate.reason = f"{type(error).__name__}: {error}"
        return None


def race(runners):
    """Median milliseconds of each of {name: function}. Rounds go around all of them, so that a drift of the clocks is
    everybody's.
    """
    times = {name: [] for name in runners}
    for name, run in runners.items():
        for _ in range(WARM_UP):
            run()
    for _ in range(ROUNDS):
        best = min((min(t) for t in times.values() if t), default=float("inf"))
        for name, run in runners.items():
            if not times[name] or min(times[name]) < OUT_OF_THE_RACE * best:
                times[name].append(stream_ms(run))
    return {name: statistics.median(t) for name, t in times.items()}


def bound(adapter, q, k, v, mask, kept, scale):
    """A function without arguments that makes this call once and returns its output."""
    if kept is not None and not adapter.limits.mask:
        return lambda: attend_kept(adapter.attend, q, k, v, kept, scale=scale, need_lse=False)[0]
    return lambda: adapter.attend(q, k, v, mask=mask, scale=scale)[0]


def sample_error(out, q, k, v, mask, scale):
    """Relative error against float32 on the first and last rows of the first heads: all keys take part, and it stays
    cheap.
    """
    heads = slice(0, SAMPLE_HEADS if k.shape[2] == q.shape[2] else q.shape[2] // k.shape[2])
    kv = slice(0, SAMPLE_HEADS if k.shape[2] == q.shape[2] else 1)
    errors = []
    for rows in (slice(0, SAMPLE_ROWS), slice(max(0, q.shape[1] - SAMPLE_ROWS), q.shape[1])):
        part = (
            mask[:, heads if mask.shape[1] != 1 else slice(None), rows if mask.shape[2] != 1 else slice(None)]
            if mask is not None
            else None
        )
        exact, _ = reference.attend(q[:, rows, heads], k[:, :, kv], v[:, :, kv], mask=part, scale=scale)
        errors.append(reference.relative_error(out[:, rows, heads], exact))
    return max(errors)


def stream_ms(run):
    """Milliseconds of one run on the current CUDA or HIP stream."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
