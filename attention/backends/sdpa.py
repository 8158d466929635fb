"""PyTorch's scaled_dot_product_attention: its own choice of kernel, and each of its kernels by name.

The named ones call the aten operator of that kernel, which returns the log-sum-exp as well; with a mask they go through
the public function restricted to that kernel, because the operators want masks padded and aligned in ways only it
knows. PyTorch's layout is (B, H, S, D).
"""

from functools import lru_cache
import warnings

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import reference
from ..adapter import Adapter, lse_bhs, repeat_heads
from ..call import Limits

aten = torch.ops.aten
ENABLED = (
    torch.backends.cuda.flash_sdp_enabled,
    torch.backends.cuda.mem_efficient_sdp_enabled,
    torch.backends.cuda.math_sdp_enabled,
    torch.backends.cuda.cudnn_sdp_enabled,
)
HALF = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, *HALF)
KERNEL_NAMES = {
    int(SDPBackend.MATH.value): "math",
    int(SDPBackend.FLASH_ATTENTION.value): "flash",
    int(SDPBackend.EFFICIENT_ATTENTION.value): "memory-efficient",
    int(SDPBackend.CUDNN_ATTENTION.value): "cuDNN",
}


def bhsd(*tensors):
    return (t.transpose(1, 2) for t in tensors)


def public(q, k, v, mask, scale):
    """F.scaled_dot_product_attention on (B, H, S, D) tensors."""
    if mask is not None and mask.dtype not in (torch.bool, q.dtype):
        mask = mask.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


ROCM_DEVICE = "cuda"  # PyTorch's name for AMD GPUs


@lru_cache(maxsize=None)
def refused_by_torch(kernel, heads, head_dim, dtype):
    """Sentences about what PyTorch's AMD kernel (AOTriton; "flash" or "efficient") cannot take. That differs by version
    and card, so torch is asked, with small tensors of this kind; empty where it cannot be asked.
    """
    can_use = {"flash": "can_use_flash_attention", "efficient": "can_use_efficient_attention"}[kernel]
    try:
        q, k, v = (torch.empty(1, heads, 64, head_dim, dtype=dtype, device=ROCM_DEVICE) for _ in range(3))
        params = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, False, False)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            if getattr(torch.backends.cuda, can_use)(params, True):
                return ()
    except (AttributeError, RuntimeError, TypeError):  # an older torch, or no GPU to make tensors on
        return ()
    reasons = " ".join(str(warning.message).split(" (Triggered internally", 1)[0] for warning in said)
    return (f"PyTorch's kernel does not take this on this GPU: {reasons or 'it does not say why.'}",)


class Named(Adapter):
    """One of PyTorch's kernels, by name."""

    def __init__(self, backend, limits, operator):
        self.backend, self.limits, self.operator = backend, limits, operator

    def kernel(self, q, k, v, mask=None):
        return f"PyTorch {KERNEL_NAMES[int(self.backend.value)]}"

    def run(self, q, k, v, mask, scale, need_lse):
        if not need_lse:
            return self.attend_heads_first(*bhsd(q, k, v), mask, scale).transpose(1, 2), None
        k, v = repeat_heads(k, q.shape[2]), repeat_heads(v, q.shape[2])
        out, lse = self.operator(*bhsd(q, k, v), scale, True)
        return out.transpose(1, 2), lse_bhs(lse, q)

    def attend_heads_first(self, q, k, v, mask, scale):
        # not every kernel takes grouped heads: PyTorch's memory-efficient one does not on ROCm (sdp_utils.cpp)
        k, v = repeat_heads(k, q.shape[1], axis=1), repeat_heads(v, q.shape[1], axis=1)
        if mask is None:
            return self.operator(q, k, v, scale, False)[0]
        with sdpa_kernel(self.backend):
            return public(q, k, v, mask, scale)

    def on_rocm(self, call):
        """Sentences about a call on an AMD GPU, after the limits that hold everywhere."""
        kernel = {SDPBackend.FLASH_ATTENTION: "flash", SDPBackend.EFFICIENT_ATTENTION: "efficient"}.get(self.backend)
        if call.device.platform != "amd" or kernel is None:
            return []
        # grouped heads are repeated before the kernel sees them
        return list(refused_by_torch(kernel, call.heads, call.head_dim, call.dtype))

    def unsupported(self, call):
        reasons = super().unsupported(call) or self.on_rocm(call)
        if call.need_lse and call.mask != "none" and self.limits.lse:
            reasons.append("It returns the log-sum-exp only for calls without a mask.")
        return reasons


def flash(q, k, v, scale, need_lse):
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)[:2]
    return aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[:2]


def efficient(q, k, v, scale, need_lse):
    return aten._scaled_dot_product_efficient_attention(q, k, v, None, need_lse, scale=scale)[:2]


def cudnn(q, k, v, scale, need_lse):
    return aten._scaled_dot_product_cudnn_attention(q, k, v, None, need_lse, scale=scale)[:2]


class Math(Adapter):
    """Two matrix products and a softmax, as the formula reads. Needs memory for the whole score matrix; the
    log-sum-exp is computed apart.
    """

    limits = Limits(dtypes=FLOATS, mask=True, lse=True, max_offset=None)

    def kernel(self, q, k, v, mask=None):
        return "PyTorch math"

    def run(self, q, k, v, mask, scale, need_lse):
        out = self.attend_heads_first(*bhsd(q, k, v), mask, scale).transpose(1, 2)
        return out, reference.attend(q, k, v, mask=mask, scale=scale)[1] if need_lse else None

    def attend_heads_first(self, q, k, v, mask, scale):
        with sdpa_kernel(SDPBackend.MATH):
            return public(q, k, v, mask, scale)


class Chosen(Adapter):
    """PyTorch's own choice for each call, as torch.nn.functional.scaled_dot_product_attention makes it."""

    limits = Limits(dtypes=FLOATS, mask=True, lse=True, max_offset=None)

    def choice(self, q, k, v, mask):
        """Number of the kernel that PyTorch takes; None on devices where it has one and no choice (Apple, others)."""
        qt, kt, vt = bhsd(q, k, v)
        try:
            return int(torch._fused_sdp_choice(qt, kt, vt, attn_mask=mask, enable_gqa=q.shape[2] != k.shape[2]))
        except (NotImplementedError, AttributeError):
            return None

    def kernel(self, q, k, v, mask=None):
        choice = self.choice(q, k, v, mask)
        return f"PyTorch {KERNEL_NAMES.get(choice, f'for {q.device.type}')}"

    def chosen_by(self):
        """Which kernels are allowed: another pack may run the model inside torch.nn.attention.sdpa_kernel."""
        return tuple(enabled() for enabled in ENABLED), torch.is_grad_enabled()

    def run(self, q, k, v, mask, scale, need_lse):
        if not need_lse:
            return public(*bhsd(q, k, v), mask, scale).transpose(1, 2), None
        named = BY_CHOICE.get(self.choice(q, k, v, mask)) if mask is None else None
        return (named or ADAPTERS["sdpa-math"]).run(q, k, v, mask, scale, True)

    attend_heads_first = staticmethod(public)


class Flash(Named):
    """On a GPU half precision only; on a CPU float32 too, and there it takes masks."""

    def unsupported(self, call):
        on_cpu = call.device.platform == "cpu"
        limits = Limits(
            dtypes=FLOATS if on_cpu else HALF,
            lse=True,
            mask=on_cpu,
            head_dim_max=None if on_cpu else 256,
            head_dim_multiple=1 if on_cpu else 8,
            max_offset=None,
        )
        lse_with_mask = (
            ["It returns the log-sum-exp only for calls without a mask."]
            if call.need_lse and call.mask == "full"
            else []
        )
        return (limits.reasons(call) or self.on_rocm(call)) + lse_with_mask


ADAPTERS = {
    "sdpa": Chosen(),
    "sdpa-flash": Flash(SDPBackend.FLASH_ATTENTION, Limits(), flash),
    "sdpa-cudnn": Named(
        SDPBackend.CUDNN_ATTENTION,
        Limits(mask=True, lse=True, head_dim_max=128, head_dim_multiple=8, max_offset=None),
        cudnn,
    ),
    "sdpa-efficient": Named(
        SDPBackend.EFFICIENT_ATTENTION,
        Limits(dtypes=FLOATS, mask=True, lse=True, head_dim_multiple=8, max_offset=None),
        efficient,
    ),
    "sdpa-math": Math(),
}
BY_CHOICE = {int(a.backend.value): a for a in ADAPTERS.values() if isinstance(a, Named)}
