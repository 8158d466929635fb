"""FlashAttention-2 (package flash-attn, Dao-AILab). fp16 and bf16, head size up to 256, no mask.

On ROCm the package may hold no compiled kernel and import AITER's Triton kernels instead; `kernel` says which one it
is.
"""

import sys

from flash_attn import flash_attn_func

from ..adapter import Adapter, lse_bhs
from ..call import Limits
from ..device import is_rocm


class Flash2(Adapter):
    limits = Limits(head_dim_max=256, head_dim_multiple=8, lse=True)
    distribution = "flash-attn"

    def kernel(self, q, k, v, mask=None):
        if "flash_attn_2_cuda" in sys.modules:
            return "flash_attn_2_cuda (Composable Kernel)" if is_rocm() else "flash_attn_2_cuda"
        borrowed = [name for name in sys.modules if "flash_attn_triton_amd" in name]
        return f"AITER Triton, imported by flash-attn ({borrowed[0]})" if borrowed else None

    def run(self, q, k, v, mask, scale, need_lse):
        # return_attn_probs without dropout returns (out, lse, None): the probabilities themselves are only made for
        # dropout
        result = flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=scale, causal=False, return_attn_probs=need_lse)
        return (result[0], lse_bhs(result[1], q)) if need_lse else (result, None)


ADAPTERS = {"flash2": Flash2()}
