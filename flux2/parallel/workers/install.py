"""Sequence parallel on a ComfyUI MODEL: install(model, request) on a clone, and every forward pass of its network is
shared with the workers.

What is wrapped is the network's forward pass, innermost of all wrappers, and not the sampler: so samplers, guiders,
CFG, previews and every wrapper of somebody else (EasyCache skips whole passes) run on rank 0 as ever and see whole
tensors. To be innermost wherever the node stands in the graph, the wrapper is put at the end of the list in each call,
by one around the model.
"""

from dataclasses import dataclass
import logging
import weakref

import comfy.model_management as management
from comfy.patcher_extension import WrappersMP
import comfy.utils

from ... import attention_slot, error_links, page_words
from ....attention.parallel import Degrees
from . import ahead, devices, session as sessions
from .patch_transfer import encode_patches
from .pool import ParallelPlan, RanksFailed
from .step import bound_arguments

KEY = "flux2_ranks"
log = logging.getLogger(__name__)


@dataclass
class ParallelRequest:
    """What a Sequence Parallel node decided. plan: who takes part; why: the reason for the degrees."""

    plan: ParallelPlan
    why: str = ""
    patcher: object = None  # weak reference to the node's own clone, for callers that are no sampler

    def session(self, base, device):
        """The ParallelSession of a loaded model, made if need be."""
        reference = weakref.ref(base)
        return sessions.session_of(
            base,
            self.plan,
            device,
            cancelled=management.processing_interrupted,
            in_use=lambda: is_loaded(reference()),
        )


def install(model, request):
    """Share the forward passes of a MODEL clone as requested. Installing twice replaces."""
    request.patcher = weakref.ref(model)
    for kind, wrapper in (
        (WrappersMP.OUTER_SAMPLE, around_sampling(request)),
        (WrappersMP.APPLY_MODEL, around_model(request)),
    ):
        model.remove_wrappers_with_key(kind, KEY)
        model.add_wrapper_with_key(kind, KEY, wrapper)
    model.model_options.setdefault("transformer_options", {})[KEY] = request


def start_ahead(gpus):
    """Start the processes for so many GPUs (0: all of this machine), before it is known which model they will load.
    What prevents it is said by the node when it runs.
    """
    try:
        plan, _ = devices.plan_ranks(management.get_torch_device(), gpus, lambda number: Degrees(number, 1))
        if plan is not None:
            ahead.start_ahead(plan, sessions.running_plans())
    except (OSError, ValueError, RuntimeError) as error:
        log.debug("Sequence parallel: the other ranks are not started before the node runs: %s", error)


def request_of(model):
    """The ParallelRequest of a MODEL that a Sequence Parallel node worked on, or None."""
    return model.model_options.get("transformer_options", {}).get(KEY)


def is_loaded(base):
    """Whether ComfyUI has a model (BaseModel) loaded, under whichever clone."""
    return any(
        loaded.model is not None and loaded.model.model is base for loaded in list(management.current_loaded_models)
    )


def around_sampling(request):
    """A wrapper around one whole sampling: the ranks are there before it, and rank 0 hears how they fared after it."""

    def wrapper(executor, *args, **kwargs):
        guider = executor.class_obj
        patcher = guider.model_patcher
        # refused before anything is started
        encode_patches(patcher, guider.model_options.get("transformer_options", {}))
        session = request.session(patcher.model, patcher.load_device)
        try:
            translate_cancel(lambda: session.begin(patcher, Progress()))
            output = executor(*args, **kwargs)
            translate_cancel(session.finish)
            return output
        except BaseException:
            end_early(session)
            raise
        finally:
            session.at_rest()

    return error_links.links()(wrapper)


def end_early(session):
    """A sampling ended early: the ranks forget what they kept between its steps (reference caches), unless they are
    gone.
    """
    try:
        if session.running and session.step is not None:
            # a cancelled pass may have taken STOPPING already, and a cancel is to end within two seconds
            session.finish(sessions.STOPPING / 2)
    except (RanksFailed, OSError):
        pass


def translate_cancel(work):
    """Run work; a failure that the user's cancel brought about is a cancel."""
    try:
        return work()
    except RanksFailed:
        management.throw_exception_if_processing_interrupted()
        raise


def around_model(request):
    """A wrapper around the model that puts `shared_pass` behind every other wrapper of the network."""

    def wrapper(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kwargs):
        base = executor.class_obj
        patcher = base.current_patcher or (request.patcher and request.patcher())
        wrappers = dict(transformer_options.get("wrappers", {}))
        kind = WrappersMP.DIFFUSION_MODEL
        wrappers[kind] = {
            **{key: those for key, those in wrappers.get(kind, {}).items() if key != KEY},
            KEY: [shared_pass(request, base, patcher)],
        }
        return executor(x, t, c_concat, c_crossattn, control, {**transformer_options, "wrappers": wrappers}, **kwargs)

    return wrapper


def shared_pass(request, base, patcher):
    """The wrapper around the network itself."""

    def wrapper(executor, *args, **kwargs):
        inputs, options = bound_arguments(executor.class_obj, args, kwargs)
        session = request.session(base, patcher.load_device)
        return translate_cancel(
            lambda: run_pass(session, executor, patcher, inputs, options, lambda: executor(*args, **kwargs))
        )

    return wrapper


def run_pass(session, executor, patcher, inputs, options, work):
    """One forward pass on every rank."""
    if session.state is sessions.State.SAMPLING:
        # ranks lost since the last pass: what that gave is worthless, so the sampling ends instead of going on with new
        # ones
        session.pool.check()
    else:  # no sampler has them: a benchmark, or a pack that calls the model itself
        session.load(patcher, Progress())
    session.ready(patcher, Progress())
    session.update(patcher, options)
    management.throw_exception_if_processing_interrupted()  # nobody has begun this pass, so nobody has to be called off
    with session.forward(executor.class_obj, inputs, moment_of(options)):
        return work()


def moment_of(options):
    """(step, steps) for a Select Attention with a schedule on the other ranks. Only then: a look at the sigmas waits
    for the GPU.
    """
    dispatcher = attention_slot.dispatcher_behind(options.get(attention_slot.SLOT))
    return attention_slot.step_of(options) if dispatcher and dispatcher.schedule else (None, 0)


class Progress:
    """Shows how far the ranks are, on the node that is executing. Raises ComfyUI's cancel."""

    def __init__(self):
        self.bar, self.text = None, None

    def __call__(self, text, done, of):
        management.throw_exception_if_processing_interrupted()
        if self.bar is None:
            self.bar = comfy.utils.ProgressBar(of)
        said = f"{of + 1} ranks: {text}" + (f" ({done} of {of})" if done < of else "")
        if said != self.text:
            self.text = said
            self.bar.update_absolute(done, of)
            say(said)


def say(text):
    """A line of text on the node that is executing, and in the log."""
    log.info("Sequence parallel: %s", text)
    page_words.tell(text)
