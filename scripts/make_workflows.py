#!/usr/bin/env python3
"""Make the templates, their cards, the subgraph blueprints and an image with an embedded workflow from the API
workflows, in ComfyUI's own page.

  python scripts/make_workflows.py [NAME ...]      write example_workflows/*.json and *.jpg, subgraphs/*.json and
                                                   docs/workflow.png and docs/hero.png, all or those named

The graphs are written once, as API workflows in example_workflows/api/. This opens each in a real ComfyUI page,
arranges the nodes as below, puts all but what a user reads and sets into one node (scripts/blueprints.py), adds a note
with the model files, and saves what the page itself would save: both kinds of workflow always say the same. A file's
name is its title in the template browser, in the order in which they stand there. The cards show what the small
drawing model (docs/small-model.md) generated from the same workflow. Needs Chromium (see tests/browser.py) and about
six minutes on two cores. Run it after a change of an API workflow or of a node's inputs.
"""

import json
import sys
import tempfile
import uuid
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import blueprints
import cards
import environment
from blueprints import REPORT, Blueprint
from comfy_server import ROOT, ComfyServer, drawing_models

sys.path.insert(0, str(ROOT / "tests"))
import browser  # noqa: E402

FOLDER, EMBEDDED = ROOT / "example_workflows", ROOT / "docs" / "workflow.png"
HERO = ROOT / "docs" / "hero.png"
DRAWN_IMAGE = ROOT / "tests" / "data" / "drawn_cat.png"
PACK_ID = "flux2-attention"  # lets ComfyUI-Manager find the pack where its nodes are missing
DEV, KLEIN = (
    f"https://huggingface.co/Comfy-Org/{name}/resolve/main/split_files" for name in ("flux2-dev", "flux2-klein")
)
FILES = {  # what the frontend offers where a file is missing: name -> (folder under models/, where it is published)
    "flux2_dev_fp8mixed.safetensors": ("diffusion_models", DEV),
    "mistral_3_small_flux2_bf16.safetensors": ("text_encoders", DEV),
    "flux2-vae.safetensors": ("vae", DEV),
    "flux-2-klein-4b.safetensors": ("diffusion_models", KLEIN),
    "qwen_3_4b.safetensors": ("text_encoders", KLEIN),
}
LOADERS = {"Flux2LoadModel": "model_name", "Flux2LoadTextEncoder": "text_encoder_name", "Flux2LoadVAE": "vae_name"}
# nothing over the graph
BARE = {"Comfy.Minimap.Visible": False, "Comfy.Graph.CanvasInfo": False, "Comfy.Graph.CanvasMenu": False}

# pixels: a node's title bar, between nodes above each other, between columns, between a group's frame and its nodes
TITLE, GAP, COLUMN_GAP, EDGE = 30, 26, 48, 18
GROUP_TITLE, GROUP_GAP = 40, 30
BELOW = 900  # where a second row of groups begins
MODELS_WIDTH = 410  # wide enough for the official file names
# at the top level nodes stand further apart: ComfyUI's newer node design draws some of them taller
TOP_GAP, TOP_COLUMN_GAP = 46, 40
BLUE, ORANGE, GREEN, PURPLE, GREY, TEAL = "#3f789e", "#b06634", "#5a8a4a", "#7a5a9a", "#666666", "#3a8a86"
CARD = 512  # pixels, square, as the template browser shows them
NOTE, WHOLE = "MarkdownNote", "whole"  # in the columns below: the note, and the node that holds the graph


@dataclass(frozen=True)
class Group:
    """A frame at (left, top) around columns of nodes: [(width, [title or (title, least height), ...]), ...].

    top: pixels, or the title of the group below which it goes.
    """

    title: str
    colour: str
    left: int
    top: int | str
    columns: list
    gap: int = GAP


@dataclass(frozen=True)
class Template:
    """What an API workflow lacks to be a template.

    api: its file. blueprint: the node that holds the graph, or None for a graph of three nodes. groups: how the nodes
    are arranged inside. columns: of the top level, [(width, [(type of node, height or None for its own), ...])].
    card: how its card is made, of the files that a run of the API workflow leaves.
    """

    api: str
    title: str
    note: str
    blueprint: Blueprint | None
    groups: list
    columns: list
    card: str = "image"


SELECT = """**attention kernel** chooses what computes attention. *auto* takes the fastest exact kernel, measured on \
your GPU. Any other choice runs, or the graph stops with the reason: nothing falls back silently.

"""
REPORT_SAYS = """**Attention Report** shows after the run which kernel ran, for how many calls, and how long a step \
took.

"""


def models(encoder="Load Mistral 3 Text Encoder"):
    """The group of the three loaders."""
    return Group("Models", BLUE, 0, 0, [(MODELS_WIDTH, ["Load FLUX.2 Model", encoder, ("Load FLUX.2 VAE", 132)])], 50)


def generating(loaders, attention=("Select Attention",), prompt=(("Prompt", 190), "Guidance")):
    """The groups of a graph that generates one image."""
    return [
        loaders,
        Group("Attention", ORANGE, 480, 0, [(360, list(attention))]),
        Group("Prompt", GREEN, 480, "Attention", [(360, list(prompt))]),
        Group(
            "Sampling",
            PURPLE,
            910,
            0,
            [(290, ["Guider", "Noise", "Sampler", "Scheduler", "Empty Latent"]), (260, ["Sample", "Decode"])],
        ),
    ]


def reference(number=None, left=0, size=True):
    """The group of one reference image, below all others; the first gives the new image its size."""
    name = f" {number}" if number else ""
    middle = [
        f"Scale Reference{name}",
        *([f"Size of {'Reference' if number else 'the Reference'}{name}"] if size else []),
    ]
    columns = [(360, middle), (290, [f"Encode Reference{name}", f"Use as Reference{name}"])]
    return Group(f"Reference image{name}", TEAL, left, BELOW, columns)


RESULTS = (430, [(REPORT, 300), ("SaveImage", 330)])
IMAGE_COLUMNS = [(340, [(NOTE, 380)]), (400, [(WHOLE, 560)]), RESULTS]
EDIT_COLUMNS = [(340, [(NOTE, 340), ("LoadImage", 290)]), (400, [(WHOLE, 560)]), RESULTS]
TWO_COLUMNS = [(300, [("LoadImage", 315), ("LoadImage", 315)]), (400, [(WHOLE, 400), (NOTE, 230)]), RESULTS]
COMPARE_COLUMNS = [
    (360, [(NOTE, 300), (WHOLE, 380)]),
    (520, [("Flux2CompareAttention", 760)]),
    (430, [("SaveImage", 340), ("SaveImage", 344)]),
]
BENCHMARK_COLUMNS = [
    (360, [("Flux2LoadModel", None), (NOTE, 460)]),
    (560, [("Flux2BenchmarkAttention", 680)]),
    (430, [("SaveImage", 560)]),
]
COMPARING = [
    models(),
    Group("Prompt", GREEN, 480, 0, [(360, [("Prompt", 190), "Guidance"])]),
    Group("Sampling", PURPLE, 910, 0, [(360, ["Sampler", "Scheduler", "Empty Latent"])]),
]
TEMPLATES = {
    "1 Text to image": Template(
        "flux2_text_to_image",
        "FLUX.2 with the attention kernel you choose",
        SELECT + REPORT_SAYS + "**Compare:** the seed is fixed, so change only *attention kernel* and run again.",
        blueprints.TEXT_TO_IMAGE,
        generating(models()),
        IMAGE_COLUMNS,
    ),
    "2 Image edit": Template(
        "flux2_image_edit",
        "Edit an image with FLUX.2",
        "**prompt** says what to change. The new image gets the size of the reference, scaled to about one "
        "megapixel.\n\n" + SELECT,
        blueprints.EDIT,
        [*generating(models()), reference()],
        EDIT_COLUMNS,
        "edit",
    ),
    "3 Two references": Template(
        "flux2_image_edit_two_references",
        "Combine two images with FLUX.2",
        """\
**prompt** calls the images *image 1* and *image 2*. The new one gets the size of image 1.

**More images:** open the node, copy the group *Reference image 2* and put its ReferenceLatent behind the last one. \
Every image makes steps longer.""",
        blueprints.TWO_REFERENCES,
        [*generating(models()), reference(1), reference(2, 900, size=False)],
        TWO_COLUMNS,
        "references",
    ),
    "4 klein in four steps": Template(
        "flux2_klein_4_steps",
        "FLUX.2 klein: an image in four steps",
        """\
**klein 4B** is distilled: four steps, and no guidance value. For klein 9B choose its file and the Qwen3 8B encoder.

"""
        + SELECT
        + REPORT_SAYS,
        blueprints.KLEIN,
        generating(models("Load Qwen3 Text Encoder"), prompt=[("Prompt", 190)]),
        IMAGE_COLUMNS,
        "four steps",
    ),
    "5 fp8 and fused blocks": Template(
        "flux2_fp8_fast_blocks",
        "Fast on one GPU: fp8 and fused blocks",
        """\
**Fast Blocks**, inside the node, computes what lies between matrix products and attention with a few fused kernels. \
**precision** *as in the file* leaves the products in the file's format: this file's run in fp8 where the card can. \
*fp8* makes those of a bf16 file fp8, a little less exact.

It needs an NVIDIA or AMD GPU with Triton; elsewhere it stops and says so: open the node and bypass \
Fast Blocks (Ctrl+B).

"""
        + REPORT_SAYS,
        blueprints.FAST,
        generating(models(), attention=["Select Attention", ("Fast Blocks", 80)]),
        IMAGE_COLUMNS,
        "fp8",
    ),
    "6 Several GPUs": Template(
        "flux2_several_gpus",
        "One image on several GPUs",
        """\
**Sequence Parallel**, inside the node, computes every step on several GPUs: each has the whole model and a part of \
the image. **gpus** 0 takes all GPUs of this machine; with one GPU it changes nothing. The first image starts a \
process for each GPU and loads the model there; they stay for the next ones.

**attention kernel** runs on each of them.

**Attention Report** shows what each GPU did, and how long a step took.""",
        blueprints.SEVERAL_GPUS,
        generating(models(), attention=["Select Attention", ("Sequence Parallel", 106)]),
        IMAGE_COLUMNS,
        "gpus",
    ),
    "7 Compare kernels": Template(
        "flux2_compare_attention",
        "Is another kernel good enough?",
        """\
**Compare Attention** generates from the same noise with the *reference* and with each *candidate*, and says for each: \
same as rounding noise, slightly different, or a different image. The yardstick is how far two of PyTorch's exact \
kernels are apart.
""",
        blueprints.TO_COMPARE,
        COMPARING,
        COMPARE_COLUMNS,
        "compare",
    ),
    "8 Benchmark kernels": Template(
        "flux2_benchmark_attention",
        "Which kernel is fastest on this machine?",
        """\
**Benchmark Attention** times every kernel that runs here on the calls your model really makes, then whole steps. It \
needs no prompt and no other model. The figures are also saved as JSON in the output folder.

**sizes:** *+1* behind a size adds a reference image of 1024x1024.

**It takes minutes.** For a first look set *sizes* to 1024x1024 and *timed steps* to 0.""",
        None,
        [],
        BENCHMARK_COLUMNS,
        "benchmark",
    ),
}


# --- the page's side -------------------------------------------------------------------------------------------------

LOAD = """
app.clean();  // pictures that nodes of the graph before showed: they are kept by node id
await app.loadApiJson(args[0], args[1]);
for (const node of app.graph.nodes) {
  const model = args[2][node.type];
  if (model) Object.assign(node.properties, {cnr_id: args[3], models: [model]});
  else if (node.type.startsWith('Flux2') && node.constructor.nodeData.python_module.startsWith('custom_nodes')) \
node.properties.cnr_id = args[3];
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
Object.assign(note, {title: args[0], color: '#432', bgcolor: '#653'});
app.graph.add(note);
note.widgets[0].value = args[1];
for (const node of app.graph.nodes) if (node !== note) node.title = node.constructor.title;  // what search and
// languages know; a stored title hides it
"""
TOP_LEVEL = """
await app.loadGraphData(args[0], true, true, args[1]);
const left = app.graph.nodes.map(node => node), sizes = {};
let x = 0;
for (const [width, stack] of args[2]) {
  let y = 0;
  for (const [type, height] of stack) {
    const place = left.findIndex(node => type === 'whole' ? node.subgraph : node.type === type);
    if (place < 0) throw new Error(args[1] + ' has no ' + type);
    const [node] = left.splice(place, 1);
    node.pos = [x, y + args[3]];
    node.setSize([width, Math.max(height ?? 0, node.computeSize()[1])]);
    y += args[3] + node.size[1] + args[4];
  }
  x += width + args[5];
}
if (left.length) throw new Error(args[1] + ' does not place ' + left.map(node => node.type));
"""
AFTER_A_RUN = """
app.graph.remove(app.graph.nodes.find(({type}) => type === 'MarkdownNote'));
const whole = app.graph.nodes.find(node => node.subgraph);
for (const widget of whole.widgets) if (widget.name in args[0]) widget.value = args[0][widget.name];
"""
SAVED = "return JSON.stringify((await app.graphToPrompt()).workflow)"


def download(name):
    """What the frontend offers when the file is missing."""
    folder, place = FILES[name]
    return {"name": name, "url": f"{place}/{folder}/{name}", "directory": folder}


def downloads(api):
    """{node type: download} for the loaders of an API workflow."""
    return {
        node["class_type"]: download(node["inputs"][LOADERS[node["class_type"]]])
        for node in api.values()
        if node["class_type"] in LOADERS
    }


def arrange(groups, heights):
    """(nodes, frames): [(title, x, y, width, height)], [(title, colour, x, y, width, height)]. y of a node is below its
    title bar.
    """
    nodes, frames, ends = [], [], {}
    for group in groups:
        top = group.top if isinstance(group.top, int) else ends[group.top] + GROUP_GAP
        x, bottom = group.left + EDGE, 0
        for width, stack in group.columns:
            placed, end = arrange_column(stack, heights, x, top + GROUP_TITLE, width, group.gap)
            nodes += placed
            x, bottom = x + width + COLUMN_GAP, max(bottom, end)
        ends[group.title] = bottom + EDGE
        frames.append(
            (group.title, group.colour, group.left, top, x - COLUMN_GAP + EDGE - group.left, bottom + EDGE - top)
        )
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


def links(api):
    """The part of a note that says which files a graph needs, where they are, and where they go."""
    lines = [f"- models/{found['directory']}: [{found['name']}]({found['url']})" for found in downloads(api).values()]
    return "\n".join(["**Model files** and their folders:", "", *lines, "", ""])


@contextmanager
def running():
    """(ComfyUI's server, a page of it) with the drawing model under the official file names, and an image as
    example.png.
    """
    comfyui = environment.comfyui(environment.cache_folder())
    with (
        tempfile.TemporaryDirectory() as folder,
        ComfyServer(comfyui, models=official_names(drawing_models(), Path(folder))) as server,
    ):
        (server.base / "input" / "example.png").write_bytes(DRAWN_IMAGE.read_bytes())
        with browser.Page(server.url, settings=BARE) as page:
            yield server, page


def official_names(small, folder):
    """Links to the small models under the names of the official files, so that no node misses its file."""
    for name, (kind, _) in FILES.items():
        (folder / name).symlink_to(small[kind][0])
    return {kind: [folder / name for name, (its_kind, _) in FILES.items() if its_kind == kind] for kind in small}


def build(page, name):
    """The GUI workflow of that name, left open in the page."""
    template = TEMPLATES[name]
    api = json.loads((FOLDER / "api" / f"{template.api}.json").read_text())
    heights = page.js(LOAD, api, name, downloads(api), PACK_ID)
    page.js(PLACE, *arrange(template.groups, heights))
    page.js(ADD_NOTE, template.title, links(api) + template.note)
    workflow = json.loads(page.js(SAVED))
    if template.blueprint:
        workflow = blueprints.wrap(template.blueprint, workflow)
    page.js(TOP_LEVEL, workflow, name, template.columns, TITLE, TOP_GAP, TOP_COLUMN_GAP)
    workflow = json.loads(page.js(SAVED))
    workflow["id"] = str(uuid.uuid5(uuid.NAMESPACE_URL, f"{PACK_ID}/{name}"))  # the same at every run
    workflow["extra"].pop("ds", None)  # the page fits the graph into the window that it has
    return workflow


def save(server, page, name):
    """Write a template and its card, and for the first one an image that holds it."""
    workflow = build(page, name)
    (FOLDER / f"{name}.json").write_text(json.dumps(workflow, indent=2) + "\n")
    card, result = cards.make(server, TEMPLATES[name].api, TEMPLATES[name].card, CARD)
    card.save(FOLDER / f"{name}.jpg", quality=88)
    if name == next(iter(TEMPLATES)):
        embed(result, workflow)
        hero(page)


def hero(page):
    """The open template after a run of the drawing model, cut to its nodes: badge, report and generated image."""
    from PIL import Image

    page.js(AFTER_A_RUN, {"prompt": cards.PROMPT, "width": 256, "height": 256})
    page.run()
    page.js("document.querySelectorAll('button').forEach(button => { button.style.visibility = 'hidden'; })")
    page.clear_view()
    box = page.fit(margin=30)
    with tempfile.TemporaryDirectory() as folder:
        page.screenshot(Path(folder) / "page.png")
        with Image.open(Path(folder) / "page.png") as shot:
            shot.convert("RGB").crop(box).save(HERO, optimize=True)


def embed(image, workflow):
    """Write an image that opens its workflow when it is dropped on ComfyUI's page."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("workflow", json.dumps(workflow))
    image.save(EMBEDDED, pnginfo=info, optimize=True)


def main():
    if reason := browser.missing():
        raise SystemExit(f"make_workflows: {reason}")
    wanted = sys.argv[1:] or list(TEMPLATES)
    if unknown := set(wanted) - set(TEMPLATES):
        raise SystemExit(
            f"make_workflows: there is no template {', '.join(sorted(unknown))}; there are {', '.join(TEMPLATES)}"
        )
    with running() as (server, page):
        for name in wanted:
            save(server, page, name)
    blueprints.write(FOLDER)


if __name__ == "__main__":
    main()
