"""The reference's treatment of prompts around 512 tokens: encoded padding before short ones, and the end of long ones
left out.

ComfyUI fills short prompts with zeros in the diffusion model and passes long ones on whole; diffusers and the official
code pad and cut before the text encoder. `like_the_reference` makes ComfyUI's encoder do the same. How far the two are
apart: docs/loading.md.
"""

import logging

import torch

LENGTH = 512  # tokens, the chat template included
log = logging.getLogger(__name__)


def like_the_reference(text_model, family, dtype=torch.float32):
    """The class of a text encoder that computes in `dtype`, with prompts cut and padded as diffusers does."""
    shortened = _cut(text_model, family)
    return _padded(shortened, family, dtype) if family.pad_token else shortened


def _cut(text_model, family):
    class Cut(text_model):
        def encode_token_weights(self, token_weight_pairs):
            rows = token_weight_pairs[family.name]
            longest = max(map(len, rows))
            if longest > LENGTH:
                log.warning(
                    "The prompt has %d tokens, the template included. Those after the first %d are left out, as in "
                    "diffusers, because the text encoder was loaded with padding 'reference'.",
                    longest,
                    LENGTH,
                )
            return super().encode_token_weights({**token_weight_pairs, family.name: [row[:LENGTH] for row in rows]})

    return Cut


def _padded(text_model, family, dtype):
    """With encoded <pad> tokens on the left of short prompts, as transformers encodes them behind its attention mask.

    A padding token attends to nothing there, and nothing attends to it: attention gives it zero, so its hidden states
    are the embedding of <pad> followed by the feed-forward layers alone, the same at every position. They are made once
    per prompt, without any padded sequence.
    """

    class ReferencePadding(text_model):
        def encode_token_weights(self, token_weight_pairs):
            out, pooled, extra = super().encode_token_weights(token_weight_pairs)
            missing = LENGTH - out.shape[1]
            if missing > 0:
                # (B, 512, 3h)
                out = torch.cat([self.pad_state().to(out).expand(out.shape[0], missing, -1), out], dim=1)
                extra["attention_mask"] = torch.nn.functional.pad(extra["attention_mask"], (missing, 0))
            return out, pooled, extra

        def pad_state(self):
            encoder = getattr(self, family.name)
            layers = encoder.transformer.model.layers
            embedding = encoder.transformer.get_input_embeddings()
            token = torch.tensor([[family.pad_token]], device=encoder.execution_device or embedding.weight.device)
            x, taps = embedding(token, out_dtype=dtype), []  # (1, 1, h)
            for number, layer in enumerate(layers, 1):
                x = x + layer.mlp(layer.post_attention_layernorm(x))
                taps += [x] if number in encoder.layer else []
            return torch.cat(taps, dim=-1)  # (1, 1, 3h)

    return ReferencePadding
