"""Training of the small text encoder, before the transformer sees it: its three taps must tell what is in each cell of
the picture.

A reader that is thrown away afterwards attends to the prompt's states, once per cell of the grid (and once for the
background, or once for an edit), and names kind, colour and size. One attention and one matrix, no more, so what it can
read a transformer's attention can read too.
"""

import torch
from torch import nn
from torch.nn import functional as F

from . import captions, scenes
from .encoder import HEAD
from .optimiser import Optimiser, halves
from .progress import Clock, Every, Mean, log

CELLS, READERS = 9, 2
# learning rates of Muon and Adam; steps of warming up; share of the time from which they fall
RATES, WARM, DECAY = (2e-3, 2e-3), 100, 0.5
EDITS = 4  # every fourth caption is an instruction
COUNTS, EDIT_COUNTS = (2, 3, 4), (3, 4, 3)  # how often one, two and three objects
NAMED = 0.8  # share of hats whose colour is said
# classes of empty cells and of colours that an instruction does not name
NOBODY, UNSAID = len(scenes.KINDS), len(scenes.COLOURS)
IGNORED = -100


class Reader(nn.Module):
    """States (B, T, C) -> logits {name: (B, queries, classes)} of `fields` {name: classes}."""

    def __init__(self, context, queries, fields):
        super().__init__()
        width = READERS * HEAD
        self.enter, self.key, self.value = (nn.Linear(inputs, width, bias=False) for inputs in (context, width, width))
        self.query = nn.Parameter(torch.randn(queries, width))
        self.leave = nn.ModuleDict({name: nn.Linear(width, classes) for name, classes in fields.items()})

    def forward(self, states, there):
        x = F.layer_norm(self.enter(states), (self.query.shape[1],))
        key, value = self.key(x), self.value(x)
        q, k, v = (
            part.unflatten(-1, (READERS, HEAD)).transpose(1, 2)
            for part in (self.query.expand(len(x), -1, -1).to(key.dtype), key, value)
        )
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=there[:, None, None]).transpose(1, 2).flatten(2)
        return {name: leave(read) for name, leave in self.leave.items()}


def readers(context):
    """The three readers: of cells, of the background, of an instruction."""
    colours = len(scenes.COLOURS)
    return nn.ModuleDict(
        {
            "cells": Reader(context, CELLS, {"kind": NOBODY + 1, "colour": colours, "size": len(scenes.SIZES)}),
            "ground": Reader(context, 1, {"style": 3, "first": len(scenes.GROUNDS), "second": len(scenes.GROUNDS)}),
            "edit": Reader(context, 1, {"task": 3, "kind": len(scenes.KINDS), "old": colours + 1, "new": colours + 1}),
        }
    )


# --- captions and what they say
# ------------------------------------------------------------------------------------------


def scene_captions(rows, generator, **options):
    """(scenes, phrases) of the captions that the flow is trained with."""
    return captions.compose(scenes.sample(rows, generator, COUNTS, **options), generator)


def edit_captions(rows, generator, counts=EDIT_COUNTS, tasks=(1, 1, 1), **options):
    """(scenes before, scenes after, phrases, target (B,)). A hat of no said colour has the usual one. `counts` and
    `tasks`
    are weights: of one, two and three objects, and of recolouring, removing and hats.
    """
    before = scenes.sample(rows, generator, counts, for_edits=True, **options)
    _, task, target, colour = scenes.edit(before, generator, tasks)
    named = scenes.Dice(generator).chance(NAMED, rows)
    colour = torch.where((task == scenes.HAT) & ~named, scenes.usual_hat(before), colour)
    return (
        before,
        scenes.apply(before, task, target, colour),
        captions.instruct(before, task, target, colour, generator, named=named),
        (task, target, colour),
    )


def said_of_scenes(table):
    """({"kind", "colour", "size"}: (B, 9), {"style", "first", "second"}: (B, 1)): classes, IGNORED where there is
    none.
    """

    def by_cell(value, empty):
        found = torch.full((len(table), CELLS + 1), empty, device=value.device)
        return found.scatter(1, torch.where(table.shown, table.cell, CELLS), value)[:, :CELLS]

    cells = {
        "kind": by_cell(table.kind, NOBODY),
        "colour": by_cell(table.colour, IGNORED),
        "size": by_cell(table.size, IGNORED),
    }
    second = torch.where(table.style == scenes.PLAIN, IGNORED, table.ground[:, 1])
    return cells, {"style": table.style[:, None], "first": table.ground[:, :1], "second": second[:, None]}


def said_of_edits(before, phrases, task, target, colour):
    """{"task", "kind", "old", "new"}: (B, 1) classes."""
    of_target = lambda value: value.gather(1, target[:, None])[:, 0]
    says_new = torch.where(
        task == scenes.HAT, _is_colour(phrases[:, captions.NEW_HAT]), phrases[:, captions.NEW] != captions.NONE
    )
    found = {
        "task": task,
        "kind": of_target(before.kind),
        "new": torch.where(says_new, colour, UNSAID),
        "old": torch.where(phrases[:, captions.OLD] != captions.NONE, of_target(before.colour), UNSAID),
    }
    return {name: value[:, None] for name, value in found.items()}


def _is_colour(phrase):
    names = scenes.constant(tuple(captions.NUMBER[f" {name}"] for name in scenes.COLOURS), phrase.device)
    return (phrase[:, None] == names).any(1)


class Lesson:
    """One batch: prompts, and the classes that each reader must find."""

    def __init__(self, rows, ids, generator, **options):
        count = max(1, rows // EDITS)
        table, phrases = scene_captions(rows - count, generator, **options)
        before, _, orders, how = edit_captions(count, generator, **options)
        self.first = rows - count  # of the instructions
        filled = F.pad(orders, (0, phrases.shape[1] - orders.shape[1]), value=captions.NONE)
        self.ids, self.lengths = ids(torch.cat([phrases, filled]))
        cells, ground = said_of_scenes(table)
        self.classes = {"cells": cells, "ground": ground, "edit": said_of_edits(before, orders, *how)}

    def read(self, encoder, readers):
        """{reader: {field: logits (B, queries, classes)}}"""
        states = encoder(self.ids)
        there = torch.arange(states.shape[1], device=states.device) < self.lengths[:, None]
        parts = {"cells": slice(None, self.first), "ground": slice(None, self.first), "edit": slice(self.first, None)}
        return {name: readers[name](states[part], there[part]) for name, part in parts.items()}

    def loss(self, found):
        losses = [
            _error(logits, self.classes[name][field])
            for name, fields in found.items()
            for field, logits in fields.items()
        ]
        return sum(losses) / len(losses)

    def right(self, found):
        """Shares of captions of which every field is read right: of scenes with one, two and three objects, of
        instructions.
        """
        whole = {
            name: torch.stack(
                [
                    ((logits.argmax(-1) == self.classes[name][field]) | (self.classes[name][field] == IGNORED)).all(1)
                    for field, logits in fields.items()
                ]
            ).all(0)
            for name, fields in found.items()
        }
        scene, objects = whole["cells"] & whole["ground"], (self.classes["cells"]["kind"] != NOBODY).sum(1)
        return [float(scene[objects == count].float().mean()) for count in (1, 2, 3)] + [
            float(whole["edit"].float().mean())
        ]


def _error(logits, classes):
    """Mean cross entropy of the classes that there are; 0 if there are none."""
    total = F.cross_entropy(logits.float().flatten(0, 1), classes.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / (classes != IGNORED).sum().clamp_min(1)


# --- training
# ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def tidy(encoder):
    """As the file has it: bf16, and an empty embedding for <pad>, so that encoded padding is zero in every tap, as
    ComfyUI's padding is.
    """
    encoder.model.embed_tokens.weight[captions.PAD] = 0
    for value in encoder.parameters():
        value.copy_(value.bfloat16())


def examine(encoder, readers, ids, generator, autocast, rows=1024):
    """One line about held-out captions."""
    with torch.no_grad(), autocast():
        lesson = Lesson(rows, ids, generator, held_out=True)
        one, two, three, edits = lesson.right(lesson.read(encoder, readers))
    return (
        f"held-out captions read right: of one shape {one:.3f}, of two {two:.3f}, of three {three:.3f}, "
        f"instructions {edits:.3f}"
    )


def train(encoder, seconds, batch, generator, autocast):
    """Train `encoder` in place for `seconds`."""
    device = generator.device
    ids, book = captions.Ids(device), readers(3 * encoder.sizes.hidden).to(device)
    steps = Optimiser(*halves({"text_encoder": encoder, "reader": book}), RATES)
    clock, report, mean, count = Clock(seconds), Every(10), Mean(), 0
    while not clock.over:
        lesson = Lesson(batch, ids, generator)
        with autocast():
            loss = lesson.loss(lesson.read(encoder, book))
        loss.backward()
        count += 1
        steps.step(min(1.0, count / WARM) * min(1.0, 0.02 + (1 - clock.share) / (1 - DECAY)))
        mean.add(loss)
        if report():
            log(
                f"text {clock.elapsed:5.0f} s  step {count:6d}  {batch * count / clock.elapsed:6.0f} captions/s  loss "
                f"{mean.read():.4f}; {examine(encoder, book, ids, generator, autocast, batch)}"
            )
    tidy(encoder)
    log(f"text done: {count} steps; {examine(encoder, book, ids, generator, autocast, batch)}")
