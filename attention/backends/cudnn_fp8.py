"""cuDNN's fp8 attention through its graph API (nvidia-cudnn-frontend, module cudnn). Quantised; Hopper and newer.

Read in nvidia-cudnn-frontend 1.32 (`pygraph.sdpa_fp8`): layout by strides, one float32 scale per tensor, read on the
device; log-sum-exp natural and float32 (B, H, Sq, 1). Head size up to 128 and a multiple of 16; on Hopper the output is
fp8 too. The softmax's probabilities are multiplied by 256, so that the smallest that fp8 can tell from 0 is 2**-17.

What goes into fp8 is made to lose little. e4m3 has three bits of fraction at any size from 2**-6 to 448, so what counts
is how large the numbers are beside the result that they make, and scales only have to keep them in that range.

- A mean is taken from all keys, which the softmax does not see ("smoothing" in SageAttention, arXiv 2410.02367), and
  one from all values, which is added to the output again. Both are exact for any number in place of the mean, so that
  of the keys is made from at most 16 evenly spaced samples of 64 tokens.
- Queries and keys are turned by one Hadamard matrix, which leaves their products and spreads a channel of outliers
  over all channels (QuaRot, arXiv 2404.00456).
- The scale of the values, and of the output, which is a mean of values, is that of the largest value: nothing is cut.
  Queries and keys, which models like FLUX.2 normalise, get 16 times what their longest row in the samples needs,
  however it is turned.

Nothing depends on an earlier call, and the CPU never waits for the GPU.

A caller whose own kernel makes q, k and v can write them in fp8 itself (`attend_keeping` for the first call of a layer,
then `attend_written`): means of keys and values, and the range of the values, are those of the layer's calls before,
kept on the GPU. What is out of that range is cut and counted. flux2/fused/fp8_attention.py is such a caller.

On data center Blackwell the output is 16 bits, as cuDNN offers from 9.13 on: written from its documentation, run
nowhere yet, and judged there by the test call that every backend has to pass. MXFP8, also offered there, is not used.
"""

import functools
import threading
from typing import NamedTuple

import cudnn
import torch
import triton
import triton.language as tl

from ..adapter import Adapter, lse_bhs
from ..call import Limits, arch_matches, default_scale
from ..device import describe
from ..tiles import cdiv, next_power_of_2

OLDEST, BROKEN = 90100, (91000,)  # versions of cuDNN, as sdpa_fp8 itself says
SOFTMAX_SCALE = 256.0
PARTS = 16  # samples, at most
TOKENS, WARPS = 64, 4  # of a sample, and of a program's tile
HEADROOM = tl.constexpr(4.0)  # of values over the largest that earlier calls of a layer had
FP8 = torch.float8_e4m3fn
WIDE_OUTPUT, WIDE_SINCE = ("sm10x",), 91300  # where, and from which cuDNN on, the output can have 16 bits
_local = threading.local()  # handles and graphs: a handle of cuDNN's serves one thread at a time


@triton.jit
def _tile(TENSOR, batch, head, token, lane, length, s_b, s_s, s_h):
    at = TENSOR + batch * s_b + head * s_h + token[:, None] * s_s + lane[None, :]
    return tl.load(at, mask=(token < length)[:, None], other=0.0).to(tl.float32)


@triton.jit
def _observe(
    Q, K, V, SUMS, LARGEST, q_len, kv_len, heads, tiles, q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h,
    D: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Of one head: sums of k and the largest row norm of q and k in one tile of tokens, and in every so manieth tile
    the sums of v and its largest magnitude, so that all programs together see all of v.
    """
    part, parts, row, rows = tl.program_id(0), tl.num_programs(0), tl.program_id(1), tl.num_programs(1)
    batch, head = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    sample, lane = (part * tiles // parts * TOKENS + tl.arange(0, TOKENS)).to(tl.int64), tl.arange(0, D)
    q = _tile(Q, batch, head, sample, lane, q_len, q_b, q_s, q_h)
    k = _tile(K, batch, head, sample, lane, kv_len, k_b, k_s, k_h)
    v_sum, v_top = tl.zeros((TOKENS, D), tl.float32), tl.zeros((TOKENS, D), tl.float32)
    first = part * TOKENS
    while first < kv_len:
        v = _tile(V, batch, head, (first + tl.arange(0, TOKENS)).to(tl.int64), lane, kv_len, v_b, v_s, v_h)
        v_sum += v
        v_top = tl.maximum(v_top, tl.abs(v))
        first += parts * TOKENS
    at = SUMS + (part * rows + row) * 2 * D + lane
    tl.store(at, tl.sum(k, 0))
    tl.store(at + D, tl.sum(v_sum, 0))
    largest = LARGEST + (part * rows + row) * 3
    tl.store(largest, tl.sqrt(tl.max(tl.sum(q * q, 1), 0)))
    tl.store(largest + 1, tl.sqrt(tl.max(tl.sum(k * k, 1), 0)))
    tl.store(largest + 2, tl.max(tl.max(v_top, 1), 0))


@triton.jit
def _conclude(
    SUMS, LARGEST, MEANS, SCALES, sampled, kv_len, parts, rows, D: tl.constexpr, P: tl.constexpr, N: tl.constexpr
):  # fmt: skip
    """Means of one head, and in the first program the scales, in the order of `quantise`."""
    row, lane, part = tl.program_id(0), tl.arange(0, 2 * D), tl.arange(0, P)
    sums = tl.load(SUMS + (part[:, None] * rows + row) * 2 * D + lane[None, :], mask=(part < parts)[:, None], other=0.0)
    tl.store(MEANS + row * 2 * D + lane, tl.sum(sums, 0) / tl.where(lane < D, sampled, kv_len))
    if row == 0:
        at = tl.arange(0, N)
        for which in tl.static_range(3):
            top = tl.max(tl.load(LARGEST + at * 3 + which, mask=at < parts * rows, other=0.0), 0)
            # of q and k only samples were seen; v without its mean is at most twice as large
            scale = tl.maximum(top, 1e-12) * (2.0 if which == 2 else 16.0) / 448.0
            tl.store(SCALES + which, scale)
            if which == 2:
                tl.store(SCALES + 3, 1.0 / scale)


@triton.jit
def _store(OUT, value, token, lane, batch, head, length, heads, D: tl.constexpr):
    """value as e4m3 into (B, S, H, D), cut where it is above the largest."""
    value = tl.minimum(tl.maximum(value, -448.0), 448.0)
    at = ((batch * length + token[:, None]) * heads + head) * D + lane[None, :]
    tl.store(OUT + at, value.to(tl.float8e4nv), mask=(token < length)[:, None])


@triton.jit
def _quantise(
    Q, K, V, MEANS, SCALES, ROTATION, Q8, K8, V8, q_len, kv_len, heads,
    q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h, D: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """q and k turned, k and v without their means, all as e4m3 of what they are over their scale."""
    row = tl.program_id(1)
    batch, head = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    token, lane = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64), tl.arange(0, D)
    turn = tl.load(ROTATION + lane[:, None] * D + lane[None, :])
    q = _tile(Q, batch, head, token, lane, q_len, q_b, q_s, q_h)
    q = tl.dot(q.to(turn.dtype), turn) / tl.load(SCALES)
    _store(Q8, q, token, lane, batch, head, q_len, heads, D)
    k = _tile(K, batch, head, token, lane, kv_len, k_b, k_s, k_h) - tl.load(MEANS + row * 2 * D + lane)[None, :]
    k = tl.dot(k.to(turn.dtype), turn) / tl.load(SCALES + 1)
    _store(K8, k, token, lane, batch, head, kv_len, heads, D)
    v = _tile(V, batch, head, token, lane, kv_len, v_b, v_s, v_h) - tl.load(MEANS + row * 2 * D + D + lane)[None, :]
    _store(V8, v * tl.load(SCALES + 3), token, lane, batch, head, kv_len, heads, D)


@triton.jit
def _restore(RAW, MEANS, SCALE, OUT, length, heads, D: tl.constexpr, TOKENS: tl.constexpr):
    """cuDNN's output times its scale, plus the mean of the values."""
    row = tl.program_id(1)
    batch, head = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    token, lane = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64), tl.arange(0, D)
    at = ((batch * length + token[:, None]) * heads + head) * D + lane[None, :]
    inside = (token < length)[:, None]
    value = tl.load(RAW + at, mask=inside, other=0.0).to(tl.float32) * tl.load(SCALE)
    value += tl.load(MEANS + row * 2 * D + D + lane)[None, :]
    tl.store(OUT + at, value.to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def _learn(
    SUMS, TOP, CUT, MEANS, SCALES, NEXT_MEANS, NEXT_SCALES, CUTS, sampled, parts, rows, programs,
    D: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """From what a call saw, means of one head for the next call, and in the first program the scale of the values."""
    row, lane, part = tl.program_id(0), tl.arange(0, 2 * D), tl.arange(0, P)
    sums = tl.load(SUMS + (part[:, None] * rows + row) * 2 * D + lane[None, :], mask=(part < parts)[:, None], other=0.0)
    tl.store(NEXT_MEANS + row * 2 * D + lane, tl.sum(sums, 0) / sampled)
    if row == 0:
        first, top, cut = programs * 0, tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.int64)
        while first < programs:
            at = first + tl.arange(0, BLOCK)
            top = tl.maximum(top, tl.load(TOP + at, mask=at < programs, other=0.0))
            cut += tl.load(CUT + at, mask=at < programs, other=0).to(tl.int64)
            first += BLOCK
        scale = tl.maximum(tl.load(SCALES + 2), tl.max(top, 0) * HEADROOM / 448.0)
        tl.store(NEXT_SCALES + 2, scale)
        tl.store(NEXT_SCALES + 3, 1.0 / scale)
        tl.store(CUTS, tl.load(CUTS) + tl.sum(cut, 0))


@functools.lru_cache(maxsize=None)
def rotation(size, dtype, device):
    """Hadamard matrix (size, size) over sqrt(size): orthonormal, its own inverse. size: a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return (matrix * size**-0.5).to(device, dtype)


@functools.lru_cache(maxsize=None)
def widened(device):
    """What the scales of a call are multiplied with to be those of the next, whose values may be larger."""
    return torch.tensor([1.0, 1.0, HEADROOM.value / 2, 2 / HEADROOM.value], device=device)


@functools.lru_cache(maxsize=None)
def constants(device):
    """float32 (3, 1) on the device: the scale of the softmax's probabilities, its inverse, and one."""
    return torch.tensor([[SOFTMAX_SCALE], [1 / SOFTMAX_SCALE], [1.0]], device=device)


def output_dtype(device, dtype):
    """What cuDNN writes: fp8 on Hopper, the dtype of the call where it can."""
    wide = arch_matches(describe(device).arch, WIDE_OUTPUT) and cudnn.backend_version() >= WIDE_SINCE
    return dtype if wide else FP8


class Raw(NamedTuple):
    """cuDNN's output before it is restored: `data` (B, S, H, D) times `scale` (1,) plus the mean of the values of each
    head, means[:, 1]; means float32 (B * H, 2, D). dtype: of the call.
    """

    data: torch.Tensor
    scale: torch.Tensor
    means: torch.Tensor
    dtype: torch.dtype


class Kept:
    """What the calls of one layer leave for its next call, on the GPU; made by `CudnnFp8.attend_keeping`.

    means float32 (B * H, 2, D) and scales float32 (4,) as of `quantise`, for the next call; of the scales the caller's
    kernel writes the first two, and it cuts values to the third times 448. turn (D, D): what it multiplies q and k
    with. cuts int64 (1,): values that were cut so far. A Raw refers to means and scales: they are never written again
    before the call after the next.
    """

    def __init__(self, scales, means, dtype):
        self.scales, self.means = scales * widened(scales.device), means
        self.turn = rotation(means.shape[-1], dtype, means.device)
        self.cuts = torch.zeros(1, dtype=torch.int64, device=means.device)
        self._spare = torch.empty_like(self.scales), torch.empty_like(self.means)

    def learn(self, sums, sampled, top, cut):
        """Take what the caller's kernel saw of k and v for the next call; returns (scales, means) of this one.

        sums float32 (n, B * H, 2, D), n <= 32: of k before its mean was taken and of v, over `sampled` tokens in all.
        top float32 and cut int32, both of one size: the largest magnitudes of v without its mean, and how many were
        cut.
        """
        parts, rows, _, size = sums.shape
        (scales, means), (next_scales, next_means) = (self.scales, self.means), self._spare
        _learn[(rows,)](
            sums, top, cut, means, scales, next_means, next_scales, self.cuts, sampled, parts, rows, top.numel(),
            D=size, P=next_power_of_2(parts), BLOCK=1024, num_warps=WARPS,
        )  # fmt: skip
        self.scales, self.means, self._spare = next_scales, next_means, (scales, means)
        return scales, means


def quantise(q, k, v):
    """(q8, k8, v8, scales, means) for cuDNN. q (B, Sq, H, D), k and v (B, Sk, H, D), last axis contiguous.

    The first three are contiguous e4m3 of the same shapes. scales: float32 (4,): what q8, k8 and v8 have to be
    multiplied with, and the inverse of the third. means: float32 (B * H, 2, D), taken from k and v. q8 and k8 are
    turned by `rotation`.
    """
    batch, q_len, heads, size = q.shape
    kv_len, rows, tiles = k.shape[1], batch * heads, cdiv(max(q_len, k.shape[1]), TOKENS)
    parts = min(PARTS, tiles)
    sampled = sum(min(TOKENS, max(0, kv_len - part * tiles // parts * TOKENS)) for part in range(parts))
    sums, means = (q.new_empty((n, rows, 2, size), dtype=torch.float32) for n in (parts, 1))
    largest, scales = (q.new_empty(n, dtype=torch.float32) for n in (parts * rows * 3, 4))
    strides = [stride for t in (q, k, v) for stride in t.stride()[:3]]
    tile = {"D": size, "TOKENS": TOKENS, "num_warps": WARPS}
    _observe[(parts, rows)](q, k, v, sums, largest, q_len, kv_len, heads, tiles, *strides, **tile)
    block = next_power_of_2(parts * rows)
    _conclude[(rows,)](
        sums, largest, means, scales, sampled, kv_len, parts, rows, D=size, P=PARTS, N=block, num_warps=WARPS
    )  # fmt: skip
    q8, k8, v8 = (torch.empty(t.shape, device=t.device, dtype=FP8) for t in (q, k, v))
    turn = rotation(size, q.dtype, q.device)
    _quantise[(tiles, rows)](q, k, v, means, scales, turn, q8, k8, v8, q_len, kv_len, heads, *strides, **tile)
    return q8, k8, v8, scales, means[0]


class Graph:
    """cuDNN's plan for one shape, on one device and in one thread."""

    def __init__(self, handle, batch, heads, q_len, kv_len, size, scale, need_lse, out_dtype):
        kinds = cudnn.data_type
        self.graph = graph = cudnn.pygraph(
            io_data_type=kinds.FP8_E4M3,
            intermediate_data_type=kinds.FLOAT,
            compute_data_type=kinds.FLOAT,
            handle=handle,
        )

        def heads_first(length):
            """Sizes and strides of (B, H, S, D) that lies in memory as (B, S, H, D)."""
            return {"dim": [batch, heads, length, size], "stride": [length * heads * size, size, heads * size, 1]}

        def scalar(name):
            return graph.tensor(name=name, dim=[1, 1, 1, 1], stride=[1, 1, 1, 1], data_type=kinds.FLOAT)

        q, k, v = (
            graph.tensor(name=name, data_type=kinds.FP8_E4M3, **heads_first(length))
            for name, length in (("q", q_len), ("k", kv_len), ("v", kv_len))
        )
        names = ("descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o")
        scales = [scalar(name) for name in names]
        out, stats, *largest = graph.sdpa_fp8(
            q, k, v, *scales, attn_scale=scale, generate_stats=need_lse, name="attention"
        )
        layout = heads_first(q_len)
        out.set_output(True).set_dim(layout["dim"]).set_stride(layout["stride"]).set_data_type(
            {FP8: kinds.FP8_E4M3, torch.bfloat16: kinds.BFLOAT16, torch.float16: kinds.HALF}[out_dtype]
        )
        for tensor in largest:  # of the probabilities and of the output; cuDNN wants room for them
            tensor.set_output(True).set_dim([1, 1, 1, 1]).set_stride([1, 1, 1, 1]).set_data_type(kinds.FLOAT)
        if need_lse:
            stats.set_output(True).set_data_type(kinds.FLOAT)
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A])
        graph.check_support()
        graph.build_plans()
        self.tensors = (q, k, v, *scales, out, *largest, *([stats] if need_lse else []))
        self.workspace = graph.get_workspace_size()

    def run(self, handle, buffers):
        """buffers: q8, k8, v8, six scalars, the output, two scalars, and the log-sum-exp where it was asked for."""
        workspace = torch.empty(self.workspace, device=buffers[0].device, dtype=torch.uint8)
        self.graph.execute(dict(zip(self.tensors, buffers)), workspace, handle=handle)


def handle_of(device):
    """This thread's handle of a device, on PyTorch's current stream."""
    handles = _local.__dict__.setdefault("handles", {})
    if device not in handles:
        handles[device] = cudnn.create_handle()
    cudnn.set_stream(handle=handles[device], stream=torch.cuda.current_stream(device).cuda_stream)
    return handles[device]


def graph_of(handle, device, *shape):
    """This thread's Graph for (batch, heads, q_len, kv_len, size, scale, need_lse, output dtype) on a device."""
    graphs, key = _local.__dict__.setdefault("graphs", {}), (device, *shape)
    if key not in graphs:
        graphs[key] = Graph(handle, *shape)
    return graphs[key]


class CudnnFp8(Adapter):
    # head sizes: those of cuDNN's that are powers of two, which the rotation needs
    limits = Limits(head_dims=(64, 128), lse=True, grouped_heads=False)
    distribution = "nvidia-cudnn-frontend"

    def missing(self):
        version = cudnn.backend_version()
        if version < OLDEST or version in BROKEN:
            return [f"cuDNN {version} has no fp8 attention that works: 9.1.0 and newer have it, except 9.10.0."]
        return [] if hasattr(cudnn.pygraph, "sdpa_fp8") else [f"The installed {self.version()} has no sdpa_fp8."]

    def kernel(self, q, k, v, mask=None):
        return f"cuDNN {cudnn.backend_version()} sdpa_fp8"

    def run(self, q, k, v, mask, scale, need_lse):
        with torch.cuda.device(q.device):
            q8, k8, v8, scales, means = quantise(q, k, v)
            raw, lse = self._raw(q8, k8, v8, scales, means, q.dtype, scale, need_lse)
            out = torch.empty(q.shape, device=q.device, dtype=q.dtype)
            batch, q_len, heads, size = q.shape
            grid = (cdiv(q_len, TOKENS), batch * heads)
            _restore[grid](raw.data, means, raw.scale, out, q_len, heads, D=size, TOKENS=TOKENS, num_warps=WARPS)
        if not need_lse:
            return out, None
        # softmax of scores without the keys' mean: what the mean adds to all scores of a query
        shift = torch.einsum("bqhd,bhd->bhq", q.float(), means[:, 0].view(batch, heads, size)) * scale
        return out, lse_bhs(lse, q) + shift

    def attend_keeping(self, q, k, v, scale=None):
        """(Raw, Kept): `attend` without its last pass, and what the next call of this layer needs."""
        with torch.cuda.device(q.device):
            q8, k8, v8, scales, means = quantise(q, k, v)
            kept = Kept(scales, means, q.dtype)
            return self._raw(q8, k8, v8, scales, means, q.dtype, scale or default_scale(q.shape[-1]), False)[0], kept

    def attend_written(self, q8, k8, v8, scales, means, dtype, scale=None):
        """Raw of q8, k8 and v8 that a caller's kernel has written with a Kept; scales, means: those it was written
        with, as Kept.learn returns them. dtype: of the model.
        """
        with torch.cuda.device(q8.device):
            return self._raw(q8, k8, v8, scales, means, dtype, scale or default_scale(q8.shape[-1]), False)[0]

    def _raw(self, q8, k8, v8, scales, means, dtype, scale, need_lse):
        """(Raw, cuDNN's log-sum-exp or None)."""
        batch, q_len, heads, size = q8.shape
        up, down, one = constants(q8.device)
        out_dtype = output_dtype(q8.device, dtype)
        # the output is a mean of values, so it fits into their scale
        scale_out, descale_out = (scales[3:4], scales[2:3]) if out_dtype == FP8 else (one, one)
        scalars = (scales[0:1], scales[1:2], scales[2:3], down, up, scale_out)
        raw, largest = torch.empty(q8.shape, device=q8.device, dtype=out_dtype), scales.new_empty((2, 1))
        lse = [scales.new_empty((batch, heads, q_len, 1))] if need_lse else []
        handle = handle_of(q8.device)
        graph = graph_of(handle, q8.device, batch, heads, q_len, k8.shape[1], size, scale, need_lse, out_dtype)
        graph.run(handle, (q8, k8, v8, *scalars, raw, *largest, *lse))
        return Raw(raw, descale_out, means, dtype), lse[0] if need_lse else None


ADAPTERS = {"cudnn-fp8": CudnnFp8()}
