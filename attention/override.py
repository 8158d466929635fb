"""ComfyUI's attention override <-> our call and layout. Imports no ComfyUI: the contract is a function signature.

Core calls `override(func, q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False,
skip_output_reshape=False, **kwargs)` from its wrap_attn (comfy/ldm/modules/attention.py, read at 0.30 and at the newer
core that passes single-owner containers: those are unwrapped by core for an override without a `container_function`,
which this one is). Kwargs understood: scale, enable_gqa, low_precision_attention, transformer_options; others are none
of an exact kernel's business and only travel on when a call is handed back.
"""

import torch

from . import ops
from .call import default_scale


class AttentionOverride:
    """The occupant of transformer_options["optimized_attention_override"] for one Selection.

    previous: the occupant found there, or None; it gets the calls that the selection hands back.
    """

    def __init__(self, selection, previous=None):
        # selecting twice replaces: an override of ours is not an occupant to be kept, the one behind it is
        self.selection, self.previous = (
            selection,
            getattr(previous, "previous", None) if isinstance_by_name(previous) else previous,
        )
        selection.previous_name = name_of(self.previous) if self.previous else None

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
        if result is None:
            rest = dict(
                kwargs,
                mask=mask,
                attn_precision=attn_precision,
                skip_reshape=skip_reshape,
                skip_output_reshape=skip_output_reshape,
            )
            return self.previous(func, q, k, v, heads, **rest) if self.previous else func(q, k, v, heads, **rest)
        out = result[0]
        return out.transpose(1, 2) if skip_output_reshape else out.reshape(out.shape[0], out.shape[1], -1)

    def _attend(self, q, k, v, mask, kwargs, heads_first):
        scale, full_precision = kwargs.get("scale"), kwargs.get("low_precision_attention", True) is False
        if torch.compiler.is_compiling():
            scale = default_scale(q.shape[-1]) if scale is None else scale
            return ops.attend(q, k, v, mask, scale, False, full_precision, self.selection.number)
        options = kwargs.get("transformer_options") or {}
        block = (
            (options["block_type"], options["block_index"])
            if "block_type" in options and "block_index" in options
            else None
        )
        return self.selection.attend(
            q, k, v, mask=mask, scale=scale, block=block, full_precision=full_precision, heads_first=heads_first
        )


def to_bshd(q, k, v, heads, skip_reshape):
    """Views in (B, S, H, D) of what core passes: (B, H, S, D) with skip_reshape, else (B, S, H*D), where k and v may
    have
    fewer heads.
    """
    if skip_reshape:
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    head_dim = q.shape[-1] // heads
    return tuple(t.unflatten(-1, (-1, head_dim)) for t in (q, k, v))


def isinstance_by_name(occupant):
    """True for an override of this pack, also one from a second import of it (ComfyUI loads packs under their path)."""
    return type(occupant).__name__ == AttentionOverride.__name__ and hasattr(occupant, "selection")


def name_of(function):
    """What to call somebody else's override in a report: module and name, without the path of the pack that it came
    from.
    """
    target = function if hasattr(function, "__qualname__") else type(function)
    return f"{target.__module__.rsplit('/', 1)[-1]}.{target.__qualname__}"
