"""SageAttention 1 and 2 (package sageattention): int8 query-key product, fp16 or fp8 value product. Quantised: measure
before trusting.

Version 1 is one Triton kernel and runs on any NVIDIA GPU; version 2 brings CUDA kernels per architecture and chooses
among them. They are told apart by what they contain. Layout "NHD" is (B, S, H, D).
"""

import inspect

import sageattention
from sageattention import sageattn

from ..adapter import Adapter, lse_bhs
from ..call import Limits

PARAMETERS = inspect.signature(sageattn).parameters
IS_VERSION_2 = any(name.startswith("sageattn_qk_int8_pv_fp") and name.endswith("_cuda") for name in dir(sageattention))


class Sage(Adapter):
    distribution = "sageattention"

    def __init__(self, major):
        self.major = major
        # sageattn of version 1 returns the output alone; its head sizes are 64, 96 and 128 (sageattention/core.py)
        self.limits = Limits(head_dims=(64, 96, 128), lse="return_lse" in PARAMETERS)

    def missing(self):
        installed = 2 if IS_VERSION_2 else 1
        return (
            []
            if installed == self.major
            else [f"The installed sageattention is version {installed}; this backend is version {self.major}."]
        )

    def kernel(self, q, k, v, mask=None):
        return "sageattn (CUDA, chosen by architecture)" if self.major == 2 else "sageattn (Triton)"

    def run(self, q, k, v, mask, scale, need_lse):
        asked = {"return_lse": True} if need_lse else {}
        if self.major == 1:
            # its own smoothing subtracts the mean from the caller's k in place (sageattention 1.0.6, core.py), which
            # others still need
            k, asked = k - k.mean(dim=1, keepdim=True), {"smooth_k": False}
        result = sageattn(q, k, v, tensor_layout="NHD", is_causal=False, sm_scale=scale, **asked)
        return (result[0], lse_bhs(result[1], q)) if need_lse else (result, None)


ADAPTERS = {"sage1": Sage(1), "sage2": Sage(2)}
