"""GroupNorm, SiLU, biases and residuals of the autoencoder in Triton, on channels-last tensors.

A norm takes three launches: `_statistics` reads the tensor once (and adds a residual on the way, where there is one),
`_combine` joins what its programs found, `_apply` normalises, multiplies, adds and applies SiLU. A program sums what is
left of its pixels without the mean of the first of them, and means and squares of programs are merged with the formula
of Chan, Golub and LeVeque (1979): a large mean costs no accuracy.
Everything is computed in float32 and rounded once, when it is stored. Biases of convolutions are added here: PyTorch
adds them to a convolution's result in a pass of its own.
"""

import torch
import triton
import triton.language as tl

from ...attention.tiles import cdiv, next_power_of_2

GROUPS = 32  # of every GroupNorm in this autoencoder
TILE = 8192  # elements of a tile: rows of pixels times padded channels
PROGRAMS = 1024  # at most, of the statistics for one picture
WARPS = 8


@triton.jit
def _channels(C: tl.constexpr, G: tl.constexpr, PAD: tl.constexpr):
    """(channel, whether it exists) of G * PAD lanes: every group is filled up to a power of two."""
    lane = tl.arange(0, G * PAD)
    if C == G * PAD:
        return lane, lane < C
    return (lane // PAD) * (C // G) + lane % PAD, lane % PAD < C // G


@triton.jit
def _of_groups(values, G: tl.constexpr, PAD: tl.constexpr):
    """Sum over the pixels (axis 0) and over the channels of each group: (ROWS, G * PAD) -> (G,)."""
    return tl.sum(tl.reshape(tl.sum(values, 0), (G, PAD)), 1)


@triton.jit
def _read(X, H, OUT, bias, at, inside, ADD: tl.constexpr, STORE: tl.constexpr):
    """A tile of x + bias (+ h) in float32, as it was stored where it was stored."""
    value = tl.load(X + at, mask=inside, other=0.0).to(tl.float32) + bias[None, :]
    if ADD:
        value += tl.load(H + at, mask=inside, other=0.0).to(tl.float32)
    if STORE:
        stored = value.to(OUT.dtype.element_ty)
        tl.store(OUT + at, stored, mask=inside)
        value = stored.to(tl.float32)
    return value


@triton.jit
def _statistics(
    X,
    H,
    X_BIAS,
    H_BIAS,
    OUT,
    COUNT,
    MEAN,
    M2,
    pixels,
    tiles,
    C: tl.constexpr,
    G: tl.constexpr,
    PAD: tl.constexpr,
    ROWS: tl.constexpr,
    ADD: tl.constexpr,
    STORE: tl.constexpr,
    HAS_X_BIAS: tl.constexpr,
    HAS_H_BIAS: tl.constexpr,
):
    program, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channel, exists = _channels(C, G, PAD)
    bias = tl.zeros((G * PAD,), tl.float32)
    if HAS_X_BIAS:
        bias += tl.load(X_BIAS + channel, mask=exists, other=0.0).to(tl.float32)
    if HAS_H_BIAS:
        bias += tl.load(H_BIAS + channel, mask=exists, other=0.0).to(tl.float32)
    # the mean of the first tile is taken from all of them, so that sums of squares do not cancel
    row = program * ROWS + tl.arange(0, ROWS)
    inside = (row < pixels)[:, None] & exists[None, :]
    value = _read(X, H, OUT, bias, (batch * pixels + row)[:, None] * C + channel[None, :], inside, ADD, STORE)
    count = tl.minimum(pixels - program * ROWS, ROWS)
    first = _of_groups(tl.where(inside, value, 0.0), G, PAD) / (count.to(tl.float32) * (C // G))
    shift = tl.reshape(tl.broadcast_to(first[:, None], (G, PAD)), (G * PAD,))[None, :]
    total = tl.where(inside, value - shift, 0.0)
    squares = total * total
    tile = program + tl.num_programs(0)
    while tile < tiles:
        row = tile * ROWS + tl.arange(0, ROWS)
        inside = (row < pixels)[:, None] & exists[None, :]
        value = _read(X, H, OUT, bias, (batch * pixels + row)[:, None] * C + channel[None, :], inside, ADD, STORE)
        off = tl.where(inside, value - shift, 0.0)
        total += off
        squares += off * off
        count += tl.minimum(pixels - tile * ROWS, ROWS)
        tile += tl.num_programs(0)
    number = count.to(tl.float32) * (C // G)
    off = _of_groups(total, G, PAD) / number
    to = (batch * tl.num_programs(0) + program) * G + tl.arange(0, G)
    tl.store(COUNT + to, number + tl.zeros((G,), tl.float32))
    tl.store(MEAN + to, first + off)
    tl.store(M2 + to, _of_groups(squares, G, PAD) - number * off * off)


@triton.jit
def _combine(COUNT, MEAN, M2, programs, eps, MEANS, RSTD, G: tl.constexpr, BLOCK: tl.constexpr):
    group, batch = tl.program_id(0), tl.program_id(1)
    part = tl.arange(0, BLOCK)
    at, inside = (batch * programs + part) * G + group, part < programs
    count = tl.load(COUNT + at, mask=inside, other=0.0)
    means = tl.load(MEAN + at, mask=inside, other=0.0)
    total = tl.sum(count, 0)
    mean = tl.sum(count * means, 0) / total
    off = means - mean
    variance = tl.sum(tl.load(M2 + at, mask=inside, other=0.0) + count * off * off, 0) / total
    tl.store(MEANS + batch * G + group, mean)
    tl.store(RSTD + batch * G + group, 1.0 / tl.sqrt(variance + eps))


@triton.jit
def _apply(
    X,
    BIAS,
    WEIGHT,
    SHIFT,
    MEANS,
    RSTD,
    OUT,
    pixels,
    C: tl.constexpr,
    G: tl.constexpr,
    PAD: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr,
):
    batch = tl.program_id(1).to(tl.int64)
    channel, exists = _channels(C, G, PAD)
    group = channel // (C // G)
    mean = tl.load(MEANS + batch * G + group, mask=exists, other=0.0)
    scale = tl.load(RSTD + batch * G + group, mask=exists, other=0.0)
    scale *= tl.load(WEIGHT + channel, mask=exists, other=0.0).to(tl.float32)
    shift = tl.load(SHIFT + channel, mask=exists, other=0.0).to(tl.float32)
    if HAS_BIAS:
        mean -= tl.load(BIAS + channel, mask=exists, other=0.0).to(tl.float32)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (row < pixels)[:, None] & exists[None, :]
    at = (batch * pixels + row)[:, None] * C + channel[None, :]
    value = tl.load(X + at, mask=inside, other=0.0).to(tl.float32)
    value = (value - mean[None, :]) * scale[None, :] + shift[None, :]
    if SILU:
        value = value / (1.0 + tl.exp(-value))
    tl.store(OUT + at, value.to(OUT.dtype.element_ty), mask=inside)


def _sizes(x):
    """(batch, channels, pixels, padded channels of a group, pixels of a tile) of a channels-last (B, C, H, W)."""
    batch, channels, height, width = x.shape
    pad = next_power_of_2(channels // GROUPS)
    return batch, channels, height * width, pad, max(1, TILE // (GROUPS * pad))


def statistics(x, bias=None, add=None, add_bias=None, *, store=False, eps=1e-6):
    """(sum, mean, rstd): of sum = x + bias (+ add + add_bias), mean and 1 / sqrt(variance + eps) of each group, float32
    (B, 32) both.

    x, add: channels-last (B, C, H, W) of one dtype. bias, add_bias: (C,) or None. With `add` or `store` the sum is
    stored, in x's dtype, and the statistics are those of what was stored; else x itself is returned for it.
    """
    batch, channels, pixels, pad, rows = _sizes(x)
    tiles = cdiv(pixels, rows)
    programs = min(tiles, PROGRAMS)
    store = store or add is not None
    out = torch.empty_like(x, memory_format=torch.channels_last) if store else x
    count, mean, m2 = x.new_empty((3, batch, programs, GROUPS), dtype=torch.float32)
    means, rstd = x.new_empty((2, batch, GROUPS), dtype=torch.float32)
    _statistics[(programs, batch)](
        x,
        x if add is None else add,
        x if bias is None else bias,
        x if add_bias is None else add_bias,
        out,
        count,
        mean,
        m2,
        pixels,
        tiles,
        C=channels,
        G=GROUPS,
        PAD=pad,
        ROWS=rows,
        ADD=add is not None,
        STORE=store,
        HAS_X_BIAS=bias is not None,
        HAS_H_BIAS=add_bias is not None,
        num_warps=WARPS,
    )
    _combine[(GROUPS, batch)](
        count, mean, m2, programs, eps, means, rstd, G=GROUPS, BLOCK=next_power_of_2(programs), num_warps=4
    )
    return out, means, rstd


def normalise(x, mean, rstd, weight, shift, bias=None, silu=True):
    """(x + bias - mean) * rstd * weight + shift, through SiLU unless told not to; channels-last like x, in its dtype.

    x: channels-last (B, C, H, W). mean, rstd: float32 (B, 32), of x + bias. weight, shift, bias: (C,).
    """
    batch, channels, pixels, pad, rows = _sizes(x)
    out = torch.empty_like(x, memory_format=torch.channels_last)
    _apply[(cdiv(pixels, rows), batch)](
        x,
        x if bias is None else bias,
        weight,
        shift,
        mean,
        rstd,
        out,
        pixels,
        C=channels,
        G=GROUPS,
        PAD=pad,
        ROWS=rows,
        HAS_BIAS=bias is not None,
        SILU=silu,
        num_warps=WARPS,
    )
    return out
