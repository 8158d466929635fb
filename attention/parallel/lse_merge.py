"""Attention over two sets of keys from the attention over each: the sum that ring attention is made of, in float32.

With lse the logarithm of the sum of a row's exponentiated scores, the joined row is the mean of the two rows weighted
by exp(lse) (Dao et al. 2022, FlashAttention, section 3.1; Liu et al. 2023, Ring Attention, section 3). A row whose lse
is -inf saw no key: it weighs nothing, whatever its numbers are, and kernels leave NaN there.

  out, lse = start(part, part_lse);   out, lse = merge(out, lse, part, part_lse);   ...
"""

import torch

NO_KEYS = float("-inf")


def start(part, part_lse):
    """The first of several parts: part (B, S, H, D) of any dtype, part_lse (B, H, S) float32 -> (out float32, lse)."""
    return counted(part, part_lse).float(), part_lse


def merge(out, lse, part, part_lse):
    """Join attention over more keys to what is there: out and lse from `start` or `merge`, of which out is written to.
    Returns (out, lse).
    """
    # -inf - -inf is NaN: neither side saw a key
    share = torch.sigmoid(part_lse - lse)
    share = torch.where(part_lse == NO_KEYS, 0, share).transpose(1, 2).unsqueeze(-1)  # (B, S, H, 1)
    return out.lerp_(counted(part, part_lse).float(), share), torch.logaddexp(lse, part_lse)


def counted(part, lse):
    """A new tensor (B, S, H, D): the part, with zeros in the rows that saw no key."""
    return torch.where((lse == NO_KEYS).transpose(1, 2).unsqueeze(-1), 0, part)
