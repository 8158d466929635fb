"""How a kernel writes the input of the matrix product that follows."""

from typing import NamedTuple

import torch

FP8_TENSOR, FP8_ROW = "fp8 with one scale", "fp8 with a scale per row"


class Format(NamedTuple):
    """kind: FP8_TENSOR, e4m3 over `scale`, a float32 scalar tensor that the product's layer has; FP8_ROW, e4m3 over a
    scale for each token, its largest magnitude over 448, which the kernel finds.
    """

    kind: str
    scale: torch.Tensor | None = None


class Quantised(NamedTuple):
    """What a kernel wrote: data (B, S, N) over scale, a scalar or (B, S, 1) float32. dtype: of what was quantised."""

    data: torch.Tensor
    scale: torch.Tensor
    format: Format
    dtype: torch.dtype


def allocate(shape, like, to):
    """(the tensor a kernel writes, its scale or None, what the kernel's wrapper returns). like: for device and dtype;
    to: Format or None.
    """
    if to is None:
        out = torch.empty(shape, device=like.device, dtype=like.dtype)
        return out, None, out
    out = torch.empty(shape, device=like.device, dtype=torch.float8_e4m3fn)
    scale = to.scale
    if to.kind == FP8_ROW:
        scale = torch.empty((*shape[:2], 1), device=like.device, dtype=torch.float32)
    return out, scale, Quantised(out, scale, to, like.dtype)
