"""How far two results are apart, how long work takes, and what that means: numbers, a control, a verdict with its
thresholds. torch only.

A verdict is never read off a fixed number of decibels: dozens of blocks amplify the last bit of a kernel's rounding, on
one model and seed more than on another. The yardstick is a control, two exact kernels on the same noise. Not covered:
what people find better or worse.
"""

from dataclasses import asdict, dataclass
import importlib.metadata
import importlib.util
import math
import platform
import statistics
import time

import torch

from ..device import describe, synchronise

NOISE, SLIGHT, DIFFERENT, NO_VERDICT = (
    "same as rounding noise",
    "slightly different picture",
    "different picture",
    "no verdict",
)
MOST_AT_A_TIME = 50
NO_SSIM = "scikit-image is not installed, so there is no SSIM. Install it with: pip install matplotlib scikit-image"
PACKAGES = (
    "triton",
    "flash-attn",
    "flash-attn-3",
    "flash-attn-4",
    "sageattention",
    "sageattn3",
    "nvidia-cudnn-frontend",
    "xformers",
    "comfy-kitchen",
    "amd-aiter",
    "flydsl",
)


# --- two results -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """A tensor against its reference. relative: ||a - r|| / ||r||. cosine: of the angle between them. change: ||a - r||
    over the norm of what varies in r, 1.41 for two unrelated pictures. non_finite: how many values of a are NaN or
    infinite; the other fields are infinite or NaN then.
    """

    relative: float
    cosine: float
    change: float
    non_finite: int = 0

    @property
    def identical(self):
        return self.relative == 0 and self.non_finite == 0


def difference(out, reference):
    """Difference of two tensors of one shape, channels on axis 1 (B, C, ...). Computed in float64; exactly zero for
    equal tensors.
    """
    broken = int((~torch.isfinite(out)).sum())
    if broken:
        return Difference(math.inf, math.nan, math.inf, broken)
    a, r = out.double(), reference.double()
    others = [axis for axis in range(r.ndim) if axis != 1]
    varying = (r - r.mean(dim=others, keepdim=True)).norm()
    gap = (a - r).norm()
    cosine = (a * r).sum() / (a.norm() * r.norm()) if gap else torch.ones(())
    return Difference(ratio(gap, r.norm()), cosine.item(), ratio(gap, varying))


def ratio(part, whole):
    """part / whole as a float: 0 when both are 0, infinite when only the whole is."""
    part, whole = float(part), float(whole)
    if whole == 0 or part != part:
        return 0.0 if part == 0 else math.inf
    return part / whole


def psnr(picture, reference):
    """Peak signal to noise ratio in dB of pictures with values from 0 to 1: -10 log10(mean squared error). Infinite for
    equal pictures.
    """
    error = (picture.double() - reference.double()).square().mean().item()
    return math.inf if error == 0 else -10 * math.log10(error) if error == error else math.nan


def ssim(image, reference):
    """Structural similarity (Wang et al. 2004) of two images (B, H, W, 3) from 0 to 1 by scikit-image, the mean of the
    batch; None without it or below 7 pixels.
    """
    if not has_ssim() or min(image.shape[1:3]) < 7:
        return None
    from skimage.metrics import structural_similarity

    pairs = zip(image.numpy(), reference.numpy())
    return statistics.fmean(float(structural_similarity(a, b, channel_axis=-1, data_range=1.0)) for a, b in pairs)


def has_ssim():
    """Whether scikit-image is installed."""
    return importlib.util.find_spec("skimage") is not None


# --- control and verdict ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Thresholds:
    """Where the verdicts begin.

    attention_ratio: error of an attention call over that of the exact kernels in the same call; 2 is what
    flash-attention's own tests allow, and exact kernels were seen up to 1.3. latent_ratio: difference of a latent over
    the control's in the same step; exact kernels were seen up to 1.1 on small models, and deep ones scatter more.
    picture_change: of the last latent, as in Difference; a quarter is about 25 dB in the picture. head_error: of one
    attention head; at a half the head computes something else (a dropped one is at 1, rows in a wrong order above it,
    quantised kernels near 0.1).
    """

    attention_ratio: float = 2.0
    latent_ratio: float = 3.0
    picture_change: float = 0.25
    head_error: float = 0.5

    def __str__(self):
        return (
            f"'{NOISE}': attention error at most {self.attention_ratio:g} times, and every step's latent at most "
            f"{self.latent_ratio:g} times the control's. "
            f"'{DIFFERENT}': the last latent moved by more than {self.picture_change:.0%} of its own variation "
            "(unrelated pictures: 141%) and more than "
            f"{self.latent_ratio:g} times the control's, or an attention head is wrong by more than "
            f"{self.head_error:.0%}. '{SLIGHT}': in between."
        )


@dataclass(frozen=True)
class Call:
    """Errors of one attention call against float32. total: over all sampled values. worst_head: of the worst head,
    relative to the average head's size. eps: spacing of the number format at 1. non_finite: NaN or infinite values in
    the whole output.
    """

    total: float
    worst_head: float
    eps: float
    non_finite: int = 0

    @property
    def floor(self):
        """What rounding the result alone costs."""
        return self.eps / 8

    @property
    def plausible(self):
        """Whether an exact kernel can be this far off. Half precision: seen at 0.3 eps. Float32 adds up the error of
        every key: seen at 9 eps.
        """
        return self.non_finite == 0 and self.worst_head <= (64 if self.eps < 1e-5 else 1.5) * self.eps


@dataclass(frozen=True)
class Evidence:
    """What one run showed: latents against the reference's, one Difference per step and one for the last latent; calls
    {(step, block): Call}.
    """

    latents: tuple
    calls: dict

    @property
    def identical(self):
        return all(d.identical for d in self.latents)

    @property
    def non_finite(self):
        return sum(d.non_finite for d in self.latents) + sum(c.non_finite for c in self.calls.values())

    def worst_call(self):
        """((step, block), Call) with the largest error of a head, or None where no call was seen."""
        return max(self.calls.items(), key=lambda item: item[1].worst_head, default=None)


@dataclass(frozen=True)
class Verdict:
    """word: one of the four above; why: the numbers that decided. attention_ratio, latent_ratio: largest over the run,
    None where not measured.
    """

    word: str
    why: str
    attention_ratio: float | None = None
    latent_ratio: float | None = None


@dataclass(frozen=True)
class Control:
    """Rounding noise of this model and seed: two exact kernels. name: which. latents: of one against the other, as in
    Evidence. calls: of each, a dict {(step, block): Call}.
    """

    name: str
    latents: tuple
    calls: tuple

    def attention_floor(self, key, call):
        """Error (total, worst head) that exact kernels make in the call `key`; where they made none, what rounding the
        result costs.
        """
        seen = [calls[key] for calls in self.calls if key in calls]
        return max([c.total for c in seen] + [call.floor]), max([c.worst_head for c in seen] + [call.floor])

    def attention_ratio(self, calls):
        """Largest error of `calls` over that of the exact kernels in the same call, by all heads or by the worst one;
        None without calls.
        """
        floors = {key: self.attention_floor(key, call) for key, call in calls.items()}
        return max(
            (max(ratio(c.total, floors[k][0]), ratio(c.worst_head, floors[k][1])) for k, c in calls.items()),
            default=None,
        )

    def latent_ratio(self, latents):
        """Largest difference of a step's latent over the control's in that step, or of the last one. A step in which
        the control is exactly equal counts with float32's spacing.
        """
        least = torch.finfo(torch.float32).eps
        return max(ratio(a.relative, max(c.relative, least)) for a, c in zip(latents, self.latents))


def judge(evidence, control, thresholds=Thresholds()):
    """Verdict on a run. control: None where no second exact kernel could run."""
    if evidence.non_finite:
        return Verdict(DIFFERENT, f"{evidence.non_finite} values are NaN or infinite")
    if evidence.identical:
        return Verdict(
            NOISE,
            "identical: every latent of every step equals the reference's exactly",
            control and control.attention_ratio(evidence.calls),
            0.0,
        )
    broken = broken_head(evidence, thresholds)
    if control is None:
        return (
            Verdict(DIFFERENT, broken)
            if broken
            else Verdict(
                NO_VERDICT, "no second exact kernel could run here, so there is nothing to tell rounding noise by"
            )
        )
    attention, latent = control.attention_ratio(evidence.calls), control.latent_ratio(evidence.latents)
    seen = ratios_text(attention, latent, evidence)
    if broken:
        return Verdict(DIFFERENT, f"{broken}; {seen}", attention, latent)
    if latent <= thresholds.latent_ratio and (attention is None or attention <= thresholds.attention_ratio):
        return Verdict(NOISE, seen, attention, latent)
    last, noise = evidence.latents[-1].change, control.latents[-1].change
    different = last > thresholds.picture_change and last > thresholds.latent_ratio * noise
    return Verdict(DIFFERENT if different else SLIGHT, seen, attention, latent)


def broken_head(evidence, thresholds):
    """The sentence about an attention head that computes something else, or ""."""
    worst = evidence.worst_call()
    if worst is None or worst[1].worst_head <= thresholds.head_error:
        return ""
    (step, block), call = worst
    return f"in block {block} of step {step + 1} an attention head is wrong by {call.worst_head:.0%}"


def ratios_text(attention, latent, evidence):
    first = (
        f"attention error {attention:.3g} times the control's"
        if attention is not None
        else "no attention call could be checked by itself"
    )
    return (
        f"{first}, latents {latent:.3g} times, last latent moved by {evidence.latents[-1].change:.2g} of its variation"
    )


# --- time ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """Milliseconds of repeated work: median, with the fastest and slowest run as the spread."""

    ms: float
    min_ms: float
    max_ms: float
    runs: int

    @classmethod
    def of(cls, values):
        return cls(statistics.median(values), min(values), max(values), len(values))

    def __str__(self):
        return f"{self.ms:.3f} ms ({self.min_ms:.3f} to {self.max_ms:.3f})"


def timed(work, device, repeat, warm_up=2, tick=lambda: None, least_ms=0):
    """Timing of `repeat` runs of work() on `device` after `warm_up` more. tick() is called before each run, outside the
    time; it may raise to stop.

    least_ms: short work is queued several times per run, so that a run takes about that long, and the time is that of
    one.
    """
    for _ in range(warm_up):
        tick()
        once = wall_ms(work, device)
    at_a_time = min(MOST_AT_A_TIME, max(1, math.ceil(least_ms / max(once, 1e-6)))) if warm_up else 1
    found = []
    for _ in range(repeat):
        tick()
        found.append(wall_ms(work, device, at_a_time))
    return Timing.of(found)


def wall_ms(work, device, times=1):
    """Milliseconds per work() of `times` in a row on a device that is idle before and after."""
    synchronise(device)
    start = time.perf_counter()
    for _ in range(times):
        work()
    synchronise(device)
    return (time.perf_counter() - start) * 1e3 / times


# --- the machine -----------------------------------------------------------------------------------------------------


def machine(device):
    """The stamp of a result: device, drivers and every version that can change a figure. Names no host and no user."""
    device = torch.device(device)
    known = describe(device)
    stamp = {
        "device": known.name,
        "arch": known.arch,
        "platform": known.platform,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }
    if device.type == "cuda":
        stamp |= {
            "memory_gib": round(torch.cuda.get_device_properties(device).total_memory / 2**30, 1),
            "gpus": torch.cuda.device_count(),
            "cudnn": torch.backends.cudnn.version(),
        }
    else:
        stamp |= {"threads": torch.get_num_threads()}
    return {name: value for name, value in {**stamp, **installed()}.items() if value is not None}


def installed():
    """{package: version} of the kernel libraries that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def as_json(value):
    """`value` as JSON takes it: dataclasses as dicts, tuples as lists; NaN and infinities, which JSON has no word for,
    as text.
    """
    if hasattr(value, "__dataclass_fields__"):
        return as_json(asdict(value))
    if isinstance(value, dict):
        return {str(k): as_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
