"""The oldest PyTorch that this pack runs with, stated once and checked by name before anything needs it.

Every name of torch that the pack calls is there in 2.6.0, with which the tests of attention/ and of two to four ranks
ran on a CPU (docs/compatibility.md). 2.5.1 lacks broadcast's `group_src` and torch._inductor.runtime.cache_dir_utils.
"""

import inspect

import torch

OLDEST = "2.6"


def lacking():
    """What this PyTorch does not have and the pack calls, by name; empty when it is new enough."""
    found = []
    if not hasattr(getattr(torch, "library", None), "custom_op"):
        found.append("torch.library.custom_op")
    attend = torch.nn.functional.scaled_dot_product_attention
    if "enable_gqa" not in (attend.__doc__ or ""):
        found.append("scaled_dot_product_attention(enable_gqa=...)")
    if (
        torch.distributed.is_available()
        and "group_src" not in inspect.signature(torch.distributed.broadcast).parameters
    ):
        found.append("torch.distributed.broadcast(group_src=...)")
    return found


def check():
    """ImportError in words when this PyTorch is too old."""
    absent = lacking()
    if absent:
        raise ImportError(
            f"Flux 2 Attention needs PyTorch {OLDEST} or newer. This is PyTorch {torch.__version__}, which has no "
            f"{', no '.join(absent)}. Update PyTorch as ComfyUI's own instructions say for your card."
        )
