"""The cards of the template browser: what the small drawing model generated from a template's API workflow.

`make(server, api, kind, size)` runs the workflow on a running ComfyUI and gives (a square card, the image itself).
"""

import asyncio
import io
import json

from PIL import Image, ImageDraw, ImageFont, ImageOps

import speed_chart
from comfy_client import ComfyClient
from comfy_server import ROOT

API = ROOT / "example_workflows" / "api"
# words that the drawing model was trained on (docs/small-model.md)
PROMPT = "a small red star above a large blue circle on a grey background"
OTHER_PROMPT = "a large yellow moon below a small green square on a blue background"
WORDS = {"edit": "Add a cool hat to the cat", "four steps": OTHER_PROMPT}
SMALL = {"width": 256, "height": 256, "steps": 20, "megapixels": 0.0625}


def make(server, api, kind, size):
    """(card, result) as PIL images; kind: a key of CARDS."""
    if kind in CHARTS:
        chart = speed_chart.square(size, *CHARTS[kind])
        return chart, chart
    images = run(server, api, {"text": WORDS.get(kind, PROMPT)})
    before = Image.open(server.base / "input" / "example.png").convert("RGB")
    return CARDS.get(kind, whole)(images, before, size), images[0]


def run(server, api, changes):
    """The images that the API workflow saves, small, with the drawing model's own text encoder and words."""
    workflow = json.loads((API / f"{api}.json").read_text())
    for node in workflow.values():
        for name, value in {**SMALL, **changes}.items():
            if name in node["inputs"] and not isinstance(node["inputs"][name], list):
                node["inputs"][name] = value
    return asyncio.run(images_of(server, workflow))


async def images_of(server, workflow):
    async with ComfyClient(server.url) as client:
        result = await client.run(workflow)
        return [Image.open(io.BytesIO(await client.download(image))).convert("RGB") for image in result.images()]


def whole(images, before, size):
    return ImageOps.fit(images[0], (size, size), Image.Resampling.LANCZOS)


def halves(images, before, size):
    """The image before on the left, after on the right, of the same thing."""
    card = whole(images, before, size)
    card.paste(ImageOps.fit(before, (size, size), Image.Resampling.LANCZOS).crop((0, 0, size // 2, size)), (0, 0))
    draw, font = ImageDraw.Draw(card), ImageFont.load_default(size // 20)
    draw.line([(size // 2, 0), (size // 2, size)], fill="white", width=4)
    for place, word in ((size // 4, "before"), (3 * size // 4, "after")):
        at = (place, size - size // 16)
        draw.text(at, word, fill="white", font=font, anchor="mm", stroke_width=3, stroke_fill="black")
    return card


def gpus(images, before, size):
    """Who computes what: the tokens of an image are its rows from top to bottom."""
    card = whole(images, before, size)
    draw, font = ImageDraw.Draw(card), ImageFont.load_default(size // 20)
    for number in range(4):
        edge = size * number // 4
        draw.line([(0, edge), (size, edge)], fill="white", width=4)
        draw.text((12, edge + 12), f"GPU {number + 1}", fill="white", font=font, stroke_width=3, stroke_fill="black")
    return card


def stacked(images, before, size):
    """What Compare Attention gives: the images side by side above their differences."""
    card = Image.new("RGB", (size, size), "#202020")
    for number, image in enumerate(images[:2]):
        part = ImageOps.pad(image, (size, size // 2), Image.Resampling.LANCZOS, color="#202020")
        card.paste(part, (0, number * (size // 2)))
    return card


CARDS = {"edit": halves, "gpus": gpus, "compare": stacked}
CHARTS = {"benchmark": ("kernels",), "fp8": ("fp8",)}
