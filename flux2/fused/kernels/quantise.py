"""fp8 e4m3 with one scale per row: of weights, of activations, and of SwiGLU as it is computed."""

import torch
import triton
import triton.language as tl

from .rows import FP8_MAX, token_rows

TINY = tl.constexpr(1e-12)  # the scale of a row of zeros


@triton.jit
def _part(BASE, column, width, GATED: tl.constexpr):
    """One chunk of a row as float32, 0 beyond width: as it is, or silu(gate) * up where the row holds gate and up."""
    value = tl.load(BASE + column, mask=column < width, other=0.0).to(tl.float32)
    if GATED:
        value = (
            value
            / (1.0 + tl.exp(-value))
            * tl.load(BASE + width + column, mask=column < width, other=0.0).to(tl.float32)
        )
    return value


@triton.jit
def _largest(BASE, width, GATED: tl.constexpr, BLOCK: tl.constexpr):
    """The largest magnitude of a row."""
    largest = tl.zeros((BLOCK,), tl.float32)
    first = width * 0
    while first < width:
        largest = tl.maximum(largest, tl.abs(_part(BASE, first + tl.arange(0, BLOCK), width, GATED)))
        first += BLOCK
    return tl.max(largest, 0)


@triton.jit
def _store(OUT, BASE, width, scale, GATED: tl.constexpr, BLOCK: tl.constexpr):
    """A row over scale as fp8; it is in the cache by now."""
    first = width * 0
    while first < width:
        column = first + tl.arange(0, BLOCK)
        value = _part(BASE, column, width, GATED) / scale
        value = tl.minimum(tl.maximum(value, -FP8_MAX), FP8_MAX)  # the division may round above it
        tl.store(OUT + column, value.to(tl.float8e4nv), mask=column < width)
        first += BLOCK


@triton.jit
def _quantise(
    MLP, ATTN, OUT, SCALES, tokens, width, attn_width, m_b, m_s, a_b, a_s, GATED: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    mlp, attn, out = MLP + batch * m_b + token * m_s, ATTN + batch * a_b + token * a_s, OUT + row * (attn_width + width)
    largest = tl.maximum(_largest(attn, attn_width, False, BLOCK), _largest(mlp, width, GATED, BLOCK))
    scale = tl.maximum(largest, TINY) / FP8_MAX
    tl.store(SCALES + row, scale)
    _store(out, attn, attn_width, scale, False, BLOCK)
    _store(out + attn_width, mlp, width, scale, GATED, BLOCK)


def quantise_rows(x, scales):
    """fp8 e4m3 (B, S, N) of x over a scale for each row, its largest magnitude over 448, which fills scales, float32
    (B,
    S, 1).

    x: (B, S, N) with any batch and token stride.
    """
    return _launch(x, None, scales, x.shape[2], 0, gated=False)


def swiglu_rows(mlp, attn, scales):
    """quantise_rows of swiglu(mlp, attn) (see swiglu.py), without the tensor between."""
    return _launch(mlp, attn, scales, mlp.shape[2] // 2, 0 if attn is None else attn.shape[2], gated=True)


def _launch(mlp, attn, scales, width, attn_width, *, gated):
    batch, tokens, _, m_b, m_s = token_rows(mlp)
    a_b, a_s = (0, 0) if attn is None else token_rows(attn)[3:]
    block = min(2048, triton.next_power_of_2(width))
    out = torch.empty((batch, tokens, attn_width + width), device=mlp.device, dtype=torch.float8_e4m3fn)
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
        BLOCK=block,
        num_warps=max(1, block // 256),
    )
    return out
