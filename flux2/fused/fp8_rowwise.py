"""The matrix products of a bf16 checkpoint in fp8 e4m3, one scale per token and one per output of the weight
(torch._scaled_mm's row-wise form).

The checkpoint's weights stay as they are. Their fp8 copies are made when a product first needs them, from what
ComfyUI's casting returns, so patched (LoRA) and offloaded weights are right. A copy is kept until the sampling ends,
while there is room for it and the weights lie on the GPU unchanged; then what comes next, a VAE say, finds the memory
that ComfyUI counts on. Where there is no copy, it is made anew for each product.
"""

import torch

import comfy.model_management
from comfy.ops import cast_bias_weight, uncast_bias_weight
from comfy.patcher_extension import CallbacksMP

from .linear import FP8_LAYOUT

KEY = "flux2_row_fp8"
ROOM = 4 * 2**30  # bytes that stay free for activations and for what ComfyUI loads next
CHANGES = (CallbacksMP.ON_LOAD, CallbacksMP.ON_DETACH, CallbacksMP.ON_APPLY_HOOKS, CallbacksMP.ON_CLEANUP)
SAMPLE = 128  # tokens whose products are also computed in the checkpoint's precision, once for each kind of layer


class RowFp8:
    """fp8 copies of a MODEL's weights, and the error that their products were measured to have."""

    def __init__(self):
        self.copies, self.errors, self.left, self.kept = {}, {}, set(), (0, 0)

    def forget(self, *_, **__):
        self.copies.clear()

    def install(self, model):
        """Forget the copies whenever ComfyUI changes the weights of a MODEL clone, and when a sampling ends."""
        for kind in CHANGES:
            model.remove_callbacks_with_key(kind, KEY)
            model.add_callback_with_key(kind, KEY, self.forget)

    def begin(self):
        self.errors.clear()
        self.left.clear()
        self.kept = (0, 0)

    def suits(self, linear):
        """Whether a layer's product is computed here; why not is kept for the report."""
        reason = unsuitable(linear)
        if reason and not torch.compiler.is_compiling():
            self.left.add(reason)
        return reason is None

    def exact(self, linear, name, write):
        """Some tokens' products (SAMPLE, out) by the layer itself, on the input that write(None) gives, for a kind of
        layer not seen yet; else None.
        """
        return (
            None
            if name in self.errors or torch.compiler.is_compiling()
            else linear(write(None)[:1, :SAMPLE])[0].float()
        )

    def product(self, linear, like, given, name):
        """The product of a products.Input, in fp8: (B, S, out)."""
        weight, weight_scale, bias = self.weight(linear, like)
        out = torch._scaled_mm(
            given.data.flatten(0, 1),
            weight.t(),
            given.scale.flatten(0, 1),
            weight_scale,
            bias=bias,
            out_dtype=like.dtype,
            use_fast_accum=True,
        )
        if given.exact is not None:
            self.errors[name] = sample_error(given.exact, out)
        return out.unflatten(0, like.shape[:2])

    def weight(self, linear, like):
        """(fp8 (out, in), scales (1, out), bias or None) of a linear layer as it is now."""
        kept = self.copies.get(linear)
        if kept and kept[0] == linear.weight.data_ptr():
            return kept[1:]
        self.copies.pop(linear, None)  # the weight has been moved: partial unloading calls nobody back
        from .kernels.quantise import quantise_rows

        weight, bias, stream = cast_bias_weight(linear, like, offloadable=True)
        scales = torch.empty((1, weight.shape[0], 1), device=like.device, dtype=torch.float32)
        made = quantise_rows(weight[None], scales)[0], scales[0].t(), bias if bias is None else bias.clone()
        uncast_bias_weight(linear, weight, bias, stream)
        if resident(linear, like) and comfy.model_management.get_free_memory(like.device) > ROOM:
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


def resident(linear, like):
    """True where a layer's weight lies unchanged on the GPU: not offloaded, not faulted in on demand, nothing computed
    at
    call time.
    """
    return linear.weight.device == like.device and not hasattr(linear, "_v") and not linear.weight_function


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


def unavailable(model):
    """Why fp8 products cannot run for a MODEL on its device, as a sentence; None when they can."""
    if not comfy.model_management.supports_fp8_compute(model.load_device):
        return "this GPU has no fp8 matrix products (NVIDIA from Ada, AMD MI355X or Radeon RX 9000)."
    if model.model.get_dtype_inference() != torch.bfloat16:
        return f"row-wise fp8 products give bfloat16, and this model computes in {model.model.get_dtype_inference()}."
    return None
