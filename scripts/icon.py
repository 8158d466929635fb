#!/usr/bin/env python3
"""Draw docs/icon.png and docs/banner.png, the pack's images in the registry: an attention map, softmax weights of six
queries over six keys, and the same beside the pack's name.

  python scripts/icon.py

Needs Pillow. The registry takes icons of at most 800 x 400 pixels, and banners of 21 to 9.
"""

import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

FILE = Path(__file__).resolve().parent.parent / "docs" / "icon.png"
BANNER, BANNER_SIZE = FILE.with_name("banner.png"), (1344, 576)
SIZE, SCALE, CELLS = 400, 4, 6
BACKGROUND, COLD, HOT = (20, 23, 31), (58, 45, 110), (255, 184, 77)
MARGIN, GAP = 46, 9


def weights():
    """Rows that sum to 1: each query looks at its own place, and all of them at key 4."""
    scores = [
        [2.6 * math.exp(-((query - key) ** 2) / 1.5) + (1.3 if key == 4 else 0) for key in range(CELLS)]
        for query in range(CELLS)
    ]
    return [[math.exp(score) / sum(map(math.exp, row)) for score in row] for row in scores]


def colour(weight, largest):
    share = (weight / largest) ** 0.85
    return tuple(round(cold + (hot - cold) * share) for cold, hot in zip(COLD, HOT))


def draw():
    """An RGBA image, SIZE x SIZE: drawn larger and reduced, for smooth edges."""
    image = Image.new("RGBA", (SIZE * SCALE,) * 2)
    pen, rows = ImageDraw.Draw(image), weights()
    pen.rounded_rectangle((0, 0, SIZE * SCALE - 1, SIZE * SCALE - 1), 72 * SCALE, BACKGROUND)
    pitch = (SIZE - 2 * MARGIN + GAP) / CELLS
    for y, row in enumerate(rows):
        for x, weight in enumerate(row):
            left, top = MARGIN + x * pitch, MARGIN + y * pitch
            box = [round(edge * SCALE) for edge in (left, top, left + pitch - GAP, top + pitch - GAP)]
            pen.rounded_rectangle(box, 10 * SCALE, colour(weight, max(map(max, rows))))
    return image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def banner():
    """An RGB image of BANNER_SIZE: the icon, the name, and what the pack does in a line."""
    image = Image.new("RGB", BANNER_SIZE, BACKGROUND)
    icon = draw()
    image.paste(icon, (88, 88), icon)
    pen = ImageDraw.Draw(image)
    pen.text((536, 222), "Flux 2 Attention", fill="white", font=ImageFont.load_default(88), anchor="lm")
    line = "FLUX.2 in ComfyUI with the kernel you choose"
    pen.text((540, 326), line, fill=HOT, font=ImageFont.load_default(34), anchor="lm")
    return image


if __name__ == "__main__":
    draw().save(FILE, optimize=True)
    banner().save(BANNER, optimize=True)
