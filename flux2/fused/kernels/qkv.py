"""q/k RMSNorm, RoPE and the joint q, k, v of text and image, straight from the outputs of the qkv products."""

import torch
import triton
import triton.language as tl

from ....attention.parallel.symmetric_kernels import peer
from .rows import token_rows

RMS_EPS = torch.finfo(torch.float32).eps  # torch's default for rms_norm computes with it for every input dtype


@triton.jit
def _normed_rotated(SRC, weight, c00, c01, c10, c11, at, inside, eps, D: tl.constexpr, ROPE: tl.constexpr):
    """RMSNorm over the head axis of a (HEADS, D) tile, times weight, then pairs of elements turned by 2 x 2 matrices
    (D/2 of each entry).
    """
    x = tl.load(SRC + at, mask=inside, other=0.0)
    dtype = x.dtype
    x = x.to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None] * weight[None, :]
    if ROPE:
        even, odd = tl.split(tl.reshape(x, (x.shape[0], D // 2, 2)))
        turned = tl.join(c00[None, :] * even + c01[None, :] * odd, c10[None, :] * even + c11[None, :] * odd)
        x = tl.reshape(turned, (x.shape[0], D))
    return x.to(dtype)


@triton.jit
def _qkv(
    TXT,
    IMG,
    TXT_Q,
    TXT_K,
    IMG_Q,
    IMG_K,
    PE,
    Q,
    K,
    V,
    tokens,
    text,
    eps,
    t_b,
    t_s,
    i_b,
    i_s,
    pe_b,
    PEERS,
    start,
    total,
    keys_at,
    values_at,
    H: tl.constexpr,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED: tl.constexpr,
    ROPE: tl.constexpr,
    COPY_V: tl.constexpr,
    TO_PEERS: tl.constexpr,
):
    """One token row: GROUP heads at a time, into Q, K, V, or (TO_PEERS) each GROUP into the memory of its rank."""
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    source, q_row, k_row = IMG + batch * i_b + (token - text) * i_s, IMG_Q, IMG_K
    if token < text:
        source, q_row, k_row = TXT + batch * t_b + token * t_s, TXT_Q, TXT_K
    lane, pair = tl.arange(0, D), tl.arange(0, D // 2)
    q_weight, k_weight = tl.load(q_row + lane).to(tl.float32), tl.load(k_row + lane).to(tl.float32)
    turn = PE + batch * pe_b + token * (2 * D) + pair * 4
    if ROPE:
        c00, c01, c10, c11 = tl.load(turn), tl.load(turn + 1), tl.load(turn + 2), tl.load(turn + 3)
    else:
        c00, c01, c10, c11 = pair, pair, pair, pair
    for first in tl.static_range(0, H, GROUP):
        member = tl.arange(0, PADDED)
        at = (first + member)[:, None] * D + lane[None, :]
        inside = ((member < GROUP) & (first + member < H))[:, None] & (lane >= 0)[None, :]
        if TO_PEERS:
            data = peer(PEERS, first // GROUP, Q.dtype.element_ty) + (batch * total + start + token) * (GROUP * D)
            within = member[:, None] * D + lane[None, :]
            q_out, k_out, v_out = data + within, data + keys_at + within, data + values_at + within
        else:
            out = row * (H * D) + at
            q_out, k_out, v_out = Q + out, K + out, V + out
        q = _normed_rotated(source, q_weight, c00, c01, c10, c11, at, inside, eps, D, ROPE)
        tl.store(q_out, q, mask=inside)
        k = _normed_rotated(source + H * D, k_weight, c00, c01, c10, c11, at, inside, eps, D, ROPE)
        tl.store(k_out, k, mask=inside)
        if COPY_V:
            tl.store(v_out, tl.load(source + 2 * H * D + at, mask=inside, other=0.0), mask=inside)


def single_qkv(qkv, heads, weights, pe, place=None):
    """q, k, v (B, S, H, D) of a single block: q and k normalised and rotated, v a view of `qkv`.

    qkv: (B, S, >= 3*H*D), q, k and v first, any token stride. weights: (q weight, k weight) of the norms, (D,) each.
    pe: (B or 1, 1, S, D/2, 2, 2) float32, or None (not rotated). place: the UlyssesBuffers that they are written into,
    each head where it is computed; then nothing is returned.
    """
    size = weights[0].shape[0]
    if place is not None:
        _launch(qkv, qkv, weights, weights, pe, None, None, None, text=0, copy_v=True, place=place)
        return None
    q, k = (qkv.new_empty((*qkv.shape[:2], heads, size)) for _ in range(2))
    _launch(qkv, qkv, weights, weights, pe, q, k, q, text=0, copy_v=False)
    return q, k, qkv[..., 2 * heads * size : 3 * heads * size].unflatten(-1, (heads, size))


def joint_qkv(txt, img, heads, txt_weights, img_weights, pe, place=None):
    """q, k, v (B, S_txt + S_img, H, D) of a double block, text first, in one launch.

    txt, img: (B, S, 3*H*D). txt_weights, img_weights: pairs (q_weight, k_weight) of (D,). pe, place as in single_qkv.
    """
    if place is not None:
        text = txt.shape[1]
        _launch(txt, img, txt_weights, img_weights, pe, None, None, None, text=text, copy_v=True, place=place)
        return None
    shape = (img.shape[0], txt.shape[1] + img.shape[1], heads, img_weights[0].shape[0])
    q, k, v = (img.new_empty(shape) for _ in range(3))
    _launch(txt, img, txt_weights, img_weights, pe, q, k, v, text=txt.shape[1], copy_v=True)
    return q, k, v


def _launch(txt, img, txt_weights, img_weights, pe, q, k, v, *, text, copy_v, place=None):
    if place is None:
        batch, tokens, heads, size = q.shape
        peers, start, total, keys_at, values_at = q, 0, 0, 0, 0
        group = min(GROUP, triton.next_power_of_2(heads))
    else:
        batch, tokens, heads, size = place.batch, place.lengths[place.memory.rank], place.heads, place.head_dim
        q = k = v = img  # only their number format is read
        peers, start, total = place.memory.peers, sum(place.lengths[: place.memory.rank]), sum(place.lengths)
        keys_at, values_at, group = place.keys_at, place.values_at, place.each
        if not tokens:
            return
    t_b, t_s = token_rows(txt)[3:]
    i_b, i_s = token_rows(img)[3:]
    pe_b = pe.stride(0) if pe is not None and pe.shape[0] > 1 else 0
    _qkv[(batch * tokens,)](
        txt,
        img,
        *txt_weights,
        *img_weights,
        q if pe is None else pe,
        q,
        k,
        v,
        tokens,
        text,
        RMS_EPS,
        t_b,
        t_s,
        i_b,
        i_s,
        pe_b,
        peers,
        start,
        total,
        keys_at,
        values_at,
        H=heads,
        D=size,
        GROUP=group,
        PADDED=triton.next_power_of_2(group),
        ROPE=pe is not None,
        COPY_V=copy_v,
        TO_PEERS=place is not None,
        num_warps=WARPS,
    )


# heads at a time, and warps, of a program: the fastest of those that benchmarks/fast_check.py times on an H200
GROUP, WARPS = 32, 4
