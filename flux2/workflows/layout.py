"""Where a new node goes on a canvas so that it covers nothing: positions and sizes in pixels, positions without the
title bar.
"""

import itertools
from collections.abc import Mapping

# title bars of nodes and groups; distance kept from others; between nodes stacked in a group
TITLE, GROUP_TITLE, GAP, LEAST_GAP = 30, 38, 20, 6
STEP, FAR = 30, 60  # the search grid, and how many of its steps to look far
SELECTOR_SIZE = [300, 226]
# as the page draws them with all widgets
LEAST_HEIGHT = {"Flux2LoadModel": 106, "Flux2LoadTextEncoder": 202, "Flux2LoadVAE": 130}


def pair(value):
    """[x, y] from a position or size as an array or, in old files, as {"0": x, "1": y}."""
    if isinstance(value, Mapping):
        value = value.get("0"), value.get("1")
    return [float(number or 0) for number in (value or (0, 0))][:2]


def grow(node):
    """Make a replaced loader tall enough for its widgets."""
    least = LEAST_HEIGHT[node["type"]]
    if node.get("size") and pair(node["size"])[1] < least:
        node["size"] = [pair(node["size"])[0], least]


def box(node):
    """(left, top, right, bottom) of a node with its title bar; of a folded one, the bar alone."""
    (x, y), (width, height) = pair(node.get("pos")), pair(node.get("size"))
    if (node.get("flags") or {}).get("collapsed"):
        height = 0
    return x, y - TITLE, x + width, y + height


def corner(node):
    """The upper left corner of a node, as a box."""
    return box(node)[:2] * 2


def frames(part):
    """The boxes of the groups."""
    for group in part.get("groups") or []:
        x, y, width, height = group["bounding"]
        yield x, y, x + width, y + height


def touch(a, b, gap=0):
    return a[0] < b[2] + gap and b[0] < a[2] + gap and a[1] < b[3] + gap and b[1] < a[3] + gap


def inside(a, b):
    return b[0] <= a[0] and b[1] <= a[1] and a[2] <= b[2] and a[3] <= b[3]


class Canvas:
    """A graph's nodes and the frames of its groups, found by place: each node is listed in the squares that it covers,
    so looking around one costs the same in a graph of any size.
    """

    SQUARE = 400  # pixels, about a node

    def __init__(self, part, searches=1):
        """searches: how many places will be looked for. Thousands in one graph share the tries of a few."""
        self.frames, self.squares, self.places, self.bottom = list(frames(part)), {}, {}, 0
        self.steps = SPIRAL[:: max(1, len(SPIRAL) * searches // MOST_TRIES)]
        for node in part["nodes"]:
            self.put(node)

    def put(self, node):
        """Note a node's place, after it was added or moved."""
        for square in self._squares(self.places.get(id(node))):
            self.squares[square].pop(id(node))
        self.places[id(node)] = place = box(node)
        self.bottom = max(self.bottom, place[3])
        for square in self._squares(place):
            self.squares.setdefault(square, {})[id(node)] = place

    def _squares(self, place, gap=0):
        """The squares that a place covers."""
        if place is None:
            return ()
        left, top, right, bottom = place
        columns = range(int((left - gap) // self.SQUARE), int((right + gap) // self.SQUARE) + 1)
        lines = range(int((top - gap) // self.SQUARE), int((bottom + gap) // self.SQUARE) + 1)
        return itertools.product(columns, lines)

    def covered(self, place, gap=0, but=()):
        """Whether a place touches a node other than those of the ids `but`."""
        return any(
            touch(place, other, gap)
            for square in self._squares(place, gap)
            for key, other in self.squares.get(square, {}).items()
            if key not in but
        )

    def nearest(self, pos, size, moving=None):
        """The free position nearest to one: over no node and no group's edge."""
        but, (width, height) = {id(moving)}, size
        near = (pos[0] - FAR * STEP, pos[1] - FAR * STEP, pos[0] + FAR * STEP + width, pos[1] + FAR * STEP + height)
        groups = [group for group in self.frames if touch(near, group, GAP)]
        for column, line in self.steps:
            found = [round(pos[0]) + column * STEP, round(pos[1]) + line * STEP]
            new = found[0], found[1] - TITLE, found[0] + width, found[1] + height
            if not self.covered(new, GAP, but) and not any(
                touch(new, group, GAP / 2) and not inside(new, group) for group in groups
            ):
                return found
        # a huge graph without a hole: below everything
        return [round(pos[0]), round(self.bottom) + TITLE + GAP]


MOST_TRIES = 150_000  # of all searches in one graph together: about a second

# the steps of the search, from near to far
SPIRAL = sorted(itertools.product(range(-FAR, FAR + 1), repeat=2), key=lambda step: step[0] ** 2 + step[1] ** 2)


def settle(canvas, replaced):
    """Move replaced loaders that grew into another node: the loaders of a group are stacked evenly in it, else one
    goes to the nearest free place.
    """
    for node in sorted(replaced, key=lambda node: pair(node["pos"])[1]):
        if canvas.covered(box(node), but={id(node)}) and not stack(canvas, node, replaced):
            node["pos"] = canvas.nearest(pair(node["pos"]), pair(node["size"]), node)
            canvas.put(node)


def stack(canvas, node, replaced):
    """Distribute the replaced loaders in the group around a node over its height; False where no group has the room
    for them.
    """
    for frame in canvas.frames:
        if inside(corner(node), frame):
            column = sorted(
                (one for one in replaced if inside(corner(one), frame)), key=lambda one: pair(one["pos"])[1]
            )
            places, but = stacked(column, frame), {id(one) for one in column}
            if places and not any(
                canvas.covered(box({**one, "pos": place}), but=but) for one, place in zip(column, places)
            ):
                for one, place in zip(column, places):
                    one["pos"] = place
                    canvas.put(one)
                return True
    return False


def stacked(column, frame):
    """[pos] of nodes below each other in a frame, with equal gaps; None where there is no room."""
    heights = [TITLE + pair(one["size"])[1] for one in column]
    gap = (frame[3] - frame[1] - GROUP_TITLE - sum(heights)) / (len(column) + 1)
    tops = [frame[1] + GROUP_TITLE + sum(heights[:place]) + gap * (place + 1) for place in range(len(column))]
    return [[pair(one["pos"])[0], round(top + TITLE)] for one, top in zip(column, tops)] if gap >= LEAST_GAP else None
