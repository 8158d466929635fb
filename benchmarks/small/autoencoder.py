"""The FLUX.2 autoencoder in plain, trainable PyTorch, with the keys of the original file. ComfyUI's AutoencoderKL
computes the same.

Pictures (B, 3, H, W) in -1..1 <-> latents (B, 128, H / 16, W / 16): 32 channels at 1/8, folded 2x2, each of the 128
normalised to mean 0 and variance 1 by stored statistics. Group norms have 32 groups, so the number of channels is a
multiple of 32.
"""

import torch
from torch import nn
from torch.nn import functional as F

CHANNELS, MULTIPLIERS, LATENT, EPSILON = 32, (1, 2, 4, 4), 32, 1e-4


def conv(inputs, outputs, size=3, stride=1):
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2 if stride == 1 else 0)


class Norm(nn.GroupNorm):
    """Keeps the number format of its input (autocast would go to float32 and double the traffic); the sums are in
    float32 all the same.
    """

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def norm(channels):
    return Norm(32, channels, eps=1e-6)


class Resnet(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.norm1, self.conv1, self.norm2, self.conv2 = (
            norm(inputs),
            conv(inputs, outputs),
            norm(outputs),
            conv(outputs, outputs),
        )
        nn.init.zeros_(self.conv2.weight)  # a residual branch starts empty
        if inputs != outputs:
            self.nin_shortcut = conv(inputs, outputs, 1)

    def forward(self, x):
        branch = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + branch


class Attention(nn.Module):
    """One head over all places of the picture."""

    def __init__(self, channels):
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (conv(channels, channels, 1) for _ in range(4))
        nn.init.zeros_(self.proj_out.weight)

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (part(h).flatten(2).transpose(1, 2)[:, None] for part in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(attended)


class Middle(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = (
            Resnet(channels, channels),
            Attention(channels),
            Resnet(channels, channels),
        )

    def forward(self, x):
        return self.block_2(self.attn_1(self.block_1(x)))


class Resample(nn.Module):
    """Half or double the size: a strided convolution padded on the right and below, or nearest neighbours and a
    convolution.
    """

    def __init__(self, channels, up):
        super().__init__()
        self.up, self.conv = up, conv(channels, channels, stride=1 if up else 2)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest") if self.up else F.pad(x, (0, 1, 0, 1)))


class Level(nn.Module):
    def __init__(self, inputs, outputs, blocks, up, resample):
        super().__init__()
        self.block = nn.ModuleList(Resnet(inputs if number == 0 else outputs, outputs) for number in range(blocks))
        if resample:
            setattr(self, "upsample" if up else "downsample", Resample(outputs, up))

    def forward(self, x):
        for block in self.block:
            x = block(x)
        resample = getattr(self, "upsample", None) or getattr(self, "downsample", None)
        return resample(x) if resample else x


class Encoder(nn.Module):
    def __init__(self, channels):
        super().__init__()
        widths = [channels * factor for factor in MULTIPLIERS]
        self.conv_in = conv(3, channels)
        self.down = nn.ModuleList(
            Level(before, width, 2, False, width_number < 3)
            for width_number, (before, width) in enumerate(zip([channels, *widths], widths))
        )
        self.mid, self.norm_out = Middle(widths[-1]), norm(widths[-1])
        self.conv_out, self.quant_conv = conv(widths[-1], 2 * LATENT), conv(2 * LATENT, 2 * LATENT, 1)

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.quant_conv(self.conv_out(F.silu(self.norm_out(self.mid(x)))))


class Decoder(nn.Module):
    def __init__(self, channels):
        super().__init__()
        widths = [channels * factor for factor in MULTIPLIERS]
        self.post_quant_conv, self.conv_in, self.mid = (
            conv(LATENT, LATENT, 1),
            conv(LATENT, widths[-1]),
            Middle(widths[-1]),
        )
        self.up = nn.ModuleList(
            Level(before, width, 3, True, number > 0)
            for number, (before, width) in enumerate(zip([*widths[1:], widths[-1]], widths))
        )
        self.norm_out, self.conv_out = norm(channels), conv(channels, 3)

    def forward(self, z):
        x = self.mid(self.conv_in(self.post_quant_conv(z)))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Autoencoder(nn.Module):
    def __init__(self, channels=CHANNELS):
        super().__init__()
        self.encoder, self.decoder = Encoder(channels), Decoder(channels)
        self.bn = nn.BatchNorm2d(4 * LATENT, eps=EPSILON, affine=False)

    def folded(self, pixels):
        """The mean of the posterior, folded but not normalised: (B, 3, H, W) -> (B, 128, H / 16, W / 16)."""
        return F.pixel_unshuffle(self.encoder(pixels)[:, :LATENT], 2)

    def encode(self, pixels):
        return F.batch_norm(self.folded(pixels).float(), self.bn.running_mean, self.bn.running_var, eps=EPSILON)

    def decode(self, latent):
        scale = (self.bn.running_var + EPSILON).sqrt()[:, None, None]
        return self.decoder(F.pixel_shuffle(latent * scale + self.bn.running_mean[:, None, None], 2))
