"""fp8 e4m3 with one scale per row: of weights, of activations, and of SwiGLU as it is computed."""

import triton
import triton.language as tl

from .formats import FP8_ROW, Format, allocate
from .rows import as_fp8, rounded, row_scale, to16, token_rows


@triton.jit
def _part(BASE, column, width, GATED: tl.constexpr, TO16: tl.constexpr):
    """One chunk of a row as float32, 0 beyond width: as it is, or silu(gate) * up where the row holds gate and up."""
    value = tl.load(BASE + column, mask=column < width, other=0.0).to(tl.float32)
    if GATED:
        up = tl.load(BASE + width + column, mask=column < width, other=0.0).to(tl.float32)
        value = rounded(value / (1.0 + tl.exp(-value)) * up, TO16)
    return value


@triton.jit
def _largest(BASE, width, GATED: tl.constexpr, TO16: tl.constexpr, BLOCK: tl.constexpr):
    """The largest magnitude of a row."""
    largest = tl.zeros((BLOCK,), tl.float32)
    first = width * 0
    while first < width:
        largest = tl.maximum(largest, tl.abs(_part(BASE, first + tl.arange(0, BLOCK), width, GATED, TO16)))
        first += BLOCK
    return tl.max(largest, 0)


@triton.jit
def _store(OUT, BASE, width, scale, GATED: tl.constexpr, TO16: tl.constexpr, BLOCK: tl.constexpr):
    """A row over scale as fp8; it is in the cache by now."""
    first = width * 0
    while first < width:
        column = first + tl.arange(0, BLOCK)
        tl.store(OUT + column, as_fp8(_part(BASE, column, width, GATED, TO16), scale, 0), mask=column < width)
        first += BLOCK


@triton.jit
def _quantise(
    MLP,
    ATTN,
    OUT,
    SCALES,
    tokens,
    width,
    attn_width,
    m_b,
    m_s,
    a_b,
    a_s,
    GATED: tl.constexpr,
    TO16: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    mlp, attn, out = MLP + batch * m_b + token * m_s, ATTN + batch * a_b + token * a_s, OUT + row * (attn_width + width)
    largest = tl.maximum(_largest(attn, attn_width, False, TO16, BLOCK), _largest(mlp, width, GATED, TO16, BLOCK))
    scale = row_scale(largest)
    tl.store(SCALES + row, scale)
    _store(out, attn, attn_width, scale, False, TO16, BLOCK)
    _store(out + attn_width, mlp, width, scale, GATED, TO16, BLOCK)


def quantise_rows(x):
    """The Quantised of x (B, S, N), any batch and token stride, with a scale for each row."""
    return _launch(x, None, x.shape[2], 0, gated=False)


def swiglu_rows(mlp, attn):
    """quantise_rows of swiglu(mlp, attn) (see swiglu.py), bit for bit, without the tensor between."""
    return _launch(mlp, attn, mlp.shape[2] // 2, 0 if attn is None else attn.shape[2], gated=True)


def _launch(mlp, attn, width, attn_width, *, gated):
    batch, tokens, _, m_b, m_s = token_rows(mlp)
    a_b, a_s = (0, 0) if attn is None else token_rows(attn)[3:]
    block = min(2048, triton.next_power_of_2(width))
    out, scales, result = allocate((batch, tokens, attn_width + width), mlp, Format(FP8_ROW))
    _quantise[(batch * tokens,)](
        mlp,
        mlp if attn is None else attn,
        out,
        scales,
        tokens,
        width,
        attn_width,
        m_b,
        m_s,
        a_b,
        a_s,
        GATED=gated,
        TO16=to16(mlp.dtype),
        BLOCK=block,
        num_warps=max(1, block // 256),
    )
    return result
