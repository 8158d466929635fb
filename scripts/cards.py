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
EDIT_PROMPT = "Add a cool hat to the cat"
SMALL = {"width": 256, "height": 256, "steps": 20, "megapixels": 0.0625, "text": PROMPT}


def make(server, api, kind, size):
    """(card, result) as PIL images; kind: a key of CARDS."""
    if kind in CHARTS:
        chart = speed_chart.square(size, *CHARTS[kind])
        return chart, chart
    images = run(server, api, {"text": EDIT_PROMPT} if kind == "edit" else {})
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
    card = ImageOps.fit(images[0], (size, size), Image.Resampling.LANCZOS)
    card.paste(ImageOps.fit(before, (size, size), Image.Resampling.LANCZOS).crop((0, 0, size // 2, size)), (0, 0))
    return lined(card, [size // 2], ("before", "after"))


def gpus(images, before, size):
    """Who computes what: stripes of the image."""
    return lined(
        whole(images, before, size), [size // 4, size // 2, size * 3 // 4], ("GPU 1", "GPU 2", "GPU 3", "GPU 4")
    )


def stacked(images, before, size):
    """What Compare Attention gives: the images side by side above their differences."""
    card = Image.new("RGB", (size, size), "#202020")
    for number, image in enumerate(images[:2]):
        part = ImageOps.pad(image, (size, size // 2), Image.Resampling.LANCZOS, color="#202020")
        card.paste(part, (0, number * (size // 2)))
    return card


def lined(card, edges, words):
    """White lines at `edges`, and a word below each part."""
    draw, font = ImageDraw.Draw(card), ImageFont.load_default(card.width // 20)
    for edge in edges:
        draw.line([(edge, 0), (edge, card.height)], fill="white", width=4)
    width = card.width // len(words)
    for number, word in enumerate(words):
        place = (number * width + width // 2, card.height - card.width // 16)
        draw.text(place, word, fill="white", font=font, anchor="mm", stroke_width=3, stroke_fill="black")
    return card


CARDS = {"edit": halves, "gpus": gpus, "compare": stacked}
CHARTS = {"benchmark": ("kernels",), "fp8": ("fp8",)}
