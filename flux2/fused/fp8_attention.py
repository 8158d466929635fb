"""q, k, v in fp8 from the kernel that normalises and rotates them, where Select Attention chose backend cudnn-fp8; and
that backend's fp8 output as the next product's input.

The backend alone reads q, k and v in 16 bits to write them in fp8, and its output in fp8 to write it in 16 bits. Here
both passes belong to kernels that run anyway. They need means and scales before the numbers are there: those of the
same block's calls before (attention/backends/cudnn_fp8.py, Kept), kept on the GPU, so that the CPU never waits for
them. The first call of a block in a sampling goes through the backend's own pass, and nothing is kept from one sampling
to the next: the same seed gives the same image. Off unless ComfyUI is started with FLUX2_FP8_QKV=1: it has not been run
on a GPU.
"""

import os
from typing import NamedTuple

from comfy.ldm.flux import math as flux_math

from ...attention.override import AttentionOverride
from .. import attention_slot

SWITCH = "FLUX2_FP8_QKV"
BACKEND = "cudnn-fp8"


def switched_on():
    return os.environ.get(SWITCH) == "1"


class Known(NamedTuple):
    """Of a block, what its first call decided and what its calls leave for the next one."""

    dispatcher: object
    decision: object
    kept: object


class Fp8Attention:
    """The calls of a MODEL's fused blocks that are computed so."""

    def __init__(self):
        self.begin()

    def begin(self):
        """A sampling begins."""
        self.kept, self.calls, self.written = {}, 0, 0

    def written_call(self, qkv, shape, pe, options):
        """Raw attention of a call whose q, k and v are written in fp8, or None where they cannot be: another backend,
        or the first call of a block. Arguments as of blocks.attention.
        """
        dispatcher = dispatcher_for(options)
        known = self.kept.get(key_of(options, shape)) if dispatcher else None
        if known is None or known.dispatcher is not dispatcher:
            return None
        decision, kept = known.decision, known.kept
        raw = decision.adapter.attend_written(*qkv(pe, fp8=kept), dtype=shape[-1])
        self.calls, self.written = self.calls + 1, self.written + 1
        dispatcher.count(decision)
        return raw

    def first_call(self, q, k, v, options):
        """Raw attention of q, k, v (B, S, H, D) as they are, from which the next call of this block knows means and
        scales; None where another backend computes, or none.
        """
        dispatcher = dispatcher_for(options)
        if dispatcher is None:
            return None
        decision = dispatcher.decide(q, k, v, None, None, None, False, BACKEND, False)
        if decision.backend != BACKEND:
            return None
        raw, kept = decision.adapter.attend_keeping(q, k, v)
        self.kept[key_of(options, q.shape)] = Known(dispatcher, decision, kept)
        self.calls += 1
        dispatcher.count(decision)
        return raw

    def as_text(self):
        if not self.calls:
            return f"fp8 q, k, v by the fused blocks ({SWITCH}): no call was computed so."
        return (
            f"fp8 q, k, v: the fused blocks wrote them in {self.written} of {self.calls} attention calls of {BACKEND}; "
            f"{self.cut()} values were larger than what earlier calls had led to expect, and were cut."
        )

    def cut(self):
        """How many values were cut. Waits for the GPU: for reports, after a sampling."""
        return sum(int(known.kept.cuts) for known in self.kept.values())

    def as_data(self):
        return {"calls": self.calls, "written": self.written, "cut": self.cut()}


def key_of(options, shape):
    """Calls with one key share means and scales: of one block, with as many images and tokens."""
    return options["block_type"], options["block_index"], *shape[:2]


def dispatcher_for(options):
    """The AttentionDispatcher that computes this call of a block with the backend, or None."""
    override = options.get(attention_slot.SLOT)
    # not where another GPU computes some of the heads, or somebody looks at the calls: they want q, k and v in 16 bits
    if type(override) is not AttentionOverride or not {"block_type", "block_index"} <= options.keys():
        return None
    # nor where another pack has put a function of its own in the place of core's attention; functools.wraps copies
    # core's __module__ to it, and not what it sees
    if getattr(flux_math.optimized_attention, "__globals__", {}).get("__name__") != "comfy.ldm.modules.attention":
        return None
    dispatcher = override.dispatcher
    return dispatcher if dispatcher.slug_of((options["block_type"], options["block_index"])) == BACKEND else None
