"""AITER's flash_attn_func (AMD): hand-written assembly or Composable Kernel for bf16 and fp16, and the same with fp8
inputs.

Read at ROCm/aiter e404860 (aiter/ops/mha.py) and in the amd-aiter 0.1.7.post2.dev18 wheel. Layout BSHD, any strides
with a contiguous last axis; log-sum-exp float32 (B, H, Sq), natural logarithm. AITER compiles a kernel when it is first
called, which can take minutes.
"""

import os

import torch

import aiter

from ..errors import UserError
from ..adapter import Adapter, lse_bhs, per_tensor_fp8
from ..call import Limits, dtype_name
from ..device import describe
from ..library_checks import lacks, unbindable

# How the assembly rounds probabilities to bf16 before the value product (how_v3_bf16_cvt). Only gfx942 has all three;
# gfx950 converts in hardware.
ROUNDING = {"nearest even": 0, "nearest away": 1, "toward zero": 2}
ASSEMBLY_ARCHS = ("gfx942", "gfx950")
ASSEMBLY_MIN_QUERIES = 129  # up to 128 queries AITER prefers Composable Kernel
# aiter #3807: with several architectures in GPU_ARCHS, AITER can take the fp8 format of another GPU, which reads as
# values off by two
FP8 = {"gfx942": torch.float8_e4m3fnuz, "gfx950": torch.float8_e4m3fn}


def uses_ck():
    """False when ENABLE_CK=0 made AITER reroute its functions to Triton; builds without that switch always use
    Composable Kernel.
    """
    return getattr(getattr(aiter, "core", None), "ENABLE_CK", True)


def opus_enabled():
    """AITER's own test for its OPUS kernel (gfx950, D128), which it takes only for calls that want no log-sum-exp."""
    return hasattr(aiter, "fmha_fwd_bf16_opus_fwd") and int(os.environ.get("AITER_ENABLE_FMHA_OPUS", "0")) != 0


class Aiter(Adapter):
    """bf16 and fp16. aiter_rounding: a key of ROUNDING; AITER's own default is "nearest away"."""

    limits = Limits(head_dim_max=256, lse=True)
    distribution = "amd-aiter"

    def __init__(self, aiter_rounding="nearest away"):
        if aiter_rounding not in ROUNDING:
            raise UserError(
                f"AITER's rounding can be {', '.join(map(repr, ROUNDING))}, not {aiter_rounding!r}.", "unknown-backend"
            )
        self.rounding = aiter_rounding

    def with_options(self, *, aiter_rounding="nearest away"):
        """This backend with another rounding, as a new adapter: the registered one is shared by all models."""
        return Aiter(aiter_rounding)

    def missing(self):
        absent = lacks(aiter, "AITER", "flash_attn_func")
        return absent or unbindable(
            aiter.flash_attn_func, "flash_attn_func", None, None, None, **self.arguments(1.0, True)
        )

    def kernel(self, q, k, v, mask=None):
        """AITER's order of choice, _flash_attn_forward in aiter/ops/mha.py. fp16 never reaches the assembly."""
        if not uses_ck():
            return "AITER Triton mha (ENABLE_CK=0)"
        arch, head_dim = describe(q.device).arch, q.shape[-1]
        if q.dtype == torch.bfloat16 and head_dim == 128:
            if arch == "gfx950" and opus_enabled():
                return "OPUS (fmha_v3 assembly where the log-sum-exp is needed)"
            if arch in ASSEMBLY_ARCHS and q.shape[1] >= ASSEMBLY_MIN_QUERIES:
                return f"fmha_v3 assembly, rounding {self.rounding}" if arch == "gfx942" else "fmha_v3 assembly"
        if (
            q.dtype == torch.bfloat16
            and head_dim == 64
            and arch == "gfx942"
            and hasattr(aiter, "mha_fwd_native_splitkv")
        ):
            return "native split-K, or CK tile where AITER sees no gain in splitting"
        return "CK tile"

    def arguments(self, scale, need_lse):
        return {
            "dropout_p": 0.0,
            "softmax_scale": scale,
            "causal": False,
            "return_lse": need_lse,
            "how_v3_bf16_cvt": ROUNDING[self.rounding],
        }

    def run(self, q, k, v, mask, scale, need_lse):
        result = aiter.flash_attn_func(q, k, v, **self.arguments(scale, need_lse))
        return (result[0], lse_bhs(result[1], q)) if need_lse else (result, None)


class AiterFp8(Adapter):
    """q, k and v in fp8, one scale per tensor, as AITER's own tests do it. Quantised; returns no log-sum-exp."""

    limits = Limits(head_dims=(128,))
    distribution = "amd-aiter"

    def missing(self):
        absent = lacks(aiter, "AITER", "flash_attn_fp8_pertensor_func", "dtypes")
        if absent:
            return absent
        # the 0.1.7 wheel has this function without scales, so it could only compute something else
        call = self.arguments(1.0, None, None, None)
        unusable = unbindable(
            aiter.flash_attn_fp8_pertensor_func, "flash_attn_fp8_pertensor_func", None, None, None, **call
        )
        known = aiter.dtypes.fp8 in FP8.values()
        return unusable + (
            [] if known else [f"AITER knows no fp8 format for this GPU (it names {dtype_name(aiter.dtypes.fp8)})."]
        )

    def unsupported(self, call):
        reasons = super().unsupported(call)
        wanted = FP8.get(call.device.arch)
        if wanted and aiter.dtypes.fp8 != wanted:
            reasons.append(
                f"AITER took {dtype_name(aiter.dtypes.fp8)} for this GPU, which computes in {dtype_name(wanted)} "
                "(aiter #3807). "
                f"Start with GPU_ARCHS={call.device.arch}."
            )
        return reasons

    def kernel(self, q, k, v, mask=None):
        if not uses_ck():
            return "AITER Triton mha_v3, fp8 (ENABLE_CK=0)"
        groups = q.shape[2] // k.shape[2]
        # the assembly takes 1, 2, 4 ... query heads per key head (a table of shifts)
        assembly = q.shape[1] >= ASSEMBLY_MIN_QUERIES and groups & (groups - 1) == 0
        return "fmha_v3 assembly, fp8" if assembly else "CK tile, fp8"

    def arguments(self, scale, q_descale, k_descale, v_descale):
        return {
            "q_descale": q_descale,
            "k_descale": k_descale,
            "v_descale": v_descale,
            "causal": False,
            "softmax_scale": scale,
        }

    def run(self, q, k, v, mask, scale, need_lse):
        (q8, q_descale), (k8, k_descale), (v8, v_descale) = (per_tensor_fp8(t, aiter.dtypes.fp8) for t in (q, k, v))
        out = aiter.flash_attn_fp8_pertensor_func(q8, k8, v8, **self.arguments(scale, q_descale, k_descale, v_descale))
        return out.to(q.dtype), None


ADAPTERS = {"aiter": Aiter(), "aiter-fp8": AiterFp8()}
