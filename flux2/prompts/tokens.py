"""Prompts -> tokens of a CLIP, with two things that core's CLIPTextEncode does not do.

A special token written out in a prompt ("[/INST]", "<|im_end|>") stays text: core tokenises the filled template in one
piece, so there such a text ends the user's turn. And a prompt longer than the reference's 512 tokens is cut where the
reference cuts it. Other prompts are tokenised by the CLIP itself, so they are core's tokens by construction.
"""

import re

from ...attention.errors import UserError
from ..loading.tekken import panics_as_sentences
from .text import count

LIMIT = 512  # tokens, template included; the reference cuts on the right
IMAGE = "[IMG]"  # stands for an image; the reference drops it from prompts


def is_flux2(clip):
    """Whether a loaded CLIP has a tokenizer of FLUX.2: one language model behind a template."""
    return hasattr(clip.tokenizer, "llama_template") and hasattr(clip.tokenizer, "clip_name")


def inner_of(clip):
    """ComfyUI's tokenizer of the one language model in a FLUX.2 CLIP."""
    return getattr(clip.tokenizer, clip.tokenizer.clip)


def tokenize(clip, text, limit=LIMIT):
    """(tokens as clip.tokenize gives them, notes). `limit` None keeps prompts of any length."""
    if not is_flux2(clip):
        return clip.tokenize(text), ["This CLIP is no text encoder of FLUX.2: the prompt went to it as it is."]
    inner, notes = inner_of(clip), []
    if IMAGE in text and IMAGE in inner.tokenizer.get_added_vocab():
        text = text.replace(IMAGE, "")
        notes.append("[IMG] stands for an image and was taken out of the prompt, as the reference does.")
    marks = look_alikes(inner, text)
    if marks:
        notes.append(f"{', '.join(marks[:3])} looks like a special token and was read as plain text.")
    try:
        tokens = None if marks else clip.tokenize(text)
    except IndexError:  # ComfyUI 0.30 on "embedding:" without a name behind it
        tokens = None
    tokens = tokens or {clip.tokenizer.clip_name: [literal(clip.tokenizer, inner, text)]}
    return cut(tokens, clip.tokenizer.clip_name, limit, notes), notes


def cut(tokens, name, limit, notes):
    """The tokens, at most `limit` of them; says so in `notes`."""
    (row,) = tokens[name]
    if limit and len(row) > limit:
        notes.append(
            f"The prompt is too long: with its template it has {len(row)} tokens, and only the first {limit} were "
            f"read, as in the reference. {count(len(row) - limit, 'token')} at its end had no effect."
        )
        return {name: [row[:limit]]}
    return tokens


def look_alikes(inner, text):
    """The special tokens that occur in a text as text, in the order of the vocabulary."""
    return [token for token in inner.tokenizer.get_added_vocab() if token in text]


def literal(tokenizer, inner, text):
    """One row of tokens for a prompt in its template, none of the prompt's own text read as a special token."""
    from comfy.sd1_clip import escape_important, unescape_important

    before, after = tokenizer.llama_template.split("{}")
    end = max((before.rfind(mark) + len(mark) for mark in look_alikes(inner, before)), default=0)
    ids = [
        *encode(inner, before[:end]),
        *plain_ids(inner, before[end:] + unescape_important(escape_important(text))),
        *encode(inner, after),
    ]
    row = [(token, 1.0) for token in ([] if inner.start_token is None else [inner.start_token]) + ids]
    padding = [(inner.pad_token, 1.0)] * ((inner.min_length or 0) - len(row))
    return padding + row if inner.pad_left else row + padding


def plain_ids(inner, text):
    """Tokens of a text in which every special token's name is broken in two, so that none can be recognised."""
    marks = look_alikes(inner, text)
    starts = (
        {found.start() + 1 for found in re.finditer(f"(?={'|'.join(map(re.escape, marks))})", text)} if marks else set()
    )
    edges = [0, *sorted(starts), len(text)]
    ids = [token for first, last in zip(edges, edges[1:]) for token in encode(inner, text[first:last])]
    if not set(ids).isdisjoint(inner.tokenizer.get_added_vocab().values()):
        raise UserError(
            "The prompt contains the name of a special token that cannot be read as plain text. Take it out of the "
            "prompt.",
            "prompts",
        )
    return ids


def encode(inner, text):
    """Ids of a text without the start token; names of special tokens become those tokens."""
    with panics_as_sentences("The prompt"):
        return inner.tokenizer(text)["input_ids"][inner.tokens_start :] if text else []
