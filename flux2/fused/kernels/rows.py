"""What the kernels share: modulation rows, fp8 and int8 rounding, how a token's row is addressed."""

import torch
import triton
import triton.language as tl

E4M3_MAX, E4M3FNUZ_MAX = tl.constexpr(448.0), tl.constexpr(240.0)  # torch.finfo's of float8_e4m3fn and float8_e4m3fnuz
FP8_TENSOR, FP8_ROW, INT8_ROW = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)  # as in formats.CODES
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
def fp8_max(DTYPE: tl.constexpr):
    """The largest finite number of an fp8 type: e4m3fn, or e4m3fnuz, which MI300's matrix units take."""
    return E4M3FNUZ_MAX if DTYPE == tl.float8e4b8 else E4M3_MAX


@triton.jit
def as_fp8(value, scale, TO16: tl.constexpr, DTYPE: tl.constexpr):
    """fp8 of value / scale, clamped to its largest finite value. The source dtype rounds first, as it does in core's
    chain.
    """
    scaled = rounded(value, TO16) / scale
    return tl.minimum(tl.maximum(scaled, -fp8_max(DTYPE)), fp8_max(DTYPE)).to(DTYPE)


@triton.jit
def row_scale(largest, FORMAT: tl.constexpr, DTYPE: tl.constexpr):
    """The scale of rows with these largest magnitudes; of a row of zeros it is tiny."""
    if FORMAT == INT8_ROW:
        return tl.maximum(largest / 127.0, 1e-30)
    else:
        return tl.maximum(largest, 1e-12) / fp8_max(DTYPE)


@triton.jit
def turned(x, GROUP: tl.constexpr, LENGTH: tl.constexpr):
    """x (LENGTH), each group of GROUP elements multiplied by the normalised regular Hadamard matrix of that size; in
    reverse order within each group.

    That matrix is the Kronecker power of h, 4 x 4, whose rows are ones but for a minus one, from the last column to the
    first. So each base-4 digit of the index is turned by h alone, and h x is the sum of x less twice x reversed.
    """
    if GROUP > 1:
        for stage in tl.static_range(0, 4):
            if 4 << (2 * stage) <= GROUP:
                x = tl.reshape(x, (LENGTH // (4 << (2 * stage)), 4, 1 << (2 * stage)))
                x = tl.sum(x, 1, keep_dims=True) - 2.0 * x
        x = tl.reshape(x, (LENGTH,)) * (1.0 / GROUP**0.5)
    return x


@triton.jit
def int8_words(x, scale, LENGTH: tl.constexpr, REVERSE: tl.constexpr):
    """x (LENGTH) over scale, rounded to nearest even, as int8, four in an int32; REVERSE: the last of four first."""
    scaled = tl.minimum(tl.maximum(x / scale, -128.0), 127.0)
    nearest = (scaled + 12582912.0) - 12582912.0  # 1.5 * 2**23: float32 has no fractions there
    place = tl.arange(0, 4)
    shift = (3 - place if REVERSE else place) * 8
    quads = tl.reshape(nearest.to(tl.int32) & 255, (LENGTH // 4, 4))
    return tl.sum(quads << shift[None, :], 1)


@triton.jit
def word_places(LENGTH: tl.constexpr, GROUP: tl.constexpr):
    """Where the words of int8_words(turned(...)) belong in a row."""
    word = tl.arange(0, LENGTH // 4)
    return word ^ (GROUP // 4 - 1) if GROUP > 1 else word


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
