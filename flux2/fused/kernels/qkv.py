"""q/k RMSNorm, RoPE and the joint q, k, v of text and image, straight from the outputs of the qkv products; or the same
in fp8, as attention backend cudnn-fp8 takes them.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from ....attention.parallel.symmetric_kernels import peer
from ....attention.tiles import cdiv, next_power_of_2
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


@triton.jit
def _store_e4m3(OUT, x, inside):
    tl.store(OUT, tl.minimum(tl.maximum(x, -448.0), 448.0).to(tl.float8e4nv), mask=inside)


@triton.jit(do_not_specialize=["text", "image", "every"])
def _qkv_fp8(
    TXT, IMG, TXT_Q, TXT_K, IMG_Q, IMG_K, PE, TURN, MEANS, SCALES, Q, K, V, SUMS, TOP, CUT,
    text, image, heads, every, eps, t_b, t_s, i_b, i_s, pe_b,
    D: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens of text or of image, q, k or v of them, HEADS heads one after another: q and k normalised, rotated,
    k without its mean, both turned; v without its mean; all as e4m3 of what they are over their scale.

    No element of a normalised row is larger than its length, sqrt(D) times the largest weight of the norm at most,
    however it is turned: that is the range of q, and twice that of k, whose mean is taken. Their scales are stored for
    cuDNN. The scale of v is given, and what is larger is cut and counted. Every so manieth tile stores its sums of k
    and v.
    """
    tile, part, which, batch = tl.program_id(0), tl.program_id(1) // 3, tl.program_id(1) % 3, tl.program_id(2)
    text_tiles, width, batches = tl.cdiv(text, TOKENS), heads * D, tl.num_programs(2)
    source, first, length, stride, before = IMG + batch.to(tl.int64) * i_b, tile - text_tiles, image, i_s, text
    if tile < text_tiles:
        source, first, length, stride, before = TXT + batch.to(tl.int64) * t_b, tile, text, t_s, tile * 0
    first *= TOKENS
    source += first.to(tl.int64) * stride + which * width
    place = batch.to(tl.int64) * (text + image) + before + first
    token, lane, pair = tl.arange(0, TOKENS), tl.arange(0, D), tl.arange(0, D // 2)
    known, inside = (first + token < length)[:, None], (first + token < length)[:, None] & (lane >= 0)[None, :]
    at, to = token[:, None] * stride + lane[None, :], token[:, None] * width + lane[None, :]
    sampled, sums = tile % every == 0, SUMS + (tile // every) * (batches * 2 * width)
    head, last = part * HEADS, tl.minimum(part * HEADS + HEADS, heads)

    if which == 2:
        inverse = tl.load(SCALES + 3)
        top, cut = inverse * 0.0, tile * 0
        while head < last:
            row = (batch * heads + head) * 2 * D + D + lane
            v = tl.load(source + head * D + at, mask=inside, other=0.0).to(tl.float32)
            if sampled:
                tl.store(sums + row, tl.sum(v, 0))
            off = tl.where(inside, v - tl.load(MEANS + row)[None, :], 0.0)
            _store_e4m3(V + place * width + head * D + to, off * inverse, inside)
            top = tl.maximum(top, tl.max(tl.max(tl.abs(off), 1), 0))
            cut += tl.sum(tl.sum((tl.abs(off * inverse) > 448.0).to(tl.int32), 1), 0)
            head += 1
        program = (batch * (tl.num_programs(1) // 3) + part) * tl.num_programs(0) + tile
        tl.store(TOP + program, top)
        tl.store(CUT + program, cut)
    else:
        out, txt_weight, img_weight = Q, TXT_Q, IMG_Q
        if which == 1:
            out, txt_weight, img_weight = K, TXT_K, IMG_K
        txt_row, img_row = tl.load(txt_weight + lane).to(tl.float32), tl.load(img_weight + lane).to(tl.float32)
        weight = tl.where(tile < text_tiles, txt_row, img_row)
        largest = tl.max(tl.maximum(tl.abs(txt_row), tl.abs(img_row)), 0)
        scale = tl.maximum(largest, 1e-12) * (which + 1).to(tl.float32) * (D**0.5 / 448.0)
        if tile + part + batch == 0:
            tl.store(SCALES + which, scale)
        turn = TURN + (2 * pair)[:, None] * D + lane[None, :]
        entries = PE + batch.to(tl.int64) * pe_b + (before + first).to(tl.int64) * (2 * D)
        entries += token[:, None] * (2 * D) + tl.arange(0, 2 * D)[None, :]
        column0, column1 = tl.split(tl.reshape(tl.load(entries, mask=known, other=0.0), (TOKENS, D // 2, 2, 2)))
        c00, c10 = tl.split(column0)
        c01, c11 = tl.split(column1)
        while head < last:
            row = (batch * heads + head) * 2 * D + 2 * pair
            x = tl.load(source + head * D + at, mask=inside, other=0.0).to(tl.float32)
            x = x * tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None] * weight[None, :]
            even, odd = tl.split(tl.reshape(x, (TOKENS, D // 2, 2)))
            even, odd = c00 * even + c01 * odd, c10 * even + c11 * odd
            if which == 1:
                if sampled:
                    tl.store(sums + row, tl.sum(even, 0))
                    tl.store(sums + row + 1, tl.sum(odd, 0))
                even -= tl.load(MEANS + row)[None, :]
                odd -= tl.load(MEANS + row + 1)[None, :]
            # a sum over even and one over odd elements: they need not be put together again. The matrix is loaded for
            # each head: kept, it would take half of the registers
            even_turn, odd_turn = tl.load(turn), tl.load(turn + D)
            x = tl.dot(even.to(even_turn.dtype), even_turn)
            x = tl.dot(odd.to(odd_turn.dtype), odd_turn, x)
            _store_e4m3(out + place * width + head * D + to, x / scale, inside)
            head += 1


def single_qkv(qkv, heads, weights, pe, place=None, fp8=None):
    """q, k, v (B, S, H, D) of a single block: q and k normalised and rotated, v a view of `qkv`.

    qkv: (B, S, >= 3*H*D), q, k and v first, any token stride. weights: (q weight, k weight) of the norms, (D,) each.
    pe: (B or 1, 1, S, D/2, 2, 2) float32, or None (not rotated). place: the UlyssesBuffers that they are written into,
    each head where it is computed; then nothing is returned. fp8: what joint_fp8 takes, to return what it returns.
    """
    size = weights[0].shape[0]
    if fp8 is not None:
        return _launch_fp8(qkv, qkv, heads, weights, weights, pe, fp8, text=0, image=qkv.shape[1])
    if place is not None:
        _launch(qkv, qkv, weights, weights, pe, None, None, None, text=0, copy_v=True, place=place)
        return None
    q, k = (qkv.new_empty((*qkv.shape[:2], heads, size)) for _ in range(2))
    _launch(qkv, qkv, weights, weights, pe, q, k, q, text=0, copy_v=False)
    return q, k, qkv[..., 2 * heads * size : 3 * heads * size].unflatten(-1, (heads, size))


def joint_qkv(txt, img, heads, txt_weights, img_weights, pe, place=None, fp8=None):
    """q, k, v (B, S_txt + S_img, H, D) of a double block, text first, in one launch.

    txt, img: (B, S, 3*H*D). txt_weights, img_weights: pairs (q_weight, k_weight) of (D,). pe, place as in single_qkv.
    fp8: an attention.backends.cudnn_fp8.Kept, to return (q8, k8, v8, scales, means) in e4m3 instead, as that backend's
    attend_written takes them; what the kernel saw is left there for the next call.
    """
    if fp8 is not None:
        text, image = txt.shape[1], img.shape[1]
        return _launch_fp8(txt, img, heads, txt_weights, img_weights, pe, fp8, text=text, image=image)
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
        group = min(GROUP, next_power_of_2(heads))
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
        PADDED=next_power_of_2(group),
        ROPE=pe is not None,
        COPY_V=copy_v,
        TO_PEERS=place is not None,
        num_warps=WARPS,
    )


def _launch_fp8(txt, img, heads, txt_weights, img_weights, pe, kept, *, text, image):
    batch, size = img.shape[0], img_weights[0].shape[0]
    tiles, parts = cdiv(text, TILE) + cdiv(image, TILE), cdiv(heads, HEADS)
    every, samples, sampled = samples_of(text, image)
    q8, k8, v8 = torch.empty(
        (3, batch, text + image, heads, size), device=img.device, dtype=torch.float8_e4m3fn
    ).unbind()
    sums = img.new_empty((samples, batch * heads, 2, size), dtype=torch.float32)
    top = img.new_empty(batch * parts * tiles, dtype=torch.float32)
    cut = img.new_empty(batch * parts * tiles, dtype=torch.int32)
    t_b, t_s = token_rows(txt)[3:]
    i_b, i_s = token_rows(img)[3:]
    _qkv_fp8[(tiles, 3 * parts, batch)](
        txt, img, *txt_weights, *img_weights, pe, kept.turn, kept.means, kept.scales, q8, k8, v8, sums, top, cut,
        text, image, heads, every, RMS_EPS, t_b, t_s, i_b, i_s, pe.stride(0) if pe.shape[0] > 1 else 0,
        D=size, TOKENS=TILE, HEADS=HEADS, num_warps=FP8_WARPS,
    )  # fmt: skip
    return q8, k8, v8, *kept.learn(sums, sampled, top, cut)


@lru_cache(maxsize=None)
def samples_of(text, image):
    """(every so manieth tile is a sample, number of samples, tokens in them) of `_qkv_fp8` for so many tokens."""
    lengths = [min(TILE, length - start) for length in (text, image) for start in range(0, length, TILE)]
    every = cdiv(len(lengths), SAMPLES)
    return every, len(lengths[::every]), sum(lengths[::every])


# in fp8: tokens of a tile, heads that a program takes one after another, its warps, and samples at most. Never timed on
# a GPU; compiled for sm_90, a thread has 128 registers and spills none
TILE, HEADS, FP8_WARPS, SAMPLES = 32, 8, 8, 32
# heads at a time, and warps, of a program: the fastest of those that benchmarks/fast_check.py times on an H200
GROUP, WARPS = 32, 4
