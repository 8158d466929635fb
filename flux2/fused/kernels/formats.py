"""How a kernel writes the input of the matrix product that follows."""

from typing import NamedTuple

import torch

FP8_TENSOR, FP8_ROW, INT8_ROW = "fp8 with one scale", "fp8 with a scale per row", "int8 with a scale per row"
CODES = {None: 0, FP8_TENSOR: 1, FP8_ROW: 2, INT8_ROW: 3}  # the kernels' argument FORMAT; rows.py has the same numbers


class Format(NamedTuple):
    """kind: FP8_TENSOR, `dtype` over `scale`, a float32 scalar tensor that the product's layer has; FP8_ROW, `dtype`
    over a scale for each token, its largest magnitude over the largest number of that dtype, which the kernel finds;
    INT8_ROW, rounded to nearest even over a scale for each token, its largest magnitude over 127.

    group: 0, or ConvRot's group (https://arxiv.org/abs/2512.03673): before INT8_ROW, each group of so many elements is
    multiplied by the normalised regular Hadamard matrix of that size, as comfy-kitchen's int8_linear does.
    """

    kind: str
    scale: torch.Tensor | None = None
    group: int = 0
    dtype: torch.dtype = torch.float8_e4m3fn


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
    scale = to.scale
    if to.kind != FP8_TENSOR:
        scale = torch.empty((*shape[:2], 1), device=like.device, dtype=torch.float32)
    if to.kind != INT8_ROW:
        out = torch.empty(shape, device=like.device, dtype=to.dtype)
        return out, scale, Quantised(out, scale, to, like.dtype)
    words = torch.empty(
        (*shape[:2], shape[2] // 4), device=like.device, dtype=torch.int32
    )  # the kernels store four at once
    return words, scale, Quantised(words.view(torch.int8), scale, to, like.dtype)


def can_write_int8(width, group):
    """Whether the kernels can write rows of this width as INT8_ROW: in words of four, and by whole groups."""
    return width % 4 == 0 and (group == 0 or (width % group == 0 and group in (4, 16, 64, 256)))
