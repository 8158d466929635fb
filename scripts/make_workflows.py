#!/usr/bin/env python3
"""Make the GUI workflows, their thumbnails and the README's picture from the API workflows, in ComfyUI's own page.

  python scripts/make_workflows.py            write example_workflows/*.json, *.jpg and docs/graph.png

The graphs are written once, as API workflows in example_workflows/api/. This opens each in a real ComfyUI page, arranges the nodes as below,
adds groups, a note and the links of the model files, and saves what the page itself would save: both kinds of workflow always say the same.
Needs Chromium (see tests/browser.py). Run it after a change of an API workflow or of a node's inputs.
"""
import io
import json
import sys
import tempfile
import uuid
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import environment
from comfy_server import ROOT, ComfyServer, small_models

sys.path.insert(0, str(ROOT / "tests"))
import browser  # noqa: E402

FOLDER, PICTURE = ROOT / "example_workflows", ROOT / "docs" / "graph.png"
PACK_ID = "flux2-attention"  # lets ComfyUI-Manager find the pack where its nodes are missing
WEIGHTS = "https://huggingface.co/Comfy-Org/flux2-dev/resolve/main/split_files"
MODELS = {"Flux2LoadModel": ("diffusion_models", "flux2_dev_fp8mixed.safetensors"),
          "Flux2LoadTextEncoder": ("text_encoders", "mistral_3_small_flux2_bf16.safetensors"),
          "Flux2LoadVAE": ("vae", "flux2-vae.safetensors")}
NOTE = """**Download** the three files named in *Models* into the folders diffusion_models, text_encoders and vae of ComfyUI's models. \
ComfyUI lists the ones you lack, with links, when this graph opens.

**Select Attention** chooses the kernel that computes attention. *auto* takes the fastest exact one, measured on your card. \
Any other choice runs, or stops and says why: nothing falls back in silence.

**Attention Report** says after the run which kernel ran, for how many calls, and how long a step took.

**Compare:** the seed is fixed, so change only *backend* and run again."""

BARE = {"Comfy.Minimap.Visible": False, "Comfy.Graph.CanvasInfo": False, "Comfy.Graph.CanvasMenu": False}  # nothing over the graph

# pixels: a node's title bar, between nodes above each other, between columns, between a group's frame and its nodes
TITLE, GAP, COLUMN_GAP, EDGE = 30, 26, 48, 18
GROUP_TITLE, MODELS_WIDTH = 40, 410  # wide enough for the official file names
NOTE_BOX = [EDGE, TITLE], [MODELS_WIDTH, 225]
BLUE, ORANGE, GREEN, PURPLE, GREY, TEAL = "#3f789e", "#b06634", "#5a8a4a", "#7a5a9a", "#666666", "#3a8a86"


@dataclass(frozen=True)
class Group:
    """A frame at (left, top) around columns of nodes: [(width, [title or (title, least height), ...]), ...]."""
    title: str
    colour: str
    left: int
    top: int
    columns: list
    gap: int = GAP


MODELS_GROUP = Group("Models", BLUE, 0, 282, [(MODELS_WIDTH, ["Load FLUX.2 Model", "Load Mistral 3 Text Encoder", "Load FLUX.2 VAE"])],
                     gap=50)  # ComfyUI's newer node design, which the user may have switched on, draws the loaders taller
COMMON = [
    MODELS_GROUP,
    Group("Attention", ORANGE, 480, 0, [(360, ["Select Attention"])]),
    Group("Prompt", GREEN, 480, 350, [(360, [("Prompt", 190), "Guidance"])]),
    Group("Sampling", PURPLE, 910, 0, [(290, ["Guider", "Noise", "Sampler", "Scheduler", "Empty Latent"]), (260, ["Sample"])]),
    Group("Picture", GREY, 1578, 0, [(480, [("Attention Report", 300), "Decode", ("Save Image", 320)])]),
]
LAYOUTS = {
    "flux2_text_to_image": COMMON,
    "flux2_image_edit": [*COMMON, Group("Reference picture", TEAL, 0, 960, [
        (MODELS_WIDTH, [("Reference Image", 320)]), (360, ["Scale Reference", "Size of the Reference"]), (290, ["Encode Reference", "Use as Reference"])])],
}


# --- the page's side -------------------------------------------------------------------------------------------------

LOAD = """
await app.loadApiJson(args[0], args[1]);
for (const node of app.graph.nodes) {
  const model = args[2][node.type];
  if (model) Object.assign(node.properties, {cnr_id: args[3], models: [model]});
  else if (node.type.startsWith('Flux2') && node.constructor.nodeData.python_module.startsWith('custom_nodes')) node.properties.cnr_id = args[3];
  for (const widget of node.widgets ?? []) if (widget.name === 'control_after_generate') widget.value = 'fixed';
}
return Object.fromEntries(app.graph.nodes.map(node => [node.title, node.computeSize()[1]]));
"""
PLACE = """
for (const [title, x, y, width, height] of args[0]) {
  const node = app.graph.nodes.find(node => node.title === title);
  node.pos = [x, y];
  node.setSize([width, height]);
}
for (const [title, color, x, y, width, height] of args[1]) {
  const group = new LiteGraph.LGraphGroup(title);
  Object.assign(group, {pos: [x, y], size: [width, height], color});
  app.graph.add(group);
}
"""
ADD_NOTE = """
const note = LiteGraph.createNode('MarkdownNote');
Object.assign(note, {title: args[0], pos: args[2], color: '#432', bgcolor: '#653'});
app.graph.add(note);
note.setSize(args[3]);
note.widgets[0].value = args[1];
Object.assign(app.canvas.ds, {scale: 0.85, offset: [100, 110]});  // where the graph opens: beside the side bar, below the buttons
"""
SAVED = "return JSON.stringify((await app.graphToPrompt()).workflow)"


def download(folder, name):
    """What the frontend offers when the file is missing."""
    return {"name": name, "url": f"{WEIGHTS}/{folder}/{name}", "directory": folder}


def arrange(groups, heights):
    """(nodes, frames): [(title, x, y, width, height)], [(title, colour, x, y, width, height)]. y of a node is below its title bar."""
    nodes, frames = [], []
    for group in groups:
        x, bottom = group.left + EDGE, 0
        for width, stack in group.columns:
            placed, end = arrange_column(stack, heights, x, group.top + GROUP_TITLE, width, group.gap)
            nodes += placed
            x, bottom = x + width + COLUMN_GAP, max(bottom, end)
        frames.append((group.title, group.colour, group.left, group.top, x - COLUMN_GAP + EDGE - group.left, bottom + EDGE - group.top))
    return nodes, frames


def arrange_column(stack, heights, x, y, width, gap):
    """One below the other; returns the nodes and where the last ends."""
    placed = []
    for entry in stack:
        title, least = entry if isinstance(entry, tuple) else (entry, 0)
        height = max(least, heights[title])
        placed.append((title, x, y + TITLE, width, height))
        y += TITLE + height + gap
    return placed, y - gap


@contextmanager
def running_page():
    """A page of a ComfyUI that has the official file names (small models behind them) and a photograph as example.png."""
    comfyui = environment.comfyui(environment.cache_folder())
    with tempfile.TemporaryDirectory() as folder, ComfyServer(comfyui, models=official_names(small_models(comfyui), Path(folder))) as server:
        photograph().save(server.base / "input" / "example.png")
        with browser.Page(server.url, settings=BARE) as page:
            yield page


def official_names(small, folder):
    """Links to the small models under the names of the official files, so that no node on the picture is marked as missing its file."""
    for kind, name in MODELS.values():
        (folder / name).symlink_to(small[kind][0])
    return {kind: [folder / name] for kind, name in MODELS.values()}


def photograph():
    from PIL import Image
    from skimage import data
    return Image.fromarray(data.chelsea())


def build(page, name):
    """The GUI workflow of that name, left open in the page."""
    api = json.loads((FOLDER / "api" / f"{name}.json").read_text())
    links = {node: download(*file) for node, file in MODELS.items()}
    heights = page.js(LOAD, api, name, links, PACK_ID)
    page.js(PLACE, *arrange(LAYOUTS[name], heights))
    page.js(ADD_NOTE, "FLUX.2 with the attention kernel you choose", NOTE, *NOTE_BOX)
    workflow = json.loads(page.js(SAVED))
    page.clear_view()
    workflow["id"] = str(uuid.uuid5(uuid.NAMESPACE_URL, f"{PACK_ID}/{name}"))  # the same at every run
    return workflow


def picture(page):
    """The open graph, cut to what is drawn."""
    from PIL import Image
    box = page.fit(margin=30)
    with tempfile.TemporaryDirectory() as folder:
        page.screenshot(Path(folder) / "graph.png")
        return Image.open(io.BytesIO((Path(folder) / "graph.png").read_bytes())).convert("RGB").crop(box)


def thumbnail(drawn):
    """As the template browser shows it: small, and 16 to 9 with the graph in the middle."""
    from PIL import Image, ImageOps
    return ImageOps.pad(drawn, (960, 540), Image.Resampling.LANCZOS, color=drawn.getpixel((0, 0)))


def main():
    if reason := browser.missing():
        raise SystemExit(f"make_workflows: {reason}")
    with running_page() as page:
        for name in LAYOUTS:
            workflow = build(page, name)
            (FOLDER / f"{name}.json").write_text(json.dumps(workflow, indent=2) + "\n")
            drawn = picture(page)
            thumbnail(drawn).save(FOLDER / f"{name}.jpg", quality=85)
            if name == "flux2_text_to_image":
                PICTURE.parent.mkdir(exist_ok=True)
                drawn.save(PICTURE, optimize=True)


if __name__ == "__main__":
    main()
