"""Attention as the definition says it, in float32 or better: what every backend is measured against. torch only, any
device.

Scores are computed a block of queries at a time, so memory stays at B * H * block * Sk floats. Not fast, and not meant
to be.
"""

import torch

from .call import default_scale
from .device import as_float64

QUERY_BLOCK = 512


def attend(q, k, v, *, mask=None, scale=None, dtype=torch.float32):
    """Exact attention.

    q (B, Sq, H, D), k and v (B, Sk, Hkv, D), mask broadcastable to (B, H, Sq, Sk): bool keeps where True, float is
    added. Returns (out (B, Sq, H, D), lse (B, H, Sq)), both in `dtype`, in which everything is computed.
    """
    scale = default_scale(q.shape[-1]) if scale is None else scale
    groups = q.shape[2] // k.shape[2]
    qt, kt, vt = (t.to(dtype).transpose(1, 2) for t in (q, k, v))  # (B, H, S, D)
    kt, vt = (t.repeat_interleave(groups, dim=1) for t in (kt, vt))
    out, lse = torch.empty_like(qt), qt.new_empty(qt.shape[:3])
    for start in range(0, qt.shape[2], QUERY_BLOCK):
        rows = slice(start, start + QUERY_BLOCK)
        scores = (qt[:, :, rows] @ kt.transpose(-1, -2)) * scale  # (B, H, block, Sk)
        scores = masked(scores, mask, rows)
        lse[:, :, rows] = torch.logsumexp(scores, dim=-1)
        out[:, :, rows] = torch.softmax(scores, dim=-1) @ vt
    return out.transpose(1, 2), lse


def masked(scores, mask, rows):
    """Scores with the rows of a mask applied; the mask may have one row for all queries."""
    if mask is None:
        return scores
    part = mask[..., rows, :] if mask.shape[-2] != 1 else mask
    if part.dtype == torch.bool:
        return scores.masked_fill(~part, float("-inf"))
    return scores + part.to(scores.dtype)


def relative_error(out, reference):
    """||out - reference|| / ||reference|| over all elements, in float64. NaN or infinity in out gives infinity."""
    out, reference = as_float64(out), as_float64(reference)
    error = ((out - reference).norm() / reference.norm()).item()
    return error if error == error else float("inf")
