"""The one slot for an attention override on a ComfyUI MODEL: who is in it, who was before, who only observes; and the
sampler's hooks that tell a dispatcher where a sampling is.

Core asks `transformer_options["optimized_attention_override"]` at every attention call and knows one override: the last
node wins. Select Attention keeps the override that it finds, for calls that it delegates; observers (the accuracy
probe, the capture of calls) stand in front of whatever computes and are looked through. Everything goes through the
model patcher of a clone: weights and modules are not touched, and a model without the clone's options behaves as
before.
"""

import logging

from comfy.patcher_extension import WrappersMP

from ..attention.device import synchronise
from ..attention.override import CHOSEN_BY_BLOCK, AttentionOverride, Observer, name_of
from . import error_links

SLOT = "optimized_attention_override"
KEY = "flux2_attention"
log = logging.getLogger(__name__)


# --- who is there ----------------------------------------------------------------------------------------------------


def override_of(model):
    """The override in the slot of a MODEL, observers included, or None."""
    return model.model_options.get("transformer_options", {}).get(SLOT)


def behind_observers(override):
    """The override that computes: `override` itself, or whom the observers in front of it look at; None for core's."""
    while isinstance(override, Observer):
        override = override.inner
    return override


def dispatcher_behind(override):
    """The AttentionDispatcher that an override computes with, observers looked through, or None."""
    override = behind_observers(override)
    return override.dispatcher if isinstance(override, AttentionOverride) else None


def dispatcher_of(model):
    """The AttentionDispatcher of a MODEL, or None where no Select Attention node has been.

    Also where another pack's override stands in front of ours, or took its place later: the report says so.
    """
    return dispatcher_behind(override_of(model)) or model.attachments.get(KEY)


# --- put somebody there ----------------------------------------------------------------------------------------------


def select(model, dispatcher):
    """Let an AttentionDispatcher compute the attention of a MODEL clone, and hook it to the sampler.

    It receives begin_run, forward and log.end. Selecting twice replaces: the override before ours is kept, an earlier
    one of ours is not, and its hooks are removed.
    """
    previous = behind_observers(override_of(model))
    if isinstance(previous, AttentionOverride):
        previous = previous.previous
    # not through set_model_optimized_attention, which cores after 0.30 have: it drops the function that an override
    # delegates calls to
    model.model_options.setdefault("transformer_options", {})[SLOT] = AttentionOverride(dispatcher, previous)
    for kind, wrapper in (
        (WrappersMP.OUTER_SAMPLE, during_sampling(dispatcher)),
        (WrappersMP.APPLY_MODEL, during_forward(dispatcher)),
    ):
        model.remove_wrappers_with_key(kind, KEY)
        model.add_wrapper_with_key(kind, KEY, wrapper)
    model.set_attachments(KEY, dispatcher)


def observed(model, observer, key):
    """A clone of a MODEL with an Observer in the slot, whose `step` (from 0) is set before each forward pass. key: of
    its wrapper.
    """
    clone = model.clone()
    clone.model_options.setdefault("transformer_options", {})[SLOT] = observer

    def wrapper(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kwargs):
        observer.step = step_of(transformer_options)[0] or 0
        transformer_options = with_choices_of_blocks(executor.class_obj.diffusion_model, transformer_options)
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)

    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, key, wrapper)
    return clone


# --- the sampler's hooks ---------------------------------------------------------------------------------------------


def during_sampling(dispatcher):
    """A wrapper around one whole sampling: begins and ends a run in the dispatcher's log."""

    def wrapper(executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
        run = dispatcher.begin_run(max(0, len(sigmas) - 1))
        guider = getattr(executor, "class_obj", None)
        run.in_front = in_front(dispatcher, getattr(guider, "model_options", None) or {})  # another pack's guider too
        try:
            output = executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        except BaseException as error:  # a cancel is one too
            dispatcher.log.end(run, error=f"{type(error).__name__}: {error}".rstrip(": "))
            error_links.link(error)
            raise
        try:
            synchronise(output.device)
            dispatcher.log.end(run, output)
        except Exception:  # the image is there: what was noted about it may be lost, the image may not
            log.exception("Select Attention: the end of this sampling could not be noted.")
        return output

    return wrapper


def in_front(dispatcher, model_options):
    """The name of an override that holds the slot in the place of a dispatcher's, or None when nobody does."""
    override = behind_observers(model_options.get("transformer_options", {}).get(SLOT))
    return name_of(override) if override is not None and dispatcher_behind(override) is not dispatcher else None


def during_forward(dispatcher):
    """A wrapper around one forward pass: tells the dispatcher the step, from the sampler's own sigmas."""

    def wrapper(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kwargs):
        transformer_options = with_choices_of_blocks(executor.class_obj.diffusion_model, transformer_options)
        # a look at the sigmas waits for the GPU
        step, steps = step_of(transformer_options) if dispatcher.schedule else (None, 0)
        with dispatcher.forward(step, steps):
            return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)

    return wrapper


def with_choices_of_blocks(network, transformer_options):
    """The options of a forward pass of a network, with the attention functions that its blocks' own files ask for.

    Cores after 0.33 keep such a choice in a block's `comfy_attention.function` (None: no choice) and use it where the
    slot is empty. Who is in the slot and leaves a call to core looks it up here.
    """
    found = {
        (kind, number): function
        for kind in ("double", "single")
        for number, block in enumerate(getattr(network, f"{kind}_blocks", ()))
        if (function := getattr(getattr(block, "comfy_attention", None), "function", None)) is not None
    }
    return {**transformer_options, CHOSEN_BY_BLOCK: found} if found else transformer_options


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


# --- what is known before a sampling ---------------------------------------------------------------------------------


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
