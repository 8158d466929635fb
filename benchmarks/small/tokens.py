"""The small tokenizer: Mistral's tekken format, every byte and every word of the captions and of FLUX.2's template as
one token.

Any text can be tokenised (by bytes and prefixes of words); the captions take few tokens. `words` gives the ids without
the tokenizers library.
"""

import base64
import functools
import json
import re

SPECIAL = (
    "<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS] [TOOL_CALLS] "
    "[IMG] <pad> "
    "[IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] [TOOL_CONTENT]"
).split()
# The pattern of the published tekken files.
PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# FLUX.2's prompt template (black-forest-labs/flux2; comfy/text_encoders/flux.py in ComfyUI).
SYSTEM = (
    "You are an AI that reasons about image descriptions. You give structured responses focusing on object "
    "relationships, object\nattribution "
    "and actions without speculation."
)
CAPTION_WORDS = (
    "A An a an picture image drawing photo painting of small medium large red green blue yellow orange purple white "
    "black circle square triangle "
    "star ring cross cat at in on the top left right bottom centre center corner above over below under to and grey "
    "gray pink teal brown beige "
    "cyan background gradient from checkered make Make change Change colour color paint remove Remove delete Erase "
    "add Add put hat cool"
)


def pieces(text):
    """Split as PATTERN does, for text of ASCII letters, spaces, newlines and punctuation (Python's re has no \\p
    classes).
    """
    return re.findall(
        r"[^\r\nA-Za-z]?[A-Z]*[a-z]+|[^\r\nA-Za-z]?[A-Z]+[a-z]*| ?[^\sA-Za-z]+[\r\n/]*|\s*[\r\n]+|\s+", text
    )


@functools.cache
def vocabulary():
    """Byte strings by rank: 256 bytes, then the words (bare and after a space) and every prefix of them, shorter ones
    first.
    """
    found = dict.fromkeys(pieces(SYSTEM) + [form for word in CAPTION_WORDS.split() for form in (word, f" {word}")])
    prefixes = {text[:length].encode() for text in found for length in range(2, len(text) + 1)}
    return [bytes([value]) for value in range(256)] + sorted(prefixes, key=lambda token: (len(token), token))


def size():
    return len(SPECIAL) + len(vocabulary())


@functools.cache
def _ranks():
    return {token: len(SPECIAL) + rank for rank, token in enumerate(vocabulary())}


def words(text):
    """Token ids of text made of whole words of the vocabulary. Raises KeyError for any other."""
    return [_ranks()[piece.encode()] for piece in pieces(text)]


def template():
    """(ids before a prompt, ids after it) in FLUX.2's template, the start token included."""
    special = {token: number for number, token in enumerate(SPECIAL)}
    return (
        [special["<s>"], special["[SYSTEM_PROMPT]"], *words(SYSTEM), special["[/SYSTEM_PROMPT]"], special["[INST]"]],
        [special["[/INST]"]],
    )


def tekken():
    """The tokenizer as the bytes of a tekken.json."""
    return json.dumps(
        {
            "config": {
                "pattern": PATTERN,
                "num_vocab_tokens": len(vocabulary()),
                "default_vocab_size": size(),
                "default_num_special_tokens": len(SPECIAL),
                "version": "v7",
            },
            "vocab": [
                {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
                for rank, token in enumerate(vocabulary())
            ],
            "special_tokens": [
                {"rank": rank, "token_str": text, "is_control": True} for rank, text in enumerate(SPECIAL)
            ],
        }
    ).encode()
