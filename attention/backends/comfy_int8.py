"""comfy-kitchen's INT8 attention, the kernel behind ComfyUI's own "comfy kitchen attention". Quantised: measure before
trusting.

Present since comfy-kitchen 0.2.40 or a little before (0.2.26, which ComfyUI 0.30 pins, has none). Layout (B, H, S, D),
any strides with a contiguous last axis; takes masks itself; returns no log-sum-exp.
"""

import torch

import comfy_kitchen

from ..adapter import Adapter
from ..call import Limits


class ComfyInt8(Adapter):
    limits = Limits(dtypes=(torch.bfloat16, torch.float16, torch.float32), head_dim_max=256, mask=True)
    distribution = "comfy-kitchen"

    def missing(self):
        if not hasattr(comfy_kitchen, "int8_attention"):
            return [f"The installed {self.version()} has no int8_attention."]
        return (
            []
            if comfy_kitchen.int8_attention_is_available()
            else ["comfy-kitchen says that its INT8 attention kernel does not run on this GPU."]
        )

    def kernel(self, q, k, v, mask=None):
        return "comfy_kitchen.int8_attention"

    def run(self, q, k, v, mask, scale, need_lse):
        # (B, H, S, D)
        out = comfy_kitchen.int8_attention(*(t.transpose(1, 2) for t in (q, k, v)), scale=scale, attn_mask=mask)
        return out.transpose(1, 2), None


ADAPTERS = {"comfy-int8": ComfyInt8()}
