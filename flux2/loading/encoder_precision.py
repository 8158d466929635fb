"""Number format in which a text encoder computes, and in bf16 the attention that fits it.

ComfyUI computes its language models in float32, whatever their weights are in. The reference pipelines of FLUX.2
(black-forest-labs/flux2, diffusers) compute them in bf16, which GPUs multiply several times faster. `compute_in`
hands a loaded encoder its embeddings in another format; all that follows takes its format from them. Nothing of the
weights changes. In float32 nothing is changed at all.
"""

import comfy.model_management
import torch
import torch.nn.functional as F

from .encoder_attention import ARGUMENT, attention_layers

AUTO = "auto"
PRECISIONS = {AUTO: None, "bf16": torch.bfloat16, "float32": torch.float32}  # "auto": see `resolved`


def resolved(precision, device):
    """The name of the format that `precision` stands for on a torch.device: "auto" is bf16 where it is native there."""
    if precision != AUTO:
        return precision
    return "bf16" if comfy.model_management.should_use_bf16(device) else "float32"


def compute_in(clip, family, precision):
    """Let the text encoder of a CLIP, of an encoder_families.Family, compute in bf16. "float32": nothing to do."""
    if PRECISIONS[precision] is not torch.bfloat16:
        return
    encoder = getattr(clip.cond_stage_model, family.name)
    prompt = PromptLength(encoder.special_tokens.get("pad"))
    encoder.register_forward_pre_hook(prompt.see_tokens)
    encoder.transformer.register_forward_pre_hook(prompt.see_embeddings, with_kwargs=True)
    encoder.transformer.register_forward_hook(prompt.forget, always_call=True)
    for layer in attention_layers(encoder.transformer):
        layer.register_forward_pre_hook(prompt.choose_attention, with_kwargs=True)
    clip.patcher.set_model_compute_dtype(torch.bfloat16)  # of weights that ComfyUI casts or patches on their way


class PromptLength:
    """How many tokens of the rows in a pass are no padding, known without asking the GPU; and what follows from it.

    ComfyUI's mask says: causal, and padding is no key. Where padding stands behind the prompt (klein) or there is none,
    that is two calls without any mask: the prompt to itself, causal; the padding to the whole prompt.
    """

    def __init__(self, pad_token):
        self.pad_token, self.padded_behind, self.length = pad_token, False, None

    def see_tokens(self, module, args):
        self.padded_behind = all(is_padded_behind(row, self.pad_token) for row in args[0])

    def see_embeddings(self, module, args, kwargs):
        lengths, embeds = kwargs.get("num_tokens"), kwargs.get("embeds")
        if embeds is None:
            return None
        if lengths and self.padded_behind and min(lengths) == max(lengths) > 0:
            self.length = lengths[0]
        return args, {**kwargs, "embeds": embeds.to(torch.bfloat16)}

    def forget(self, *_):
        self.length, self.padded_behind = None, False

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
