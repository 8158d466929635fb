#!/usr/bin/env python3
"""Make the GUI workflows, their thumbnails, the subgraph blueprints and the README's picture from the API workflows, in
ComfyUI's own page.

  python scripts/make_workflows.py [NAME ...]      write example_workflows/*.json and *.jpg, subgraphs/*.json and
                                                   docs/graph.png, all or those named

The graphs are written once, as API workflows in example_workflows/api/. This opens each in a real ComfyUI page,
arranges the nodes as below, adds groups, a note and the links of the model files, and saves what the page itself would
save: both kinds of workflow always say the same. Needs Chromium (see tests/browser.py). Run it after a change of an API
workflow or of a node's inputs.
"""

import io
import json
import sys
import tempfile
import uuid
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import blueprints
import environment
from comfy_server import ROOT, ComfyServer, small_models

sys.path.insert(0, str(ROOT / "tests"))
import browser  # noqa: E402

FOLDER, PICTURE = ROOT / "example_workflows", ROOT / "docs" / "graph.png"
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
MODELS_WIDTH, TABLE_WIDTH = 410, 940  # wide enough for the official file names, and for the lines of the tables
NOTE_BOX = [EDGE, TITLE], [MODELS_WIDTH, 225]
BLUE, ORANGE, GREEN, PURPLE, GREY, TEAL = "#3f789e", "#b06634", "#5a8a4a", "#7a5a9a", "#666666", "#3a8a86"


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
    """What the API workflow of the same name lacks: where its nodes are, and what the note says."""

    groups: list
    title: str
    note: str
    note_box: tuple = NOTE_BOX


DOWNLOAD = """**Download** the files named in *Models* into the folders diffusion_models, text_encoders and vae of \
ComfyUI's models. \
ComfyUI lists the ones you lack, with links, when this graph opens.

"""
SELECT = """**Select Attention** chooses the kernel that computes attention. *auto* takes the fastest exact one, \
measured on your card. \
Any other choice runs, or stops and says why: nothing falls back in silence.

"""
REPORT = """**Attention Report** says after the run which kernel ran, for how many calls, and how long a step took.

"""


def models(encoder="Load Mistral 3 Text Encoder", top=282):
    """The group of the three loaders. Its nodes stand apart: ComfyUI's newer node design draws the loaders taller."""
    return Group(
        "Models", BLUE, 0, top, [(MODELS_WIDTH, ["Load FLUX.2 Model", encoder, ("Load FLUX.2 VAE", 132)])], gap=50
    )


def drawing(loaders, attention=("Select Attention",), prompt=(("Prompt", 190), "Guidance")):
    """The groups of a graph that draws one picture."""
    return [
        loaders,
        Group("Attention", ORANGE, 480, 0, [(360, list(attention))]),
        Group("Prompt", GREEN, 480, "Attention", [(360, list(prompt))]),
        Group(
            "Sampling",
            PURPLE,
            910,
            0,
            [(290, ["Guider", "Noise", "Sampler", "Scheduler", "Empty Latent"]), (260, ["Sample"])],
        ),
        Group("Picture", GREY, 1578, 0, [(480, [("Attention Report", 300), "Decode", ("Save Image", 320)])]),
    ]


def reference(number=None, left=0, size=True):
    """The group of one reference picture, below the models; the first gives the new picture its size."""
    name = f" {number}" if number else ""
    middle = [
        f"Scale Reference{name}",
        *([f"Size of {'Reference' if number else 'the Reference'}{name}"] if size else []),
    ]
    return Group(
        f"Reference picture{name}",
        TEAL,
        left,
        "Models",
        [
            (MODELS_WIDTH, [(f"Reference Image{name}", 320)]),
            (360, middle),
            (290, [f"Encode Reference{name}", f"Use as Reference{name}"]),
        ],
    )


COMPARING = [
    models(),
    Group("Prompt", GREEN, 480, 0, [(360, [("Prompt", 190), "Guidance"])]),
    Group("Sampling", PURPLE, 480, "Prompt", [(360, ["Sampler", "Scheduler", "Empty Latent"])]),
    Group("Comparison", ORANGE, 910, 0, [(TABLE_WIDTH, [("Compare Attention", 800)])]),
    Group("What changed", GREY, 1920, 0, [(560, [("Save Pictures", 380), ("Save Differences", 380)])]),
]
TIMING = [
    Group("Model", BLUE, 0, 282, [(MODELS_WIDTH, ["Load FLUX.2 Model"])]),
    Group("Benchmark", ORANGE, 480, 0, [(TABLE_WIDTH, [("Benchmark Attention", 600)])]),
    Group("Chart", GREY, 1490, 0, [(620, [("Save Chart", 600)])]),
]
TEMPLATES = {
    "flux2_text_to_image": Template(
        drawing(models()),
        "FLUX.2 with the attention kernel you choose",
        DOWNLOAD
        + SELECT
        + REPORT
        + """\
**Compare:** the seed is fixed, so change only *backend* and run again.""",
    ),
    "flux2_image_edit": Template(
        [*drawing(models()), reference()],
        "Edit a picture with FLUX.2",
        DOWNLOAD
        + SELECT
        + REPORT
        + """\
**The prompt** says what to change. The new picture gets the size of the reference, scaled to about one megapixel.""",
    ),
    "flux2_image_edit_two_references": Template(
        [*drawing(models()), reference(1), reference(2, 1222, size=False)],
        "Combine two pictures with FLUX.2",
        DOWNLOAD
        + SELECT
        + """\
**The prompt** calls the pictures *image 1* and *image 2*. The new one gets the size of image 1.

**More pictures:** copy the group *Reference picture 2* and put its *Use as Reference* behind the last one. Every \
picture makes steps longer.""",
    ),
    "flux2_klein_4_steps": Template(
        drawing(models("Load Qwen3 Text Encoder"), prompt=[("Prompt", 190)]),
        "FLUX.2 klein: a picture in four steps",
        DOWNLOAD
        + SELECT
        + REPORT
        + """\
**klein 4B** is distilled: four steps, and no guidance value. For klein 9B choose its file and the Qwen3 8B encoder.""",
    ),
    "flux2_fp8_fast_blocks": Template(
        drawing(models(), attention=["Select Attention", ("Fast Blocks", 80)]),
        "Fast on one GPU: fp8 and fused blocks",
        DOWNLOAD
        + """\
**Fast Blocks** computes what lies between matrix products and attention with a few fused kernels. *checkpoint* leaves \
the products as the file \
has them: this file's run in fp8 where the card can. *fp8* makes those of a bf16 file fp8, a little less exact.

It needs an NVIDIA or AMD GPU with Triton; elsewhere it stops and says so: bypass it (Ctrl+B).

**Attention Report** says how many block calls were fused, and how long a step took.""",
    ),
    "flux2_several_gpus": Template(
        drawing(models(), attention=["Select Attention", ("Sequence Parallel", 106)]),
        "One picture on several GPUs",
        DOWNLOAD
        + """\
**Sequence Parallel** computes every step on several GPUs: each has the whole model and a part of the picture. *gpus* \
0 takes all GPUs of this \
machine; with one GPU it changes nothing. The first picture starts a process for each GPU and loads the model there; \
they stay for the next ones.

**Select Attention** chooses the kernel that runs on each of them.

**Attention Report** says what each GPU did, and how long a step took.""",
    ),
    "flux2_compare_attention": Template(
        COMPARING,
        "Is another attention good enough?",
        DOWNLOAD
        + """\
**Compare Attention** draws the same noise with the *reference* and with each *candidate*, and says for each: same as \
rounding noise, slightly \
different, or a different picture. The yardstick is how far two of PyTorch's exact kernels are apart.

**Up to eight candidates:** four backends, and four models from other nodes (LoRA, compiled, fp8 ...) at *model_a* to \
*model_d*. One that cannot \
run is a row with its reason.""",
    ),
    "flux2_benchmark_attention": Template(
        TIMING,
        "Which attention is fastest on this machine?",
        """\
**Benchmark Attention** times every backend that runs here on the calls your model really makes, then whole steps. It \
needs no prompt and no other \
model. The table says why the others cannot run; the figures are also saved as JSON in the output folder.

**sizes:** *+1* behind a size adds a reference picture of 1024x1024.

**It takes minutes.** For a first look set *sizes* to 1024x1024 and *step_repeat* to 0.""",
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
Object.assign(note, {title: args[0], pos: args[2], color: '#432', bgcolor: '#653'});
app.graph.add(note);
note.setSize(args[3]);
note.widgets[0].value = args[1];
Object.assign(app.canvas.ds, {scale: 0.85, offset: [100, 110]});  // where the graph opens: beside the side bar, below \
the buttons
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


@contextmanager
def running_page():
    """A page of a ComfyUI that has the official file names (small models behind them) and a photograph as
    example.png.
    """
    comfyui = environment.comfyui(environment.cache_folder())
    with (
        tempfile.TemporaryDirectory() as folder,
        ComfyServer(comfyui, models=official_names(small_models(comfyui), Path(folder))) as server,
    ):
        photograph().save(server.base / "input" / "example.png")
        with browser.Page(server.url, settings=BARE) as page:
            yield page


def official_names(small, folder):
    """Links to the small models under the names of the official files, so that no node on the picture is marked as
    missing
    its file.
    """
    for name, (kind, _) in FILES.items():
        (folder / name).symlink_to(small[kind][0])
    return {kind: [folder / name for name, (its_kind, _) in FILES.items() if its_kind == kind] for kind in small}


def photograph():
    from PIL import Image
    from skimage import data

    return Image.fromarray(data.chelsea())


def build(page, name):
    """The GUI workflow of that name, left open in the page."""
    api, template = json.loads((FOLDER / "api" / f"{name}.json").read_text()), TEMPLATES[name]
    heights = page.js(LOAD, api, name, downloads(api), PACK_ID)
    page.js(PLACE, *arrange(template.groups, heights))
    page.js(ADD_NOTE, template.title, template.note, *template.note_box)
    workflow = json.loads(page.js(SAVED))
    page.clear_view()
    workflow["id"] = str(uuid.uuid5(uuid.NAMESPACE_URL, f"{PACK_ID}/{name}"))  # the same at every run
    return workflow


def picture(page):
    """The open graph, cut to what is drawn."""
    from PIL import Image

    # one lies over the graph's corner
    page.js("document.querySelectorAll('button').forEach(button => { button.style.visibility = 'hidden'; })")
    box = page.fit(margin=30)
    with tempfile.TemporaryDirectory() as folder:
        page.screenshot(Path(folder) / "graph.png")
        return Image.open(io.BytesIO((Path(folder) / "graph.png").read_bytes())).convert("RGB").crop(box)


def thumbnail(drawn):
    """As the template browser shows it: small, and 16 to 9 with the graph in the middle."""
    from PIL import Image, ImageOps

    return ImageOps.pad(drawn, (960, 540), Image.Resampling.LANCZOS, color=drawn.getpixel((0, 0)))


def save(page, name):
    """Write a template, its thumbnail, and for the first one the README's picture."""
    workflow = build(page, name)
    (FOLDER / f"{name}.json").write_text(json.dumps(workflow, indent=2) + "\n")
    drawn = picture(page)
    thumbnail(drawn).save(FOLDER / f"{name}.jpg", quality=85)
    if name == "flux2_text_to_image":
        PICTURE.parent.mkdir(exist_ok=True)
        drawn.save(PICTURE, optimize=True)


def main():
    if reason := browser.missing():
        raise SystemExit(f"make_workflows: {reason}")
    wanted = sys.argv[1:] or list(TEMPLATES)
    if unknown := set(wanted) - set(TEMPLATES):
        raise SystemExit(
            f"make_workflows: there is no template {', '.join(sorted(unknown))}; there are {', '.join(TEMPLATES)}"
        )
    with running_page() as page:
        for name in wanted:
            save(page, name)
    blueprints.write(FOLDER)


if __name__ == "__main__":
    main()
