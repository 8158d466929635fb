"""xFormers memory_efficient_attention: it dispatches to CUTLASS or FlashAttention kernels. fp16, bf16 and float32;
layout (B, S, H, D).
"""

import torch

from xformers.ops import memory_efficient_attention, memory_efficient_attention_forward_requires_grad

from ..adapter import Adapter, lse_bhs, repeat_heads
from ..call import Limits


class Xformers(Adapter):
    limits = Limits(
        dtypes=(torch.bfloat16, torch.float16, torch.float32), head_dim_max=256, head_dim_multiple=8, lse=True
    )
    distribution = "xformers"

    def kernel(self, q, k, v, mask=None):
        return "memory_efficient_attention (its own choice)"

    def run(self, q, k, v, mask, scale, need_lse):
        k, v = (repeat_heads(t, q.shape[2]) for t in (k, v))
        if not need_lse:
            return memory_efficient_attention(q, k, v, scale=scale), None
        out, lse = memory_efficient_attention_forward_requires_grad(q, k, v, scale=scale)
        return out, lse_bhs(lse, q)


ADAPTERS = {"xformers": Xformers()}
