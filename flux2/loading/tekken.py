"""Mistral's tokenizer, from its tekken file or from a Hugging Face tokenizer.json, as a `tokenizers.Tokenizer`.

A tekken file lists byte strings by rank; byte pair encoding needs the merges that build them, which follow from the
ranks. ComfyUI 0.30 leaves this to transformers, whose converter changed its arguments (MistralConverter in transformers
5.23 takes a file), so it is done here with the tokenizers library alone. Where a checkpoint keeps its tokenizer:
`find`.
"""

import base64
import json
from pathlib import Path

from ..checkpoints.header import CheckpointError

TENSORS = ("tekken_model", "tokenizer_json")  # uint8 tensors inside a text encoder file
FILES = ("tekken.json", "tokenizer.json")  # files beside the weights, or in the folder tokenizer/ next to theirs


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
    import tokenizers

    try:
        content = json.loads(data)
        return (
            from_tekken(content)
            if "special_tokens" in content
            else tokenizers.Tokenizer.from_str(bytes(data).decode("utf-8"))
        )
    except Exception as error:  # the Rust side raises plain Exception
        raise CheckpointError(
            f"The tokenizer in {origin} cannot be read ({type(error).__name__}: {error}). It must be Mistral's "
            "tekken.json or a Hugging Face tokenizer.json; download the text encoder again."
        ) from None


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
    ranks = {base64.b64decode(entry["token_bytes"]): rank for rank, entry in enumerate(ranked)}
    text = {token: _printable(token) for token in ranks}
    vocabulary = {token: number for number, token in enumerate(special)} | {
        text[token]: len(special) + rank for token, rank in ranks.items()
    }
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=[(text[a], text[b]) for a, b in _merges(ranks)], ignore_merges=True)
    )
    words = pre_tokenizers.Split(Regex(config["pattern"]), behavior="isolated")
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
    listed = {entry["rank"]: entry["token_str"] for entry in content["special_tokens"]}
    count = max(content["config"].get("default_num_special_tokens", 0), len(listed))
    return [listed.get(number, f"<SPECIAL_{number}>") for number in range(count)]


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
