"""SageAttention 3 (package sageattn3): FP4 query-key and value products on Blackwell. Quantised: measure before
trusting.

Its function takes (B, H, S, D), no scale and returns no log-sum-exp, so q is multiplied beforehand where another scale
than D**-0.5 is asked.
"""

from sageattn3 import sageattn3_blackwell

from ..adapter import Adapter
from ..call import Limits, default_scale


class Sage3(Adapter):
    limits = Limits(head_dims=(64, 128), grouped_heads=False)
    distribution = "sageattn3"

    def kernel(self, q, k, v, mask=None):
        return "sageattn3_blackwell (FP4)"

    def run(self, q, k, v, mask, scale, need_lse):
        ratio = scale / default_scale(q.shape[-1])
        q = q if ratio == 1 else (q.float() * ratio).to(q.dtype)
        out = sageattn3_blackwell(*(t.transpose(1, 2).contiguous() for t in (q, k, v)), is_causal=False)  # (B, H, S, D)
        return out.transpose(1, 2), None


ADAPTERS = {"sage3": Sage3()}
