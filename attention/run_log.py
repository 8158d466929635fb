"""What really ran: one RunLog per dispatcher, one Run per sampling, one Entry per kind of call."""

from collections import deque
from dataclasses import dataclass, field
import logging
import time

RUNS_KEPT = 8
NOT_ASKED = (
    "This backend computed nothing: the model never asked it. A model that was compiled and sampled before Select "
    "Attention keeps its own attention "
    "in the compiled code: put the compile node after Select Attention. Otherwise this model does not take its "
    "attention from ComfyUI."
)


@dataclass
class Entry:
    """Calls of one kind. backend: slug that computed, or "delegated"; kernel: its kernel or None; why: the decision's
    reason.
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
    loading_seconds: float | None = None

    @property
    def calls(self):
        return sum(e.calls for e in self.kinds())

    def count(self, decision):
        """Count one call of a Decision. Called for every attention call: nothing expensive here."""
        entry = self.entries.get(decision.key)
        (entry or self._entry(decision)).calls += 1

    def _entry(self, decision):
        """The entry of a decision seen for the first time; decisions that read the same (other strides, say) share
        one.
        """
        fresh = Entry(decision.backend, decision.library, decision.kernel, str(decision.call), decision.why)
        entry = self.entries[decision.key] = next((e for e in self.entries.values() if e.same_kind(fresh)), fresh)
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
            "error": self.error,
            "entries": entries,
            "auto": [t.as_data() for t in self.tables],
        }

    def as_text(self):
        """The run as a report for people."""
        lines = [f"Attention backend chosen: {self.chosen}"]
        if self.previous:
            lines.append(
                f"Another attention override was on this model before: {self.previous}. It gets the calls that are "
                "handed back."
            )
        if self.seconds is not None and self.steps:
            lines.append(
                f"{self.steps} steps in {self.seconds:.2f} s: {self.seconds / self.steps:.3f} s per step (first step "
                f"included; {self.loading_seconds:.1f} s before it for loading)"
            )
        if self.error:
            lines.append(f"The sampling stopped with an error: {self.error}")
        if not self.entries and self.seconds is not None:
            lines.append(NOT_ASKED)
        elif not self.entries:
            lines.append("No attention call has been seen yet. The report must come after the work it reports.")
        for entry in self.kinds():
            lines.append(
                f"{entry.calls} calls: {entry.backend} | {entry.library} | kernel "
                f"{entry.kernel or 'not named by the library'} | {entry.call}"
            )
            lines.append(f"    {entry.why}")
        return "\n".join(lines + [t.as_text() for t in self.tables])


class RunLog:
    """The last runs of one dispatcher, newest last.

    listener: called with a Run once its first forward pass is done, which is when its kernel is known, and when it has
    ended; or None.
    """

    def __init__(self):
        self.runs = deque(maxlen=RUNS_KEPT)
        self.listener = None

    @property
    def current(self):
        return self.runs[-1] if self.runs else None

    def begin(self, chosen, previous, steps):
        self.runs.append(Run(chosen, previous, steps=steps))
        return self.current

    def forward(self):
        """Called at the start of every forward pass: the first one ends the loading, the second tells the listener what
        the first one ran.
        """
        run = self.current
        if run is None:
            return
        run.forwards += 1
        if run.first_forward is None:
            run.first_forward = time.perf_counter()
        elif run.forwards == 2 and run.seconds is None:
            self.tell(run)

    def tell(self, run):
        """A listener that fails is no reason to stop a sampling."""
        if self.listener:
            try:
                self.listener(run)
            except Exception:
                logging.getLogger(__name__).exception("Select Attention: what ran could not be shown on the node.")

    def end(self, run, output=None, error=None):
        """Close a run. output: the latent it produced, float tensor of any shape."""
        now = time.perf_counter()
        begun = run.first_forward or now
        run.seconds, run.loading_seconds, run.error = now - begun, begun - run.started, error
        if not run.entries and not error:
            logging.getLogger(__name__).warning("Select Attention, %s: %s", run.chosen, NOT_ASKED)
        run.latent = latent_fingerprint(output) if output is not None else None
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
    values = latent.detach().double()
    return tuple(latent.shape), f"{values.sum().item():.6e}", f"{values.square().sum().item():.6e}"
