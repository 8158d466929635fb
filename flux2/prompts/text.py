"""What is in a prompt that FLUX.2 does not read as people may expect, found in the text alone, before any tokenizer.

`clean(text)` gives the text that is encoded and the sentences to show. Nothing is dropped without a sentence.
"""

import re
import unicodedata

from ...attention.errors import UserError
from ..checkpoints.header import open_regular

MOST_LETTERS = 200_000  # of a prompt: some 50,000 tokens, where FLUX.2 reads 512
MOST_PROMPTS = 10_000  # of a list
KEPT_CONTROLS = "\t\n\r"
WEIGHT = re.compile(r"\([^()\n]*:\s*\d+(?:\.\d*)?\s*\)")
EMBEDDING = re.compile(r"(?:(?<=\s)|^)embedding:[ \t]*\S*")
LORA = re.compile(r"<lora:[^<>\n]*>")


def clean(text):
    """(text without control characters, notes). ValueError for anything but text."""
    check_bounds(text)
    kept = "".join(
        letter for letter in text if letter in KEPT_CONTROLS or unicodedata.category(letter) not in ("Cc", "Cs")
    )
    notes = []
    if len(kept) < len(text):
        notes.append(
            f"{count(len(text) - len(kept), 'control character')} removed: no tokenizer has a meaning for them."
        )
    return kept, notes + remarks(kept)


def check_bounds(text):
    """ValueError for what is no text, or one that is no prompt any more. Patterns of tokenizers take minutes for
    millions of letters, during which nothing can be cancelled.
    """
    if not isinstance(text, str):
        raise UserError(
            f"A prompt must be text; this is {type(text).__name__}. Connect an output of the type STRING.", "prompts"
        )
    if len(text) > MOST_LETTERS:
        raise UserError(
            f"The prompt is too long: it has {len(text)} letters, and FLUX.2 reads 512 tokens, about 2,000 letters. "
            f"At most {MOST_LETTERS} can be given. Shorten it, or use Encode Prompt List for a list of prompts.",
            "prompts",
        )


def check_characters(text):
    """ValueError for a text with half of a character, which no tokenizer takes; `clean` leaves them out."""
    half = next((letter for letter in text if unicodedata.category(letter) == "Cs"), None)
    if half:
        raise UserError(
            f"The prompt has half of a character in it (U+{ord(half):04X}), as a program leaves it that cuts an emoji "
            "in two. Delete what stands there and type it again.",
            "prompts",
        )


def remarks(text):
    """Sentences about syntax of other models in a prompt, and about a prompt that is empty."""
    notes = []
    if not text.strip():
        notes.append("The prompt is empty: FLUX.2 gets its system message alone.")
    if WEIGHT.search(text):
        notes.append(
            f"FLUX.2 has no prompt weights: {quoted(WEIGHT, text)} is read as it stands, brackets and number "
            "included. Say in words what matters more."
        )
    if EMBEDDING.search(text):
        notes.append(
            f"FLUX.2 was trained without embeddings: {quoted(EMBEDDING, text)} is handled as CLIP Text Encode does, "
            "which leaves out the name, and puts in the vectors of a file if there is one of this encoder's width."
        )
    if LORA.search(text):
        notes.append(f"A prompt loads no LoRA: {quoted(LORA, text)} is read as text. Use a LoRA loader node.")
    return notes


def has_embedding(text):
    return bool(EMBEDDING.search(text))


def quoted(pattern, text):
    """The first match, shortened, in quotation marks."""
    found = pattern.search(text)[0]
    return f"'{found[:40]}{'...' if len(found) > 40 else ''}'"


def count(number, noun):
    return f"{number} {noun}{'s' if number != 1 else ''}"


def split(text, how):
    """The prompts in a text: one on each line, or paragraphs between blank lines. Empty ones are left out."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    parts = text.split("\n") if how == "each line" else re.split(r"\n[ \t]*\n", text)
    found = [part.strip() for part in parts if part.strip()]
    if len(found) > MOST_PROMPTS:
        raise UserError(
            f"There are {len(found)} prompts, and at most {MOST_PROMPTS} can be encoded in one run. Split them.",
            "prompts",
        )
    return found


def read_file(path, limit=16 * 2**20):
    """The text of a file. ValueError with a sentence when it is not readable as text."""
    try:
        with open_regular(path) as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise UserError(f"The prompt file {path.name} cannot be read: {error.strerror or error}.", "prompts") from None
    if len(data) > limit:
        raise UserError(
            f"The prompt file {path.name} is larger than {limit // 2**20} MiB. Prompts are text; choose another file "
            f"or split it.",
            "prompts",
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"The prompt file {path.name} is not UTF-8 text (byte {error.start}). Save it as UTF-8.",
            "prompts",
        ) from None
