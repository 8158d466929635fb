"""What a Select Attention node does to a MODEL, for every caller: the node, comparisons, benchmarks, text encoders."""

import os

import folder_paths

from ..attention import dispatch, registry
from ..attention.call import AttentionRefused
from ..attention.dispatch import SCHEDULE_TOPIC, AttentionDispatcher, Schedule
from ..attention.errors import UserError
from . import attention_slot

NO_SECOND = "none"
ROUNDINGS = ["nearest away", "nearest even", "toward zero"]


def tuner():
    """What `auto` measured, kept in ComfyUI's user folder; made when first needed, the folder is not known before."""
    file = os.path.join(folder_paths.get_user_directory(), "flux2_attention", "auto.json")
    if dispatch.default_tuner().file is None or str(dispatch.default_tuner().file) != file:
        dispatch.set_default_tuner(file)
    return dispatch.default_tuner()


def check(model, slug):
    """Refuse now, before anything is sampled, a backend that cannot run this model here. Raises AttentionRefused."""
    if slug in (registry.AUTO, registry.COMFYUI, NO_SECOND):
        return
    device, dtype, head_dim = attention_slot.attention_facts(model)
    reasons = registry.probe(slug, device, dtype, head_dim or 128)
    if reasons:
        raise AttentionRefused(slug, reasons, registry.what_to_do(slug, registry.describe(device)))


def check_schedule(edge_backend, *counts):
    """A second kernel needs a place and a place needs a kernel: UserError when one of them is missing.

    counts: how many first and last steps (and blocks) the second kernel computes.
    """
    if edge_backend != NO_SECOND and not any(counts):
        raise UserError(
            f"A second kernel is chosen ({edge_backend}), and it would compute nothing: first and last steps and "
            "blocks are all 0. Set at least one of them, or set the second kernel to 'none'.",
            SCHEDULE_TOPIC,
        )
    if edge_backend == NO_SECOND and any(counts):
        raise UserError(
            "First or last steps or blocks are set, and no second kernel is chosen to compute them. Choose one, or "
            "set them to 0.",
            SCHEDULE_TOPIC,
        )


def select(
    model,
    backend,
    unsupported=dispatch.REFUSE,
    edge_backend=NO_SECOND,
    first_steps=0,
    last_steps=0,
    first_blocks=0,
    last_blocks=0,
    aiter_rounding=ROUNDINGS[0],
):
    """(a clone of the MODEL with this attention, its AttentionDispatcher). Arguments as the node's inputs.

    Raises AttentionRefused when a backend cannot run this model here, UserError for inputs that do not fit together.
    """
    counts = first_steps, last_steps, first_blocks, last_blocks
    check_schedule(edge_backend, *counts)
    for slug in (backend, edge_backend):
        check(model, slug)
    schedule = None
    if edge_backend != NO_SECOND:
        schedule = Schedule(edge_backend, *counts, attention_slot.block_kinds(model))
    options = {"aiter_rounding": aiter_rounding}
    dispatcher = AttentionDispatcher(
        backend, unsupported=unsupported, schedule=schedule, tuner=tuner(), options=options
    )
    patched = model.clone()
    attention_slot.select(patched, dispatcher)
    return patched, dispatcher
