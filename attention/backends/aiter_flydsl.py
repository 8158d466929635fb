"""Attention written in FlyDSL (AMD): AITER's kernels for gfx1201 (Radeon RX 9070), gfx1250 and, in fp8, gfx950
(MI350). FlyDSL is AMD's Python language for GPU kernels (pip install flydsl); the kernels lie in AITER.

Read at ROCm/aiter 01d3e6d and, before it, 62c4b35 (aiter/ops/flydsl/fmha_kernels.py and the kernels it launches):
- gfx1201, bf16 and fp16: flydsl_flash_attn_func. BSHD, made contiguous there; keys past the end are masked. The first
  version took no scale, wanted as many keys as queries, and let up to 0.5 % of padding take part in the softmax: of it
  only lengths that need no padding are used here.
- gfx1201, fp8: the same function, with one float32 scale per tensor.
- gfx1250, bf16 and fp16: flydsl_flash_attn_batch_func. The only one with a log-sum-exp: float32 (B, H, Sq), natural
  logarithm. Its kernel finds the tensors of a batch entry at `entry * length` rows, so of a batch it takes contiguous
  tensors only.
- gfx950, fp8: flydsl_flash_attn_batch_func, head size 128.
flydsl_flash_attn_batch_func answers None for what it has no kernel for. Kernels are compiled on the first call.
"""

import torch

import aiter  # noqa: F401  so that a machine without ROCm is told what AITER says about it

from ..errors import explained
from ..adapter import Adapter, installed_version, lse_bhs, per_tensor_fp8
from ..call import Limits, default_scale
from ..device import describe
from ..library_checks import lacks, part, takes, unbindable

FMHA, FMHA_WHY = part("aiter.ops.flydsl.fmha_kernels")
QUANT, _ = part("aiter.ops.flydsl.fp8_quant", "aiter.ops.flydsl.fmha_kernels")
RDNA4, BATCH = "flydsl_flash_attn_func", "flydsl_flash_attn_batch_func"
MASKS_PADDING = takes(getattr(FMHA, RDNA4, None), "softmax_scale")  # both came in one commit
TILE = 128  # queries per tile of the first version: lengths divisible by it need no padding
VALUE_TILE = 256  # the most that later versions pad a length to
MAX_VALUE_BYTES = 2**32  # of V in one batch entry: gfx1201's buffer descriptor holds the size in 32 bits


class FlyDsl(Adapter):
    """bf16 and fp16, exact."""

    distribution = "amd-aiter"
    limits = Limits(head_dims=(64, 128), lse=True)

    def version(self):
        return f"{super().version()}, {installed_version('flydsl')}"

    def missing(self):
        absent = FMHA_WHY or lacks(FMHA, "AITER's FlyDSL attention", RDNA4, BATCH)
        return absent or self.unusable()

    def unusable(self):
        """Sentences about functions that cannot be called the way it is done here."""
        batch = {"softmax_scale": 1.0, "causal": False, "return_lse": True}
        return unbindable(getattr(FMHA, RDNA4), RDNA4, None, None, None, causal=False) + unbindable(
            getattr(FMHA, BATCH), BATCH, None, None, None, **batch
        )

    def unsupported(self, call):
        refuse = {"gfx1201": self.refused_by_gfx1201, "gfx1250": self.refused_by_gfx1250}.get(call.device.arch)
        return super().unsupported(call) + (refuse(call) if FMHA is not None and refuse else [])

    def refused_by_gfx1201(self, call):
        """Sentences about what flydsl_flash_attn_func cannot take of a call."""
        found = []
        if call.kv_heads != call.heads:
            found.append(
                "On gfx1201 it needs as many key/value heads as query heads, and this call has "
                f"{call.kv_heads} and {call.heads}."
            )
        if call.need_lse and self.limits.lse:
            found.append("On gfx1201 it cannot return the log-sum-exp, which ring attention needs.")
        if -(-call.kv_len // VALUE_TILE) * VALUE_TILE * call.kv_heads * call.head_dim * 2 >= MAX_VALUE_BYTES:
            found.append("On gfx1201 it takes less than 4 GiB of values per image, and this call has more.")
        if not MASKS_PADDING and (call.q_len != call.kv_len or call.q_len % TILE):
            found.append(
                "This build of AITER pads lengths without a mask: it needs as many keys as queries, divisible by "
                f"{TILE}, and this call has {call.q_len} queries and {call.kv_len} keys. A newer AITER takes any."
            )
        return found

    def refused_by_gfx1250(self, call):
        """Sentences about what flydsl_flash_attn_batch_func cannot take of a call."""
        if call.head_dim != 128:
            return [f"On gfx1250 it takes head size 128, and this model has {call.head_dim}."]
        if not hasattr(FMHA, "flash_attn_batch_m32x8"):
            return ["This build of AITER has FlyDSL attention for gfx1250 with head size 192 only."]
        return []

    def kernel(self, q, k, v, mask=None):
        return f"FlyDSL flash attention ({describe(q.device).arch})"

    def run(self, q, k, v, mask, scale, need_lse):
        if describe(q.device).arch != "gfx1201":
            return batch_function(*by_entry(q, k, v), softmax_scale=scale, causal=False, return_lse=need_lse)
        if MASKS_PADDING:
            return getattr(FMHA, RDNA4)(q, k, v, causal=False, softmax_scale=scale), None
        ratio = scale / default_scale(q.shape[-1])  # the first version knows the default scale only: one rounding of q
        q = q if ratio == 1 else (q.float() * ratio).to(q.dtype)
        return getattr(FMHA, RDNA4)(q, k, v, causal=False), None


class FlyDslFp8(FlyDsl):
    """q, k and v in fp8 (e4m3fn), one scale per tensor. Quantised.

    The softmax scale goes into the scale of the queries: exact, and one compiled kernel serves all scales.
    """

    limits = Limits(head_dims=(128,))

    def unusable(self):
        scales = {f"{n}_descale": None for n in "qkv"}
        return unbindable(getattr(FMHA, RDNA4), RDNA4, None, None, None, causal=False, **scales) + unbindable(
            getattr(FMHA, BATCH), BATCH, None, None, None, causal=False, **scales
        )

    def kernel(self, q, k, v, mask=None):
        rotated = ", queries and keys rotated" if self.quantiser(q) is not None else ""
        return f"FlyDSL flash attention, fp8{rotated} ({describe(q.device).arch})"

    def quantiser(self, q):
        """AITER's own for this GPU, which rotates queries and keys by a Hadamard matrix first (fewer outliers); or
        None."""
        native = describe(q.device).arch == "gfx1201" and q.dtype == torch.bfloat16
        return getattr(QUANT, "flydsl_fp8_quant", None) if native else None

    def run(self, q, k, v, mask, scale, need_lse):
        quantise = self.quantiser(q)
        if quantise:
            q8, k8, v8, q_descale, k_descale, v_descale = quantise(*(t.contiguous() for t in (q, k, v)), rotation=True)
        else:
            pairs = [per_tensor_fp8(t, torch.float8_e4m3fn) for t in (q, k, v)]
            (q8, q_descale), (k8, k_descale), (v8, v_descale) = pairs
        scales = {
            "q_descale": q_descale * (scale / default_scale(q.shape[-1])),
            "k_descale": k_descale,
            "v_descale": v_descale,
        }
        if describe(q.device).arch == "gfx1201":
            out = getattr(FMHA, RDNA4)(q8, k8, v8, causal=False, **scales)
        else:
            out, _ = batch_function(q8, k8, v8, causal=False, **scales)
        return out.to(q.dtype), None


def by_entry(*tensors):
    """The tensors as gfx1250's kernel finds them: any strides for one batch entry, contiguous for more."""
    return [t if t.shape[0] == 1 else t.contiguous() for t in tensors]


def batch_function(q, k, v, **arguments):
    """(out, lse or None) of flydsl_flash_attn_batch_func. RuntimeError where it answers that it has no kernel."""
    result = getattr(FMHA, BATCH)(q, k, v, **arguments)
    if result is None:
        raise explained(
            RuntimeError(
                f"AITER's {BATCH} has no FlyDSL kernel for this call on {describe(q.device)}. Choose another backend, "
                "or a newer AITER."
            ),
            "aiter-on-rocm",
        )
    return (result[0], lse_bhs(result[1], q)) if isinstance(result, tuple) else (result, None)


ADAPTERS = {"aiter-flydsl": FlyDsl(), "aiter-flydsl-fp8": FlyDslFp8()}
