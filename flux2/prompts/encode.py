"""Prompts -> conditioning, from disk when this encoder has read them before.

  done = encode(clip, "a cat", PromptCache(folder, limit))
  done.conditioning, done.hit, done.report

For an ordinary prompt the conditioning is bit for bit what core's CLIPTextEncode gives with the same CLIP. What the key
of an entry holds: the prompt, the encoder's fingerprint and how it was loaded, the token limit, the device, and the
versions of ComfyUI and PyTorch. A CLIP whose content is not known here (another loader, a LoRA, hooks) is encoded and
not kept, and the report says why.
"""

import logging
import time
from dataclasses import dataclass

import comfy.model_management
import comfy.utils
import torch

from ..loading import lazy_clip
from . import text as prompt_text, tokens as prompt_tokens

FORMAT = 1
ROWS = 8  # prompts in one pass
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncodedPrompt:
    """An encoded prompt."""

    conditioning: list
    hit: bool
    report: str


def encode(clip, text, cache=None, limit=prompt_tokens.LIMIT):
    """EncodedPrompt for one prompt. `cache` is a PromptCache or None; `limit` the largest number of tokens, or None."""
    return encode_all(clip, [text], cache, limit)[0]


def encode_all(clip, texts, cache=None, limit=prompt_tokens.LIMIT):
    """[EncodedPrompt] for several prompts: those on disk are read, the others go through the encoder together, with a
    progress bar.
    """
    lazy_clip.source_of(clip)  # refuses a CLIP that is not there
    several = len(set(texts)) > 1
    jobs = {text: PromptJob(clip, text, cache, limit, several) for text in dict.fromkeys(texts)}
    bar = comfy.utils.ProgressBar(len(jobs))
    waiting = [job for job in jobs.values() if not job.read()]
    bar.update(len(jobs) - len(waiting))
    for job in waiting:
        job.tokenize()
    for group in _groups(clip, waiting):
        comfy.model_management.throw_exception_if_processing_interrupted()
        start = time.perf_counter()
        results = (
            one_pass(clip, [job.tokens for job in group])
            if len(group) > 1
            else [clip.encode_from_tokens_scheduled(group[0].tokens)]
        )
        for job, conditioning in zip(group, results):
            job.keep(conditioning, time.perf_counter() - start, len(group))
        bar.update(len(group))
    return [jobs[text].done for text in texts]


class PromptJob:
    """One prompt on its way: read from disk, or tokenised, encoded and kept. `done` is the EncodedPrompt then."""

    def __init__(self, clip, text, cache, limit, several):
        self.clip, self.cache, self.limit = clip, cache, limit
        self.text, self.notes = prompt_text.clean(text)
        self.reason = unkept(clip, self.text) if cache else "keeping prompts on disk is switched off"
        self.several, self.tokens, self.done = several, None, None

    def key(self, together=False):
        """The name of the prompt's entry. One encoded together with others differs from one encoded alone by rounding,
        so it has an entry of its own, which only other lists of prompts read: for a single prompt a hit is exact.
        """
        return {**key(self.clip, self.text, self.limit), **({"together": True} if together else {})}

    def read(self):
        """Whether the prompt was on disk and has been read from there."""
        if self.reason:
            return False
        start = time.perf_counter()
        found = self.cache.read(self.key()) or (self.several and self.cache.read(self.key(together=True)))
        if not found:
            return False
        conditioning, self.notes = found
        device = comfy.model_management.intermediate_device()
        conditioning = [
            [cond.to(device), {k: v.to(device) if torch.is_tensor(v) else v for k, v in extra.items()}]
            for cond, extra in conditioning
        ]
        took = time.perf_counter() - start
        self._finish(conditioning, True, f"Hit: read from disk in {took:.2f} s. The text encoder was not used.")
        return True

    def tokenize(self):
        """The first thing that needs a lazy encoder."""
        self.tokens, notes = prompt_tokens.tokenize(self.clip, self.text, self.limit)
        self.notes += notes

    def keep(self, conditioning, seconds, together):
        """Write what was encoded, in one pass with `together` prompts, to disk unless there is a reason not to."""
        how = f"encoded in {seconds:.2f} s" + (f" together with {together - 1} more" if together > 1 else "")
        self.reason = self.reason or unkept(self.clip, self.text)  # a lazy encoder is known by now
        if not self.reason:
            try:
                size = self.cache.write(self.key(together > 1), conditioning, self.notes)
                return self._finish(conditioning, False, f"Miss: {how} and kept on disk ({size / 2**20:.1f} MiB).")
            except (ValueError, OSError) as error:
                self.reason = str(error)
        self._finish(conditioning, False, f"Miss: {how}. Not kept on disk: {self.reason}.")

    def _finish(self, conditioning, hit, line):
        self.done = EncodedPrompt(conditioning, hit, "\n".join([line, *self.notes]))
        log.info("%s", self.done.report)


# --- what is kept
# ------------------------------------------------------------------------------------------------------


def key(clip, text, limit):
    """Everything that decides what a prompt is encoded to, as a JSON value."""
    import comfyui_version

    source = lazy_clip.source_of(clip)
    device = clip.patcher.load_device if lazy_clip.is_loaded(clip) else source.load_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    # float32 has no mark, so that what was kept before there was a choice is still found
    computed = {} if source.computed_in == "float32" else {"computed_in": source.computed_in}
    return {
        "format": FORMAT,
        "prompt": text,
        "encoder": source.fingerprint,
        "padding": source.padding,
        "options": source.options,
        "limit": limit,
        "device": name,
        "dtype": str(comfy.model_management.text_encoder_dtype(device)),
        "comfyui": comfyui_version.__version__,
        "torch": torch.__version__,
        **computed,
    }


def unkept(clip, text):
    """Why an encoded prompt cannot be kept under this encoder's name, as part of a sentence; empty when it can. Loads
    nothing.
    """
    if not lazy_clip.is_loaded(clip):
        patched = ""
    elif lazy_clip.source_of(clip) is None:
        return "this CLIP is not from Load FLUX.2 Text Encoder, so what is in it is not known"
    else:
        patched = _changed(clip)
    if patched:
        return f"{patched}, so it is no longer the encoder in the file"
    if clip.layer_idx is not None or clip.tokenizer_options or clip.apply_hooks_to_conds or clip.use_clip_schedule:
        return "another node changed the options of this CLIP"
    return "it may contain an embedding, whose file is not part of its name" if prompt_text.has_embedding(text) else ""


def _changed(clip):
    """How a loaded CLIP differs from its file, as the beginning of a sentence, or nothing."""
    patcher = clip.patcher
    if patcher.patches:
        return f"a LoRA or another patch is on this CLIP ({len(patcher.patches)} weights)"
    objects = set(patcher.object_patches) - {"manual_cast_dtype"}  # ComfyUI itself sets that one on every CLIP
    changed = (patcher.hook_patches, patcher.forced_hooks, objects, patcher.weight_wrapper_patches, patcher.injections)
    if any(changed) or clip.cond_stage_model is not patcher.model:
        return "another node changed this CLIP"
    return ""


# --- several prompts in one pass
# -----------------------------------------------------------------------------------------


def _groups(clip, jobs):
    """Jobs in lists that are encoded together, of similar lengths; alone where the encoder takes one at a time."""
    if not all(_can_join(clip, job.tokens) for job in jobs):
        return [[job] for job in jobs]
    ordered = sorted(jobs, key=lambda job: _length(job.tokens))
    return [ordered[first : first + ROWS] for first in range(0, len(ordered), ROWS)]


def _can_join(clip, tokens):
    """Whether tokens may share a pass: one row of plain ids, of an encoder that adds nothing per prompt (as padding
    'reference' does).
    """
    source = lazy_clip.source_of(clip)
    rows = next(iter(tokens.values()))
    return (
        source is not None
        and source.padding == "zeros"
        and prompt_tokens.is_flux2(clip)
        and not clip.patcher.forced_hooks
        and clip.apply_hooks_to_conds is None
        and len(tokens) == len(rows) == 1
        and all(isinstance(entry[0], int) for entry in rows[0])
    )


def _length(tokens):
    return len(next(iter(tokens.values()))[0])


def one_pass(clip, tokens):
    """Conditionings of several prompts from one pass through the encoder.

    Shorter rows are filled on the right: attention is causal, so nothing in front of the filling changes. Core lays the
    rows behind one another.
    """
    name = clip.tokenizer.clip_name
    pad = getattr(clip.cond_stage_model, clip.tokenizer.clip).special_tokens["pad"]
    rows = [entry[name][0] for entry in tokens]
    longest = max(map(len, rows))
    ((cond, extra),) = clip.encode_from_tokens_scheduled(
        {name: [row + [(pad, 1.0)] * (longest - len(row)) for row in rows]}
    )
    places = [slice(number * longest, number * longest + len(row)) for number, row in enumerate(rows)]
    return [
        [[cond[:, place].clone(), {k: v[:, place].clone() if torch.is_tensor(v) else v for k, v in extra.items()}]]
        for place in places
    ]
