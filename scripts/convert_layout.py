"""Where a new node goes on a canvas so that it covers nothing: positions and sizes in pixels, positions without the
title
bar.
"""

import itertools
from collections.abc import Mapping

# title bars of nodes and groups; distance kept from others; between nodes stacked in a group
TITLE, GROUP_TITLE, GAP, LEAST_GAP = 30, 38, 20, 6
STEP, FAR = 30, 60  # the search grid, and how many of its steps to look far
SELECTOR_SIZE = [300, 226]
# as the page draws them with all widgets
LEAST_HEIGHT = {"Flux2LoadModel": 106, "Flux2LoadTextEncoder": 178, "Flux2LoadVAE": 106}


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


def settle(part, replaced):
    """Move replaced loaders that grew into another node: the loaders of a group are stacked evenly in it, else one
    goes to
    the nearest free place.
    """
    for node in sorted(replaced, key=lambda node: pair(node["pos"])[1]):
        if any(touch(box(node), box(other)) for other in part["nodes"] if other is not node) and not stack(
            part, node, replaced
        ):
            node["pos"] = nearest(part, pair(node["pos"]), pair(node["size"]), node)


def stack(part, node, replaced):
    """Distribute the replaced loaders in the group around a node over its height; False where no group has the room for
    them.
    """
    for frame in frames(part):
        if inside(corner(node), frame):
            column = sorted(
                (one for one in replaced if inside(corner(one), frame)), key=lambda one: pair(one["pos"])[1]
            )
            places = stacked(column, frame)
            others = [box(other) for other in part["nodes"] if not any(other is one for one in column)]
            if places and not any(
                touch(box({**one, "pos": place}), other) for one, place in zip(column, places) for other in others
            ):
                for one, place in zip(column, places):
                    one["pos"] = place
                return True
    return False


def stacked(column, frame):
    """[pos] of nodes below each other in a frame, with equal gaps; None where there is no room."""
    heights = [TITLE + pair(one["size"])[1] for one in column]
    gap = (frame[3] - frame[1] - GROUP_TITLE - sum(heights)) / (len(column) + 1)
    tops = [frame[1] + GROUP_TITLE + sum(heights[:place]) + gap * (place + 1) for place in range(len(column))]
    return [[pair(one["pos"])[0], round(top + TITLE)] for one, top in zip(column, tops)] if gap >= LEAST_GAP else None


def nearest(part, pos, size, moving=None):
    """The free position nearest to one: over no node and no group's edge."""
    nodes, groups = [box(node) for node in part["nodes"] if node is not moving], list(frames(part))
    steps = range(-FAR, FAR + 1)
    for column, line in sorted(itertools.product(steps, steps), key=lambda step: step[0] ** 2 + step[1] ** 2):
        found = [round(pos[0]) + column * STEP, round(pos[1]) + line * STEP]
        new = box({"pos": found, "size": size})
        if not any(touch(new, node, GAP) for node in nodes) and not any(
            touch(new, group, GAP / 2) and not inside(new, group) for group in groups
        ):
            return found
    # a huge graph without a hole: below everything
    return [round(pos[0]), round(max(node[3] for node in nodes)) + TITLE + GAP]
