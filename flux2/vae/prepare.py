"""Which code computes a loaded VAE, how much memory ComfyUI is told that it takes, and MIOpen's search on ROCm.

  prepare(vae, "auto")     # a comfy.sd.VAE, changed in place

The network's own `encoder.forward` and `decoder.forward` are replaced, so that every way into it takes part: whole
images, batches, tiles, ComfyUI's retry in tiles, and other packs' nodes. Weights, dtype and patcher stay as they are.
"""

import contextlib
import logging
import threading

import torch
from comfy.ldm.modules.diffusionmodules.model import Decoder, Encoder

from ..checkpoints.header import CheckpointError
from ..compiled import toolchain
from ..fused import kernels as triton_kernels

AUTO, ON, OFF = "auto", "on", "off"
CHOICES = (AUTO, ON, OFF)
GROUPS = 32
# Numbers in memory at once for each pixel, a tenth more than measured at 1024x1024 and 2048x2048 in bf16 on an H200,
# for encoder and decoder of the published width, 128. ComfyUI 0.30 reckons 1767 and 2178.
NUMBERS = {True: {"encode": 563, "decode": 846}, False: {"encode": 711, "decode": 1208}}  # fused or not
log = logging.getLogger(__name__)


def prepare(vae, choice):
    """Let a VAE compute with fused blocks ("on"; "auto": where they can run) or with ComfyUI's ("off").

    Raises CheckpointError when "on" cannot be.
    """
    network = vae.first_stage_model
    reason = None if choice == OFF else unavailable(network, vae.device)
    if choice == ON and reason:
        raise CheckpointError(
            f"The VAE's fused blocks cannot run here: {reason} Set fused blocks of Load FLUX.2 VAE to 'auto' or 'off'.",
            "fast-blocks",
        )
    if choice == AUTO and torch.version.hip:
        reason = "on ROCm they have not been measured ('on' uses them)."
    elif choice == AUTO and not reason and vae.device.type != "cuda":
        reason = "this VAE does not compute on a GPU."
    fused = choice != OFF and not reason
    if choice == AUTO and not fused:
        log.info("The VAE is computed by ComfyUI's blocks, not fused ones: %s", reason)
    for name, work in (("encoder", "encode"), ("decoder", "decode")):
        module = getattr(network, name, None)
        if module is not None and (fused or torch.version.hip):
            module.forward = Forward(module, work, fused)
    if vae.device.type == "cuda" and not torch.version.hip:
        encoder, decoder = (getattr(getattr(network, name, None), "ch", 128) for name in ("encoder", "decoder"))
        numbers = {
            "encode": NUMBERS[fused]["encode"] * encoder / 128,
            "decode": NUMBERS[fused]["decode"] * decoder / 128,
        }
        vae.memory_used_encode = lambda shape, dtype: numbers["encode"] * shape[2] * shape[3] * dtype.itemsize
        # a place of the latent is 16x16 pixels
        vae.memory_used_decode = lambda shape, dtype: numbers["decode"] * shape[2] * shape[3] * 256 * dtype.itemsize


def unavailable(network, device):
    """Why a network cannot be computed with fused blocks on a torch.device, as a sentence; None when it can."""
    for name, kind in (("encoder", Encoder), ("decoder", Decoder)):
        module = getattr(network, name, None)
        if module is not None and (type(module) is not kind or not is_flux2(module)):
            return f"this {name} is not built like that of FLUX.2."
    return triton_kernels.unavailable(device) or (device.type == "cuda" and toolchain.unavailable(device)) or None


def is_flux2(module):
    """Whether an encoder or decoder of ComfyUI's has only what blocks.py computes: no time, no further attention."""
    levels = getattr(module, "down", None) or module.up
    norms = [norm for norm in module.modules() if isinstance(norm, torch.nn.GroupNorm)]
    return (
        not module.carried
        and not getattr(module, "tanh_out", False)
        and not any(len(level.attn) for level in levels)
        and all(norm.num_groups == GROUPS and norm.eps == 1e-6 for norm in norms)
    )


class Forward:
    """An encoder's or decoder's forward pass: fused or ComfyUI's own, on ROCm without MIOpen's search."""

    def __init__(self, module, name, fused):
        self.module, self.name, self.fused = module, name, fused

    def __call__(self, x, **options):
        with immediate_mode if torch.version.hip else contextlib.nullcontext():
            # where gradients are asked for, and on another device than the VAE's own, ComfyUI's blocks compute
            needs_gradients = torch.is_grad_enabled() and x.requires_grad
            if not self.fused or options or needs_gradients or triton_kernels.unavailable(x.device):
                return type(self.module).forward(self.module, x, **options)
            from . import blocks  # imports Triton

            return getattr(blocks, self.name)(self.module, x)


class ImmediateMode:
    """MIOpen without a search for the fastest convolution of each new shape, which takes minutes on some cards.

    PyTorch takes MIOpen's immediate mode where `deterministic` is set and `benchmark` is not (pytorch/pytorch#145294);
    it has these switches for the whole process only. The first that comes in sets them, the last that goes out puts
    them back.
    """

    def __init__(self):
        self.lock, self.inside, self.before = threading.Lock(), 0, None

    def __enter__(self):
        with self.lock:
            if not self.inside:
                self.before = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
                torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
            self.inside += 1

    def __exit__(self, *_):
        with self.lock:
            self.inside -= 1
            if not self.inside:
                torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = self.before


immediate_mode = ImmediateMode()
