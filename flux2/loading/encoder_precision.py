"""Number format in which a text encoder computes, and in bf16 the attention that fits it.

ComfyUI computes its language models in float32, whatever their weights are in. The reference pipelines of FLUX.2
(black-forest-labs/flux2, diffusers) compute them in bf16, which GPUs multiply several times faster. Here an encoder
gets its embeddings in bf16, and all that follows takes its format from them. Nothing of the weights changes. In float32
nothing is changed at all.

At 512 tokens an H200 computes Qwen3 8B in 11 ms, and the CPU needs longer to ask for it: so weights that are where and
what they should be are used as they are, and the causal attention runs without a mask.
"""

import comfy.model_management
import torch
import torch.nn.functional as F

from .direct_weights import DirectWeights
from .encoder_attention import ARGUMENT, attention_layers

AUTO = "auto"
PRECISIONS = {AUTO: None, "bf16": torch.bfloat16, "float32": torch.float32}  # "auto": see `resolved`


def resolved(precision, device):
    """The name of the format that `precision` stands for on a torch.device: "auto" is bf16 where it is native there."""
    if precision != AUTO:
        return precision
    return "bf16" if comfy.model_management.should_use_bf16(device) else "float32"


def bf16_text_model(text_model, family):
    """The class of a text encoder that computes in bf16, from ComfyUI's class and its encoder_families.Family."""

    class InBf16(text_model):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            compute_in_bf16(getattr(self, family.name))

        def encode_token_weights(self, token_weight_pairs):
            """As ComfyUI's, with the three hidden states joined before they leave the device, not after."""
            rows = token_weight_pairs[family.name]
            if not rows or any(weight != 1.0 for row in rows for _, weight in row):
                return super().encode_token_weights(token_weight_pairs)
            states, pooled, extra = getattr(self, family.name).encode([[token for token, _ in row] for row in rows])
            joined = states.movedim(1, 2).flatten(2).flatten(0, 1)[None]  # (rows, 3, S, h) -> (1, rows * S, 3 * h)
            mask = extra["attention_mask"].flatten()[None]
            to = comfy.model_management.intermediate_device()
            return joined.to(to), pooled, {**extra, "attention_mask": mask.to(to)}

    return InBf16


def compute_in_bf16(encoder):
    """Let a comfy.sd1_clip.SDClipModel compute in bf16."""
    prompt = Pass(encoder.special_tokens.get("pad"))
    encoder.register_forward_pre_hook(prompt.see_tokens)
    encoder.transformer.register_forward_pre_hook(prompt.begin, with_kwargs=True)
    encoder.transformer.register_forward_hook(prompt.end, always_call=True)
    for layer in attention_layers(encoder.transformer):
        layer.register_forward_pre_hook(prompt.choose_attention, with_kwargs=True)


class Pass:
    """A pass of rows of tokens through an encoder: how many of them are no padding, known without asking the GPU, and
    what follows from it.

    ComfyUI's mask says: causal, and padding is no key. Where padding stands behind the prompt (klein) or there is none,
    that is two calls without any mask: the prompt to itself, causal; the padding to the whole prompt.
    """

    def __init__(self, pad_token):
        self.pad_token, self.padded_behind, self.length, self.weights = pad_token, False, None, None

    def see_tokens(self, module, args):
        self.padded_behind = all(is_padded_behind(row, self.pad_token) for row in args[0])

    def begin(self, module, args, kwargs):
        lengths, embeds = kwargs.get("num_tokens"), kwargs.get("embeds")
        if embeds is None:
            return None
        if lengths and self.padded_behind and min(lengths) == max(lengths) > 0:
            self.length = lengths[0]
        self.weights = DirectWeights(module, embeds.device, torch.bfloat16)
        self.weights.__enter__()
        return args, {**kwargs, "embeds": embeds.to(torch.bfloat16)}

    def end(self, *_):
        if self.weights is not None:
            self.weights.__exit__()
        self.length, self.padded_behind, self.weights = None, False, None

    def choose_attention(self, module, args, kwargs):
        if self.length is None or kwargs.get("past_key_value") is not None:
            return None
        return args, {**kwargs, ARGUMENT: self.attend}

    def attend(self, q, k, v, heads, mask=None, skip_reshape=True, **_):
        """Called as ComfyUI calls its attention. q (B, H, S, D), k and v (B, Hkv, S, D) -> (B, S, H * D)."""
        length, grouped = self.length, q.shape[1] != k.shape[1]
        k, v = k[:, :, :length], v[:, :, :length]
        out = F.scaled_dot_product_attention(q[:, :, :length], k, v, is_causal=True, enable_gqa=grouped)
        if length < q.shape[2]:
            padding = F.scaled_dot_product_attention(q[:, :, length:], k, v, enable_gqa=grouped)
            out = torch.cat([out, padding], dim=2)
        return out.transpose(1, 2).flatten(2)


def is_padded_behind(row, pad_token):
    """Whether ComfyUI's mask of a row of tokens, some of which may be embeddings, is ones and then zeros."""
    first = next((at for at, entry in enumerate(row) if isinstance(entry, int) and entry == pad_token), len(row))
    return first > 0 and all(isinstance(entry, int) for entry in row[first:])
