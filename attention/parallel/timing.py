"""Seconds that one rank spent in collectives and in everything else, without making the GPU wait for the clock.

On a GPU two events are recorded around each part and read when somebody asks; on the CPU the clock is read. A
collective that another rank is late for counts as collective: that is what waiting costs here.
"""

from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass
import time

import torch

FOLD = 4096  # pairs of events kept before the finished ones are added up


@dataclass
class Times:
    """forwards: passes through the model; collectives: how many took place; sent: bytes that left this rank; seconds as
    named; tokens: per rank, of the last pass.
    """

    forwards: int = 0
    collectives: int = 0
    sent: int = 0
    forward_seconds: float = 0.0
    collective_seconds: float = 0.0
    tokens: tuple = ()

    @property
    def compute_seconds(self):
        """What is left of the forward passes without their collectives."""
        return max(0.0, self.forward_seconds - self.collective_seconds)

    def as_data(self):
        return {**vars(self), "tokens": list(self.tokens), "compute_seconds": self.compute_seconds}


class Stats:
    """The times of one rank. `forward` and `collective` are context managers around the work; `read` gives the sums;
    `reset` starts again.
    """

    def __init__(self, device="cpu"):
        self.device = torch.device(device)
        self.reset()

    def reset(self):
        self._times, self._pairs = Times(), deque()

    def set_tokens(self, lengths):
        self._times.tokens = tuple(lengths)

    @contextmanager
    def forward(self):
        with self._timed("forward_seconds"):
            yield
        self._times.forwards += 1

    @contextmanager
    def collective(self, sent):
        """sent: bytes; None for the wait of a collective that was counted when it started."""
        with self._timed("collective_seconds"):
            yield
        self._times.collectives += sent is not None
        self._times.sent += sent or 0

    @contextmanager
    def _timed(self, name):
        if self.device.type == "cuda":
            begun = self._mark()
            yield
            self._pairs.append((name, begun, self._mark()))
            if len(self._pairs) >= FOLD:
                self._fold(wait=False)
        else:
            begun = time.perf_counter()
            yield
            self._add(name, time.perf_counter() - begun)

    def _mark(self):
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _add(self, name, seconds):
        setattr(self._times, name, getattr(self._times, name) + seconds)

    def _fold(self, wait):
        """Add up the pairs that are finished, or wait for all of them. They finish in the order in which they ended."""
        if wait and self._pairs:
            torch.cuda.synchronize(self.device)
        while self._pairs and (wait or self._pairs[0][2].query()):
            name, begun, ended = self._pairs.popleft()
            self._add(name, begun.elapsed_time(ended) / 1e3)

    def read(self):
        """Times so far. Waits for the GPU: ask at the end of a sampling."""
        self._fold(wait=True)
        return self._times
