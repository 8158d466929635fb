"""One custom operator around every backend, so that torch.compile sees a call and not a kernel library.

Which dispatcher and backend compute is decided when the graph runs, so `auto`, schedules and reports work in compiled
models, and another backend needs no new graph; the graph's own argument is the number of the dispatcher it was traced
with. Outside a graph this is not used.
"""

from typing import Optional

import torch
from torch import Tensor


@torch.library.custom_op("flux2_attention::attend", mutates_args=())
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Optional[Tensor],
    scale: float,
    need_lse: bool,
    full_precision: bool,
    dispatcher: int,
) -> tuple[Tensor, Tensor]:
    from .dispatch import in_graph, sdpa_attention

    chosen = in_graph(dispatcher)
    if chosen:
        options = {"need_lse": need_lse, "full_precision": full_precision, "in_graph": True}
        out, lse = chosen.attend(q, k, v, mask=mask, scale=scale, **options)
    else:
        out, lse = sdpa_attention(q, k, v, mask, scale, need_lse)
    # the fake promises a contiguous output: most kernels return one, and the others are made so
    return out.contiguous(), q.new_empty(0) if lse is None else lse


@_attend.register_fake
def _(q, k, v, mask, scale, need_lse, full_precision, dispatcher):
    out = q.new_empty((*q.shape[:3], v.shape[-1]))
    return out, q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32) if need_lse else q.new_empty(0)


def attend_in_graph(q, k, v, mask, scale, need_lse, full_precision, dispatcher):
    """AttentionDispatcher number `dispatcher` on BSHD tensors, as one graph node. Returns (out, lse); lse is an empty
    tensor unless asked for.
    """
    return _attend(q, k, v, mask, scale, need_lse, full_precision, dispatcher)
