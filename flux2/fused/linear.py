"""The matrix products of a fused block: ComfyUI's own modules, called with fp8 where they would quantise their input
themselves.

The modules do the casting, offloading, patching and quantising as they do in core's block. What is spared is the pass
that reads a bf16 tensor to write it as fp8: the kernel in front writes fp8, with the checkpoint's input scale, and
hands the module a quantised tensor.
"""

from functools import lru_cache
from typing import NamedTuple

import torch

FP8_LAYOUT = "TensorCoreFP8E4M3Layout"


class Input(NamedTuple):
    """What a linear layer is given: data (B, S, K), the scale that fp8 data are over, and a sample of the exact product
    where the error is wanted.
    """

    data: torch.Tensor
    scale: torch.Tensor | None
    exact: torch.Tensor | None


class Products:
    """How a MODEL's fused blocks call their linear layers. rows: a row_fp8.RowFp8 for bf16 layers, or None."""

    def __init__(self, rows=None):
        self.rows = rows

    def product(self, linear, like, write, name, again=None):
        """linear applied to what write(scale) returns: (B, S, N).

        write(None) gives a tensor of like's dtype; write(a scalar tensor) gives fp8 e4m3 over that scale, and is asked
        for that only when the layer itself would quantise its input so; write((B, S, 1)) fills in a scale for each
        token. again(None): the same without side effects.
        """
        return self.apply(linear, like, self.input(linear, like, write, name, again), name)

    def input(self, linear, like, write, name, again=None):
        """The first half of product: nothing that write() reads is needed any more."""
        scale = self.scale_for(linear, like)
        data = write(scale)
        exact = (
            self.rows.exact(linear, name, again or write)
            if self.rows and scale is not None and scale.ndim == 3
            else None
        )
        return Input(data, scale, exact)

    def apply(self, linear, like, given, name):
        """The second half of product: (B, S, N)."""
        data, scale, _ = given
        if scale is None:
            return linear(data)
        if scale.ndim == 3:
            return self.rows.product(linear, like, given, name)
        return linear(as_quantised(data, scale, like.dtype)).unflatten(0, data.shape[:2])

    def scale_for(self, linear, like):
        """What write() is asked for: None, a scalar, or (B, S, 1) to be filled in."""
        in_rows, scale = self.rows and self.rows.suits(linear), input_scale(linear, like.device)
        if scale is None and in_rows:
            return torch.empty((*like.shape[:2], 1), device=like.device, dtype=torch.float32)
        return scale

    def projection(self, linear, attn, name):
        """linear applied to the attention output (B, S, N), which no kernel of ours writes."""
        from .kernels.quantise import quantise_rows

        if self.rows and self.rows.suits(linear):
            return self.product(
                linear, attn, lambda scales: attn if scales is None else quantise_rows(attn, scales), name
            )
        return linear(attn)


def input_scale(linear, device):
    """The fp8 scale that a ComfyUI linear layer would quantise its input with, as a float32 scalar on `device`; None
    if it
    would not.

    A layer with a LoRA computed at call time, with full precision asked for, or with its own smoothing is left to
    itself.
    """
    if getattr(linear, "layout_type", None) != FP8_LAYOUT or getattr(linear, "pre_quant_scale", None) is not None:
        return None
    full = getattr(linear, "_full_precision_mm", False) or getattr(linear, "comfy_force_cast_weights", False)
    if full or linear.weight_function or linear.bias_function:
        return None
    scale = getattr(linear, "input_scale", None)
    return one(device) if scale is None else scale.detach().to(device=device, dtype=torch.float32)


@lru_cache(maxsize=None)
def one(device):
    """The scale of a layer whose checkpoint has none: ComfyUI then casts its input as it is."""
    return torch.ones((), device=device)


def as_quantised(data, scale, dtype):
    """A comfy-kitchen tensor of (B*S, N) over fp8 data (B, S, N): what a linear layer makes of its input."""
    from comfy.quant_ops import QuantizedTensor, get_layout_class

    params = get_layout_class(FP8_LAYOUT).Params(
        scale=scale, orig_dtype=dtype, orig_shape=(data.shape[0] * data.shape[1], data.shape[2])
    )
    return QuantizedTensor(data.flatten(0, 1), FP8_LAYOUT, params)


def norm_weight(norm, like):
    """A norm's weight on the device and in the dtype of `like`, through ComfyUI's casting: offloaded and patched
    weights
    included.
    """
    weight = norm.weight
    if weight.device == like.device and weight.dtype == like.dtype and not norm.weight_function:
        return weight
    from comfy.ops import cast_bias_weight, uncast_bias_weight

    cast, bias, stream = cast_bias_weight(norm, like, offloadable=True)
    copy = cast.clone()  # the cast may lie in a buffer that is given back before the kernel runs
    uncast_bias_weight(norm, cast, bias, stream)
    return copy
