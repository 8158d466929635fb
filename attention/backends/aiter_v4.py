"""AITER's MHA v4 (AMD): assembly for attention, one backend per pair of query/key and value formats. bf16 with bf16 is
exact, all others are quantised.

Read at ROCm/aiter e404860 (quantised formats only), 0055212 (bf16 appears) and at nsakkine/aiter 1013b75, a copy of
AITER's later main (log-sum-exp and scale modes appear): aiter/ops/mha_v4.py and mha_v4.md, kernels in
hsa/<arch>/fmha_v4_fwd/fmha_v4_fwd.csv. It takes contiguous bf16 BSHD tensors of head size 128 with as many key as query
heads, any lengths, no mask, and returns bf16. AITER quantises, and refuses what it has no kernel for; so does this
file.

Its block-sparse kernels (`block_mask`; xDiT's SPARGE backends) are not offered: with a mask that keeps every block they
compute what the dense kernel of the same formats computes, after one more pass over a table of blocks.
"""

import torch

import aiter  # noqa: F401  so that a machine without ROCm is told what AITER says about it

from ..adapter import Adapter, lse_bhs
from ..call import Limits
from ..library_checks import lacks, part, takes, unbindable

V4, V4_WHY = part("aiter.ops.mha_v4")
BOTH, MI350 = ("gfx942", "gfx950"), ("gfx950",)
# mha_v4 has had `return_lse` from the start, and raised for it until mha_v4_packed was given a buffer to write it to
WRITES_LSE = takes(getattr(V4, "mha_v4_packed", None), "lse")


class MhaV4(Adapter):
    """Query/key format `qk` and value format `v`, as in AITER's AttentionFormat ("FP8" is whichever the GPU computes
    in), on `archs`.
    """

    distribution = "amd-aiter"
    names = ("mha_v4", "AttentionFormat", "native_fp8_format", "scale_modes_for_formats")

    def __init__(self, qk, v, archs):
        self.qk, self.v, self.archs = qk, v, archs
        self.limits = Limits(dtypes=(torch.bfloat16,), head_dims=(128,), grouped_heads=False, lse=WRITES_LSE)

    def formats(self):
        """Keyword arguments that name the formats."""
        qk, v = (
            V4.native_fp8_format() if name == "FP8" else getattr(V4.AttentionFormat, name) for name in (self.qk, self.v)
        )
        return {"q_format": qk, "k_format": qk, "v_format": v}

    def missing(self):
        absent = V4_WHY or lacks(V4, "AITER's MHA v4", *self.names)
        return absent or self.unknown_formats() or self.unusable()

    def unknown_formats(self):
        try:
            V4.scale_modes_for_formats(**self.formats())  # AITER's own list of combinations; it raises for the others
        except Exception as error:
            return [
                (
                    f"This build's MHA v4 does not know {self.qk} queries and keys with {self.v} values "
                    f"({type(error).__name__}: {error})."
                )
            ]
        return []

    def unusable(self):
        return unbindable(V4.mha_v4, "mha_v4", None, None, None, softmax_scale=1.0, **self.formats())

    def unsupported(self, call):
        reasons = super().unsupported(call)
        if call.device.platform == "amd" and call.device.arch not in self.archs:
            reasons.append(f"AITER has this kernel for {' and '.join(self.archs)}, and this GPU is {call.device.arch}.")
        elif call.need_lse and self.limits.lse and call.device.arch not in MI350:
            reasons.append(f"AITER raises for its log-sum-exp on {call.device.arch}: it is validated on gfx950 alone.")
        return reasons

    def kernel(self, q, k, v, mask=None):
        return f"fmha_v4 assembly, {self.qk} queries and keys, {self.v} values"

    def run(self, q, k, v, mask, scale, need_lse):
        result = self.launch(*(t.contiguous() for t in (q, k, v)), scale, {"return_lse": True} if need_lse else {})
        # natural logarithm of the keys as given: where AITER centres keys itself, it puts the shift back
        return (result[0], lse_bhs(result[1], q)) if need_lse else (result, None)

    def launch(self, q, k, v, scale, asked):
        return V4.mha_v4(q, k, v, softmax_scale=scale, **self.formats(), **asked)


class MhaV4Mxfp8(MhaV4):
    """fp8 queries and keys with a scale per 32 elements after a Hadamard rotation, fp8 values with one scale.

    mha_v4 reads two fp8 formats as one scale per tensor, unless it can be told the scale modes. Builds before that are
    given packed tensors, as AITER's own benchmark does it (op_tests/op_benchmarks/triton/bench_sage.py,
    _run_aiter_mxfp8): the softmax scale goes into the queries while they are quantised.
    """

    quantisers = ("mha_v4_packed", "mha_v4_q_multiplier", "quantize_mxfp8_q", "quantize_mxfp8_k", "quantize_fp8")

    def __init__(self, qk, v, archs):
        super().__init__(qk, v, archs)
        self.told = takes(getattr(V4, "mha_v4", None), "q_scale_mode")
        self.names = (*MhaV4.names, "AttentionScaleMode", *(() if self.told else self.quantisers))

    def scale_modes(self):
        per_32, per_tensor = V4.AttentionScaleMode.E8M0_PER_1X32, V4.AttentionScaleMode.F32_PER_TENSOR
        return {"q_scale_mode": per_32, "k_scale_mode": per_32, "v_scale_mode": per_tensor}

    def unusable(self):
        function, tensors = (V4.mha_v4, 3) if self.told else (V4.mha_v4_packed, 6)
        chosen = {**self.formats(), **self.scale_modes()}
        return unbindable(function, function.__name__, *[None] * tensors, softmax_scale=1.0, **chosen)

    def kernel(self, q, k, v, mask=None):
        return "fmha_v4 assembly, MXFP8 queries and keys, FP8 values"

    def launch(self, q, k, v, scale, asked):
        if self.told:
            return super().launch(q, k, v, scale, {**self.scale_modes(), **asked})
        q8, q_descale = V4.quantize_mxfp8_q(q, V4.mha_v4_q_multiplier(scale))
        k8, k_descale = V4.quantize_mxfp8_k(k)
        v8, v_descale = V4.quantize_fp8(v)
        packed = (q8, k8, v8, q_descale, k_descale, v_descale)
        return V4.mha_v4_packed(*packed, softmax_scale=scale, **self.formats(), **self.scale_modes(), **asked)


ADAPTERS = {
    "aiter-v4-bf16": MhaV4("BF16", "BF16", MI350),
    "aiter-v4-bf16fp8": MhaV4("BF16", "FP8", MI350),
    "aiter-v4-i8fp8": MhaV4("INT8", "FP8", BOTH),
    "aiter-v4-fp8": MhaV4("FP8", "FP8", MI350),
    "aiter-v4-mxfp8": MhaV4Mxfp8("FP8", "FP8", MI350),
    "aiter-v4-f8f6": MhaV4("FP8", "MXFP6", MI350),
    "aiter-v4-mxfp6": MhaV4("MXFP6", "FP8", MI350),
    "aiter-v4-f6f6": MhaV4("MXFP6", "MXFP6", MI350),
    "aiter-v4-f6f4": MhaV4("MXFP6", "MXFP4", MI350),
    "aiter-v4-mxfp4": MhaV4("MXFP4", "FP8", MI350),
    "aiter-v4-f4f4": MhaV4("MXFP4", "MXFP4", MI350),
}
