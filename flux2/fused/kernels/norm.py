"""Gated residual, LayerNorm and modulation in one pass over a token's row."""

import triton
import triton.language as tl

from ....attention.tiles import cdiv, next_power_of_2
from .formats import CODES, allocate
from .rows import FP8_ROW, FP8_TENSOR, FP16_MAX, INT8_ROW, as_fp8, int8_words, mod_strides, modulation, rounded
from .rows import row_scale, to16, token_rows, turned, word_places


@triton.jit
def _residual_norm(
    X,
    DELTA,
    GATE,
    SHIFT,
    SCALE,
    OUT,
    OUT_SCALE,
    rows,
    tokens,
    N,
    eps,
    start,
    end,
    x_b,
    x_s,
    d_b,
    d_s,
    g_b,
    g_m,
    n_b,
    n_m,
    ADD: tl.constexpr,
    NORM: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    FINITE: tl.constexpr,
    SHARED: tl.constexpr,
    TO16: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    batch, token = row // tokens, row % tokens
    at = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (at < N)[None, :]
    x_at = X + (batch * x_b + token * x_s)[:, None] + at[None, :]
    x = tl.load(x_at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        delta = tl.load(DELTA + (batch * d_b + token * d_s)[:, None] + at[None, :], mask=inside, other=0.0).to(
            tl.float32
        )
        x += delta * modulation(GATE, batch, token, at, inside, N, start, end, g_b, g_m, SHARED)
        if FINITE:
            x = tl.where(x == x, tl.minimum(tl.maximum(x, -FP16_MAX), FP16_MAX), 0.0)
        stored = x.to(X.dtype.element_ty)
        tl.store(x_at, stored, mask=inside)
        x = stored.to(tl.float32)
    if NORM:
        scale = modulation(SCALE, batch, token, at, inside, N, start, end, n_b, n_m, SHARED)
        shift = modulation(SHIFT, batch, token, at, inside, N, start, end, n_b, n_m, SHARED)
        centred = tl.where(inside, x - (tl.sum(x, 1) / N)[:, None], 0.0)
        normed = centred / tl.sqrt(tl.sum(centred * centred, 1) / N + eps)[:, None]
        value = normed * (1.0 + scale) + shift
        out = OUT + row[:, None] * N + at[None, :]
        if FORMAT == INT8_ROW:
            value = turned(
                tl.reshape(tl.where(inside, rounded(value, TO16), 0.0), (ROWS * BLOCK,)), GROUP, ROWS * BLOCK
            )
            value = tl.reshape(value, (ROWS, BLOCK))
            scale = row_scale(tl.max(tl.abs(value), 1), FORMAT, tl.int8)
            tl.store(OUT_SCALE + row, scale, mask=row < rows)
            every = tl.reshape(tl.broadcast_to(scale[:, None], (ROWS, BLOCK)), (ROWS * BLOCK,))
            words = int8_words(tl.reshape(value, (ROWS * BLOCK,)), every, ROWS * BLOCK, GROUP > 1)
            place = word_places(BLOCK, GROUP)
            there = (row < rows)[:, None] & (place * 4 < N)[None, :]
            tl.store(OUT + row[:, None] * (N // 4) + place[None, :], tl.reshape(words, (ROWS, BLOCK // 4)), mask=there)
        elif FORMAT == FP8_ROW:
            value = rounded(value, TO16)
            scale = row_scale(tl.max(tl.where(inside, tl.abs(value), 0.0), 1), FORMAT, OUT.dtype.element_ty)
            tl.store(OUT_SCALE + row, scale, mask=row < rows)
            tl.store(out, as_fp8(value, scale[:, None], 0, OUT.dtype.element_ty), mask=inside)
        elif FORMAT == FP8_TENSOR:
            tl.store(out, as_fp8(value, tl.load(OUT_SCALE), TO16, OUT.dtype.element_ty), mask=inside)
        else:
            tl.store(out, value.to(OUT.dtype.element_ty), mask=inside)


def norm_modulate(x, shift, scale, *, segment=(0, 0), eps=1e-6, to=None):
    """LayerNorm(x) * (1 + scale) + shift, without weights of the norm's own: (B, S, N) contiguous.

    x: (B, S, N), any batch and token stride. shift, scale: (B or 1, 1 or 2, N), two views of one tensor (equal
    strides). segment: (start, end) of the tokens that row 1 of the modulation is for (ComfyUI's index_timestep_zero).
    to: a formats.Format, then the result is a Quantised; None keeps x's dtype. Raises ValueError for strides that the
    kernel cannot read.
    """
    return _launch(x, None, None, shift, scale, segment, eps, to, False)


def add_gated(x, delta, gate, *, segment=(0, 0), finite=False):
    """x += delta * gate in place; returns x. finite: replace what float16 cannot hold (nan by 0, infinities by the
    largest value), as core does.
    """
    _launch(x, delta, gate, None, None, segment, 0.0, None, finite)
    return x


def add_gated_norm_modulate(x, delta, gate, shift, scale, *, segment=(0, 0), eps=1e-6, to=None, finite=False):
    """add_gated(x, delta, gate), then norm_modulate of the new x, in one pass."""
    return _launch(x, delta, gate, shift, scale, segment, eps, to, finite)


def _launch(x, delta, gate, shift, scale, segment, eps, to, finite):
    batch, tokens, width, x_b, x_s = token_rows(x)
    count, add, norm = batch * tokens, delta is not None, scale is not None
    out, out_scale, result = allocate(x.shape, x, to) if norm else (x, None, None)
    d_b, d_s = token_rows(delta)[3:] if add else (0, 0)
    g, n = mod_strides(gate) if add else (0, 0), mod_strides(scale) if norm else (0, 0)
    if norm and mod_strides(shift) != n:
        raise ValueError("shift and scale must be views of one modulation tensor, with equal strides.")
    # rows of one program that share one modulation read it once: it is as long as a row, and would be half of all reads
    shared = segment[0] >= segment[1] and (batch == 1 or tokens % ROWS == 0)
    _residual_norm[(cdiv(count, ROWS),)](
        x,
        delta if add else x,
        gate if add else x,
        shift if norm else x,
        scale if norm else x,
        out,
        x if out_scale is None else out_scale,
        count,
        tokens,
        width,
        eps,
        *segment,
        x_b,
        x_s,
        d_b,
        d_s,
        *g,
        *n,
        ADD=add,
        NORM=norm,
        FORMAT=CODES[to and to.kind],
        GROUP=to.group if to else 0,
        FINITE=finite,
        SHARED=shared,
        TO16=to16(x.dtype),
        ROWS=ROWS,
        BLOCK=next_power_of_2(width),
        num_warps=WARPS,
    )
    return result


ROWS, WARPS = 1, 8  # tokens and warps of a program: the fastest of those that benchmarks/fast_check.py times on an H200
