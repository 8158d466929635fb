"""Mistral's tokenizer, from its tekken file or from a Hugging Face tokenizer.json, as a `tokenizers.Tokenizer`.

A tekken file lists byte strings by rank; byte pair encoding needs the merges that build them, which follow from the
ranks. ComfyUI 0.30 leaves this to transformers, whose converter changed its arguments (MistralConverter in transformers
5.23 takes a file), so it is done here with the tokenizers library alone. Where a checkpoint keeps its tokenizer:
`find`.
"""

import base64
import contextlib
import json
import re
from pathlib import Path

from ...attention.errors import UserError
from ..checkpoints.header import CheckpointError, read_small

TENSORS = ("tekken_model", "tokenizer_json")  # uint8 tensors inside a text encoder file
FILES = ("tekken.json", "tokenizer.json")  # files beside the weights, or in the folder tokenizer/ next to theirs

# Bounds on what a tokenizer may claim. The published tekken file: 15 to 19 MB, 130,072 tokens of 0.9 million bytes in
# all, 1,000 special tokens.
FILE_LIMIT = 64 * 2**20
MOST_SPECIAL, MOST_TOKENS, MOST_TOKEN_BYTES, LONGEST_TOKEN = 10_000, 300_000, 2_000_000, 1024
NUMBER = re.compile(r"-?[0-9]{1,7}")
# How text is cut into words. Other patterns are refused: there are innocent-looking ones that take hours, and FLUX.2's
# encoder was trained with one of these.
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = ("(?i:'s|'t|'re|'ve|'m|'ll|'d)|", "(?i:[sdmt]|ll|ve|re)|", "")
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# the published tokenizer.json of Mistral Small has the second kind, which transformers offers to put right
PATTERNS = (TEKKEN, GPT2, *(ending + _WORDS % digits for ending in _ENDINGS for digits in ("", "{1,3}")))
NORMALIZERS = ("Sequence", "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents", "Prepend", "Replace")
MOST_GROWTH = 64  # of a text by a tokenizer's replacements


@contextlib.contextmanager
def panics_as_sentences(what):
    """The tokenizers library reports some failures as a panic, which is no Exception: left alone it would end
    ComfyUI's prompt worker. Here it becomes a ValueError.
    """
    try:
        yield
    except Exception:
        raise
    except BaseException as error:
        if type(error).__module__ != "pyo3_runtime":
            raise
        raise UserError(
            f"{what} cannot be read by the tokenizer ({str(error)[:200]}). Shorten or change it.",
            "prompts",
        ) from None


def find(folder):
    """The tokenizer file that belongs to a Hugging Face text encoder folder, or None: in the folder, or in
    ../tokenizer.
    """
    places = (Path(folder), Path(folder).parent / "tokenizer")
    return next((place / name for place in places for name in FILES if (place / name).is_file()), None)


def build(data, origin):
    """A `tokenizers.Tokenizer` from the bytes of a tekken file or a tokenizer.json. `origin` names the place in
    messages.
    """
    try:
        with panics_as_sentences("Its file"):
            content = json.loads(data, parse_int=_number)
            if "special_tokens" in content:
                return from_tekken(content)
            return from_tokenizer_json(content, bytes(data).decode("utf-8"))
    except Exception as error:  # the library itself raises plain Exception
        raise CheckpointError(
            f"The tokenizer in {origin} cannot be read ({type(error).__name__}: {str(error)[:300]}). It must be "
            f"Mistral's tekken.json or a Hugging Face tokenizer.json; download the text encoder again.",
            "tokenizer",
        ) from None


def read_file(path):
    """The bytes of a tokenizer file. Raises CheckpointError."""
    return read_small(path, FILE_LIMIT)


def _number(text):
    """A whole number of a tokenizer: all of them count or name tokens."""
    if not NUMBER.fullmatch(text):
        raise ValueError(f"it holds the number {text[:20]}, and no tokenizer has so many tokens")
    return int(text)


def _known(pattern):
    if pattern not in PATTERNS:
        raise ValueError(f"it cuts text by a pattern of its own, {str(pattern)[:60]!r}, which could take hours")
    return pattern


def from_tokenizer_json(content, text):
    """A `tokenizers.Tokenizer` from a tokenizer.json, given parsed and as text, without padding and truncation. What in
    it could make a short prompt long, or slow, is refused: ValueError.
    """
    import tokenizers

    growth, waiting = 1, [("normalizer", content.get("normalizer")), ("", content.get("pre_tokenizer"))]
    waiting += [("", content.get("post_processor")), ("", content.get("decoder"))]
    while waiting:
        place, node = waiting.pop()
        if isinstance(node, list):
            waiting += [(place, inner) for inner in node]
        if not isinstance(node, dict):
            continue
        if place == "normalizer" and node.get("type") not in (None, *NORMALIZERS):
            raise ValueError(f"it changes text by {str(node.get('type'))[:40]}, which no tokenizer of FLUX.2 does")
        if place == "normalizer":
            growth *= max(1, len(str(node.get("content", ""))), len(str(node.get("prepend", ""))))
        if "Regex" in node:
            _known(node["Regex"])
        waiting += [(place, inner) for inner in node.values()]
    if growth > MOST_GROWTH:
        raise ValueError("its replacements make a text many times longer, which no tokenizer of FLUX.2 does")
    ready = tokenizers.Tokenizer.from_str(text)
    ready.no_padding()
    ready.no_truncation()
    return ready


def from_tekken(content):
    """A `tokenizers.Tokenizer` from the parsed JSON of a tekken file: ids are the special tokens, then the byte strings
    by rank.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    config = content["config"]
    special = _special_tokens(content)
    room = config.get("default_vocab_size", len(special) + len(content["vocab"])) - len(special)
    # a file may list more than the model's vocabulary
    ranked = sorted(content["vocab"], key=lambda entry: entry["rank"])[:room]
    if any(entry["rank"] != rank for rank, entry in enumerate(ranked)):
        raise ValueError("the ranks of its tokens have gaps, so their ids are not known")
    ranks = {base64.b64decode(entry["token_bytes"]): rank for rank, entry in enumerate(ranked)}
    longest = max(map(len, ranks), default=0)
    if len(ranks) > MOST_TOKENS or sum(map(len, ranks)) > MOST_TOKEN_BYTES or longest > LONGEST_TOKEN:
        raise ValueError(
            f"it lists {len(ranks)} tokens, the longest of {longest} bytes; no published tokenizer is so large"
        )
    text = {token: _printable(token) for token in ranks}
    vocabulary = {token: number for number, token in enumerate(special)} | {
        text[token]: len(special) + rank for token, rank in ranks.items()
    }
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=[(text[a], text[b]) for a, b in _merges(ranks)], ignore_merges=True)
    )
    words = pre_tokenizers.Split(Regex(_known(config["pattern"])), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder, tokenizer.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def _special_tokens(content):
    """Special tokens in the order of their ids. A file may list fewer than it reserves; the rest are fillers that no
    text produces.
    """
    listed = {entry["rank"]: _special_text(entry) for entry in content["special_tokens"]}
    count = max(content["config"].get("default_num_special_tokens", 0), max(listed, default=-1) + 1)
    if count > MOST_SPECIAL:
        raise ValueError(f"it reserves {count} special tokens; the published file has 1,000")
    return [listed.get(number, f"<SPECIAL_{number}>") for number in range(count)]


def _special_text(entry):
    """A special token as text; some files give it as bytes."""
    return entry["token_str"] if entry.get("token_str") else base64.b64decode(entry["token_bytes"]).decode("utf-8")


def _merges(ranks):
    """Pairs of tokens that join to a token, in the order in which they must be tried: by the rank of the result, then
    of the parts.
    """
    for token in sorted(ranks, key=ranks.get):
        splits = [
            (token[:at], token[at:]) for at in range(1, len(token)) if token[:at] in ranks and token[at:] in ranks
        ]
        yield from sorted(splits, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))


def _byte_letters():
    """The letter that stands for each byte in byte-level vocabularies: itself where it prints, else a letter from 256
    on.
    """
    prints = (
        set(range(ord("!"), ord("~") + 1)) | set(range(ord("¡"), ord("¬") + 1)) | set(range(ord("®"), ord("ÿ") + 1))
    )
    hidden = [value for value in range(256) if value not in prints]
    return {value: chr(value) if value in prints else chr(256 + hidden.index(value)) for value in range(256)}


LETTERS = _byte_letters()


def _printable(token):
    return "".join(LETTERS[value] for value in token)
