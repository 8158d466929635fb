"""What the kernels share: modulation rows, fp8 rounding, how a token's row is addressed."""

import torch
import triton
import triton.language as tl

FP8_MAX = tl.constexpr(448.0)  # largest finite float8_e4m3fn
FP16_MAX = tl.constexpr(65504.0)


@triton.jit
def modulation(BASE, batch, token, at, inside, N, start, end, stride_b, stride_m, SHARED: tl.constexpr):
    """Modulation of a tile of tokens as float32, (1 or ROWS, BLOCK), from (B, 1 or 2, N) whose row 1 is for the tokens
    start <= s < end.

    SHARED: all tokens of the tile have the same one, that of the first token.
    """
    if SHARED:
        row = tl.min(batch, 0) * stride_b
        return tl.load(BASE + row + at, mask=at < N, other=0.0).to(tl.float32)[None, :]
    else:
        second = ((token >= start) & (token < end)).to(tl.int64)
        rows = batch * stride_b + second * stride_m
        return tl.load(BASE + rows[:, None] + at[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def rounded(value, TO16: tl.constexpr):
    """float32 with the rounding of the 16 bit tensor that core would have had here: 1 bf16, 2 fp16, 0 none."""
    if TO16 == 1:
        return value.to(tl.bfloat16).to(tl.float32)
    elif TO16 == 2:
        return value.to(tl.float16).to(tl.float32)
    else:
        return value


@triton.jit
def as_fp8(value, scale, TO16: tl.constexpr):
    """fp8 e4m3 of value / scale, clamped to its largest finite value. The source dtype rounds first, as it does in
    core's
    chain.
    """
    scaled = rounded(value, TO16) / scale
    return tl.minimum(tl.maximum(scaled, -FP8_MAX), FP8_MAX).to(tl.float8e4nv)


@triton.jit
def row_scale(largest):
    """The fp8 scale of a row with this largest magnitude; of a row of zeros it is tiny."""
    return tl.maximum(largest, 1e-12) / FP8_MAX


def to16(dtype):
    """The TO16 argument for a torch dtype."""
    return {torch.bfloat16: 1, torch.float16: 2}.get(dtype, 0)


def mod_strides(mod):
    """(batch stride, row stride) of a modulation (B or 1, 1 or 2, N); 0 where it is broadcast. The last axis must be
    contiguous.
    """
    return (mod.stride(0) if mod.shape[0] > 1 else 0), (mod.stride(1) if mod.shape[1] > 1 else 0)


def token_rows(x):
    """(B, S, N, batch stride, token stride) of a (B, S, N) tensor whose last axis is contiguous."""
    if x.stride(2) != 1:
        raise ValueError(
            f"The fused kernels take tensors whose last axis is contiguous; this one has strides {tuple(x.stride())}."
        )
    return (*x.shape, x.stride(0), x.stride(1))
