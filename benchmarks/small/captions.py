"""Captions of scenes and instructions of edits, as text and as token ids: a caption is a row of phrases, each an entry
of
PHRASES or none.

The rows are drawn on any device, seeded, thousands at a time; `ids` turns them into the token ids that the tokenizer of
tokens.py gives for the same text in FLUX.2's template (the tests compare the two). Shapes: B captions, S phrase slots,
T tokens.

`compose` makes the captions of training together with their scenes: what a caption leaves unsaid is always drawn in the
same way, so that there is one picture to learn per caption, and none has to be chosen among many (a small model draws
shapes at two of the places that it may choose from).
"""

from dataclasses import replace

import torch

from . import tokens
from .scenes import (
    CHECKER,
    COLOURS,
    GRADIENT,
    GROUNDS,
    HAT,
    KINDS,
    OBJECTS,
    PLAIN,
    RECOLOUR,
    REMOVE,
    SIZES,
    Dice,
    constant,
)

PLACES = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")
PLACE_WORDS = [
    [f" at the {place}" for place in PLACES],
    [f" in the {place}" + (" corner" if number in (0, 2, 6, 8) else "") for number, place in enumerate(PLACES)],
    [" in the center" if place == "centre" else f" on the {place}" for place in PLACES],
]
ABOVE, BELOW, LEFT, RIGHT = range(4)
RELATIONS = [
    [" above", " over"],
    [" below", " under"],
    [" to the left of", " left of"],
    [" to the right of", " right of"],
]
PLACE, RELATE, BARE = range(3)  # what a caption says about where things are
STYLES, SINGLE_STYLES = (4, 5, 1), (9, 0, 1)  # how often, of several objects and of one
RELATED = ((1, 7, 5), (7, 1, 5), (3, 5, 7), (5, 3, 7))  # cells of the three objects, by relation of the first two
ALONE = ((4, 3, 5), (3, 5, 7))  # their cells if nothing is said: of one, of several
INTRODUCTIONS = ["A picture of", "a picture of", "An image of", "a drawing of", "A photo of", "A painting of"]
# by start of caption with a capital, small, or later; before a vowel or not
ARTICLES = ["A", "An", "a", "an", " a", " an"]
AND, COMMA, COMMA_AND, STOP = " and", ",", ", and", "."
GROUND_WORDS = [
    [f" on a {name} background" for name in GROUNDS],
    [f" on a gradient from {first} to {second}" for first in GROUNDS for second in GROUNDS],
    [f" on a checkered {first} and {second} background" for first in GROUNDS for second in GROUNDS],
]
RECOLOUR_WORDS = ["make the", "Make the", "change the colour of the", "Change the color of the", "paint the"]
REMOVE_WORDS = ["remove the", "Remove the", "delete the", "Erase the"]
ADD_WORDS = ["add a", "Add a", "put a"]
ADD_AN = [f"{words}n" for words in ADD_WORDS]
COOL, HAT_TO, HAT_ON, TO = " cool", " hat to the", " hat on the", " to"
ADD_BARE = [f"{words} hat to the" for words in ADD_WORDS]


def _flat(value):
    return [value] if isinstance(value, str) else [text for part in value for text in _flat(part)]


PHRASES = list(
    dict.fromkeys(
        _flat(
            [
                INTRODUCTIONS,
                ARTICLES,
                [f" {name}" for table in (SIZES, COLOURS, KINDS) for name in table],
                PLACE_WORDS,
                RELATIONS,
                AND,
                COMMA,
                COMMA_AND,
                STOP,
                GROUND_WORDS,
                RECOLOUR_WORDS,
                REMOVE_WORDS,
                ADD_WORDS,
                ADD_AN,
                COOL,
                HAT_TO,
                HAT_ON,
                TO,
                ADD_BARE,
            ]
        )
    )
)
NUMBER = {text: number for number, text in enumerate(PHRASES)}
NONE = -1


def _numbers(texts):
    return NUMBER[texts] if isinstance(texts, str) else tuple(_numbers(part) for part in texts)


def table(texts, device):
    """Nested lists of phrases -> the same of their numbers, as a tensor."""
    return constant(_numbers(texts), device)


def text(row):
    """The caption that one row of phrase numbers stands for."""
    return "".join(PHRASES[number] for number in row if number != NONE)


def _maybe(phrase, keep):
    return torch.where(keep, phrase, NONE)


# --- captions of scenes
# --------------------------------------------------------------------------------------------------


def describe(scenes, generator, full=False):
    """(phrases (B, S), relation (B,), or -1) of scenes as they are. With `full` every caption says the background,
    relates the first two objects if there are two, and says the place of a single one: the captions that are judged.
    """
    dice, rows = Dice(generator), len(scenes)
    always = torch.ones(rows, dtype=torch.bool, device=dice.device)
    relation = torch.where(
        (scenes.count > 1) & (always if full else dice.chance(0.55, rows)), _relation(scenes, dice), NONE
    )
    places = ((scenes.count == 1) & (always if full else dice.chance(0.6, rows))) | (
        (relation < 0) & dice.chance(0.4, rows)
    )
    return _phrases(scenes, dice, relation, places, None, always if full else None), relation


def compose(scenes, generator):
    """(scenes, phrases (B, S)): `scenes` with everything that their captions leave unsaid set to what is drawn then:
    cells by RELATED or ALONE, medium size, a grey background.
    """
    dice, rows = Dice(generator), len(scenes)
    single = scenes.count == 1
    style = torch.where(single, dice.weighted(SINGLE_STYLES, rows), dice.weighted(STYLES, rows))
    relation = torch.where(style == RELATE, dice.below(len(RELATIONS), rows), NONE)
    sized, grounded = dice.chance(0.7, rows, OBJECTS), dice.chance(0.9, rows)
    unsaid = constant(ALONE, dice.device)[(~single).long()]
    cell = torch.where((style == RELATE)[:, None], constant(RELATED, dice.device)[relation.clamp_min(0)], unsaid)
    scenes = replace(
        scenes,
        cell=torch.where((style == PLACE)[:, None], scenes.cell, cell),
        size=torch.where(sized, scenes.size, list(SIZES).index("medium")),
        style=torch.where(grounded, scenes.style, PLAIN),
        ground=torch.where(grounded[:, None], scenes.ground, list(GROUNDS).index("grey")),
    )
    return scenes, _phrases(scenes, dice, relation, style == PLACE, sized, grounded)


def _phrases(scenes, dice, relation, places, sized, grounded):
    """(B, S). `relation` (B,) or -1, `places` (B,), `sized` (B, N) and `grounded` (B,) say what is said; the last two
    are drawn if None.
    """
    rows = len(scenes)
    introduction = _maybe(
        table(INTRODUCTIONS, dice.device)[dice.below(len(INTRODUCTIONS), rows)], dice.chance(0.4, rows)
    )
    start = torch.where(introduction != NONE, 2, dice.below(2, rows))
    sized = dice.chance(0.6, rows, OBJECTS) if sized is None else sized
    parts = [introduction[:, None]]
    for number in range(OBJECTS):
        parts += [
            _joint(scenes, relation, number, dice),
            _object(
                scenes, number, start if number == 0 else torch.full_like(start, 2), sized[:, number], places, dice
            ),
        ]
    ground = _maybe(_ground(scenes, dice.device), dice.chance(0.7, rows) if grounded is None else grounded)
    stop = _maybe(table([STOP], dice.device).expand(rows), dice.chance(0.15, rows))
    return torch.cat([*parts, ground[:, None], stop[:, None]], dim=1)


def _relation(scenes, dice):
    """One that holds between the cells of the first two objects."""
    row, column = scenes.cell[:, :2] // 3, scenes.cell[:, :2] % 3
    down, right = row[:, 1] - row[:, 0], column[:, 1] - column[:, 0]
    holds = torch.stack([down > 0, down < 0, right > 0, right < 0], dim=1)
    return (holds * (dice.uniform(len(scenes), 4) + 1)).argmax(1)


def _joint(scenes, relation, number, dice):
    """(B, 1): what stands before object `number`."""
    rows, device = len(scenes), dice.device
    if number == 0:
        return torch.full((rows, 1), NONE, device=device)
    last = torch.where(dice.chance(0.3, rows), NUMBER[COMMA_AND], NUMBER[AND])
    words = torch.where(
        scenes.count - 1 == number, last if number == 2 else torch.full_like(last, NUMBER[AND]), NUMBER[COMMA]
    )
    if number == 1:
        related = table(RELATIONS, device)[relation.clamp_min(0), dice.weighted((3, 1), rows)]
        words = torch.where(relation >= 0, related, words)
    return _maybe(words, scenes.count > number)[:, None]


def _object(scenes, number, start, sized, places, dice):
    """(B, 5): article, size, colour, kind and place of one object."""
    rows, device = len(scenes), dice.device
    size, colour, kind = scenes.size[:, number], scenes.colour[:, number], scenes.kind[:, number]
    vowel = (colour == list(COLOURS).index("orange")) & ~sized
    words = torch.stack(
        [
            table(ARTICLES, device)[2 * torch.where(start == 2, 2, start) + vowel],
            _maybe(_names(SIZES, device)[size], sized),
            _names(COLOURS, device)[colour],
            _names(KINDS, device)[kind],
            _maybe(table(PLACE_WORDS, device)[dice.below(3, rows), scenes.cell[:, number]], places),
        ],
        dim=1,
    )
    return _maybe(words, (scenes.count > number)[:, None])


def _names(table_of_names, device):
    return table([f" {name}" for name in table_of_names], device)


def _ground(scenes, device):
    first, second = scenes.ground[:, 0], scenes.ground[:, 1]
    plain, gradient, checker = (table(words, device) for words in GROUND_WORDS)
    pair = first * len(GROUNDS) + second
    return torch.where(
        scenes.style == GRADIENT, gradient[pair], torch.where(scenes.style == CHECKER, checker[pair], plain[first])
    )


# --- instructions of edits
# ---------------------------------------------------------------------------------------------

# slots of an instruction's phrases: colour before, of a hat, after, and kind of the object
OLD, NEW_HAT, NEW, KIND = 3, 1, 6, 4


def instruct(scenes, task, target, colour, generator, full=False, named=None):
    """Phrases (B, S) of edits of `scenes` (before the edit). With `full` a hat's colour is always said, else where
    `named`
    (B,) says so.
    """
    dice, rows = Dice(generator), len(scenes)
    pick = lambda texts: table(texts, dice.device)[dice.below(len(texts), rows)]
    named = (
        torch.ones(rows, dtype=torch.bool, device=dice.device)
        if full
        else dice.chance(0.7, rows)
        if named is None
        else named
    )
    hat, old = task == HAT, scenes.colour.gather(1, target[:, None])[:, 0]
    orange, style = colour == list(COLOURS).index("orange"), dice.below(len(RECOLOUR_WORDS), rows)
    adding = torch.where(named, torch.where(orange, pick(ADD_AN), pick(ADD_WORDS)), pick(ADD_WORDS))
    lead = torch.where(
        task == RECOLOUR,
        table(RECOLOUR_WORDS, dice.device)[style],
        torch.where(task == REMOVE, pick(REMOVE_WORDS), adding),
    )
    new = _names(COLOURS, dice.device)[colour]
    look = torch.where(named, new, _maybe(pick([COOL]), dice.chance(0.6, rows)))
    return torch.stack(
        [
            lead,
            _maybe(look, hat),
            _maybe(pick([HAT_TO, HAT_ON]), hat),
            _maybe(_names(COLOURS, dice.device)[old], dice.chance(0.5, rows)),
            _names(KINDS, dice.device)[scenes.kind.gather(1, target[:, None])[:, 0]],
            _maybe(pick([TO]), (task == RECOLOUR) & ((style == 2) | (style == 3))),
            _maybe(new, task == RECOLOUR),
            _maybe(pick([STOP]), dice.chance(0.1, rows)),
        ],
        dim=1,
    )


# --- token ids
# -----------------------------------------------------------------------------------------------------------


class Ids:
    """Phrases -> token ids on one device."""

    def __init__(self, device):
        encoded = [tokens.words(phrase) for phrase in PHRASES]
        width = max(map(len, encoded))
        rows = [ids + [NONE] * (width - len(ids)) for ids in encoded] + [[NONE] * width]  # the last row is that of NONE
        self.table = torch.tensor(rows, device=device)
        self.before, self.after = (torch.tensor(ids, device=device) for ids in tokens.template())

    def __call__(self, phrases, dropped=None):
        """(ids (B, T) padded on the right, lengths (B,)) in FLUX.2's template. `dropped` (B,) empties captions."""
        caption = self.table[phrases].flatten(1)
        if dropped is not None:
            caption = torch.where(dropped[:, None], NONE, caption)
        whole = torch.cat([self.before.expand(len(caption), -1), caption, self.after.expand(len(caption), -1)], dim=1)
        there = whole != NONE
        order = (~there).to(torch.int8).argsort(dim=1, stable=True)
        return whole.gather(1, order)[:, :LONGEST].clamp_min(0), there.sum(1)


PAD = tokens.SPECIAL.index("<pad>")
LONGEST = 80  # tokens of the longest prompt, template included; the tests check it
