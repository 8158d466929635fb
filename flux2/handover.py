"""What a fused block hands to the next one: the normed input of its first product, written in the same pass as its own output.

Core gives every block the hidden states and may change them in between (a ControlNet adds to them in place), and so may another pack. So what was
written ahead is used only while it belongs to them for certain: the same tensor, not written to since, which PyTorch counts, and the same modulation.
"""
from typing import NamedTuple

import torch


class Reader(NamedTuple):
    """Who reads the hidden states next: a LayerNorm without weights of its own, and the linear layer behind it."""
    norm: torch.nn.Module
    linear: torch.nn.Module


class Note(NamedTuple):
    """A normed input, and all that it depends on."""
    normed: torch.Tensor
    x: torch.Tensor
    version: int
    mod: object
    segment: tuple
    scale: torch.Tensor | None

    def fits(self, x, mod, segment, scale):
        return self.x is x and self.version == x._version and self.mod is mod and self.segment == segment and per(self.scale) == per(scale)


class Handover:
    """Normed inputs that were written ahead, by the layer that will read them: two between double blocks, one between single blocks."""

    def __init__(self):
        self.notes = {}

    def forget(self):
        self.notes.clear()

    def add(self, x, delta, gate, *, segment, finite):
        """x += delta * gate, in place, where nothing is written ahead."""
        from .kernels.norm import add_gated
        add_gated(x, delta, gate, segment=segment, finite=finite)

    def add_and_note(self, x, delta, gate, reader, mod, scale, *, segment, finite):
        """add, and in the same launch what `reader` will ask for: x normed and modulated by `mod`. x: counted. scale: as Products.scale_for gives it."""
        from .kernels.norm import add_gated_norm_modulate
        normed = add_gated_norm_modulate(x, delta, gate, mod.shift, mod.scale, segment=segment, eps=reader.norm.eps, fp8_scale=scale, finite=finite)
        self.notes[reader.linear] = Note(normed, x, x._version, mod, segment, scale)

    def normed(self, x, reader, mod, scale, *, segment):
        """norm_modulate of x for a reader; from the note where there is one that fits. A scale for each token is filled in."""
        from .kernels.norm import norm_modulate
        note = self.notes.pop(reader.linear, None)
        if note is None or not note.fits(x, mod, segment, scale):
            return norm_modulate(x, mod.shift, mod.scale, segment=segment, eps=reader.norm.eps, fp8_scale=scale)
        if per(scale) == "token":
            scale.copy_(note.scale)
        return note.normed


def per(scale):
    """What an fp8 scale is for: "token", "tensor", or None where there is none."""
    return None if scale is None else "token" if scale.ndim == 3 else "tensor"


def counted(x):
    """x as a tensor whose in-place changes PyTorch counts; under inference_mode an alias of it, which is to be handed on in its place."""
    if not x.is_inference():
        return x
    with torch.inference_mode(False):
        return torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())
