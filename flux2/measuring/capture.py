"""The shapes a MODEL really attends with, caught in one step of it, and the time of its whole steps. Models are cloned,
never changed.

Any MODEL with a conditioning of its own works; for FLUX.2 a random conditioning is made when none is given, which costs
the same time. Not covered: text encoders and VAEs.
"""

from dataclasses import dataclass
import re
import time

import comfy.samplers
import torch

from . import sampling
from ...attention.errors import UserError
from ...attention.override import Observer
from .. import attention_slot

TOPIC = "compare-and-benchmark"
TEXT_TOKENS, LARGEST_SIDE, PATCH, MOST_SIZES = 512, 16384, 16, 64
SIZE_HELP = (
    "Sizes are written like 1024x1024, with +1 behind it for one reference picture of 1024 x 1024, and "
    "separated by commas: 1024x1024, 1024x1024+1."
)


@dataclass(frozen=True)
class Size:
    """A picture in pixels, and how many references of 1024 x 1024 it is drawn with."""

    width: int
    height: int
    references: int = 0

    def __str__(self):
        return f"{self.width}x{self.height}" + (f"+{self.references}" if self.references else "")


def sizes(text):
    """[Size] of a text such as "1024x1024, 1024x1024+1". ValueError with the rule."""
    parts = [part.strip() for part in text.replace("\n", ",").split(",") if part.strip()]
    if not parts:
        raise UserError(f"There is no size to measure. {SIZE_HELP}", TOPIC)
    if len(parts) > MOST_SIZES:
        raise UserError(f"{len(parts)} sizes are too many: name at most {MOST_SIZES}. {SIZE_HELP}", TOPIC)
    return [one_size(part) for part in parts]


def one_size(text):
    found = re.fullmatch(r"(\d{1,6})\s*[xX×]\s*(\d{1,6})\s*(?:\+\s*(\d))?", text[:40])
    if not found or len(text) > 40:
        raise UserError(f"'{text if len(text) <= 40 else text[:37] + '...'}' is not a size. {SIZE_HELP}", TOPIC)
    width, height, references = (int(n or 0) for n in found.groups())
    for side in (width, height):
        if not PATCH <= side <= LARGEST_SIDE or side % PATCH:
            raise UserError(
                f"'{text}' is not a size that can be generated: both sides must be multiples of {PATCH} from {PATCH} "
                f"to {LARGEST_SIDE}.",
                TOPIC,
            )
    return Size(width, height, references)


def random_conditioning(model, seed=0):
    """A CONDITIONING of noise for models of Flux's shape. ValueError for others: they need a real one."""
    width = getattr(getattr(model.model.diffusion_model, "params", None), "context_in_dim", None)
    if width is None:
        raise UserError(
            "This model does not say how wide its prompts are. Connect a conditioning (any prompt will do).", TOPIC
        )
    return [[torch.randn(1, TEXT_TOKENS, width, generator=torch.Generator().manual_seed(seed)), {"guidance": 4.0}]]


def sampling_job(model, size, positive, steps, seed=0):
    """SamplingJob: `steps` steps of euler at a Size, from the noise of `seed`."""
    formats = model.model.latent_format
    shape = (
        1,
        formats.latent_channels,
        size.height // formats.spacial_downscale_ratio,
        size.width // formats.spacial_downscale_ratio,
    )
    if size.references:
        side = 1024 // formats.spacial_downscale_ratio
        references = [
            torch.randn(1, formats.latent_channels, side, side, generator=torch.Generator().manual_seed(n))
            for n in range(size.references)
        ]
        positive = [[context, {**values, "reference_latents": references}] for context, values in positive]
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)
    return sampling.SamplingJob(
        sampling.guider_of(model, positive),
        {"samples": torch.zeros(shape)},
        comfy.samplers.sampler_object("euler"),
        sigmas,
        seed,
    )


# --- attention calls -------------------------------------------------------------------------------------------------


@dataclass
class Captured:
    """One kind of attention call of a model, with the tensors of its first one: q, k, v (B, H, S, D). count: how often
    a step makes it.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None
    scale: float | None
    count: int = 0

    @property
    def text(self):
        keys = "" if self.q.shape[2] == self.k.shape[2] else f" x {self.k.shape[2]} keys"
        return (
            f"{self.q.shape[2]} tokens{keys}, {self.q.shape[1]} heads of {self.q.shape[3]}, "
            f"{str(self.q.dtype).removeprefix('torch.')}, "
            f"batch {self.q.shape[0]}{', mask' if self.mask is not None else ''}, {self.count} times a step"
        )


class Capture(Observer):
    """Keeps the tensors of the first call of each signature."""

    def __init__(self, inner):
        super().__init__(inner)
        self.step, self.kinds = 0, {}

    def __call__(self, func, q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, **kwargs):
        if not torch.compiler.is_compiling():
            tensors = (
                (q, k, v)
                if skip_reshape
                else (t.unflatten(-1, (-1, q.shape[-1] // heads)).transpose(1, 2) for t in (q, k, v))
            )
            self.keep(*tensors, mask, kwargs.get("scale"))
        kwargs = dict(kwargs, mask=mask, attn_precision=attn_precision, skip_reshape=skip_reshape)
        return super().__call__(func, q, k, v, heads, **kwargs)

    def keep(self, q, k, v, mask, scale):
        """q, k, v (B, H, S, D)."""
        key = q.shape, k.shape, q.stride(), q.dtype, mask is not None
        if key not in self.kinds:
            # clone keeps the strides of dense tensors: backends are timed on the layout that the model hands over
            self.kinds[key] = Captured(q.clone(), k.clone(), v.clone(), mask, scale)
        self.kinds[key].count += 1


def captured(model, size, positive):
    """[Captured] of one step at a Size. What the model raises passes through."""
    capture, step = Capture(attention_slot.override_of(model)), sampling_job(model, size, positive, 1)
    sampling.settle(model, step)
    sampling.run(attention_slot.observed(model, capture, sampling.KEY), step, None)
    return list(capture.kinds.values())


# --- whole steps -----------------------------------------------------------------------------------------------------


def step_times(model, size, positive, repeat, tick=lambda: None):
    """Milliseconds of `repeat` steps after a first one that warms up. tick() is called after each."""
    times, last = [], None

    def callback(step, denoised, x, steps):
        nonlocal last
        sampling.synchronise(model.load_device)
        now = time.perf_counter()
        if last is not None:
            times.append((now - last) * 1e3)
        tick()
        last = time.perf_counter()

    sampling.run(model, sampling_job(model, size, positive, repeat + 1), callback)
    return times
