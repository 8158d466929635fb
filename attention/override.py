"""ComfyUI's attention override <-> our call and layout. Imports no ComfyUI: the contract is a function signature.

Core calls `override(func, q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False,
skip_output_reshape=False, **kwargs)` from its wrap_attn (comfy/ldm/modules/attention.py, read at 0.30, 0.33 and later).
Kwargs understood: scale, enable_gqa, low_precision_attention, transformer_options; others are none of an exact kernel's
business and only travel on when a call is delegated to the override behind this one.

From 0.33 on core may pass q, k and v in containers that give up their tensor when it is taken. For an override without
a `container_function` core takes them out first; none of ours has one, because core calls it without `func`, which a
delegated call needs, and a kernel needs q, k and v until its output is there anyway.
"""

import torch

from . import ops
from .call import default_scale
from .dispatch import Decision

# of transformer_options: {(block type, block index): attention function that the block's own file asks for}, in cores
# whose blocks have such a choice. Core passes neither it nor the block to an override.
CHOSEN_BY_BLOCK = "flux2_attention_of_blocks"


def core_function(func, kwargs):
    """What core would compute a call with if the slot were empty: the function that the block's own file asks for,
    else `func`. kwargs: of the call.
    """
    options = kwargs.get("transformer_options") or {}
    block = options.get("block_type"), options.get("block_index")
    return options.get(CHOSEN_BY_BLOCK, {}).get(block, func)


class AttentionOverride:
    """What stands in transformer_options["optimized_attention_override"] for one AttentionDispatcher.

    previous: the override that was there before, or None for core's own function; it computes what the dispatcher
    delegates.
    """

    def __init__(self, dispatcher, previous=None):
        self.dispatcher, self.previous = dispatcher, previous
        dispatcher.previous_name = name_of(previous) if previous else None

    def __call__(
        self,
        func,
        q,
        k,
        v,
        heads,
        mask=None,
        attn_precision=None,
        skip_reshape=False,
        skip_output_reshape=False,
        **kwargs,
    ):
        qs, ks, vs = to_bshd(q, k, v, heads, skip_reshape)
        result = self._attend(qs, ks, vs, mask, kwargs, (q, k, v) if skip_reshape else None)
        if isinstance(result, Decision):  # delegated
            rest = dict(
                kwargs,
                mask=mask,
                attn_precision=attn_precision,
                skip_reshape=skip_reshape,
                skip_output_reshape=skip_output_reshape,
            )
            computing = self.previous or core_function(func, rest)
            out = self.previous(func, q, k, v, heads, **rest) if self.previous else computing(q, k, v, heads, **rest)
            self.dispatcher.count(result, computed_by=name_of(computing))
            return out
        out = result[0]
        return out.transpose(1, 2) if skip_output_reshape else out.reshape(out.shape[0], out.shape[1], -1)

    def _attend(self, q, k, v, mask, kwargs, heads_first):
        scale, full_precision = kwargs.get("scale"), kwargs.get("low_precision_attention", True) is False
        if torch.compiler.is_compiling():
            scale = default_scale(q.shape[-1]) if scale is None else scale
            return ops.attend_in_graph(q, k, v, mask, scale, False, full_precision, self.dispatcher.number)
        options = kwargs.get("transformer_options") or {}
        block = (
            (options["block_type"], options["block_index"])
            if "block_type" in options and "block_index" in options
            else None
        )
        return self.dispatcher.attend(
            q, k, v, mask=mask, scale=scale, block=block, full_precision=full_precision, heads_first=heads_first
        )


def to_bshd(q, k, v, heads, skip_reshape):
    """Views in (B, S, H, D) of what core passes: (B, H, S, D) with skip_reshape, else (B, S, H*D), where k and v may
    have fewer heads.
    """
    if skip_reshape:
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    head_dim = q.shape[-1] // heads
    return tuple(t.unflatten(-1, (-1, head_dim)) for t in (q, k, v))


class Observer:
    """An override that looks at attention calls and lets another one compute them: in front of it, in the same slot.

    inner: the override that computes, or None for the function that core hands over.
    """

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, func, *args, **kwargs):
        return self.inner(func, *args, **kwargs) if self.inner else core_function(func, kwargs)(*args, **kwargs)


def name_of(function):
    """What to call somebody else's override in a report: module and name, without the path of the pack that it came
    from.
    """
    target = function if hasattr(function, "__qualname__") else type(function)
    return f"{target.__module__.rsplit('/', 1)[-1]}.{target.__qualname__}"
