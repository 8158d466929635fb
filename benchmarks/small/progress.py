"""Time, logging and averages of a training run that is given minutes, not steps."""

import time

import torch


class Clock:
    """Runs for `seconds`; `share` goes from 0 to 1."""

    def __init__(self, seconds):
        self.start, self.seconds = time.monotonic(), max(seconds, 1e-3)

    @property
    def elapsed(self):
        return time.monotonic() - self.start

    @property
    def share(self):
        return min(1.0, self.elapsed / self.seconds)

    @property
    def over(self):
        return self.elapsed >= self.seconds


class Every:
    """True once per `seconds`."""

    def __init__(self, seconds):
        self.seconds, self.next = seconds, time.monotonic() + seconds

    def __call__(self):
        if time.monotonic() < self.next:
            return False
        self.next = time.monotonic() + self.seconds
        return True


class Mean:
    """The mean of losses since it was last read, kept on their device so that adding one does not wait for it."""

    def __init__(self):
        self.total, self.count = 0.0, 0

    def add(self, value):
        self.total, self.count = self.total + value.detach(), self.count + 1

    def read(self):
        mean = float(self.total) / max(self.count, 1)
        self.total, self.count = 0.0, 0
        return mean


class Average:
    """Exponential moving average of the parameters of some models, in models of their own ({kind: model})."""

    def __init__(self, models, copies, decay=0.999):
        self.pairs = [
            (mine, theirs)
            for kind, model in models.items()
            for mine, theirs in zip(copies[kind].parameters(), model.parameters())
        ]
        self.models, self.decay, self.steps = copies, decay, 0
        for mine, _ in self.pairs:
            mine.requires_grad_(False)

    @torch.no_grad()
    def update(self):
        self.steps += 1
        decay = min(self.decay, self.steps / (self.steps + 9))
        torch._foreach_lerp_([mine for mine, _ in self.pairs], [theirs for _, theirs in self.pairs], 1 - decay)


def log(text):
    print(text, flush=True)
