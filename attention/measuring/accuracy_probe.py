"""Check attention calls against float32 while a model runs: an observer in the override slot, which lets the override
behind it compute and looks at the result.

Sampled are all heads on a few rows of queries, which move from call to call: a dropped head, text and image in a wrong
order, a padded tail, a mask that was ignored all show, and a call costs little more than the conversion of its keys.
Every key takes part. On several GPUs the probe sees what rank 0 computes between two exchanges: all tokens, a share of
the heads. Not covered: calls inside a compiled graph, and the parts of a ring, which no override computes.
"""

import torch

from .. import reference
from ..masks import normalise
from .statistics import Call, ratio
from ..override import Observer, to_bshd

ROWS, HEADS_AT_ONCE = 48, 8  # rows of queries per call; heads that are converted to float32 together
STRIDE = 17  # by how many rows the sample moves from call to call: odd, so that it meets every place in a kernel's tile


class AttentionProbe(Observer):
    """Checks the calls of some steps.

    step: set by whoever drives the sampler; steps: those in which calls are checked. calls: {(step, block): Call}, the
    worst per block and step. seen: number of calls that passed through. largest_scores: most elements that one call's
    score matrix has.
    """

    def __init__(self, inner, steps):
        super().__init__(inner)
        self.steps = frozenset(steps)
        self.step, self.seen, self.calls, self.largest_scores = 0, 0, {}, 0

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
        layout = {"skip_reshape": skip_reshape, "skip_output_reshape": skip_output_reshape}
        out = super().__call__(func, q, k, v, heads, mask=mask, attn_precision=attn_precision, **layout, **kwargs)
        if torch.compiler.is_compiling():
            return out
        self.seen += 1
        if self.step in self.steps:
            result = out.transpose(1, 2) if skip_output_reshape else out.unflatten(-1, (heads, -1))
            self.check(*to_bshd(q, k, v, heads, skip_reshape), result, mask, kwargs)
        return out

    @torch.no_grad()
    def check(self, q, k, v, out, mask, kwargs):
        """q, k, v, out (B, S, H, D). Keeps the Call if it is the worst of its block and step."""
        self.largest_scores = max(self.largest_scores, q.shape[0] * q.shape[2] * q.shape[1] * k.shape[1])
        found = call_error(q, k, v, out, mask, kwargs.get("scale"), self.seen * STRIDE)
        key = self.step, block_of(kwargs.get("transformer_options") or {}, self.seen)
        if key not in self.calls or found.worst_head >= self.calls[key].worst_head:
            self.calls[key] = found


def block_of(options, number):
    """What a report calls the block that attends: "double 3" for models that number their blocks, else the number of
    the call.
    """
    return (
        f"{options['block_type']} {options['block_index']}"
        if "block_type" in options and "block_index" in options
        else f"call {number}"
    )


def call_error(q, k, v, out, mask=None, scale=None, offset=0):
    """Call for q, k, v, out (B, S, H, D): out against float32 attention on a sample of rows that starts at `offset`."""
    rows = sample_rows(q.shape[1], offset, q.device)
    wanted, got = exact_rows(q, k, v, rows, mask, scale), out[:, rows].float()
    size, error = per_head(wanted), per_head(got - wanted)
    scale_of_heads = size.square().mean().sqrt()
    broken = int((~torch.isfinite(out)).sum())
    return Call(ratio(error.norm(), size.norm()), ratio(error.max(), scale_of_heads), torch.finfo(q.dtype).eps, broken)


def per_head(values):
    """Euclidean norm of each head of (B, S, H, D): (H,)."""
    return values.transpose(1, 2).transpose(0, 1).flatten(1).norm(dim=1)


def sample_rows(length, offset, device):
    """ROWS row numbers, evenly spread and shifted by `offset`, always with the first and the last; all rows of a short
    sequence.
    """
    if length <= ROWS:
        return torch.arange(length, device=device)
    spread = (torch.arange(ROWS - 2, device=device) * length // (ROWS - 2) + offset) % length
    return torch.cat([spread, spread.new_tensor([0, length - 1])]).unique()


def exact_rows(q, k, v, rows, mask, scale):
    """Float32 attention of the query rows `rows`, a few heads at a time: (B, rows, H, D)."""
    mask = mask_rows(mask, q.shape[1], rows)
    groups, parts = q.shape[2] // k.shape[2], []
    for start in range(0, k.shape[2], HEADS_AT_ONCE):
        kv = slice(start, start + HEADS_AT_ONCE)
        of_q = slice(start * groups, (start + HEADS_AT_ONCE) * groups)
        part = mask if mask is None or mask.shape[1] == 1 else mask[:, of_q]
        parts.append(reference.attend(q[:, rows, of_q], k[:, :, kv], v[:, :, kv], mask=part, scale=scale)[0])
    return torch.cat(parts, dim=2)


def mask_rows(mask, q_len, rows):
    """The rows of a mask as core passes it, (B or 1, H or 1, rows or 1, Sk); None for None."""
    if mask is None:
        return None
    mask = normalise(mask, q_len)
    return mask if mask.shape[2] == 1 else mask[:, :, rows]
