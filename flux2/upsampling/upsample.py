"""Prompt upsampling: a short prompt, or a wish about reference images -> a text that FLUX.2 follows better, written by
Mistral 3.

  text, report = upsample(clip, "a cat with a hat", [], WritingSettings(seed=1))

The CLIP must come from Load FLUX.2 Text Encoder, from a file or folder that also holds what writing needs; see
mistral.py.
"""

import time
from dataclasses import dataclass

import comfy.model_management
import comfy.utils
import torch

from ...attention.errors import UserError
from ..loading import lazy_clip
from ..prompts import text as prompt_text, tokens as prompt_tokens
from ..checkpoints.header import CheckpointError
from .vision_inputs import frames, image_tokens, prepared
from .mistral import ADVICE, direct, parts_of, writer_of

MOST_IMAGES = 4
MOST_TOKENS = 2048  # of a request; the reference cuts there too
LEAST_TEMPERATURE = 1e-4
SHOW_EVERY = 0.25  # seconds between two looks at the growing text
GENERATE = """You write prompts for FLUX.2, a model that paints pictures from text. Rework the request you are given \
into a richer prompt whose subject and intent are untouched.

How to do it:
1. Form: a request in fields or JSON stays in that form with fuller values; ordinary language becomes well-developed \
paragraphs.
2. What can be seen: say concretely which shapes, sizes, surfaces and materials there are, where the light comes from, \
how hard and which colour it is, how shadows fall, what stands where, and what surrounds it.
3. Lettering: everything that can be read in the picture goes in quotation marks, in the language of the request. \
Where a thing would carry lettering in reality, such as a shop sign, a label or a display, decide what it says.

Answer with the new prompt and no other word."""
EDIT = """You direct FLUX.2 when it edits pictures. Turn the wish you are given, together with the pictures you see, \
into a single compact instruction of 50 to 80 words, or about 30 when the wish is short.

What makes it good:
- It is one instruction with no remarks around it.
- Its wording is sober and exact, without ornament.
- It names both the change and what remains as it was: faces, light, composition.
- It speaks of things that are really in the pictures.
- It is put positively: what to preserve, not what to avoid.
- Vague ideas become things an eye can see, with colours and materials.
- It suits a general audience.

Answer with the instruction as plain text and no other word."""


@dataclass(frozen=True)
class WritingSettings:
    """How to write. Temperature 0 always takes the likeliest token."""

    seed: int = 0
    temperature: float = 0.15
    max_tokens: int = 512

    def __post_init__(self):
        if not (0 <= self.temperature <= 10 and self.max_tokens >= 1):
            raise UserError(
                f"Temperature {self.temperature} with {self.max_tokens} tokens cannot be used: the temperature must "
                "be between 0 and 10, and at least one token must be written.",
                "improving-prompts",
            )


@dataclass(frozen=True)
class WritingRequest:
    """A request as the network takes it."""

    ids: torch.Tensor  # (1, T)
    pixels: dict  # pixel_values and image_sizes, or nothing
    notes: list


def upsample(clip, text, images=(), settings=WritingSettings(), show=None):
    """(the improved text, a report). `show` gets the growing text while it is written. ValueError with a sentence for
    what cannot be done.
    """
    text, notes = prompt_text.clean(text)
    if not text.strip():
        raise UserError(
            "There is nothing to improve: the prompt is empty. Write what the image should show, or what to change "
            "in the reference images.",
            "improving-prompts",
        )
    found = frames(images, MOST_IMAGES)
    parts = parts_of(lazy_clip.source_of(clip))
    if found and not parts.vision:
        raise CheckpointError(
            f"{parts.checkpoint.name} has no vision tower, so it cannot look at reference images. Take the images "
            f"off, or: {ADVICE}",
            "improving-prompts",
        )
    inner = prompt_tokens.inner_of(clip)
    writer = writer_of(
        clip, parts, inner.tokenizer.convert_tokens_to_ids(prompt_tokens.IMAGE), lazy_clip.source_of(clip).memory
    )
    asked = request(inner, text, found, writer.network.config)
    start = time.perf_counter()
    try:
        ids = write(clip, writer, inner, asked, settings, show)
    finally:
        writer.rest(clip)
    written = inner.tokenizer.decode(ids, skip_special_tokens=True).strip()
    if not written:
        raise UserError("Mistral wrote nothing. Try another seed, or a higher temperature.", "improving-prompts")
    return written, report(len(ids), time.perf_counter() - start, settings, notes + asked.notes)


def report(count, seconds, settings, notes):
    """How much was written, how fast, and the notes."""
    cut = f"It was stopped at {settings.max_tokens} tokens and may end in the middle of a sentence."
    ended = cut if count >= settings.max_tokens else "It came to its end."
    return "\n".join(
        [
            f"Wrote {prompt_text.count(count, 'token')} in {seconds:.1f} s ({count / max(seconds, 1e-6):.1f} a "
            f"second). {ended}",
            *notes,
        ]
    )


def request(inner, text, found, config):
    """The chat that asks for a better prompt. Nothing in the text becomes a special token."""

    def special(name):
        return inner.tokenizer.convert_tokens_to_ids(name)

    notes, pixels, shown = [], {}, []
    words = prompt_tokens.plain_ids(inner, text)
    if len(words) > MOST_TOKENS:
        notes.append(f"The prompt is too long: of its {len(words)} tokens only the first {MOST_TOKENS} were read.")
    if found:
        unit = config.vision_config.patch_size * config.spatial_merge_size
        values, sizes = prepared(found, unit, config.vision_config.image_size)
        pixels = {"pixel_values": values, "image_sizes": sizes}
        shown = image_tokens(sizes, unit, special("[IMG]"), special("[IMG_BREAK]"), special("[IMG_END]"))
    system = prompt_tokens.plain_ids(inner, EDIT if found else GENERATE)
    ids = [
        inner.start_token,
        special("[SYSTEM_PROMPT]"),
        *system,
        special("[/SYSTEM_PROMPT]"),
        special("[INST]"),
        *shown,
        *words[:MOST_TOKENS],
        special("[/INST]"),
    ]
    return WritingRequest(torch.tensor([ids]), pixels, notes)


def write(clip, writer, inner, asked, settings, show):
    """The ids that the network writes, without the end token."""
    device, length = clip.patcher.load_device, asked.ids.shape[1]
    writer.load(clip, length + settings.max_tokens)
    ids = asked.ids.to(device)
    pixels = {
        name: value.to(device, writer.dtype) if value.is_floating_point() else value.to(device)
        for name, value in asked.pixels.items()
    }
    end = inner.tokenizer.convert_tokens_to_ids("</s>")
    with (
        comfy.model_management.cuda_device_context(device),
        seeded(settings.seed, device),
        direct(writer),
        torch.no_grad(),
    ):
        out = writer.network.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **pixels,
            **choice(settings),
            max_new_tokens=settings.max_tokens,
            eos_token_id=end,
            pad_token_id=inner.pad_token,
            logits_processor=[only_numbers],
            stopping_criteria=[watch(length, settings.max_tokens, inner, show)],
        )
    written = out[0, length:].tolist()
    return written[:-1] if written and written[-1] == end else written


def choice(settings):
    """How transformers chooses a token: the likeliest, or sampled from all of them. A temperature next to nothing would
    overflow and means the likeliest.
    """
    sampled = settings.temperature > LEAST_TEMPERATURE
    return (
        {"do_sample": True, "temperature": settings.temperature, "top_k": 0, "top_p": 1.0}
        if sampled
        else {"do_sample": False}
    )


def only_numbers(ids, scores):
    """Refuse scores to choose a token from that are NaN: drawing from them would end a GPU's context, and everything in
    the server with it.
    """
    if scores.isnan().any():
        raise UserError(
            "Mistral wrote nothing: its numbers overflowed. Load the text encoder from bf16 weights, and take LoRAs "
            "off its CLIP.",
            "improving-prompts",
        )
    return scores


def watch(length, most, inner, show):
    """What runs after each token: cancels, moves the progress bar, shows the text. Never ends the writing by itself."""
    bar, shown = comfy.utils.ProgressBar(most), [0.0]

    def after_token(ids, scores, **kwargs):
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(ids.shape[1] - length)
        if show and time.perf_counter() - shown[0] > SHOW_EVERY:
            shown[0] = time.perf_counter()
            show(inner.tokenizer.decode(ids[0, length:].tolist(), skip_special_tokens=True))
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    return after_token


class seeded:
    """Random numbers from a seed inside a with block; outside, torch's own go on as before."""

    def __init__(self, seed, device):
        self.seed, self.fork = (
            seed % 2**63,
            torch.random.fork_rng(range(torch.cuda.device_count()) if device.type == "cuda" else []),
        )

    def __enter__(self):
        self.fork.__enter__()
        torch.manual_seed(self.seed)

    def __exit__(self, *error):
        return self.fork.__exit__(*error)
