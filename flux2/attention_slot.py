"""An attention override on a ComfyUI MODEL: set, found again, replaced; and the sampler's hooks that tell it where a
sampling is.

Everything goes through the model patcher of a clone: the model's weights and modules are not touched, and a model
without the clone's options behaves as before.
"""

import torch

from comfy.patcher_extension import WrappersMP

from . import error_links

SLOT = "optimized_attention_override"
KEY = "flux2_attention"


def occupant(model):
    """Whoever holds the attention override of a MODEL, or None."""
    return model.model_options.get("transformer_options", {}).get(SLOT)


def install(model, override):
    """Put `override` (called like core's attention functions) into the slot of a MODEL clone and hook its selection to
    the
    sampler.

    override.selection receives begin_run, forward and log.end. Hooks of an earlier selection are removed: selecting
    twice replaces.
    """
    # not through set_model_optimized_attention, which cores after 0.30 have: it drops the function that an override
    # hands calls back to
    model.model_options.setdefault("transformer_options", {})[SLOT] = override
    selection = override.selection
    for kind, wrapper in (
        (WrappersMP.OUTER_SAMPLE, during_sampling(selection)),
        (WrappersMP.APPLY_MODEL, during_forward(selection)),
    ):
        model.remove_wrappers_with_key(kind, KEY)
        model.add_wrapper_with_key(kind, KEY, wrapper)


def during_sampling(selection):
    """A wrapper around one whole sampling: begins and ends a run in the selection's log."""

    def wrapper(executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
        run = selection.begin_run(max(0, len(sigmas) - 1))
        try:
            output = executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        except BaseException as error:  # a cancel is one too
            selection.log.end(run, error=f"{type(error).__name__}: {error}".rstrip(": "))
            error_links.link(error)
            raise
        if output.device.type == "cuda":
            torch.cuda.synchronize(output.device)
        selection.log.end(run, output)
        return output

    return wrapper


def during_forward(selection):
    """A wrapper around one forward pass: tells the selection the step, from the sampler's own sigmas."""

    def wrapper(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kwargs):
        # a look at the sigmas waits for the GPU
        step, steps = step_of(transformer_options) if selection.schedule else (None, 0)
        with selection.forward(step, steps):
            return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)

    return wrapper


def step_of(transformer_options):
    """(step from 0, number of steps) of the sigma that is being evaluated; (None, 0) outside a sampling.

    A sampler may evaluate between two sigmas of its schedule (Heun, DPM++ 2S): that belongs to the step it is in.
    """
    sigmas, sigma = transformer_options.get("sample_sigmas"), transformer_options.get("sigmas")
    if sigmas is None or sigma is None:
        return None, 0
    steps = len(sigmas) - 1
    # sigmas fall; the step is that of the last scheduled sigma not below the current one (a hair of tolerance for
    # casts)
    at_or_above = int((sigmas >= sigma.flatten()[0].to(sigmas) * (1 - 1e-5)).sum())
    return min(max(at_or_above - 1, 0), steps - 1), steps


def attention_facts(model):
    """What is known of a MODEL's attention before it runs: (torch device, dtype it computes in, head size or None).

    The head size is the hidden size over the heads for models that state both (Flux and its relatives).
    """
    inner = model.model
    dtype = getattr(inner, "manual_cast_dtype", None) or inner.get_dtype()
    params = getattr(inner.diffusion_model, "params", None)
    head_dim = (
        params.hidden_size // params.num_heads
        if hasattr(params, "hidden_size") and hasattr(params, "num_heads")
        else None
    )
    return model.load_device, dtype, head_dim


def block_kinds(model):
    """(("double", n), ("single", m)) for models of Flux's shape, () where the model does not number its blocks in that
    way.
    """
    inner = model.model.diffusion_model
    kinds = ((kind, len(getattr(inner, f"{kind}_blocks", ()))) for kind in ("double", "single"))
    return tuple((kind, n) for kind, n in kinds if n)
