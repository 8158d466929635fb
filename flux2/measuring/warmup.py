"""Steps of a MODEL before the first picture, so that what happens once per size (compiling, tuning, allocation) is over
when it is drawn.

The model samples as it is, with all that other nodes did to it, from noise that nobody sees; its weights and options
are not changed, and random numbers go on afterwards as if nothing had run. A text encoder and a VAE are run once, if
given. Not covered: guiders with a negative prompt.
"""

from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
import statistics
import time

import comfy.model_management
import comfy.samplers
import torch

from ...attention.errors import first_line, is_out_of_memory
from .. import attention_slot
from . import capture, sampling

# about as long as prompts are: encoders compile for lengths too
PROMPT = "A lighthouse on a cliff in the evening, waves below, photograph."
REFERENCE_SIDE = 1024


@dataclass
class WarmUpRow:
    """One thing that was run. loading: seconds before the first step; steps: seconds of each; seconds: of what has no
    steps; error: why it did not.
    """

    what: str
    seconds: float | None = None
    loading: float = 0.0
    steps: list = field(default_factory=list)
    error: str = ""

    def as_text(self):
        if self.error:
            return f"{self.what}: did not run. {self.error}"
        if self.seconds is not None:
            return f"{self.what}: {self.seconds:.2f} s"
        parts = [f"loaded in {self.loading:.1f} s"] if self.loading >= 0.1 else []
        parts += [f"first step {self.steps[0]:.2f} s"] if self.steps else []
        parts += [f"then {statistics.median(self.steps[1:]):.3f} s per step"] if len(self.steps) > 1 else []
        return f"{self.what}: {', '.join(parts)}"


def warm_up(model, sizes, steps, positive=None, clip=None, vae=None, batch=1, tick=lambda: None):
    """[WarmUpRow] of what was run: the text encoder, `steps` steps of a MODEL at each capture.Size, the VAE. tick() is
    called between, and after each step.

    positive: a CONDITIONING; without one clip makes it, and without that noise stands in. A size for which memory is
    short becomes a row with its reason; whatever else goes wrong passes through.
    """
    rows = []
    with same_random_numbers(model.load_device):
        if clip is not None:
            positive = positive or timed(rows, "text encoder", lambda: encode(clip))
            tick()
        positive = positive or capture.random_conditioning(model)
        for size in sizes:
            rows.append(sampled(model, size, positive, steps, batch, tick))
        for size in sizes if vae is not None else ():
            decoded(rows, model, vae, size, batch)
            tick()
    return rows


def ticks(sizes, steps, clip=None, vae=None):
    """How many ticks a warm-up makes."""
    return len(sizes) * (steps + (vae is not None)) + (clip is not None)


def same_random_numbers(device):
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def timed(rows, what, work):
    """The result of work(), its time as a WarmUpRow."""
    start = time.perf_counter()
    with sampling.in_words(what):
        result = work()
    rows.append(WarmUpRow(what, time.perf_counter() - start))
    return result


def encode(clip):
    return clip.encode_from_tokens_scheduled(clip.tokenize(PROMPT))


def sampled(model, size, positive, steps, batch, tick):
    """The WarmUpRow of `steps` steps at a Size."""
    row, clock = WarmUpRow(str(size) + (f", batch {batch}" if batch > 1 else "")), Clock(model.load_device)

    def callback(*_):
        row.steps.append(clock.lap())
        tick()

    job = capture.sampling_job(model, size, positive, steps)
    job = replace(
        job, latent={"samples": job.latent["samples"].repeat(batch, 1, 1, 1)}, sampler=clocked(job.sampler, clock, row)
    )
    try:
        sampling.run(model, job, callback)
    except Exception as error:
        if not is_out_of_memory(
            error
        ):  # PyTorch's class is one of several: compilers, other ranks and the CPU have others
            raise
        comfy.model_management.soft_empty_cache()
        row.error = f"There is not enough memory for this size ({first_line(error)})."
    return row


class Clock:
    """Seconds between laps, the device's work included."""

    def __init__(self, device):
        self.device, self.last = device, time.perf_counter()

    def lap(self):
        sampling.synchronise(self.device)
        before, self.last = self.last, time.perf_counter()
        return self.last - before


def clocked(sampler, clock, row):
    """A sampler that starts the clock of the first step: loading comes before it."""

    def function(*args, **kwargs):
        row.loading = clock.lap()
        return sampler.sampler_function(*args, **kwargs)

    return comfy.samplers.KSAMPLER(function, sampler.extra_options, sampler.inpaint_options)


def decoded(rows, model, vae, size, batch):
    """Rows of a VAE's part in a picture of a Size: decoding, and encoding its references."""
    latent = capture.sampling_job(model, size, [], 1).latent["samples"].repeat(batch, 1, 1, 1)
    timed(rows, f"VAE, decoding {size.width}x{size.height}", lambda: vae.decode(latent))
    if size.references and not any("encoding" in row.what for row in rows):
        timed(
            rows,
            "VAE, encoding a reference",
            lambda: vae.encode(torch.full((1, REFERENCE_SIDE, REFERENCE_SIDE, 3), 0.5)),
        )


@contextmanager
def unlogged(model):
    """Leaves the attention log of a MODEL as it was; gives a list that afterwards says which kernels ran meanwhile."""
    dispatcher, ran = attention_slot.dispatcher_of(model), []
    kept = list(dispatcher.log.runs) if dispatcher else []
    try:
        yield ran
    finally:
        if dispatcher:
            ran += kernels([run for run in dispatcher.log.runs if all(run is not old for old in kept)])
            dispatcher.log.runs.clear()
            dispatcher.log.runs.extend(kept)


def kernels(runs):
    """[sentence] of the kernels that computed attention in some runs of a log."""
    calls = Counter()
    for entry in (entry for run in runs for entry in run.kinds()):
        calls[f"{entry.backend} ({entry.kernel or entry.library})"] += entry.calls
    return [f"attention: {', '.join(f'{name}, {count} calls' for name, count in calls.most_common())}"] if calls else []
