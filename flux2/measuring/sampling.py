"""The same noise through variants of a MODEL: what each predicts in every step, how long a step takes, and the
pictures.

A Variant is a name and a transform of the MODEL, so backends, fused blocks, more GPUs or a LoRA are all
compared in the same way. Who looks at attention calls is an argument (`make_probe`). Models are cloned, never changed.
Not covered: video and other nested latents.
"""

from contextlib import contextmanager
from dataclasses import dataclass, field, replace
import copy
import statistics
import time

import comfy.model_management
import comfy.sample
import comfy.samplers
import torch

from ...attention.call import AttentionRefused
from ...attention.device import synchronise
from ...attention.errors import Explained, UserError
from .. import attention_slot, error_links

KEY = "flux2_compare"
TOPIC = "compare-and-benchmark"
LONGEST_CAUSE = 500  # characters of somebody else's error in a sentence
COMPILED = "torch_compile_kwargs"  # what core's helper for compiling leaves in model_options


@dataclass(frozen=True)
class Variant:
    """A variant of a model: transform(MODEL) -> MODEL. Whatever it raises is the reason why the candidate did not run.
    selects: whether the transform puts every attention call of the model on a backend, so that their number is known.
    """

    name: str
    transform: object
    selects: bool = False


@dataclass(frozen=True)
class SamplingJob:
    """One sampling. guider: a GUIDER whose conditions and settings are used, its model replaced. latent: ComfyUI's
    dict. sigmas: (steps + 1,).
    """

    guider: object
    latent: dict
    sampler: object
    sigmas: torch.Tensor
    seed: int

    @property
    def steps(self):
        return max(0, len(self.sigmas) - 1)


@dataclass
class Recording:
    """One sampling as it went. predicted: per step the denoised latent, float32 on the CPU; latent: the last one;
    seconds: {step: time} of the steps that were timed; model: what was sampled; probe: what looked at its attention;
    error: why it stopped; ran, calls: which kernels computed, in words, and how many calls of attention they counted,
    where the model keeps a log (filled in by the caller).
    """

    name: str
    predicted: list = field(default_factory=list)
    latent: torch.Tensor | None = None
    seconds: dict = field(default_factory=dict)
    model: object = None
    probe: object = None
    error: str = ""
    ran: str = ""
    calls: int | None = None

    @property
    def latents(self):
        """What is compared: the prediction of each step, then the last latent."""
        return [*self.predicted, self.latent]

    @property
    def seconds_per_step(self):
        return statistics.median(self.seconds.values()) if self.seconds else None


def guider_of(model, positive):
    """A GUIDER for one prompt without guidance by a negative one, as core's Basic Guider."""
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": positive})
    return guider


def guided(guider, model):
    """A copy of a GUIDER that samples with `model`."""
    twin = copy.copy(guider)
    twin.model_patcher, twin.model_options = model, model.model_options
    return twin


def checked_steps(steps):
    """The steps in which attention is looked at, and which are therefore not timed: first, middle and last, as long as
    one is left to time.
    """
    return {0, steps // 2, steps - 1} if steps > 3 else {0, steps - 1} if steps == 3 else {0}


def record(candidate, model, job, make_probe, on_step=lambda: None):
    """Recording of `job` with a Variant of `model`. make_probe(override, steps) makes the
    Observer.
    """
    found = Recording(candidate.name)
    try:
        found.model = candidate.transform(model)
        settle(model if candidate.selects else found.model, job)
        found.probe = make_probe(attention_slot.override_of(found.model), checked_steps(job.steps))
        sample(attention_slot.observed(found.model, found.probe, KEY), job, found, on_step)
    except (
        Exception
    ) as error:  # whatever it is, it is this candidate's reason; a cancel is no Exception and ends everything
        found.error = reason_of(error)
        comfy.model_management.soft_empty_cache()
    return found


def reason_of(error):
    """Why something did not run: the error's sentence; with its type where it is a mere word, as a KeyError's is."""
    if isinstance(error, AttentionRefused):
        return " ".join(
            error.reasons + ([error.hint] if error.call is None and "install" in error.hint.lower() else [])
        )
    text = error_links.bare(str(error).strip())
    return text if " " in text else f"{type(error).__name__}: {text}".removesuffix(": ")


@contextmanager
def in_words(what):
    """Around what the user's model, guider, text encoder or VAE computes: an error without a sentence becomes a
    UserError with it. Errors of this pack and short memory pass.
    """
    try:
        yield
    except Exception as error:  # whatever a model of any pack raises; a cancel is no Exception
        if error_links.section_of(error) or isinstance(error, Explained):
            raise
        said = f"{type(error).__name__}: {str(error).strip()}".removesuffix(": ")[:LONGEST_CAUSE]
        raise UserError(
            f"{what} stopped with this error, which comes from the model or from what is connected to it: {said}\nTry "
            "the same inputs with ComfyUI's own nodes. If these stop too, look at the node that the message names; if "
            "not, please report it.",
            TOPIC,
        ) from error


def is_compiled(model):
    """Whether core's helper for torch.compile has been at work on a MODEL."""
    return COMPILED in model.model_options


def settle(model, job):
    """Run one step of a MODEL that core's helper has compiled, as it came. Its graphs are traced in the first run and
    never look at transformer_options again: traced with an observer of ours they would keep it, and the user's next
    picture would fail or come from another kernel.
    """
    if is_compiled(model):
        run(model, replace(job, sigmas=job.sigmas[:2]), None)


def sample(model, job, found, on_step):
    """Run the job and fill in the Recording. A step's time runs from the end of the model's work in the step before to
    its end in this one.
    """
    skipped, last = getattr(found.probe, "steps", ()), None

    def callback(step, denoised, x, steps):
        nonlocal last
        synchronise(model.load_device)
        now = time.perf_counter()
        if last is not None and step not in skipped:
            found.seconds[step] = now - last
        found.predicted.append(denoised.detach().float().cpu())
        on_step()
        last = time.perf_counter()

    found.latent = run(model, job, callback)


def run(model, job, callback):
    """The last latent of a job, float32 on the CPU, sampled as core's SamplerCustomAdvanced does."""
    ratios = (job.latent.get(f"downscale_ratio_{axis}") for axis in ("spacial", "temporal"))
    if job.latent["samples"].is_nested:
        raise UserError(
            "This compares images: a latent with several parts (video with sound, say) cannot be compared yet.", TOPIC
        )
    with in_words("Sampling"):
        latent = comfy.sample.fix_empty_latent_channels(model, job.latent["samples"], *ratios)
        noise = comfy.sample.prepare_noise(latent, job.seed, job.latent.get("batch_index"))
        samples = guided(job.guider, model).sample(
            noise,
            latent,
            job.sampler,
            job.sigmas,
            denoise_mask=job.latent.get("noise_mask"),
            callback=callback,
            disable_pbar=True,
            seed=job.seed,
        )
    return samples.detach().float().cpu()


def decode(vae, latent):
    """Pictures (B, H, W, 3), float32 from 0 to 1 on the CPU."""
    with in_words("The VAE"):
        pictures = vae.decode(latent)
    return pictures.reshape(-1, *pictures.shape[-3:]).float().cpu().clamp(0, 1)


def rough_image(model, latent):
    """A small image (B, h, w, 3) of a latent without its VAE, by the colour table that ComfyUI previews with; its
    mean as grey for formats without one.
    """
    formats = model.model.latent_format
    if formats.latent_rgb_factors is None:
        grey = latent.reshape(latent.shape[0], latent.shape[1], -1, latent.shape[-1]).mean(dim=1)
        return stretched(grey.unsqueeze(-1).expand(*grey.shape, 3))
    table = torch.tensor(formats.latent_rgb_factors, dtype=torch.float32)
    reshape = getattr(formats, "latent_rgb_factors_reshape", None)
    flat = reshape(latent) if reshape else latent
    bias = torch.tensor(formats.latent_rgb_factors_bias or [0.0, 0.0, 0.0])
    return ((flat.movedim(1, -1) @ table + bias + 1) / 2).clamp(0, 1).reshape(-1, *flat.shape[-2:], 3)


def stretched(values):
    """Values to the range from 0 to 1."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low).clamp(min=1e-12)


def stopper(bar):
    """A tick that moves the progress bar and raises when the user cancels."""

    def tick():
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update(1)

    return tick
