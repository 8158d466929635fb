"""auto, measured: the fastest exact backend on the model's own tensors, checked against float32 first.

The first call of each shape bucket times every exact backend that accepts it; the answer is remembered for the process
and, when a file is given, across processes. Where nothing can be timed (a CPU, a stream under capture) the registry's
order decides.
"""

import contextlib
import dataclasses
from dataclasses import dataclass
from functools import partial
import json
import logging
import os
from pathlib import Path
import statistics
import tempfile
import threading

import torch

from . import reference, registry
from .call import AttentionRefused, dtype_name
from .errors import is_out_of_memory
from .masks import attend_kept

log = logging.getLogger(__name__)
WARM_UP, ROUNDS = 2, 9
LARGEST_FILE = 2**24  # bytes; a choice takes about a thousand
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
        figures = f"{self.ms:8.3f} ms" if self.ms is not None else "not timed"
        figures += f"  relative error {self.error:.1e}" if self.ms is not None and self.error is not None else ""
        return f"    {self.backend:<16}{figures}  {self.reason}".rstrip()


@dataclass
class AutoChoice:
    """What auto measured for one call, and what it chose."""

    call: str
    device: str
    chosen: str
    why: str
    candidates: list

    @property
    def timed(self):
        return any(c.ms is not None for c in self.candidates)

    def as_data(self):
        return {
            "call": self.call,
            "device": self.device,
            "chosen": self.chosen,
            "why": self.why,
            "candidates": [vars(c) for c in self.candidates],
        }

    @property
    def says_more(self):
        """Whether there is more to read than `why`: a time, or the reason why a backend was not taken."""
        return any(c.ms is not None or c.reason for c in self.candidates)

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


def signature(call):
    """What calls have in common whatever their lengths are, in plain values."""
    return (dtype_name(call.dtype), call.batch, call.heads, call.kv_heads, call.head_dim, call.mask, call.need_lse)


def candidates(device):
    """Exact backends that are available on a device, in the registry's order."""
    return [slug for slug in registry.AUTO_ORDER if not registry.unavailable(slug, device)]


def can_time(device_type):
    return device_type == "cuda" and not torch.cuda.is_current_stream_capturing()


MOST_TAKEN = 16384  # calls of different shapes whose kernel is known to the other ranks


class Tuner:
    """Chooses for `auto`. file: where choices are kept between processes, or None."""

    def __init__(self, file=None):
        self.file = Path(file) if file else None
        self._known = self._read()
        self._tables, self._variants = {}, {}
        self._taken = {}  # {(what, signature, lengths): name}, newest last: for the other ranks of a parallel model
        self._lock = threading.RLock()  # choose measures backends, and of each its fastest variant

    def choose(self, call, q, k, v, mask=None, kept=None, scale=None):
        """(slug, AutoChoice) for these tensors. AttentionRefused with all reasons when none accepts them."""
        key = bucket_key(call)
        with self._lock:
            found, lasting = self._tables.get(key) or self._remembered(key, call), True
            if found is None:
                found, lasting = self._decide(call, q, k, v, mask, kept, scale)
                if lasting and found.timed:
                    self._remember(key, found)
            self._take(registry.AUTO, call, found.chosen)
            if lasting:  # else memory was short: the next model that asks measures again
                self._tables[key] = found
            return found.chosen, found

    def _take(self, what, call, name):
        key = (what, signature(call), (call.q_len, call.kv_len))
        self._taken.pop(key, None)
        self._taken[key] = name
        if len(self._taken) > MOST_TAKEN:
            del self._taken[next(iter(self._taken))]

    def taken(self, what, kind, lengths, tolerance=0):
        """What was last taken for calls of a signature and of lengths at most `tolerance` tokens off, or None: backend
        for what = "auto", the name of a variant for a backend.
        """
        with self._lock:
            for (one, same, (q_len, kv_len)), name in reversed(self._taken.items()):
                near = abs(q_len - lengths[0]) <= tolerance and abs(kv_len - lengths[1]) <= tolerance
                if one == what and same == tuple(kind) and near:
                    return name
        return None

    def variant(self, slug, adapter, call, q, k, v, mask=None, kept=None, scale=None):
        """The fastest of an adapter's variants on these tensors, itself an Adapter. Measured on the first call of a
        shape and remembered like the choices of `auto`; where nothing can be timed, the adapter as it is.
        """
        variants = adapter.variants(call)
        if len(variants) < 2 or not can_time(q.device.type):
            return adapter
        key = f"{slug}: {', '.join(variants)}|{bucket_key(call)}"
        with self._lock:
            chosen, lasting = self._variants.get(key) or self._known.get(key, {}).get("chosen"), True
            if chosen not in variants:
                chosen, lasting = self._fastest_variant(key, call, variants, q, k, v, mask, kept, scale)
            self._take(slug, call, chosen)
            if lasting:
                self._variants[key] = chosen
            return variants[chosen]

    def _fastest_variant(self, key, call, variants, q, k, v, mask, kept, scale):
        """(name, whether it holds for longer than this moment)."""
        rows, runners, own_error, lasting = [TimedBackend(name) for name in variants], {}, None, True
        for number, row in enumerate(rows):
            run, passing = check(row, lambda row=row: variants[row.backend], q, k, v, mask, kept, scale)
            lasting = lasting and not passing
            if number == 0:
                own_error = row.error
            if row.error is not None and own_error is None:
                row.reason = "not used: the library's own choice failed, so there is nothing to check it against"
            elif row.error is not None and row.error > max(ERROR_FACTOR * own_error, ERROR_FLOOR):
                row.reason = f"rejected: error above {ERROR_FACTOR:g} times {own_error:.1e}"
            elif run is not None:
                runners[row.backend] = run
        for name, ms in race(runners).items():
            next(row for row in rows if row.backend == name).ms = ms
        timed = [row for row in rows if row.ms is not None]
        if not timed:  # memory is short for measuring: let the library's own choice try
            return rows[0].backend, False
        best = min(timed, key=lambda row: row.ms)
        why = f"fastest of {len(timed)}, measured on this call"
        if lasting and len(timed) == len(runners):
            self._remember(key, AutoChoice(str(call), str(call.device), best.backend, why, rows))
        return best.backend, lasting

    def _decide(self, call, q, k, v, mask, kept, scale):
        """(AutoChoice, whether it holds for longer than this moment)."""
        rows = [TimedBackend(s, reason=" ".join(registry.unsupported(s, call))) for s in candidates(call.device)]
        accepted = [c for c in rows if not c.reason]
        if not accepted:
            reasons = [f"{c.backend}: {c.reason}" for c in rows]
            raise AttentionRefused(
                registry.AUTO, reasons or ["No exact backend is available on this device."], call=call
            )
        described = str(call), str(call.device)
        if not can_time(q.device.type):
            why = "nothing can be timed here, so the fixed order decides"
            return AutoChoice(*described, accepted[0].backend, why, rows), True
        sdpa_error, runners, lasting = None, {}, True
        for candidate in accepted:  # sdpa is first in the order, so its error is known before the others are judged
            chosen = partial(self._adapter, candidate.backend, call, q, k, v, mask, kept, scale)
            run, passing = check(candidate, chosen, q, k, v, mask, kept, scale)
            lasting = lasting and not passing
            sdpa_error = candidate.error if candidate.backend == "sdpa" else sdpa_error
            if candidate.error is not None and sdpa_error is None:
                candidate.reason = "not used: PyTorch's own kernel failed, so there is nothing to check it against"
            elif candidate.error is not None and candidate.error > max(ERROR_FACTOR * sdpa_error, ERROR_FLOOR):
                candidate.reason = f"rejected: error above {ERROR_FACTOR:g} times PyTorch's own {sdpa_error:.1e}"
            elif run is not None:
                runners[candidate.backend] = run
        times = race(runners)
        for candidate in accepted:
            candidate.ms = times.get(candidate.backend)
        if not times:  # memory is short for measuring: let PyTorch try the call itself
            why = "nothing could be measured here, the reasons are below"
            return AutoChoice(*described, accepted[0].backend, why, rows), False
        best = min((c for c in accepted if c.ms is not None and not c.reason), key=lambda c: c.ms)
        why = f"fastest of {len(accepted)} exact backends, measured on this call"
        return AutoChoice(*described, best.backend, why, rows), lasting and len(times) == len(runners)

    def _adapter(self, slug, call, *tensors):
        return self.variant(slug, registry.adapter(slug, call.device), call, *tensors)

    def _remembered(self, key, call):
        entry = self._known.get(key)
        if entry and entry["chosen"] in registry.ROWS and not registry.unsupported(entry["chosen"], call):
            rows = [TimedBackend(**row) for row in entry["candidates"]]
            return AutoChoice(str(call), str(call.device), entry["chosen"], "measured earlier on this machine", rows)
        return None

    def _read(self):
        """{key: {"chosen", "candidates"}} of the file: what fits, whoever wrote it; {} where there is none to read."""
        try:
            if not self.file or not self.file.is_file() or self.file.stat().st_size > LARGEST_FILE:
                return {}
            known = json.loads(self.file.read_text(encoding="utf-8"))
            return {key: fitting(entry) for key, entry in known.items() if fitting(entry)}
        except (OSError, ValueError, AttributeError, RecursionError):  # somebody edited it: measure again
            return {}

    def _remember(self, key, found):
        """Write a choice into the file. A disk that refuses costs only the file: this process has the choice."""
        if not self.file:
            return
        self._known = {**self._read(), key: {"chosen": found.chosen, "candidates": [vars(c) for c in found.candidates]}}
        new = None
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(
                "w", dir=self.file.parent, prefix=".auto-", encoding="utf-8", delete=False
            ) as handle:
                new = Path(handle.name)
                json.dump(self._known, handle, indent=1)
            os.replace(new, self.file)  # another process reads the old file or the new one, never half of it
        except OSError as error:
            log.warning("auto: what was measured cannot be kept in %s: %s", self.file, error.strerror or error)
            if new is not None:
                with contextlib.suppress(OSError):
                    new.unlink(missing_ok=True)


def fitting(entry):
    """An entry of the file with the fields that this version knows; None when one is missing or of another type."""
    if not isinstance(entry, dict) or not isinstance(entry.get("chosen"), str):
        return None
    rows = entry.get("candidates")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        return None
    names = [field.name for field in dataclasses.fields(TimedBackend)]
    rows = [{name: row[name] for name in names if name in row} for row in rows]
    for row in rows:
        figures = (row.get("ms"), row.get("error"))
        if not isinstance(row.get("backend"), str) or not isinstance(row.get("reason", ""), str):
            return None
        if not all(figure is None or type(figure) in (int, float) for figure in figures):
            return None
    return {"chosen": entry["chosen"], "candidates": rows}


def check(candidate, adapter, q, k, v, mask, kept, scale):
    """Run a TimedBackend once on the tensors and fill in its error, or its reason when it fails. adapter: a function
    that returns the Adapter.

    Returns (the function that runs it, or None; whether the failure is a passing one, such as memory that is short).
    """
    try:
        run = bound(adapter(), q, k, v, mask, kept, scale)
        candidate.error = sample_error(run(), q, k, v, mask, scale)
        return run, False
    except Exception as error:  # this candidate is out, and the image goes on
        candidate.reason = f"{type(error).__name__}: {error}"
        return None, is_out_of_memory(error)


def race(runners):
    """{name: median milliseconds} of {name: function}; without those that raise on the way.

    Rounds go around all of them, so that a drift of the clocks is everybody's.
    """
    times = {name: [] for name in runners}
    for number in range(WARM_UP + ROUNDS):
        best = min((min(t) for t in times.values() if t), default=float("inf"))
        for name in list(times):
            if times[name] and min(times[name]) >= OUT_OF_THE_RACE * best:
                continue
            try:
                if number < WARM_UP:
                    runners[name]()
                else:
                    times[name].append(stream_ms(runners[name]))
            except Exception as error:  # memory that became short, say: this one is out, and the image goes on
                log.warning("auto: %s ran once and then failed: %s", name, error)
                del times[name]
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
