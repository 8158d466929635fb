"""What a fused block hands to the next one: the normed input of its first product, written in the same pass as its own
output.

Core gives every block the hidden states and may change them in between (a ControlNet adds to them in place), and so may
another pack. So what was written ahead is used only while it belongs to them for certain: the same tensor, not written
to since, which PyTorch counts, and the same modulation.
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
    shift: torch.Tensor
    scale: torch.Tensor
    segment: tuple
    linear: torch.nn.Module
    fp8_scale: torch.Tensor | None

    def fits(self, x, reader, mod, segment, fp8_scale):
        same = (
            self.x is x
            and self.version == x._version
            and self.shift is mod.shift
            and self.scale is mod.scale
            and self.linear is reader.linear
        )
        return same and self.segment == segment and per(self.fp8_scale) == per(fp8_scale)


class Handover:
    """Normed inputs that were written ahead, by the name of the hidden states: of "img" and "txt" between double
    blocks,
    of "joint" between single ones.
    """

    def __init__(self):
        self.notes, self.missed = {}, set()

    def forget(self):
        self.notes.clear()
        self.missed.clear()

    def add(self, name, x, delta, gate, *, segment, finite):
        """x += delta * gate, in place, where nothing is written ahead."""
        from .kernels.norm import add_gated

        self.notes.pop(name, None)
        add_gated(x, delta, gate, segment=segment, finite=finite)

    def add_and_note(self, name, x, delta, gate, reader, mod, fp8_scale, *, segment, finite):
        """add, and in the same launch what `reader` will ask for: x normed and modulated by `mod`. fp8_scale: as
        Products.scale_for gives it.
        """
        from .kernels.norm import add_gated_norm_modulate

        normed = add_gated_norm_modulate(
            x,
            delta,
            gate,
            mod.shift,
            mod.scale,
            segment=segment,
            eps=reader.norm.eps,
            fp8_scale=fp8_scale,
            finite=finite,
        )
        self.notes[name] = Note(normed, x, x._version, mod.shift, mod.scale, segment, reader.linear, fp8_scale)

    def normed(self, name, x, reader, mod, fp8_scale, *, segment):
        """norm_modulate of x for a reader; from the note where there is one that fits. A scale for each token is filled
        in.
        """
        from .kernels.norm import norm_modulate

        note = self.notes.pop(name, None)
        if note is None or not note.fits(x, reader, mod, segment, fp8_scale):
            # somebody stands in between, and will again: nothing is written for it any more
            self.missed.update(() if note is None else (note.linear,))
            return norm_modulate(x, mod.shift, mod.scale, segment=segment, eps=reader.norm.eps, fp8_scale=fp8_scale)
        if per(fp8_scale) == "token":
            fp8_scale.copy_(note.fp8_scale)
        return note.normed


def per(scale):
    """What an fp8 scale is for: "token", "tensor", or None where there is none."""
    return None if scale is None else "token" if scale.ndim == 3 else "tensor"


def counted(x):
    """x as a tensor whose in-place changes PyTorch counts; under inference_mode an alias of it, which is to be handed
    on
    in its place.
    """
    if not x.is_inference():
        return x
    with torch.inference_mode(False):
        return torch.empty(0, dtype=x.dtype, device=x.device).set_(
            x.untyped_storage(), x.storage_offset(), x.shape, x.stride()
        )
