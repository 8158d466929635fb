"""Masks on kernels that take none: a mask that only hides keys is exact when the hidden keys are left out of k and v.

ComfyUI hands masks over as bool or as additive floats, with or without batch and head axes. Whether a mask only hides
keys needs its values, so the answer is remembered per tensor: one synchronisation per mask, not one per block.
"""

from dataclasses import dataclass
import weakref

import torch

HIDDEN = -1e4  # additive values at or below this hide a key: exp(-1e4) is zero in float32


def normalise(mask, q_len):
    """A mask of 2 to 4 axes as (B or 1, H or 1, Sq or 1, Sk), a view."""
    if mask.ndim == 2:
        # core reads (Sq, Sk); a (B, Sk) mask cannot be told apart when B == Sq, and core would read that as (Sq, Sk)
        # too
        mask = mask[None, None] if mask.shape[0] in (1, q_len) else mask[:, None, None]
    return mask.unsqueeze(1) if mask.ndim == 3 else mask


@dataclass(frozen=True)
class KeptKeys:
    """Which keys remain: one index tensor for the whole batch, or one per batch entry. everything: no key is hidden."""

    indices: tuple
    everything: bool = False

    @classmethod
    def of(cls, keep):
        """From bool (B or 1, Sk), True where a key is kept."""
        rows = keep[:1] if bool((keep == keep[:1]).all()) else keep
        return cls(tuple(row.nonzero().squeeze(1) for row in rows), everything=bool(keep.all()))


def kept_keys(mask):
    """KeptKeys when the mask (B or 1, H or 1, Sq or 1, Sk) is the same for every query and head, else None; with the
    reason.

    Returns (KeptKeys or None, reason).
    """
    row = mask[:, :1, :1]
    if not _same_everywhere(mask, row):
        return None, "the mask differs between queries or heads"
    row = row[:, 0, 0]
    keep = row if row.dtype == torch.bool else row > HIDDEN
    if row.dtype != torch.bool and bool((row[keep] != 0).any()):
        return None, "the mask adds a bias to keys that it keeps"
    if not bool(keep.any(dim=-1).all()):
        return None, "the mask hides every key of a batch entry"
    return KeptKeys.of(keep), "the mask only hides keys"


def _same_everywhere(mask, row):
    broadcast = all(mask.shape[d] == 1 or mask.stride(d) == 0 for d in (1, 2))
    return broadcast or bool((mask == row).all())


class MaskMemory:
    """kept_keys with memory: a mask tensor is recognised by identity and version, and forgotten when it is freed.

    ComfyUI samples in inference mode, whose tensors have no version: `forget` is called at the start of every forward
    pass, within which nobody writes to a mask.
    """

    def __init__(self):
        self._seen = {}

    def __call__(self, mask, q_len):
        known = self._seen.get(id(mask))
        if known and known[0]() is mask and known[1] == version(mask):
            return known[2]
        answer = kept_keys(normalise(mask, q_len))
        self._seen[id(mask)] = (
            weakref.ref(mask, lambda _, key=id(mask): self._seen.pop(key, None)),
            version(mask),
            answer,
        )
        return answer

    def forget(self):
        self._seen.clear()


def version(tensor):
    """The number of in-place writes to a tensor; None for inference tensors, which do not count them."""
    return None if tensor.is_inference() else tensor._version


def attend_kept(attend, q, k, v, kept, *, scale, need_lse):
    """Run `attend` on the keys that are kept: exact, because a hidden key has weight zero. One call per index tensor of
    `kept`.
    """
    if len(kept.indices) == 1:
        k, v = (t.index_select(1, kept.indices[0]) for t in (k, v))
        return attend(q, k, v, scale=scale, need_lse=need_lse)
    parts = [
        attend(
            q[b : b + 1],
            k[b : b + 1].index_select(1, index),
            v[b : b + 1].index_select(1, index),
            scale=scale,
            need_lse=need_lse,
        )
        for b, index in enumerate(kept.indices)
    ]
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts]) if need_lse else None
