"""The FLUX.2 diffusion transformer in plain, trainable PyTorch, with the state dict keys of the original
(black-forest-labs) file.

ComfyUI's comfy/ldm/flux/model.py computes the same (tests/test_small_model.py compares them), but updates activations
in place and leaves parameters uninitialised. Shapes: B batch, L text rows, N image tokens (of the picture, then of the
reference pictures), H heads, D = 128. Not covered: biases, ControlNet, other reference methods than "index".
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

HEAD = 128  # channels of one head: four axes of 32 rotary channels
AXIS, THETA = 32, 2000
LATENT = 128  # channels of one image token
TEXT_AXIS = 3  # text rows are numbered 0, 1, 2, ... on this axis
REFERENCE_TIME = 10.0  # position of the first reference picture on axis 0 (ref_index_scale)


@dataclass(frozen=True)
class Sizes:
    """Dimensions of the transformer. `hidden` is a multiple of 128; `context` is three times the width of the text
    encoder.
    """

    hidden: int = 256
    double: int = 1
    single: int = 5
    context: int = 192


def linear(inputs, outputs):
    return nn.Linear(inputs, outputs, bias=False)


class HeadNorm(nn.Module):
    """RMS norm over the channels of each head; its weight is called `scale` in the original file."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(HEAD))

    def forward(self, x):
        return F.rms_norm(x.float(), (HEAD,), self.scale, 1e-6)


class QueryKeyNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.query_norm, self.key_norm = HeadNorm(), HeadNorm()


class Attention(nn.Module):
    """Weights of one stream's attention; the joint attention itself is in `attend`."""

    def __init__(self, hidden):
        super().__init__()
        self.qkv, self.norm, self.proj = linear(hidden, 3 * hidden), QueryKeyNorm(), linear(hidden, hidden)


class Gate(nn.Module):
    def forward(self, x):
        gate, value = x.chunk(2, dim=-1)
        return F.silu(gate) * value


class Embedder(nn.Module):
    """Sinusoids of a number (time or guidance) -> a vector of the hidden size."""

    def __init__(self, hidden):
        super().__init__()
        self.in_layer, self.out_layer = linear(256, hidden), linear(hidden, hidden)

    def forward(self, value):
        return self.out_layer(F.silu(self.in_layer(sinusoids(value))))


class Modulation(nn.Module):
    """`parts` vectors (B, 1, hidden): shift, scale and gate of each residual branch, the same ones in every block."""

    def __init__(self, hidden, parts):
        super().__init__()
        self.parts, self.lin = parts, linear(hidden, parts * hidden)

    def forward(self, vector):
        return self.lin(F.silu(vector))[:, None].chunk(self.parts, dim=-1)


def sinusoids(value):
    """(B,) numbers -> (B, 256): cosines, then sines, of 1000 times the number at 128 frequencies."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32, device=value.device) / 128)
    angles = 1000.0 * value.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rotations(ids):
    """(S, 4) positions -> (S, 64, 2) float32: cosine and sine for every pair of channels."""
    powers = torch.linspace(0, (AXIS - 2) / AXIS, steps=AXIS // 2, dtype=torch.float64, device=ids.device)
    angles = (ids.double()[:, :, None] / THETA**powers).flatten(1)
    return torch.stack([angles.cos(), angles.sin()], dim=-1).float()


def rotate(x, rotation):
    """Rotate neighbouring pairs of channels. x (B, S, H, D), rotation (S, D / 2, 2)."""
    cos, sin = rotation[:, None, :, 0], rotation[:, None, :, 1]
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)


def normalised(x, shift, scale):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def heads(qkv, norm):
    """(B, S, 3 * hidden) -> q, k, v, each (B, S, H, D); q and k normalised, in float32."""
    q, k, v = qkv.unflatten(-1, (3, -1, HEAD)).unbind(2)
    return norm.query_norm(q), norm.key_norm(k), v


def attend(q, k, v, rotation):
    """Attention of everything to everything: (B, S, H, D) three times -> (B, S, H * D)."""
    q, k = rotate(q, rotation).to(v.dtype), rotate(k, rotation).to(v.dtype)
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2).flatten(2)


class DoubleBlock(nn.Module):
    """Text and image keep their own weights and meet in one attention."""

    def __init__(self, hidden):
        super().__init__()
        self.img_attn, self.txt_attn = Attention(hidden), Attention(hidden)
        self.img_mlp, self.txt_mlp = (
            nn.Sequential(linear(hidden, 6 * hidden), Gate(), linear(3 * hidden, hidden)) for _ in range(2)
        )

    def forward(self, img, txt, img_parts, txt_parts, rotation):
        streams = [
            heads(part.qkv(normalised(x, *mod[:2])), part.norm)
            for x, mod, part in ((txt, txt_parts, self.txt_attn), (img, img_parts, self.img_attn))
        ]
        attended = attend(*(torch.cat(pair, dim=1) for pair in zip(*streams)), rotation)
        txt = self._finish(txt, attended[:, : txt.shape[1]], txt_parts, self.txt_attn, self.txt_mlp)
        img = self._finish(img, attended[:, txt.shape[1] :], img_parts, self.img_attn, self.img_mlp)
        return img, txt

    @staticmethod
    def _finish(x, attended, parts, attention, mlp):
        x = x + parts[2] * attention.proj(attended)
        return x + parts[5] * mlp(normalised(x, *parts[3:5]))


class SingleBlock(nn.Module):
    """Text and image in one sequence; attention and MLP side by side in two matrices."""

    def __init__(self, hidden):
        super().__init__()
        self.linear1, self.linear2 = linear(hidden, 9 * hidden), linear(4 * hidden, hidden)
        self.norm, self.gate = QueryKeyNorm(), Gate()

    def forward(self, x, shift, scale, gate, rotation):
        qkv, mlp = self.linear1(normalised(x, shift, scale)).tensor_split([3 * x.shape[-1]], dim=-1)
        attended = attend(*heads(qkv, self.norm), rotation)
        return x + gate * self.linear2(torch.cat([attended, self.gate(mlp)], dim=-1))


class FinalLayer(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), linear(hidden, 2 * hidden))
        self.linear = linear(hidden, LATENT)

    def forward(self, x, vector):
        shift, scale = self.adaLN_modulation(vector)[:, None].chunk(2, dim=-1)
        return self.linear(normalised(x, shift, scale))


class Transformer(nn.Module):
    """FLUX.2: image tokens (B, N, 128), text states (B, L, context), time and guidance (B,) -> velocity of the image
    tokens (B, N, 128).
    """

    def __init__(self, sizes=Sizes()):
        super().__init__()
        hidden = sizes.hidden
        self.sizes = sizes
        self.img_in, self.txt_in = linear(LATENT, hidden), linear(sizes.context, hidden)
        self.time_in, self.guidance_in = Embedder(hidden), Embedder(hidden)
        self.double_stream_modulation_img, self.double_stream_modulation_txt = (
            Modulation(hidden, 6),
            Modulation(hidden, 6),
        )
        self.single_stream_modulation = Modulation(hidden, 3)
        self.double_blocks = nn.ModuleList(DoubleBlock(hidden) for _ in range(sizes.double))
        self.single_blocks = nn.ModuleList(SingleBlock(hidden) for _ in range(sizes.single))
        self.final_layer = FinalLayer(hidden)
        self.reset()

    def reset(self):
        """Start as the identity: no branch adds anything and the velocity is zero; text and time are read from the
        first step on.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
        for layer in (
            self.double_stream_modulation_img.lin,
            self.double_stream_modulation_txt.lin,
            self.single_stream_modulation.lin,
            self.final_layer.adaLN_modulation[1],
            self.final_layer.linear,
        ):
            nn.init.zeros_(layer.weight)

    def forward(self, img, txt, time, guidance, rotation):
        img, txt, rows = self.img_in(img), self.txt_in(txt), txt.shape[1]
        vector = self.time_in(time) + self.guidance_in(guidance)
        img_parts, txt_parts = self.double_stream_modulation_img(vector), self.double_stream_modulation_txt(vector)
        for block in self.double_blocks:
            img, txt = block(img, txt, img_parts, txt_parts, rotation)
        x, parts = torch.cat([txt, img], dim=1), self.single_stream_modulation(vector)
        for block in self.single_blocks:
            x = block(x, *parts, rotation)
        return self.final_layer(x[:, rows:], vector)


# --- positions and folding -------------------------------------------------------------------------------------------


def positions(rows, height, width, references=0, device=None, first_row=0):
    """Rotations (S, 64, 2) of `rows` text rows numbered from `first_row`, a picture of height x width tokens, and
    references of that size.
    """
    text = torch.zeros(rows, 4, device=device)
    text[:, TEXT_AXIS] = torch.arange(first_row, first_row + rows, device=device)
    pictures = [_grid(REFERENCE_TIME * number, height, width, device) for number in range(references + 1)]
    return rotations(torch.cat([text, *pictures]))


def _grid(time, height, width, device):
    y, x = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
    return torch.stack([torch.full_like(y, time), y, x, torch.zeros_like(y)], dim=-1).flatten(0, 1).float()


def tokens(latent):
    """(B, 128, h, w) -> (B, h * w, 128)."""
    return latent.flatten(2).transpose(1, 2)


def picture(tokens, height):
    """(B, h * w, 128) -> (B, 128, h, w)."""
    return tokens.transpose(1, 2).unflatten(2, (height, -1))
