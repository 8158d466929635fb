"""The sums of an int8 product as numbers: times the scale of the row and that of the column, with the bias added."""

import torch
import triton
import triton.language as tl

from ....attention.tiles import cdiv


@triton.jit
def _dequantise(SUMS, ROW_SCALE, COLUMN_SCALE, BIAS, OUT, N, column_step, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < N
    scale = tl.load(ROW_SCALE + row) * tl.load(COLUMN_SCALE + at * column_step, mask=inside, other=0.0)
    value = tl.load(SUMS + row * N + at, mask=inside, other=0).to(tl.float32) * scale
    if HAS_BIAS:
        value += tl.load(BIAS + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(OUT + row * N + at, value.to(OUT.dtype.element_ty), mask=inside)


def dequantise(sums, row_scale, column_scale, bias, dtype):
    """sums * row_scale * column_scale + bias, (M, N) in `dtype`. sums: (M, N) int32, contiguous; row_scale: (M, 1) and
    column_scale: (N,) or (1,), float32; bias: (N,) or None.
    """
    rows, width = sums.shape
    out = torch.empty((rows, width), device=sums.device, dtype=dtype)
    _dequantise[(rows, cdiv(width, BLOCK))](
        sums,
        row_scale,
        column_scale,
        sums if bias is None else bias,
        out,
        width,
        0 if column_scale.numel() == 1 else 1,
        HAS_BIAS=bias is not None,
        BLOCK=BLOCK,
        num_warps=8,
    )
    return out


BLOCK = 2048  # columns of a program
