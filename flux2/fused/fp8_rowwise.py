"""The matrix products of a bf16 checkpoint in fp8 (e4m3fn, on MI300 e4m3fnuz), one scale per token and one per output
of the weight (torch._scaled_mm's row-wise form).

The checkpoint's weights stay as they are. Their fp8 copies are made when a product first needs them, from what
ComfyUI's casting returns, so patched (LoRA) and offloaded weights are right. A copy is kept until the sampling ends,
while there is room for it and the weights lie on the GPU unchanged; then what comes next, a VAE say, finds the memory
that ComfyUI counts on. Where there is no copy, it is made anew for each product.
"""

from weakref import WeakKeyDictionary

import torch

import comfy.model_management
from comfy.ops import cast_bias_weight, uncast_bias_weight
from comfy.patcher_extension import CallbacksMP

from .kernels.formats import FP8_ROW, Format, Quantised
from .linear import FP8_LAYOUT

KEY = "flux2_fp8_rowwise"
ROOM = 4 * 2**30  # bytes that stay free for activations and for what ComfyUI loads next
CHANGES = (CallbacksMP.ON_LOAD, CallbacksMP.ON_DETACH, CallbacksMP.ON_APPLY_HOOKS, CallbacksMP.ON_CLEANUP)
SAMPLE = 128  # tokens whose products are also computed in the checkpoint's precision, once for each kind of layer


class RowwiseFp8:
    """fp8 copies of a MODEL's weights. errors: what their products were measured to be off, by the layers' names."""

    def __init__(self):
        self.copies, self.errors, self.left, self.kept = {}, {}, set(), (0, 0)
        self.names = WeakKeyDictionary()  # of the blocks' linear layers
        self.format = Format(FP8_ROW)

    def forget(self, *_, **__):
        self.copies.clear()

    def install(self, model):
        """Forget the copies whenever ComfyUI changes the weights of a MODEL clone, and when a sampling ends. The number
        format is that of the model's device.
        """
        self.format = Format(FP8_ROW, dtype=fp8_dtype(model.load_device) or torch.float8_e4m3fn)
        for kind in CHANGES:
            model.remove_callbacks_with_key(kind, KEY)
            model.add_callback_with_key(kind, KEY, self.forget)

    def begin(self):
        self.errors.clear()
        self.left.clear()
        self.kept = (0, 0)

    def know(self, block):
        """The names of a block's layers, under which errors are kept."""
        if block not in self.names:
            self.names.update({module: name for name, module in block.named_modules()})

    def suits(self, linear):
        """Whether a layer's product is computed here; why not is kept for the report."""
        reason = unsuitable(linear)
        if reason:
            self.left.add(reason)
        return reason is None

    def measured(self, linear):
        """Whether the error of this kind of layer is known; until then product() needs its input as it is."""
        return self.names.get(linear) in self.errors

    def product(self, linear, x):
        """linear applied to x (B, S, K), a tensor or a Quantised with a scale per row, in fp8: (B, S, out)."""
        from .kernels.quantise import quantise_rows

        given = x if isinstance(x, Quantised) else quantise_rows(x, self.format)
        weight, weight_scale, bias = self.weight(linear, given.data.device, given.dtype)
        out = torch._scaled_mm(
            given.data.flatten(0, 1),
            weight.t(),
            given.scale.flatten(0, 1),
            weight_scale,
            bias=bias,
            out_dtype=given.dtype,
            use_fast_accum=True,
        )
        if given is not x and not self.measured(linear):
            # not through the layer's hooks: where weights are split over GPUs, they add products of other GPUs
            exact = linear.forward(x[:1, :SAMPLE])[0].float()
            self.errors[self.names.get(linear)] = sample_error(exact, out)
        return out.unflatten(0, given.data.shape[:2])

    def weight(self, linear, device, dtype):
        """(fp8 (out, in), scales (1, out), bias or None) of a linear layer, for inputs of this device and dtype."""
        kept = self.copies.get(linear)
        if kept and kept[0] == linear.weight.data_ptr():
            return kept[1:]
        self.copies.pop(linear, None)  # the weight has been moved: partial unloading calls nobody back
        from .kernels.quantise import quantise_rows

        weight, bias, stream = cast_bias_weight(
            linear, dtype=dtype, device=device, bias_dtype=dtype, offloadable=True, compute_dtype=dtype
        )
        rows = quantise_rows(weight[None], self.format)
        made = rows.data[0], rows.scale[0].t(), bias if bias is None else bias.clone()
        uncast_bias_weight(linear, weight, bias, stream)
        if resident(linear, device) and comfy.model_management.get_free_memory(device) > ROOM:
            self.copies[linear] = (linear.weight.data_ptr(), *made)
            self.kept = len(self.copies), sum(data.numel() for _, data, *_ in self.copies.values())
        return made

    def as_text(self):
        left = "".join(f"\n  products left as the checkpoint has them: {reason}" for reason in sorted(self.left))
        if not self.errors:
            return "fp8 with a scale per row: no product was computed so." + left
        kept = f"{self.kept[0]} weights were kept in fp8 meanwhile, {self.kept[1] / 2**30:.1f} GiB"
        errors = ", ".join(f"{name} {error:.1e}" for name, error in self.errors.items())
        return (
            f"fp8 with a scale per row; relative error of a product against the checkpoint's precision: {errors}. "
            f"{kept}."
        ) + left


def resident(linear, device):
    """True where a layer's weight lies unchanged on the GPU: not offloaded, not faulted in on demand, nothing computed
    at call time.
    """
    return linear.weight.device == device and not hasattr(linear, "_v") and not linear.weight_function


def sample_error(exact, out):
    """Relative error of products out (B*S, N) against the exact ones of its first tokens."""
    return ((out[: exact.shape[0]].float() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def unsuitable(linear):
    """Why a layer's product stays as the checkpoint has it, as a sentence; None when it can be fp8."""
    if getattr(linear, "layout_type", None) is not None:
        return (
            f"the checkpoint is quantised already ({'fp8' if linear.layout_type == FP8_LAYOUT else linear.layout_type})"
        )
    if type(linear.weight) not in (torch.Tensor, torch.nn.Parameter) or not linear.weight.is_floating_point():
        return (
            f"a layer's weight is kept in a format of its own ({type(linear.weight).__name__}, {linear.weight.dtype})"
        )
    if linear.in_features % 16 or linear.out_features % 16:
        return f"a layer of {linear.in_features} x {linear.out_features} is no multiple of 16, which fp8 products need"
    return None


def fp8_dtype(device):
    """The fp8 type that a device's matrix units multiply: e4m3fn, or e4m3fnuz on MI300, where ComfyUI has no fp8
    products of its own; None where there are none.
    """
    if torch.version.hip and device.type == "cuda":
        if torch.cuda.get_device_properties(device).gcnArchName.startswith("gfx94"):
            return torch.float8_e4m3fnuz
    return torch.float8_e4m3fn if comfy.model_management.supports_fp8_compute(device) else None


def unavailable_for(model):
    """Why fp8 products cannot run for a MODEL on its device, as a sentence; None when they can."""
    if fp8_dtype(model.load_device) is None:
        return "this GPU has no fp8 matrix products (NVIDIA from Ada, AMD MI300X, MI355X or Radeon RX 9000)."
    if model.model.get_dtype_inference() != torch.bfloat16:
        return f"row-wise fp8 products give bfloat16, and this model computes in {model.model.get_dtype_inference()}."
    return None
