"""A small Mistral 3 text encoder in plain, trainable PyTorch, with ComfyUI's state dict keys
(comfy/text_encoders/llama.py computes the same).

30 layers, of which FLUX.2 joins the hidden states after 10, 20 and 30. Attention is causal, so padding on the right
changes nothing. Shapes: B prompts, T tokens, D = 128 channels of a head.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

HEAD, THETA, EPSILON = 128, 1e9, 1e-5
LAYERS, TAPS = 30, (10, 20, 30)


@dataclass(frozen=True)
class Sizes:
    """Dimensions of the encoder; the transformer's context is 3 * hidden."""

    vocabulary: int
    hidden: int = 64
    heads: int = 1
    kv_heads: int = 1
    intermediate: int = 128


def linear(inputs, outputs):
    return nn.Linear(inputs, outputs, bias=False)


class Norm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, self.weight, EPSILON)


class Attention(nn.Module):
    def __init__(self, sizes):
        super().__init__()
        self.q_proj = linear(sizes.hidden, sizes.heads * HEAD)
        self.k_proj, self.v_proj = (linear(sizes.hidden, sizes.kv_heads * HEAD) for _ in range(2))
        self.o_proj = linear(sizes.heads * HEAD, sizes.hidden)

    def forward(self, x, rotation):
        q, k, v = (
            part(x).unflatten(-1, (-1, HEAD)).transpose(1, 2) for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, rotation).to(v.dtype), rotate(k, rotation).to(v.dtype)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return self.o_proj(attended.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, sizes):
        super().__init__()
        self.gate_proj, self.up_proj = (linear(sizes.hidden, sizes.intermediate) for _ in range(2))
        self.down_proj = linear(sizes.intermediate, sizes.hidden)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, sizes):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = Norm(sizes.hidden), Norm(sizes.hidden)
        self.self_attn, self.mlp = Attention(sizes), Mlp(sizes)

    def forward(self, x, rotation):
        x = x + self.self_attn(self.input_layernorm(x), rotation)
        return x + self.mlp(self.post_attention_layernorm(x))


class LanguageModel(nn.Module):
    def __init__(self, sizes):
        super().__init__()
        self.embed_tokens = nn.Embedding(sizes.vocabulary, sizes.hidden)
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(LAYERS))


class TextEncoder(nn.Module):
    """Token ids (B, T) -> joined hidden states (B, T, 3 * hidden)."""

    def __init__(self, sizes):
        super().__init__()
        self.sizes, self.model = sizes, LanguageModel(sizes)
        self.reset()

    def reset(self):
        """Branches start small, so that the gradient of the lowest tap reaches the embeddings through 30 layers
        undiminished.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
        for layer in self.model.layers:
            for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
                module.weight.data *= (2 * LAYERS) ** -0.5
        nn.init.normal_(self.model.embed_tokens.weight)

    def forward(self, ids):
        x, rotation, states = self.model.embed_tokens(ids), rotations(ids.shape[1], ids.device), []
        for number, layer in enumerate(self.model.layers, 1):
            x = layer(x, rotation)
            if number in TAPS:
                states.append(x)
        return torch.cat(states, dim=-1)


def rotations(length, device):
    """(T, D) cosines and sines, each half of the channels twice."""
    frequencies = THETA ** -(torch.arange(0, HEAD, 2, dtype=torch.float32, device=device) / HEAD)
    angles = torch.arange(length, dtype=torch.float32, device=device)[:, None] * frequencies
    return angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)


def rotate(x, rotation):
    """Rotate channel i with channel i + D / 2. x (B, H, T, D)."""
    cos, sin = rotation
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-high, low], dim=-1) * sin


def left_padded(states, lengths, rows):
    """Right-padded states (B, T, C) -> (B, rows, C): zeros, then each prompt's states, as ComfyUI feeds them to the
    transformer.
    """
    source = torch.arange(rows, device=states.device) - (rows - lengths[:, None])  # (B, rows)
    found = states.gather(1, source.clamp(0, states.shape[1] - 1)[..., None].expand(-1, -1, states.shape[2]))
    return found * (source >= 0)[..., None]
