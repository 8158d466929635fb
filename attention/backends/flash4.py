"""FlashAttention-4 (package flash-attn-4, CuTe DSL; read at 4.0.0b36). fp16 and bf16, head size up to 128, no mask.

Kernels are compiled on the first call of each head size and dtype, which takes seconds.
"""

from flash_attn.cute import flash_attn_func

from ..adapter import Adapter, lse_bhs
from ..call import Limits


class Flash4(Adapter):
    limits = Limits(head_dim_max=128, head_dim_multiple=8, lse=True)
    distribution = "flash-attn-4"

    def kernel(self, q, k, v, mask=None):
        return "flash_attn.cute"

    def run(self, q, k, v, mask, scale, need_lse):
        result = flash_attn_func(q, k, v, softmax_scale=scale, causal=False, return_lse=need_lse)
        out, lse = result[:2] if isinstance(result, tuple) else (result, None)
        return out, lse_bhs(lse, q) if need_lse else None


ADAPTERS = {"flash4": Flash4()}
