"""The blocks of the autoencoder's encoder and decoder, computed in channels-last memory with fused norms.

  decode(vae.first_stage_model.decoder, z)

cuDNN's fast convolutions read and write channels-last memory; from ComfyUI's layout each of them turns its input and
its result. PyTorch's GroupNorm gives an image to 32 thread blocks, a fraction of a large GPU, and norm, SiLU, bias and
residual are passes over the image each. Here a residual block is two convolutions and four passes. The weights stay
ComfyUI's: its layers are asked for them at each call, so weights that are offloaded, cast or patched work.
"""

import functools

import comfy.ops
import torch
import torch.nn.functional as F

from . import kernels

SCORES = 2**26  # scores of the attention in memory at once: 256 MiB


class Biased:
    """A channels-last tensor x (B, C, H, W) whose bias (C,), or None, is still to be added."""

    def __init__(self, x, bias=None):
        self.x, self.bias = x, bias

    def added(self):
        return self.x if self.bias is None else self.x.add_(self.bias.view(1, -1, 1, 1))


class Measured:
    """A channels-last tensor x (B, C, H, W), with the mean and 1 / deviation of its groups, float32 (B, 32) each."""

    def __init__(self, x, mean, rstd):
        self.x, self.mean, self.rstd = x, mean, rstd


def weights(layer, like):
    """(weight, bias) of a ComfyUI layer in the dtype and on the device of `like`, valid after the next layer too."""
    comfy.ops.run_every_op()  # a cancel is heard here
    if not (layer.comfy_cast_weights or layer.weight_function or layer.bias_function):
        return layer.weight, layer.bias
    weight, bias, stream = comfy.ops.cast_bias_weight(layer, like, offloadable=True)
    kept = weight.clone(), bias.clone()  # ComfyUI's buffers behind them are the next layer's
    comfy.ops.uncast_bias_weight(layer, weight, bias, stream)
    return kept


def convolve(layer, x):
    """Biased result of a convolution; x: channels-last."""
    weight, bias = weights(layer, x)
    y = F.conv2d(x, weight, None, layer.stride, layer.padding)
    return Biased(y.contiguous(memory_format=torch.channels_last), bias)


def norm(layer, given, bias=None, silu=True):
    """GroupNorm (and SiLU) of a Measured tensor, or of given.x + bias where given was measured with it."""
    weight, shift = weights(layer, given.x)
    return kernels.normalise(given.x, given.mean, given.rstd, weight, shift, bias, silu)


def measured(biased):
    """Measured sum of a Biased."""
    return Measured(*kernels.statistics(biased.x, biased.bias, store=True))


def residual_block(block, given):
    """Measured result of a ResnetBlock on a Measured tensor."""
    h = convolve(block.conv1, norm(block.norm1, given))
    h = convolve(block.conv2, norm(block.norm2, Measured(*kernels.statistics(h.x, h.bias)), h.bias))
    x = convolve(block.nin_shortcut, given.x) if block.in_channels != block.out_channels else Biased(given.x)
    return Measured(*kernels.statistics(x.x, x.bias, h.x, h.bias))


def attention_block(block, given):
    """Measured result of an AttnBlock: attention between all places, with one head as wide as the tensor."""
    x = norm(block.norm, given, silu=False)
    batch, channels, height, width = x.shape
    q, k, v = (
        convolve(layer, x).added().permute(0, 2, 3, 1).reshape(batch, 1, height * width, channels)
        for layer in (block.q, block.k, block.v)
    )
    attend = in_chunks if keeps_scores_in_float32(x.dtype, x.device) else F.scaled_dot_product_attention
    out = attend(q, k, v).reshape(batch, height, width, channels).permute(0, 3, 1, 2)
    h = convolve(block.proj_out, out)
    return Measured(*kernels.statistics(given.x, None, h.x, h.bias))


def in_chunks(q, k, v):
    """Attention of q, k, v (B, 1, N, C) as two matrix products and a softmax in float32, a chunk of queries at a time.

    For heads of 512 channels PyTorch has a kernel of Ampere's time only: on an H200 it takes 4.2 ms at N = 16384, and
    this 2.4.
    """
    out, rows = torch.empty_like(q), max(1, SCORES // k.shape[2])
    for image in range(len(q)):
        keys = k[image, 0].t() * q.shape[-1] ** -0.5
        for start in range(0, q.shape[2], rows):
            part = slice(start, start + rows)
            scores = torch.mm(q[image, 0, part], keys, out_dtype=torch.float32)
            torch.mm(torch.softmax(scores, -1).to(v.dtype), v[image, 0], out=out[image, 0, part])
    return out


@functools.cache
def keeps_scores_in_float32(dtype, device):
    """Whether this PyTorch multiplies 16-bit matrices into a float32 result here (CUDA, from 2.8 on)."""
    if dtype not in (torch.bfloat16, torch.float16) or device.type != "cuda" or torch.version.hip:
        return False
    try:
        torch.mm(*torch.zeros(2, 16, 16, dtype=dtype, device=device), out_dtype=torch.float32)
    except (TypeError, RuntimeError):
        return False
    return True


def middle(mid, given):
    return residual_block(mid.block_2, attention_block(mid.attn_1, residual_block(mid.block_1, given)))


def doubled(x):
    """Nearest neighbours at twice the height and width, channels-last: a copy, where PyTorch's own kernel is slow."""
    batch, channels, height, width = x.shape
    places = x.permute(0, 2, 3, 1)[:, :, None, :, None].expand(batch, height, 2, width, 2, channels)
    return places.reshape(batch, 2 * height, 2 * width, channels).permute(0, 3, 1, 2)


def decode(decoder, z):
    """Pixels (B, 3, 8H, 8W) of a latent (B, 32, H, W)."""
    h = measured(convolve(decoder.conv_in, z.contiguous(memory_format=torch.channels_last)))
    h = middle(decoder.mid, h)
    for level in reversed(range(decoder.num_resolutions)):
        for block in decoder.up[level].block:
            h = residual_block(block, h)
        if level:
            h = measured(convolve(decoder.up[level].upsample.conv, doubled(h.x)))
    return convolve(decoder.conv_out, norm(decoder.norm_out, h)).added()


def encode(encoder, pixels):
    """Means and log variances (B, 64, H/8, W/8) of pixels (B, 3, H, W)."""
    h = measured(convolve(encoder.conv_in, pixels.contiguous(memory_format=torch.channels_last)))
    for level in range(encoder.num_resolutions):
        for block in encoder.down[level].block:
            h = residual_block(block, h)
        if level != encoder.num_resolutions - 1:
            h = measured(convolve(encoder.down[level].downsample.conv, F.pad(h.x, (0, 1, 0, 1))))
    h = middle(encoder.mid, h)
    return convolve(encoder.conv_out, norm(encoder.norm_out, h)).added()
