"""What attention backend cudnn-fp8 leaves (its Raw: e4m3 over one scale, without the mean of each head's values) as the
next product's input: for a double block here, for a single block beside SwiGLU (swiglu.py).
"""

import triton
import triton.language as tl

from ....attention.tiles import cdiv, next_power_of_2
from .formats import FP8_TENSOR, allocate
from .rows import as_fp8, to16


@triton.jit
def unscaled(ATTN, SCALE, MEANS, token_at, means_at, column, inside, D: tl.constexpr):
    """Columns of one token's row (H*D) in float32. means_at: where the means of its image begin in MEANS, (H, 2, D)."""
    value = tl.load(ATTN + token_at + column, mask=inside, other=0.0).to(tl.float32) * tl.load(SCALE)
    mean = MEANS + means_at + (column // D) * (2 * D) + D + column % D
    return value + tl.load(mean, mask=inside, other=0.0)


@triton.jit
def _attention_output(
    ATTN, SCALE, MEANS, OUT, FP8_SCALE, tokens, first, kept, width,
    FP8: tl.constexpr, TO16: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // kept, first + row % kept
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, at = column < width, (batch * tokens + token) * width
    value = unscaled(ATTN, SCALE, MEANS, at, batch * width * 2, column, inside, D)
    if FP8:
        value = as_fp8(value, tl.load(FP8_SCALE), TO16, OUT.dtype.element_ty)
    tl.store(OUT + row * width + column, value.to(OUT.dtype.element_ty), mask=inside)


def attention_output(raw, start=0, stop=None, *, to=None):
    """Attention (B, stop - start, H*D) of the tokens start <= s < stop, in the dtype of the call, or the Quantised of a
    Format that has one scale. raw: an attention.backends.cudnn_fp8.Raw of (B, S, H, D).
    """
    batch, tokens, heads, size = raw.data.shape
    kept, width = (tokens if stop is None else stop) - start, heads * size
    if to is not None and to.kind != FP8_TENSOR:
        raise ValueError(f"Attention's output is not written as {to.kind}.")
    out, fp8_scale, result = allocate((batch, kept, width), raw.data.new_empty(0, dtype=raw.dtype), to)
    block = min(BLOCK, next_power_of_2(width))
    if kept:
        _attention_output[(batch * kept, cdiv(width, block))](
            raw.data, raw.scale, raw.means, out, raw.scale if fp8_scale is None else fp8_scale,
            tokens, start, kept, width,
            FP8=fp8_scale is not None, TO16=to16(raw.dtype), D=size, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return result


BLOCK = 2048  # columns of a program
