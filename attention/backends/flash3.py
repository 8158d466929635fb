"""FlashAttention-3 (package flash-attn-3, module flash_attn_interface; Hopper). fp16 and bf16, head size up to 256, no
mask.

Early releases always return (out, lse), later ones a bare tensor unless return_attn_probs is set: the signature tells
which.
"""

import inspect

from flash_attn_interface import flash_attn_func

from ..adapter import Adapter, lse_bhs
from ..call import Limits

ASKS_FOR_LSE = "return_attn_probs" in inspect.signature(flash_attn_func).parameters


class Flash3(Adapter):
    limits = Limits(head_dim_max=256, head_dim_multiple=8, lse=True)
    distribution = "flash-attn-3"

    def kernel(self, q, k, v, mask=None):
        return "flash_attn_interface"

    def run(self, q, k, v, mask, scale, need_lse):
        asked = {"return_attn_probs": True} if need_lse and ASKS_FOR_LSE else {}
        result = flash_attn_func(q, k, v, softmax_scale=scale, causal=False, **asked)
        out, lse = result[:2] if isinstance(result, tuple) else (result, None)
        return out, lse_bhs(lse, q) if need_lse else None


ADAPTERS = {"flash3": Flash3()}
