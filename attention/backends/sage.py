"""SageAttention 1 and 2 (package sageattention): int8 query-key product, fp16 or fp8 value product. Quantised: measure
before trusting.

Version 1 is one Triton kernel and runs on any NVIDIA GPU; version 2 brings CUDA kernels per architecture and chooses
among them. They are told apart by what they contain. Layout "NHD" is (B, S, H, D).

The Triton kernels do not mask the rest of their last block of keys: its zeros count as keys of weight exp(0). That
shrinks the output (0.28 of it at 77 keys of random data), so such lengths are refused.
"""

import inspect

import sageattention
from sageattention import sageattn

from ..adapter import Adapter, lse_bhs
from ..call import Limits

PARAMETERS = inspect.signature(sageattn).parameters
KEYS_IN_A_BLOCK = 64  # BLOCK_N of the Triton kernels of 1.0.6 and 2.2 (attn_qk_int8_per_block.py and its _h96)
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

    def unsupported(self, call):
        reasons = super().unsupported(call)
        # version 2 takes its Triton kernel on sm86 (sageattention 2.2, core.py)
        if self.major == 1 or call.device.arch == "sm86":
            block = f"Its kernel counts the rest of its last block of {KEYS_IN_A_BLOCK} keys as keys"
            if call.kv_len % KEYS_IN_A_BLOCK:
                reasons.append(
                    f"{block}, so it is right only for multiples of {KEYS_IN_A_BLOCK}, and this call has "
                    f"{call.kv_len} keys."
                )
            elif call.mask == "keys":
                reasons.append(f"{block}, so it is not right for a mask that hides some of the keys.")
        return reasons

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
