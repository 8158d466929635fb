"""The matrix products of a fused block: ComfyUI's own modules, given fp8 or int8 where they would quantise their input
themselves.

The modules do the casting, offloading, patching and quantising as they do in core's block. What is spared is the pass
that reads a bf16 tensor to write it as fp8 or int8: the kernel in front writes fp8 with the checkpoint's input scale,
and the module is handed a quantised tensor; or int8 with a scale per token (int8_rowwise.py).
"""

from functools import lru_cache

import torch

from . import int8_rowwise
from ..parallel import tensor_parallel
from .kernels.formats import FP8_TENSOR, INT8_ROW, Format, Quantised

FP8_LAYOUT = "TensorCoreFP8E4M3Layout"


class Products:
    """How a MODEL's fused blocks call their linear layers. fp8: an fp8_rowwise.RowwiseFp8 for bf16 layers, or None;
    attention: an fp8_attention.Fp8Attention, whose output a product may take in fp8, or None.
    """

    def __init__(self, fp8=None, attention=None):
        self.fp8, self.attention = fp8, attention

    def input_format(self, linear, like):
        """The Format in which a kernel should write the input of a linear layer, or None for like's dtype."""
        scale = fp8_input_scale(linear, like.device)
        if scale is not None:
            return Format(FP8_TENSOR, scale)
        group = int8_rowwise.group_of(linear)
        if group is not None:
            return Format(INT8_ROW, group=group)
        if self.fp8 and self.fp8.suits(linear) and self.fp8.measured(linear):
            return self.fp8.format
        return None

    def product(self, linear, x):
        """linear applied to x (B, S, K), a tensor or a Quantised that a kernel has written: (B, S, out)."""
        if isinstance(x, Quantised) and x.format.kind == FP8_TENSOR:
            return linear(as_comfy_tensor(x)).unflatten(0, x.data.shape[:2])
        if isinstance(x, Quantised) and x.format.kind == INT8_ROW:
            return added(linear, int8_rowwise.product(linear, x))
        if isinstance(x, Quantised) or (self.fp8 and self.fp8.suits(linear)):
            return added(linear, self.fp8.product(linear, x))
        return linear(x)


def added(linear, out):
    """A product that was computed without calling its layer. Where weights are split over GPUs, the layer adds those of
    the other GPUs when it is called (flux2/parallel/tensor_parallel.py).
    """
    add = getattr(linear, tensor_parallel.ADD, None)
    return out if add is None else add(out)


def fp8_input_scale(linear, device):
    """The fp8 scale that a ComfyUI linear layer would quantise its input with, as a float32 scalar on `device`; None
    if it would not.

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


def as_comfy_tensor(x):
    """A comfy-kitchen tensor of (B*S, K) over a Quantised (B, S, K): what a linear layer makes of its input."""
    from comfy.quant_ops import QuantizedTensor, get_layout_class

    data = x.data.flatten(0, 1)
    params = get_layout_class(FP8_LAYOUT).Params(scale=x.scale, orig_dtype=x.dtype, orig_shape=tuple(data.shape))
    return QuantizedTensor(data, FP8_LAYOUT, params)


def norm_weights(norm, like):
    """(q weight, k weight) of a QKNorm; see norm_weight."""
    return norm_weight(norm.query_norm, like), norm_weight(norm.key_norm, like)


def norm_weight(norm, like):
    """A norm's weight on the device and in the dtype of `like`, through ComfyUI's casting: offloaded and patched
    weights included.
    """
    weight = norm.weight
    if weight.device == like.device and weight.dtype == like.dtype and not norm.weight_function:
        return weight
    from comfy.ops import cast_bias_weight, uncast_bias_weight

    cast, bias, stream = cast_bias_weight(norm, like, offloadable=True)
    copy = cast.clone()  # the cast may lie in a buffer that is given back before the kernel runs
    uncast_bias_weight(norm, cast, bias, stream)
    return copy
