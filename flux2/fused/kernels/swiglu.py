"""SwiGLU, written beside the attention output so that the second product of a single block needs no concatenation."""

import torch
import triton
import triton.language as tl

from ....attention.tiles import cdiv, next_power_of_2
from .attention_output import attention_output, unscaled
from .formats import FP8_TENSOR, allocate
from .quantise import swiglu_rows
from .rows import as_fp8, to16, token_rows


@triton.jit
def _swiglu(
    MLP,
    ATTN,
    ATTN_SCALE,
    ATTN_MEANS,
    OUT,
    FP8_SCALE,
    tokens,
    width,
    attn_width,
    m_b,
    m_s,
    a_b,
    a_s,
    FP8: tl.constexpr,
    TO16: tl.constexpr,
    BLOCK: tl.constexpr,
    RAW: tl.constexpr,
):
    """RAW: the head size of an attention output that is to be unscaled on the way, or 0."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, token = row // tokens, row % tokens
    at = part * BLOCK + tl.arange(0, BLOCK)  # column of the output row: attention first
    column = at - attn_width
    inside = at < attn_width + width
    if part * BLOCK < attn_width:  # a block never straddles: attn_width is a multiple of BLOCK
        if RAW:
            of_batch = batch * attn_width * 2
            value = unscaled(ATTN, ATTN_SCALE, ATTN_MEANS, batch * a_b + token * a_s, of_batch, at, inside, RAW)
        else:
            value = tl.load(ATTN + batch * a_b + token * a_s + at, mask=inside, other=0.0).to(tl.float32)
    else:
        source = MLP + batch * m_b + token * m_s + column
        gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        value = gate / (1.0 + tl.exp(-gate)) * tl.load(source + width, mask=inside, other=0.0).to(tl.float32)
    out = OUT + row * (attn_width + width) + at
    if FP8:
        tl.store(out, as_fp8(value, tl.load(FP8_SCALE), TO16, OUT.dtype.element_ty), mask=inside)
    else:
        tl.store(out, value.to(OUT.dtype.element_ty), mask=inside)


def swiglu(mlp, attn=None, *, to=None):
    """silu(first half of mlp) * second half: (B, S, M), or (B, S, A + M) with attn copied in front.

    mlp: (B, S, 2*M), any batch and token stride. attn: (B, S, A), None, or an attention.backends.cudnn_fp8.Raw of
    (B, S, H, D). to: as in norm.norm_modulate.
    """
    raw = None if attn is None or torch.is_tensor(attn) else attn
    if to is not None and to.kind != FP8_TENSOR:
        return swiglu_rows(mlp, attn if raw is None else attention_output(raw), to)
    attn = attn if raw is None else raw.data.flatten(2)
    batch, tokens, double, m_b, m_s = token_rows(mlp)
    width, attn_width = double // 2, 0 if attn is None else attn.shape[2]
    a_b, a_s = (0, 0) if attn is None else token_rows(attn)[3:]
    block = block_size(width, attn_width)
    out, fp8_scale, result = allocate((batch, tokens, attn_width + width), mlp, to)
    _swiglu[(batch * tokens, cdiv(attn_width + width, block))](
        mlp,
        mlp if attn is None else attn,
        mlp if raw is None else raw.scale,
        mlp if raw is None else raw.means,
        out,
        mlp if fp8_scale is None else fp8_scale,
        tokens,
        width,
        attn_width,
        m_b,
        m_s,
        a_b,
        a_s,
        FP8=fp8_scale is not None,
        TO16=to16(mlp.dtype),
        BLOCK=block,
        RAW=0 if raw is None else raw.data.shape[3],
        num_warps=max(1, block // (32 * ELEMENTS)),
    )
    return result


def block_size(width, attn_width):
    """The largest power of two up to LARGEST that divides the attention's width, so that no program sees both
    sources.
    """
    block = min(LARGEST, next_power_of_2(width))
    while attn_width % block:
        block //= 2
    return block


LARGEST, ELEMENTS = 2048, 8  # columns of a program, and of each thread
