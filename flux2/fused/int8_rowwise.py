"""The matrix products of an int8 checkpoint (int8_tensorwise, with or without ConvRot), on an input that a kernel has
quantised already.

ComfyUI's layer hands its bf16 input to comfy-kitchen's int8_linear, which rotates and quantises it (one more pass over
the tensor) and multiplies. Here the kernel in front has done that, so what is left is the product: int8 by int8 into
int32, times the scale of the token and that of the output.
"""

from functools import lru_cache

import torch

from comfy.ops import cast_bias_weight, uncast_bias_weight
from comfy.quant_ops import QuantizedTensor

from .kernels.formats import can_write_int8

INT8_LAYOUT = "TensorWiseINT8Layout"
FEWEST = 17  # rows that torch._int_mm takes on CUDA


def group_of(linear):
    """ConvRot's group of an int8 layer whose input a kernel can write, 0 where it has none; None where the layer has to
    quantise its input itself, such as with a LoRA computed at call time, or on AMD, where comfy-kitchen has kernels of
    its own that nobody has timed these against.
    """
    if getattr(linear, "layout_type", None) != INT8_LAYOUT or torch.version.hip:
        return None
    weight = linear.weight
    if not isinstance(weight, QuantizedTensor):
        return None
    full = getattr(linear, "_full_precision_mm", False) or getattr(linear, "comfy_force_cast_weights", False)
    if full or linear.weight_function or linear.bias_function or getattr(weight._params, "transposed", False):
        return None
    group = weight._params.convrot_groupsize if getattr(weight._params, "convrot", False) else 0
    fits = can_write_int8(linear.in_features, group) and not (linear.in_features % 8 or linear.out_features % 8)
    return group if fits else None


def product(linear, x):
    """linear applied to a Quantised x (B, S, K) of kind INT8_ROW: (B, S, out) in the dtype that was quantised."""
    weight, bias, stream = cast_bias_weight(
        linear,
        dtype=linear.weight.dtype,
        device=x.data.device,
        bias_dtype=x.dtype,
        offloadable=True,
        compute_dtype=x.dtype,
        want_requant=True,
    )
    data, scale = x.data.flatten(0, 1), x.scale.flatten(0, 1)
    scales = weight._params.scale.reshape(-1).float()
    if data.device.type == "cuda" and kitchens():
        out = kitchens()(data, weight._qdata, scale, scales, bias, x.dtype)
    else:
        from .kernels.dequantise import dequantise

        rows = data.shape[0]
        if rows < FEWEST:
            data = torch.nn.functional.pad(data, (0, 0, 0, FEWEST - rows))
        out = dequantise(torch._int_mm(data, weight._qdata.t())[:rows], scale, scales, bias, x.dtype)
    uncast_bias_weight(linear, weight, bias, stream)
    return out.unflatten(0, x.data.shape[:2])


@lru_cache(maxsize=None)
def kitchens():
    """comfy-kitchen's product of quantised tensors with the scaling in it, with which its int8_linear ends, or None
    where it has none by that name, or core has not taken its CUDA kernels. torch._int_mm is as fast, and needs another
    pass for the scaling.
    """
    import comfy_kitchen

    cuda = comfy_kitchen.list_backends().get("cuda", {})
    if not cuda.get("available") or cuda.get("disabled"):
        return None
    try:
        from comfy_kitchen.backends.cuda import _int4_linear_via_int8_values as function
    except ImportError:
        return None
    return function
