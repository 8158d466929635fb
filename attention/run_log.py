"""What really ran: one RunLog per dispatcher, one Run per sampling, one Entry per kind of call."""

from collections import Counter, deque
from dataclasses import dataclass, field
import logging
import time

from .device import as_float64

RUNS_KEPT = 8
log = logging.getLogger(__name__)
NOT_ASKED = (
    "This backend computed nothing: the model never asked it. A model that was compiled and sampled before Select "
    "Attention keeps its own attention in the compiled code: put the compile node after Select Attention. Otherwise "
    "this model does not take its attention from ComfyUI."
)
IN_FRONT = (
    "Another attention override stood in front of this one during the sampling: {}. What it computed by itself is not "
    "counted here."
)
REPLACED = (
    "This backend computed nothing: another attention override, {}, took its place. Remove that node, or put Select "
    "Attention behind it."
)


@dataclass
class Entry:
    """Calls of one kind. backend: slug that computed, or "delegated"; kernel: its kernel, or the function that a
    delegated call went to, or None; why: the decision's reason.
    """

    backend: str
    library: str
    kernel: str | None
    call: str
    why: str
    calls: int = 0

    def same_kind(self, other):
        return (self.backend, self.kernel, self.call, self.why) == (other.backend, other.kernel, other.call, other.why)


@dataclass
class Run:
    """One sampling. seconds (from the first forward pass on) is None until it ended; latent is the fingerprint of what
    it produced.
    """

    chosen: str
    previous: str | None = None
    entries: dict = field(default_factory=dict)
    tables: list = field(default_factory=list)
    steps: int | None = None
    seconds: float | None = None
    error: str | None = None
    latent: tuple | None = None
    started: float = field(default_factory=time.perf_counter)
    first_forward: float | None = None
    forwards: int = 0
    in_front: str | None = None  # another pack's override that held the slot during the sampling
    loading_seconds: float | None = None

    @property
    def calls(self):
        return sum(e.calls for e in self.kinds())

    def count(self, decision, computed_by=None):
        """Count one call of a Decision. Called for every attention call: nothing expensive here."""
        entry = self.entries.get((decision.key, computed_by))
        (entry or self._entry(decision, computed_by)).calls += 1

    def _entry(self, decision, computed_by):
        """The entry of a decision seen for the first time; decisions that read the same (other strides, say) share
        one.
        """
        kernel = computed_by or decision.kernel
        fresh = Entry(decision.backend, decision.library, kernel, str(decision.call), decision.why)
        entry = self.entries[decision.key, computed_by] = next(
            (e for e in self.entries.values() if e.same_kind(fresh)), fresh
        )
        if decision.table and decision.table not in self.tables:
            self.tables.append(decision.table)
        return entry

    def kinds(self):
        """The entries, each once."""
        return list({id(e): e for e in self.entries.values()}.values())

    def as_data(self):
        """The run as plain data, for API users: JSON-serialisable."""
        entries = [
            {
                "backend": e.backend,
                "library": e.library,
                "kernel": e.kernel,
                "call": e.call,
                "why": e.why,
                "calls": e.calls,
            }
            for e in self.kinds()
        ]
        return {
            "chosen": self.chosen,
            "backend": "+".join(dict.fromkeys(e["backend"] for e in entries)),
            "calls": self.calls,
            "seconds": self.seconds,
            "loading_seconds": self.loading_seconds,
            "steps": self.steps,
            "seconds_per_step": self.seconds / self.steps if self.seconds and self.steps else None,
            "previous_override": self.previous,
            "override_in_front": self.in_front,
            "error": self.error,
            "entries": entries,
            "auto": [t.as_data() for t in self.tables],
        }

    def as_text(self):
        """The run as a report for people: the answer, then what it rests on."""
        lines = [self.answer(), f"Attention backend chosen: {self.chosen}"]
        if self.previous:
            delegated = sum(e.calls for e in self.kinds() if e.kernel == self.previous)
            lines.append(
                f"Another attention override was on this model before: {self.previous}. It computed {delegated} calls "
                "that were left to it."
            )
        if self.in_front and self.entries:
            lines.append(IN_FRONT.format(self.in_front))
        if self.seconds is not None and self.steps:
            lines.append(
                f"{self.steps} steps in {self.seconds:.2f} s, the first step included; {self.loading_seconds:.1f} s "
                "before it for loading."
            )
        for entry in self.kinds():
            lines.append(
                f"{entry.calls} calls: {entry.backend} | {entry.library} | kernel "
                f"{entry.kernel or 'not named by the library'} | {entry.call}"
            )
            lines.append(f"    {entry.why}")
        return "\n".join(lines + [t.as_text() for t in self.tables if t.says_more])

    def answer(self):
        """The first line of the report: what computed, how fast, how many calls; or why there is nothing to say."""
        if self.error:
            return f"The sampling stopped with an error: {self.error}"
        if not self.entries:
            return self.why_nothing()
        parts = Counter()
        for entry in self.kinds():
            parts[f"{entry.backend} ({entry.kernel or entry.library})"] += entry.calls
        if len(parts) == 1:
            said = [next(iter(parts)), f"all {self.calls} attention calls" if self.calls > 1 else "1 attention call"]
        else:
            said = [" and ".join(f"{name} in {n}" for name, n in parts.most_common()) + f" of {self.calls} calls"]
        if self.seconds and self.steps:
            said.insert(1, f"{self.seconds / self.steps:.3f} s per step")
        return " \u00b7 ".join(said)

    def why_nothing(self):
        """Why no call has been counted."""
        if self.seconds is None:
            return "No attention call has been seen yet. The report must come after the work it reports."
        return REPLACED.format(self.in_front) if self.in_front else NOT_ASKED


class RunLog:
    """The last runs of one dispatcher, newest last.

    listener: called with a Run once its first forward pass is done, which is when its kernel is known, and when it has
    ended; or None.
    """

    def __init__(self):
        self.runs = deque(maxlen=RUNS_KEPT)
        self.outside = None
        self.listener = None

    @property
    def current(self):
        """The newest sampling; where there was none, the calls outside of one."""
        return self.runs[-1] if self.runs else self.outside

    def running(self, chosen, previous):
        """The Run that a call made now belongs to: the sampling that has not ended, or the calls outside of one."""
        if self.runs and self.runs[-1].seconds is None:
            return self.runs[-1]
        if self.outside is None:
            self.outside = Run(chosen, previous)
        return self.outside

    def begin(self, chosen, previous, steps):
        self.runs.append(Run(chosen, previous, steps=steps))
        return self.runs[-1]

    def forward(self):
        """Called at the start of every forward pass: the first one ends the loading, the second tells the listener what
        the first one ran.
        """
        run = self.current
        if run is None or run.seconds is not None:
            return
        run.forwards += 1
        if run.first_forward is None:
            run.first_forward = time.perf_counter()
        elif run.forwards == 2:
            self.tell(run)

    def tell(self, run):
        """A listener that fails is no reason to stop a sampling."""
        if self.listener:
            try:
                self.listener(run)
            except Exception:
                log.exception("Select Attention: what ran could not be shown on the node.")

    def end(self, run, output=None, error=None):
        """Close a run. output: the latent it produced, float tensor of any shape."""
        now = time.perf_counter()
        begun = run.first_forward or now
        run.seconds, run.loading_seconds, run.error = now - begun, begun - run.started, error
        if not run.entries and not error:
            log.warning("Select Attention, %s: %s", run.chosen, run.why_nothing())
        try:
            run.latent = latent_fingerprint(output) if output is not None else None
        except Exception:  # a tensor type of somebody else: the report then finds the newest sampling
            log.exception("Select Attention: this latent cannot be recognised later.")
        self.tell(run)

    def find(self, latent):
        """The run that produced a latent with this fingerprint, else the newest; with whether it was found by the
        latent.
        """
        for run in reversed(self.runs):
            if latent is not None and run.latent == latent:
                return run, True
        return self.current, False


def latent_fingerprint(latent):
    """A cheap identity of a latent tensor: its shape and float64 sums, rounded so that a change of device does not
    alter it.
    """
    values = as_float64(latent.detach())
    return tuple(latent.shape), f"{values.sum().item():.6e}", f"{values.square().sum().item():.6e}"
