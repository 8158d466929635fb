"""fp8 or int8 with one scale per row: of weights, of activations, and of SwiGLU as it is computed."""

import triton
import triton.language as tl

from ....attention.tiles import next_power_of_2
from .formats import CODES, FP8_ROW, Format, allocate
from .rows import INT8_ROW, as_fp8, int8_words, rounded, row_scale, to16, token_rows, turned, word_places


@triton.jit
def _part(BASE, column, width, GATED: tl.constexpr, TO16: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """One chunk of a row as float32, 0 beyond width: as it is, or silu(gate) * up where the row holds gate and up; then
    turned (see rows.py).
    """
    value = tl.load(BASE + column, mask=column < width, other=0.0).to(tl.float32)
    if GATED:
        up = tl.load(BASE + width + column, mask=column < width, other=0.0).to(tl.float32)
        value = rounded(value / (1.0 + tl.exp(-value)) * up, TO16)
    return turned(value, GROUP, BLOCK)


@triton.jit
def _largest(BASE, width, GATED: tl.constexpr, TO16: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """The largest magnitude of a row."""
    largest = tl.zeros((BLOCK,), tl.float32)
    first = width * 0
    while first < width:
        value = _part(BASE, first + tl.arange(0, BLOCK), width, GATED, TO16, GROUP, BLOCK)
        largest = tl.maximum(largest, tl.abs(value))
        first += BLOCK
    return tl.max(largest, 0)


@triton.jit
def _store(
    OUT,
    BASE,
    width,
    scale,
    GATED: tl.constexpr,
    TO16: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row over its scale; it is in the cache by now. OUT: where the row begins."""
    first = width * 0
    while first < width:
        column = first + tl.arange(0, BLOCK)
        value = _part(BASE, column, width, GATED, TO16, GROUP, BLOCK)
        if FORMAT == INT8_ROW:
            place = first // 4 + word_places(BLOCK, GROUP)
            tl.store(OUT + place, int8_words(value, scale, BLOCK, GROUP > 1), mask=place * 4 < width)
        else:
            tl.store(OUT + column, as_fp8(value, scale, 0, OUT.dtype.element_ty), mask=column < width)
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
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    per_word: tl.constexpr = 4 if FORMAT == INT8_ROW else 1
    mlp, attn, out = MLP + batch * m_b + token * m_s, ATTN + batch * a_b + token * a_s, OUT
    out += row * ((attn_width + width) // per_word)
    largest = _largest(attn, attn_width, False, TO16, GROUP, BLOCK)
    largest = tl.maximum(largest, _largest(mlp, width, GATED, TO16, GROUP, BLOCK))
    scale = row_scale(largest, FORMAT, OUT.dtype.element_ty)
    tl.store(SCALES + row, scale)
    _store(out, attn, attn_width, scale, False, TO16, FORMAT, GROUP, BLOCK)
    _store(out + attn_width // per_word, mlp, width, scale, GATED, TO16, FORMAT, GROUP, BLOCK)


def quantise_rows(x, to=Format(FP8_ROW)):
    """The Quantised of x (B, S, N), any batch and token stride, with a scale for each row."""
    return _launch(x, None, x.shape[2], 0, to, gated=False)


def swiglu_rows(mlp, attn, to):
    """quantise_rows of swiglu(mlp, attn) (see swiglu.py), bit for bit, without the tensor between."""
    return _launch(mlp, attn, mlp.shape[2] // 2, 0 if attn is None else attn.shape[2], to, gated=True)


def _launch(mlp, attn, width, attn_width, to, *, gated):
    batch, tokens, _, m_b, m_s = token_rows(mlp)
    a_b, a_s = (0, 0) if attn is None else token_rows(attn)[3:]
    block = min(2048, next_power_of_2(width))
    out, scales, result = allocate((batch, tokens, attn_width + width), mlp, to)
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
        FORMAT=CODES[to.kind],
        GROUP=to.group,
        BLOCK=block,
        num_warps=max(1, block // 256),
    )
    return result
