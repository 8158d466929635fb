"""Scenes of one to three shapes as tables of numbers, and their pictures: drawn by signed distances, on any device,
seeded, without end.

A scene has up to three objects, each in its own cell of a 3 x 3 grid, with its own colour; a cat is one of the kinds.
Edits (another colour, a hat, one object fewer) change the table and draw again, so what an edit must not touch is the
same by construction. Shapes: B scenes, N = 3 objects, H x W pixels. Lengths are in units of 1/256 of the shorter side;
y grows downwards.
"""

import functools
import math
from dataclasses import dataclass, fields, replace

import torch

KINDS = ("circle", "square", "triangle", "star", "ring", "cross", "cat")
SHAPES = 6  # the kinds that the judge knows: all but the cat
COLOURS = {
    "red": (216, 38, 38),
    "green": (38, 158, 58),
    "blue": (38, 78, 216),
    "yellow": (245, 218, 38),
    "orange": (245, 134, 26),
    "purple": (146, 56, 188),
    "white": (247, 247, 247),
    "black": (18, 18, 18),
}
GROUNDS = {
    "grey": (128, 128, 128),
    "pink": (240, 172, 192),
    "teal": (62, 150, 152),
    "brown": (122, 84, 54),
    "beige": (226, 206, 172),
    "cyan": (142, 206, 236),
}
# radius; smaller stars than these do not survive the autoencoder
SIZES = {"small": 24.0, "medium": 33.0, "large": 42.0}
PLAIN, GRADIENT, CHECKER = range(3)
OBJECTS, CELL, TILE = 3, 256 / 3, 32.0
JITTER = 4.0  # how far an object's centre may be from that of its cell, each way
TOPS = (0.9, 0.78, 1.0, 1.0, 0.95, 0.95, 0.6)  # height of each kind above its centre, in radii: where a hat sits
HAT_WIDTH, HAT_HEIGHT, HAT_SINK = 0.7, 0.9, 0.15  # half its base, its height, and how far it is pulled down, in radii
HELD_OUT = 16  # one in so many sets of objects is never trained on


@dataclass
class Scenes:
    """A table of scenes; every field is a tensor with B rows. `hat` is the object that wears one, or -1."""

    count: torch.Tensor  # (B,) number of objects
    kind: torch.Tensor  # (B, N) index into KINDS
    colour: torch.Tensor  # (B, N) index into COLOURS
    size: torch.Tensor  # (B, N) index into SIZES
    cell: torch.Tensor  # (B, N) 3 * row + column
    shift: torch.Tensor  # (B, N, 2) x and y, within JITTER
    shown: torch.Tensor  # (B, N) bool
    style: torch.Tensor  # (B,) PLAIN, GRADIENT or CHECKER
    ground: torch.Tensor  # (B, 2) indices into GROUNDS
    hat: torch.Tensor  # (B,)
    hat_colour: torch.Tensor  # (B,) index into COLOURS

    def __len__(self):
        return len(self.count)

    def __getitem__(self, index):
        return Scenes(*(getattr(self, field.name)[index] for field in fields(self)))

    def to(self, device):
        return Scenes(*(getattr(self, field.name).to(device) for field in fields(self)))

    def put(self, index, other):
        """Overwrite the rows `index` with the rows of `other`."""
        for field in fields(self):
            getattr(self, field.name)[index] = getattr(other, field.name)


def joined(parts):
    return Scenes(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Scenes)))


@functools.lru_cache(maxsize=None)
def constant(values, device):
    """A tuple of numbers as a tensor, copied to its device once: every such copy makes the host wait for a GPU."""
    return torch.tensor(values, device=device)


class Dice:
    """Random tables from one generator, on its device."""

    def __init__(self, generator):
        self.generator, self.device = generator, generator.device

    def below(self, high, *shape):
        return torch.randint(high, shape, generator=self.generator, device=self.device)

    def uniform(self, *shape):
        return torch.rand(shape, generator=self.generator, device=self.device)

    def chance(self, probability, *shape):
        return self.uniform(*shape) < probability

    def weighted(self, weights, *shape):
        total = constant(tuple(map(float, weights)), self.device).cumsum(0)
        return torch.searchsorted(total, self.uniform(*shape) * total[-1], right=True).clamp_max(len(weights) - 1)

    def shuffled(self, rows, choices, kept):
        """(rows, kept): different numbers below `choices` in each row."""
        return self.uniform(rows, choices).argsort(1)[:, :kept]


# --- choosing
# ----------------------------------------------------------------------------------------------------------


def sample(rows, generator, counts=(3, 4, 3), cats=True, held_out=False, for_edits=False):
    """`rows` scenes, none (or only) of the held out ones. `counts`: weights of one, two and three objects. For edits no
    kind comes twice and each object has a column of its own, below the top row, so that there is room for a hat.
    """
    spare = rows * 2 * HELD_OUT + 64 if held_out else rows * 5 // 4 + 64
    scenes = _sample(spare, Dice(generator), counts, cats, for_edits)
    wanted = is_held_out(scenes) == held_out
    return scenes[(~wanted).to(torch.int8).argsort(dim=0, stable=True)[:rows]]


def _sample(rows, dice, counts, cats, for_edits):
    kinds = len(KINDS) if cats else SHAPES
    count = dice.weighted(counts, rows) + 1
    grounds = dice.shuffled(rows, len(GROUNDS), 2)
    return Scenes(
        count=count,
        kind=dice.shuffled(rows, kinds, OBJECTS) if for_edits else dice.below(kinds, rows, OBJECTS),
        colour=dice.shuffled(rows, len(COLOURS), OBJECTS),
        size=dice.below(len(SIZES), rows, OBJECTS),
        cell=3 * (1 + dice.below(2, rows, OBJECTS)) + dice.shuffled(rows, 3, OBJECTS)
        if for_edits
        else dice.shuffled(rows, 9, OBJECTS),
        shift=(dice.uniform(rows, OBJECTS, 2) * 2 - 1) * JITTER,
        shown=torch.arange(OBJECTS, device=dice.device) < count[:, None],
        style=dice.weighted((5, 3, 2), rows),
        ground=grounds,
        hat=torch.full((rows,), -1, device=dice.device),
        hat_colour=torch.zeros(rows, dtype=torch.long, device=dice.device),
    )


def is_held_out(scenes):
    """(B,) bool: sets of (colour, kind) that are kept for judging, whatever their order, sizes, places and
    background.
    """
    code = scenes.kind * len(COLOURS) + scenes.colour
    mixed = ((code * 7919 + 104729) * (code + 31) % 1000003 * scenes.shown).sum(1)
    return (mixed * 31 + scenes.count * 17) % 1009 % HELD_OUT == 5


RECOLOUR, REMOVE, HAT = range(3)


def edit(scenes, generator, tasks=(1, 1, 1)):
    """(edited scenes, task (B,), target object (B,), new colour (B,)). A scene with one object never loses it. `tasks`:
    weights of the three.
    """
    dice, rows = Dice(generator), len(scenes)
    task = dice.weighted(tasks, rows)
    task = torch.where((task == REMOVE) & (scenes.count == 1), 2 * dice.below(2, rows), task)
    target = (dice.uniform(rows) * scenes.count).long()
    colour = _free_colour(scenes, dice)
    return apply(scenes, task, target, colour), task, target, colour


def _free_colour(scenes, dice):
    """A colour that no object of the scene has."""
    taken = torch.zeros(len(scenes), len(COLOURS), device=dice.device).scatter(1, scenes.colour, 9.0)
    return (taken + dice.uniform(len(scenes), len(COLOURS))).argmin(1)


def usual_hat(scenes):
    """(B,) the colour of a hat when none is said: the first one that no object of the scene has."""
    taken = torch.zeros(len(scenes), len(COLOURS), device=scenes.colour.device).scatter(1, scenes.colour, 99.0)
    return (taken + torch.arange(len(COLOURS), device=scenes.colour.device)).argmin(1)


def apply(scenes, task, target, colour):
    here = torch.arange(OBJECTS, device=target.device) == target[:, None]
    return replace(
        scenes,
        colour=torch.where(here & (task == RECOLOUR)[:, None], colour[:, None], scenes.colour),
        shown=scenes.shown & ~(here & (task == REMOVE)[:, None]),
        hat=torch.where(task == HAT, target, scenes.hat),
        hat_colour=torch.where(task == HAT, colour, scenes.hat_colour),
    )


# --- drawing
# -----------------------------------------------------------------------------------------------------------


def palette(table, device):
    return constant(tuple(table.values()), device) / 255


def centres(scenes, height=256, width=256):
    """(B, N, 2) x and y in pixels."""
    place = torch.stack([scenes.cell % 3, scenes.cell // 3], dim=-1) + 0.5
    extent = constant((width / 3, height / 3), place.device)
    return place * extent + scenes.shift * (min(height, width) / 256)


def radii(scenes, height=256, width=256):
    return constant(tuple(SIZES.values()), scenes.size.device)[scenes.size] * (min(height, width) / 256)


def draw(scenes, height=256, width=256, painter=None):
    """Pictures (B, 3, height, width) float32 in -1..1. `painter` is `paint`, or a compiled one."""
    device = scenes.kind.device
    colours, grounds = palette(COLOURS, device), palette(GROUNDS, device)
    body = colours[scenes.colour]  # (B, N, 3)
    # a cat's eyes: dark, on a black cat light
    detail = torch.where((body.mean(-1, keepdim=True) > 0.25), 0.07, 0.95).expand(-1, -1, 3)
    wearer = scenes.hat.clamp_min(0)[:, None]
    tops = constant(TOPS, device)[scenes.kind.gather(1, wearer)]
    return (painter or paint)(
        centres(scenes, height, width),
        radii(scenes, height, width),
        scenes.kind,
        scenes.shown,
        body,
        detail,
        scenes.style,
        grounds[scenes.ground],
        wearer,
        (scenes.hat >= 0),
        tops,
        colours[scenes.hat_colour],
        height,
        width,
    )


def paint(centre, radius, kind, shown, body, detail, style, ground, wearer, hatted, tops, hat_colour, height, width):
    """The drawing itself: arithmetic without branches on data, so that torch.compile makes one kernel of it. Returns
    (B,
    3, H, W) in -1..1.
    """
    device = centre.device
    y = torch.arange(height, device=device, dtype=torch.float32)[None, :, None] + 0.5
    x = torch.arange(width, device=device, dtype=torch.float32)[None, None, :] + 0.5
    picture = _background(x, y, style, ground, height, width)
    for number in range(OBJECTS):
        r = radius[:, number, None, None]
        dx, dy = x - centre[:, number, 0, None, None], y - centre[:, number, 1, None, None]
        inside = coverage(outline(kind[:, number, None, None], dx, dy, r)) * shown[:, number, None, None]
        picture = picture + inside[:, None] * (body[:, number, :, None, None] - picture)
        face = coverage(_face(dx, dy, r)) * (shown[:, number] & (kind[:, number] == len(KINDS) - 1))[:, None, None]
        picture = picture + face[:, None] * (detail[:, number, :, None, None] - picture)
    r, middle = radius.gather(1, wearer)[..., None], centre.gather(1, wearer[..., None].expand(-1, -1, 2))
    base = middle[:, :, 1, None] - (tops[..., None] - HAT_SINK) * r
    hat = coverage(_hat(x - middle[:, :, 0, None], y - base, r)) * hatted[:, None, None]
    picture = picture + hat[:, None] * (hat_colour[:, :, None, None] - picture)
    return picture * 2 - 1


def _background(x, y, style, ground, height, width):
    """(B, 3, H, W) in 0..1: one colour, from one at the top to another at the bottom, or tiles of two."""
    tile = TILE * min(height, width) / 256
    odd = (torch.floor(x / tile) + torch.floor(y / tile)) % 2
    style = style[:, None, None]
    share = torch.where(
        style == CHECKER, odd, torch.where(style == GRADIENT, (y / height).expand_as(odd), torch.zeros_like(odd))
    )
    first, second = (ground[:, number, :, None, None] for number in range(2))
    return first + share[:, None] * (second - first)


def coverage(distance):
    """Share of a pixel inside an outline, from the signed distance of its centre (negative inside)."""
    return (0.5 - distance).clamp(0, 1)


def outline(kind, dx, dy, r):
    """Signed distance in pixels to the outline of each object's kind. `kind` broadcasts against dx and dy."""
    distance = _circle(dx, dy, r)
    for number, shape in enumerate((_square, _triangle, _star, _ring, _cross, _cat), 1):
        distance = torch.where(kind == number, shape(dx, dy, r), distance)
    return distance


def _circle(dx, dy, r):
    return (dx * dx + dy * dy).sqrt() - 0.9 * r


def _square(dx, dy, r):
    return torch.maximum(dx.abs(), dy.abs()) - 0.78 * r


def _triangle(dx, dy, r):
    return torch.maximum(dy - 0.5 * r, dx.abs() * 0.8660254 - dy * 0.5 - 0.5 * r)


def _star(dx, dy, r, inner=0.5):
    """Five points, one up: folded into half of one point, where the outline is a line from (1, 0) to the inner
    corner.
    """
    step = math.pi / 5
    distance, angle = (dx * dx + dy * dy + 1e-6).sqrt(), torch.atan2(dx, -dy)
    angle = (torch.remainder(angle + step, 2 * step) - step).abs()
    ex, ey = inner * math.cos(step) - 1, inner * math.sin(step)
    return ((distance * angle.cos() - r) * ey - distance * angle.sin() * ex) / math.hypot(ex, ey)


def _ring(dx, dy, r):
    return ((dx * dx + dy * dy).sqrt() - 0.72 * r).abs() - 0.23 * r


def _cross(dx, dy, r):
    x, y = dx.abs(), dy.abs()
    return torch.minimum(torch.maximum(x - 0.3 * r, y - 0.95 * r), torch.maximum(x - 0.95 * r, y - 0.3 * r))


def _cat(dx, dy, r):
    """A round head with two ears."""
    x, y = dx.abs() / r, dy / r
    head = (x * x + (y - 0.2) ** 2).sqrt() - 0.7
    ear = torch.maximum(torch.maximum(_side(x, y, 0.08, -0.3, 0.6, -0.95), _side(x, y, 0.6, -0.95, 0.7, 0.1)), y - 0.1)
    return torch.minimum(head, ear) * r


def _side(x, y, ax, ay, bx, by):
    """Distance to the line from a to b, negative on its right when y grows downwards (outlines run clockwise)."""
    length = math.hypot(bx - ax, by - ay)
    return ((y - ay) * (ax - bx) - (x - ax) * (ay - by)) / length


def _face(dx, dy, r):
    """A cat's eyes and nose."""
    x, y = dx.abs() / r, dy / r
    eyes, nose = (((x - 0.28) ** 2 + (y - 0.08) ** 2).sqrt() - 0.12), (x * x + (y - 0.4) ** 2).sqrt() - 0.1
    return torch.minimum(eyes, nose) * r


def _hat(dx, dy, r):
    """A pointed hat standing on dy = 0."""
    w, h = HAT_WIDTH * r, HAT_HEIGHT * r
    return torch.maximum(dy, (dx.abs() * h - dy * w - w * h) / (h * h + w * w).sqrt())
