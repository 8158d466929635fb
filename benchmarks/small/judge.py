"""Judging pictures of scenes by code, with scikit-image: which shapes of which colour are there, where, and did an
edit do what it should?

Text to image: pixels are given to the nearest of the known colours, connected pixels of a colour are a shape, and a
shape's kind is that of the six whose drawing its outline covers best. A picture is right if the shapes in it are those
that were asked for, none missing and none besides. Edits: the layout is known, so the pixels of every colour are
compared with those of the drawn result, give or take TOLERANCE pixels, and the kinds of the shapes with those drawn.
The cat is not judged. tests/test_small_model.py shows what the judge accepts and refuses. Pictures are (256, 256, 3)
float in 0..1.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
from skimage import measure, morphology, transform

from . import scenes

FAR = 0.26  # pixels whose colour is further than this from every known one (RGB in 0..1) belong to no shape
SMALLEST = 150  # pixels; the smallest shape drawn, a small star, has about 850
BEST = 0.72  # overlap with the best template below which an outline is of no known kind
BOX = 32  # outlines are compared in boxes of this size
TOLERANCE, COVERED = 3, 0.9  # pixels that an edited shape may be off by; share of it that must then coincide
APART = 16  # pixels by which one shape must be above or left of another


@dataclass(frozen=True)
class Shape:
    colour: str
    kind: str
    x: float  # centre of mass, pixels
    y: float
    area: int


@functools.cache
def _palette():
    """(14, 3): the colours of shapes, then those of backgrounds."""
    return np.array([*scenes.COLOURS.values(), *scenes.GROUNDS.values()]) / 255


def colour_masks(picture):
    """{colour: (H, W) bool}: the pixels that are nearest to each colour of shapes, and near enough."""
    distance = np.linalg.norm(picture[:, :, None] - _palette(), axis=-1)
    nearest, near = distance.argmin(-1), distance.min(-1) < FAR
    return {name: (nearest == number) & near for number, name in enumerate(scenes.COLOURS)}


def shapes_in(picture):
    """Every connected shape of the picture, as a list of Shape; what has no known outline is of kind "unknown"."""
    found = []
    for colour, mask in colour_masks(picture).items():
        whole = morphology.closing(morphology.opening(mask, morphology.disk(1)), morphology.disk(1))
        for region in measure.regionprops(measure.label(whole)):
            if region.area >= SMALLEST:
                y, x = region.centroid
                found.append(Shape(colour, kind_of(region.image), float(x), float(y), int(region.area)))
    return found


def kind_of(outline):
    """Name of the kind whose drawing overlaps most with a mask cut to its bounding box, or "unknown"."""
    box = _boxed(outline)
    overlap = {kind: (box & template).sum() / (box | template).sum() for kind, template in _templates().items()}
    best = max(overlap, key=overlap.get)
    return best if overlap[best] >= BEST else "unknown"


def _boxed(mask):
    """A mask stretched to BOX x BOX; long thin ones stay so, or a line would become a square."""
    height, width = mask.shape
    if max(height, width) > 1.6 * min(height, width):
        side = max(height, width)
        mask = np.pad(mask, [((side - height) // 2,) * 2, ((side - width) // 2,) * 2])
    return transform.resize(mask.astype(float), (BOX, BOX), anti_aliasing=True) > 0.5


@functools.cache
def _templates():
    y, x = torch.meshgrid(*(torch.arange(128) - 63.5,) * 2, indexing="ij")
    drawn = {
        kind: (scenes.outline(torch.tensor(number), x, y, 50.0) < 0).numpy()
        for number, kind in enumerate(scenes.KINDS[: scenes.SHAPES])
    }
    return {kind: _boxed(measure.regionprops(mask.astype(np.uint8))[0].image) for kind, mask in drawn.items()}


# --- text to image
# -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """What is right in a picture; `relation` and `place` are None where the caption says none."""

    shapes: bool
    relation: bool | None
    place: bool | None
    found: tuple


def wanted(table, row):
    """[(colour, kind)] of the shown objects of one scene, in their order."""
    colours = list(scenes.COLOURS)
    return [
        (colours[table.colour[row, n]], scenes.KINDS[table.kind[row, n]])
        for n in range(scenes.OBJECTS)
        if table.shown[row, n]
    ]


def judge(picture, objects, relation=-1, cell=None):
    """Verdict on a picture of `objects` [(colour, kind)], of which the first stands to the second as `relation` says
    (captions.ABOVE ...), or in `cell` of the grid.
    """
    found = shapes_in(picture)
    right = sorted((shape.colour, shape.kind) for shape in found) == sorted(objects)
    return Verdict(
        right,
        _related(found, objects, relation) if relation >= 0 else None,
        None
        if cell is None
        else any(_cell(shape, picture) == cell and (shape.colour, shape.kind) == objects[0] for shape in found),
        tuple(found),
    )


def _cell(shape, picture):
    height, width = picture.shape[:2]
    return 3 * int(shape.y * 3 / height) + int(shape.x * 3 / width)


def _related(found, objects, relation):
    first, second = ([shape for shape in found if (shape.colour, shape.kind) == wanted] for wanted in objects[:2])
    if len(first) != 1 or len(second) != 1:
        return False
    down, right = second[0].y - first[0].y, second[0].x - first[0].x
    return (down, -down, right, -right)[relation] >= APART


# --- edits
# ---------------------------------------------------------------------------------------------------------------


def judge_edit(picture, result, cut=()):
    """Is `picture` the drawn `result` (both (H, W, 3))? Every colour of shapes must be where it is drawn, and nowhere
    else, and shapes must be of their kinds, except in the colours `cut`: those of a hat and of its wearer, whose
    outline it cuts.
    """
    found, expected = colour_masks(picture), colour_masks(result)
    kinds = [
        sorted((shape.colour, shape.kind) for shape in shapes_in(each) if shape.colour not in cut)
        for each in (picture, result)
    ]
    return kinds[0] == kinds[1] and all(_coincide(found[colour], expected[colour]) for colour in scenes.COLOURS)


def cut_colours(after, row):
    """The colours of hat and wearer in one edited scene."""
    hat, names = int(after.hat[row]), list(scenes.COLOURS)
    return (names[after.colour[row, hat]], names[after.hat_colour[row]]) if hat >= 0 else ()


def _coincide(found, expected):
    found, expected = (morphology.remove_small_objects(mask, max_size=SMALLEST // 3) for mask in (found, expected))
    if not expected.any() or not found.any():
        return bool(expected.any()) == bool(found.any())
    parts, reached = measure.label(expected), _grown(found)
    shares = [reached[parts == number].mean() for number in range(1, parts.max() + 1)]
    return min(shares) >= COVERED and found[_grown(expected)].sum() >= COVERED * found.sum()


def _grown(mask):
    return morphology.dilation(mask, morphology.disk(TOLERANCE))


# --- numbers
# -------------------------------------------------------------------------------------------------------------


def wilson(right, count, z=1.96):
    """(low, high): 95 % confidence interval of a share (Wilson 1927)."""
    if count == 0:
        return 0.0, 1.0
    share = right / count
    middle, spread = (
        share + z * z / (2 * count),
        z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)),
    )
    return (middle - spread) / (1 + z * z / count), (middle + spread) / (1 + z * z / count)


def as_pictures(pixels):
    """(B, 3, H, W) tensor in -1..1 -> list of (H, W, 3) arrays in 0..1."""
    return list(((pixels.clamp(-1, 1) + 1) / 2).movedim(1, -1).float().cpu().numpy())
