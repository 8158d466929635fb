"""Text encoders that know where they come from, and text encoders that are not read before a prompt needs them.

  clip = text_encoder(EncoderSource(path), lambda: load.load_text_encoder(path), when_needed=True)
  source_of(clip).fingerprint        # a name made from the content of the files; see fingerprint.py

A CLIP carries its EncoderSource as an attachment of its patcher, so clones and LoRA loaders hand it on. A lazy CLIP is
a comfy.sd.CLIP whose patcher, network and tokenizer come into being when somebody first uses one of them: to every
other node it is an ordinary CLIP. Using is more than looking: ComfyUI's executor and its caches ask each output for
`patcher` and `is_dynamic` between the nodes, and both are answered without reading the file.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import comfy.model_management
import comfy.sd

from ...attention.errors import UserError
from .. import error_links
from ..checkpoints import identify
from ..checkpoints.header import open_checkpoint
from . import encoder_precision, tekken
from .encoder_families import FAMILIES, dimensions
from .examine import examine, tokenizer_place
from .fingerprint import fingerprint

NOW, WHEN_NEEDED = "now", "when needed"
LOADS = (NOW, WHEN_NEEDED)
ATTACHMENT = "flux2_source"
PARTS = ("patcher", "cond_stage_model", "tokenizer")  # of a CLIP; what a lazy one does not have yet


@dataclass(frozen=True)
class EncoderSource:
    """Where a text encoder comes from and how it was asked for. `fingerprint` and `kind` are filled in by
    `text_encoder`.
    """

    path: str
    device: str = "default"
    padding: str = "zeros"
    memory: str = "auto"  # one of memory.MODES; changes nothing in what is encoded
    # further (name, value) pairs that may change what a prompt is encoded to, such as the attention kernel
    options: tuple = ()
    precision: str = "auto"  # one of encoder_precision.PRECISIONS
    kind: str = ""  # a key of FAMILIES
    fingerprint: str = ""

    @property
    def load_device(self):
        """Where ComfyUI will run the encoder, known without loading it."""
        import torch

        return torch.device("cpu") if self.device == "cpu" else comfy.model_management.text_encoder_device()

    @property
    def computed_in(self):
        """Name of the number format in which prompts are computed: what `precision` stands for on the load device."""
        return encoder_precision.resolved(self.precision, self.load_device)


def examined(source):
    """The EncoderSource with its fingerprint, after the checks that need the headers alone. Raises CheckpointError."""
    checkpoint = open_checkpoint(source.path)
    found = examine(checkpoint, identify.TEXT_ENCODER)
    family = FAMILIES[found.kind]
    sizes, place = dimensions(checkpoint, found, family), tokenizer_place(checkpoint, family)
    data = tekken.read_file(place) if isinstance(place, Path) else b""
    return replace(source, kind=found.kind, fingerprint=fingerprint(checkpoint, found, family, sizes, data))


def text_encoder(source, build: Callable, when_needed=False):
    """CLIP of an EncoderSource, by `build`: now, or when it is first used. A bad file is refused now in both cases."""
    source = examined(source)
    if when_needed:
        return LazyCLIP(SharedEncoder(source, build))
    clip = build()
    clip.patcher.attachments[ATTACHMENT] = source
    return clip


def source_of(clip):
    """The EncoderSource of a CLIP, None when it is of another loader. Loads nothing. ValueError without a CLIP."""
    if clip is None:
        raise UserError(
            "There is no CLIP: the checkpoint that should give one has no text encoder. Use Load FLUX.2 Text Encoder.",
            "prompts",
        )
    return clip.shared.source if not is_loaded(clip) else clip.patcher.attachments.get(ATTACHMENT)


def is_loaded(clip):
    """Whether a CLIP has its weights; only a lazy one may not."""
    return not isinstance(clip, LazyCLIP) or "cond_stage_model" in vars(clip)


class SharedEncoder:
    """The one loaded CLIP that all clones of a lazy CLIP share. The content is examined again at loading: a file may
    have been replaced since.
    """

    def __init__(self, source, build):
        self.source, self.build = source, build
        self.clip, self.lock = None, threading.Lock()

    def load(self):
        with self.lock:
            if self.clip is None:
                with error_links.links():
                    self.clip = text_encoder(self.source, self.build)
                self.source = source_of(self.clip)
            return self.clip


class UnreadPatcher:
    """`patcher` of a LazyCLIP that was not read: no ModelPatcher, so whoever only looks passes it by. Any use of it
    reads the file and goes to the real patcher.
    """

    def __init__(self, clip):
        vars(self)["clip"] = clip

    def __getattr__(self, name):
        if name.startswith("__"):  # what Python's own protocols (copying, pickling) ask of any object
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.clip.read().patcher, name)

    def __setattr__(self, name, value):
        setattr(self.clip.read().patcher, name, value)


class LazyCLIP(comfy.sd.CLIP):
    """A CLIP whose file is read when its network, its tokenizer or something of its patcher is first used."""

    def __init__(self, shared):
        super().__init__(no_init=True)
        self.shared = shared
        self.layer_idx, self.use_clip_schedule, self.apply_hooks_to_conds = None, False, None
        self.tokenizer_options = {}

    def read(self):
        """This CLIP with its patcher, network and tokenizer."""
        if not is_loaded(self):
            loaded = self.shared.load().clone()
            vars(self).update({part: getattr(loaded, part) for part in PARTS})
        return self

    def __getattr__(self, name):
        if name == "patcher":
            return UnreadPatcher(self)
        if name not in PARTS:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return vars(self.read())[name]

    def load_model(self, tokens={}):
        """ComfyUI hands the patcher itself to its memory management here, so it must be the real one."""
        return comfy.sd.CLIP.load_model(self.read(), tokens)

    def is_dynamic(self):
        """Unread: yes, for ComfyUI's RAM cache takes that as "dropping this frees no memory", and it holds none."""
        return super().is_dynamic() if is_loaded(self) else True

    def clone(self, disable_dynamic=False):
        if is_loaded(self) or disable_dynamic:
            return comfy.sd.CLIP.clone(self.read(), disable_dynamic=disable_dynamic)
        copy = LazyCLIP(self.shared)
        copy.layer_idx, copy.use_clip_schedule = self.layer_idx, self.use_clip_schedule
        copy.apply_hooks_to_conds = self.apply_hooks_to_conds
        copy.tokenizer_options = self.tokenizer_options.copy()
        return copy
