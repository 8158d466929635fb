"""One node that holds a whole graph: the blueprints in ComfyUI's node library and search, and the top level of the
templates.

`write(folder)` makes subgraphs/*.json from the templates; ComfyUI serves them to its page (GET /global_subgraphs).
`wrap(blueprint, workflow)` puts everything of a flat graph that a template does not show at its top level into such a
node. What a user sets is an input of the subgraph, connected to widgets inside. Standard library alone.
"""

import copy
import json
import uuid
from dataclasses import dataclass
from pathlib import Path

NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "flux2-attention/blueprints")  # the same ids at every run
INSIDE, OUTSIDE = -10, -20  # the ids of a subgraph's own inputs and outputs in its links
REPORT = "Flux2AttentionReport"
# what stays at the top level: what a user reads, and the files that go in and out
SHOWN = (
    "MarkdownNote",
    "LoadImage",
    "SaveImage",
    "ImageCompare",
    REPORT,
    "Flux2CompareAttention",
    "Flux2BenchmarkAttention",
)
LINK = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
# pixels: width of the two border nodes, height of an input there, distance from the graph
COLUMN, LINE, MARGIN = 160, 20, 120
EDGE = 18  # between a group's frame and its nodes, as in the templates


@dataclass(frozen=True)
class Blueprint:
    """name: of the file and in the library. inputs: (label, type of the node, its input, type); one label may stand for
    several inputs. outputs: (label, type of the node, number of its output). The second node of a type is "TYPE 2".
    """

    name: str
    description: str
    aliases: tuple
    inputs: tuple
    outputs: tuple


PROMPT = ("prompt", "CLIPTextEncode", "text", "STRING")
SIZE = tuple(
    (side, node, side, "INT") for side in ("width", "height") for node in ("EmptyFlux2LatentImage", "Flux2Scheduler")
)
IMAGE = ("image", "ImageScaleToTotalPixels", "image", "IMAGE")
SECOND_IMAGE = ("image 2", "ImageScaleToTotalPixels 2", "image", "IMAGE")
MEGAPIXELS = ("megapixels", "ImageScaleToTotalPixels", "megapixels", "FLOAT")
KERNEL = ("attention kernel", "Flux2SelectAttention", "backend", "COMBO")
SEED, STEPS = ("seed", "RandomNoise", "noise_seed", "INT"), ("steps", "Flux2Scheduler", "steps", "INT")
GUIDANCE = ("guidance", "FluxGuidance", "guidance", "FLOAT")
MODELS = (
    ("model", "Flux2LoadModel", "model_name", "COMBO"),
    ("text encoder", "Flux2LoadTextEncoder", "text_encoder_name", "COMBO"),
    ("vae", "Flux2LoadVAE", "vae_name", "COMBO"),
)
SETTINGS = (SEED, STEPS, GUIDANCE, *MODELS)


def results(model="Flux2SelectAttention"):
    """The outputs of a graph that generates an image; model: the node in front of the sampler."""
    return (("image", "VAEDecode", 0), ("model", model, 0), ("latent", "SamplerCustomAdvanced", 0))


WHICH = "Connect model and latent to Attention Report to see which kernel ran."
ALIASES = ("flux2", "flash attention", "aiter", "rocm")
TEXT_TO_IMAGE = Blueprint(
    "FLUX.2 text to image",
    f"Generates an image from a prompt with FLUX.2 dev and the attention kernel you choose. {WHICH}",
    ("text to image", *ALIASES),
    (PROMPT, *SIZE, KERNEL, *SETTINGS),
    results(),
)
EDIT = Blueprint(
    "FLUX.2 edit",
    f"Changes an image as the prompt says, with FLUX.2 dev and the attention kernel you choose. {WHICH}",
    ("image edit", "reference", "kontext", *ALIASES),
    (IMAGE, PROMPT, KERNEL, *SETTINGS, MEGAPIXELS),
    results(),
)
TWO_REFERENCES = Blueprint(
    "FLUX.2 edit with two references",
    f"Combines two images as the prompt says. {WHICH}",
    (),
    (IMAGE, SECOND_IMAGE, PROMPT, KERNEL, *SETTINGS),
    results(),
)
KLEIN = Blueprint(
    "FLUX.2 klein text to image",
    f"Generates an image in four steps. {WHICH}",
    (),
    (PROMPT, *SIZE, KERNEL, SEED, STEPS, *MODELS),
    results(),
)
FAST = Blueprint(
    "FLUX.2 with fused blocks",
    f"Generates an image with fused transformer blocks. {WHICH}",
    (),
    (PROMPT, *SIZE, KERNEL, ("precision", "Flux2FastBlocks", "precision", "COMBO"), *SETTINGS),
    results("Flux2FastBlocks"),
)
SEVERAL_GPUS = Blueprint(
    "FLUX.2 on several GPUs",
    f"Generates one image on several GPUs. {WHICH}",
    (),
    (PROMPT, *SIZE, KERNEL, ("gpus", "Flux2SequenceParallel", "gpus", "INT"), *SETTINGS),
    results("Flux2SequenceParallel"),
)
TO_COMPARE = Blueprint(
    "FLUX.2 prompt and models",
    "What Compare Attention samples with: model, prompt, empty latent, sampler, schedule and VAE.",
    (),
    (PROMPT, *SIZE, STEPS, GUIDANCE, *MODELS),
    (
        ("model", "Flux2LoadModel", 0),
        ("latent", "EmptyFlux2LatentImage", 0),
        ("sampler", "KSamplerSelect", 0),
        ("sigmas", "Flux2Scheduler", 0),
        ("positive", "FluxGuidance", 0),
        ("vae", "Flux2LoadVAE", 0),
    ),
)
LIBRARY = {"1 Text to image": TEXT_TO_IMAGE, "2 Image edit": EDIT}  # template -> what of it goes into the library


def write(folder):
    """Make all blueprints from the templates in `folder`, into the folder subgraphs beside it."""
    target = Path(folder).parent / "subgraphs"
    target.mkdir(exist_ok=True)
    for template, blueprint in LIBRARY.items():
        workflow = json.loads((Path(folder) / f"{template}.json").read_text())
        (target / f"{blueprint.name}.json").write_text(json.dumps(build(blueprint, workflow), indent=2) + "\n")


def identity(*parts):
    return str(uuid.uuid5(NAMESPACE, "/".join(parts)))


def build(blueprint, workflow):
    """The blueprint file, as the page writes them: a workflow of one node and the definition of its subgraph, which
    the template `workflow` holds.
    """
    (definition,) = workflow["definitions"]["subgraphs"]
    node = instance(blueprint, definition, workflow["last_node_id"])
    return {
        "id": identity(blueprint.name, "file"),
        "revision": 0,
        "last_node_id": node["id"],
        "last_link_id": 0,
        "nodes": [node],
        "links": [],
        "groups": [],
        "definitions": {"subgraphs": [definition]},
        "config": {},
        "extra": {"BlueprintDescription": blueprint.description, "BlueprintSearchAliases": list(blueprint.aliases)},
        "version": 0.4,
    }


def wrap(blueprint, workflow):
    """A flat graph with everything but the types SHOWN inside the blueprint's node, linked to what stays."""
    number = {entry: place for place, entry in enumerate(dict.fromkeys(label for label, *_ in blueprint.inputs))}
    definition = subgraph(blueprint, copy.deepcopy(workflow))
    node = instance(blueprint, definition, workflow["last_node_id"] + 1)
    kept = [copy.deepcopy(entry) for entry in workflow["nodes"] if entry["type"] in SHOWN]
    names, links = named(workflow["nodes"]), []
    sources = {(names[kind]["id"], slot): place for place, (_, kind, slot) in enumerate(blueprint.outputs)}
    targets = {(names[kind]["id"], name): number[label] for label, kind, name, _ in blueprint.inputs}
    by_id, shown = {entry["id"]: entry for entry in workflow["nodes"]}, {entry["id"]: entry for entry in kept}
    for entry in kept:
        for slot in entry["outputs"]:
            slot["links"] = []
    for _, origin, slot, target, place, kind in bridged(workflow):
        if target in shown:
            origin, slot = (origin, slot) if origin in shown else (node["id"], sources[origin, slot])
        elif origin in shown:
            target, place = node["id"], targets[target, by_id[target]["inputs"][place]["name"]]
        else:
            continue
        links.append([len(links) + 1, origin, slot, target, place, kind])
        ends = {**shown, node["id"]: node}
        ends[origin]["outputs"][slot]["links"].append(links[-1][0])
        ends[target]["inputs"][place]["link"] = links[-1][0]
    return {
        **workflow,
        "last_node_id": node["id"],
        "last_link_id": len(links),
        "nodes": [*kept, node],
        "links": links,
        "groups": [],
        "definitions": {"subgraphs": [definition]},
    }


def bridged(workflow):
    """The links of a graph as if no report stood between sampler and decoder: what it passes on comes from before."""
    reports = {node["id"]: node for node in workflow["nodes"] if node["type"] == REPORT}
    into = {link[0]: link for link in workflow["links"]}
    for link in workflow["links"]:
        if link[1] in reports and link[2] == 0:
            (latent,) = [slot["link"] for slot in reports[link[1]]["inputs"] if slot["name"] == "latent"]
            link = [link[0], *into[latent][1:3], *link[3:]]
        yield link


def named(nodes):
    """{"TYPE" or "TYPE 2": node} in the order of ids."""
    found = {}
    for node in sorted(nodes, key=lambda node: node["id"]):
        name = node["type"]
        found[name if name not in found else f"{name} {1 + sum(n.split(' ')[0] == name for n in found)}"] = node
    return found


def instance(blueprint, definition, number):
    """The node that stands for the subgraph."""
    return {
        "id": number,
        "type": definition["id"],
        "pos": [0, 0],
        "size": [400, 60 + 26 * len(definition["inputs"])],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": [outer_input(entry, definition) for entry in definition["inputs"]],
        "outputs": [{"name": entry["name"], "type": entry["type"], "links": []} for entry in definition["outputs"]],
        "title": blueprint.name,
        "properties": {"cnr_id": "flux2-attention"},
        "widgets_values": [],
    }


def outer_input(entry, definition):
    """The outer side of an input: a widget if inside it is one."""
    inner = next(slot for node in definition["nodes"] for slot in node["inputs"] if slot["link"] == entry["linkIds"][0])
    return {
        "name": entry["name"],
        "type": entry["type"],
        **({"widget": {"name": entry["name"]}} if "widget" in inner else {}),
        "link": None,
    }


class Graph:
    """The nodes and links of a template that go into its blueprint; nodes are asked for by their type."""

    def __init__(self, workflow):
        self.nodes = [node for node in workflow["nodes"] if node["type"] not in SHOWN]
        self.of_type, kept = named(self.nodes), {node["id"] for node in self.nodes}
        self.links = [dict(zip(LINK, link)) for link in bridged(workflow) if link[1] in kept and link[3] in kept]
        self.last = workflow["last_link_id"]
        self.disconnect({link["id"] for link in self.links})

    def disconnect(self, kept):
        """Take links to nodes that were left out off the others."""
        ends = {node["id"]: node for node in self.nodes}
        for node in self.nodes:
            for slot in node["inputs"]:
                slot["link"] = slot["link"] if slot["link"] in kept else None
            for slot in node["outputs"]:
                slot["links"] = []
        for link in self.links:
            ends[link["origin_id"]]["outputs"][link["origin_slot"]]["links"].append(link["id"])

    def link(self, *ends):
        """Add a link from (node id, slot) to (node id, slot), of a type; returns its id."""
        self.last += 1
        self.links.append(dict(zip(LINK, (self.last, *ends))))
        return self.last

    def feed(self, place, kind, name, slot_type):
        """Connect the subgraph's input number `place` to an input; returns the link's id.

        A page saves no slot for a widget until something is connected: it is made here.
        """
        node = self.of_type[kind]
        names = [slot["name"] for slot in node["inputs"]]
        if name not in names:
            names.append(name)
            node["inputs"].append({"name": name, "type": slot_type, "widget": {"name": name}})
        number = names.index(name)
        node["inputs"][number]["link"] = self.link(INSIDE, place, node["id"], number, slot_type)
        return node["inputs"][number]["link"]

    def drain(self, place, kind, slot):
        """Connect an output to the subgraph's output number `place`; returns (type, link id)."""
        node = self.of_type[kind]
        output = node["outputs"][slot]
        output["links"].append(self.link(node["id"], slot, OUTSIDE, place, output["type"]))
        return output["type"], output["links"][-1]


def subgraph(blueprint, workflow):
    """The definition: the template's nodes and groups, and links from its inputs and to its outputs."""
    graph = Graph(workflow)
    inputs, outputs = inputs_of(blueprint, graph), outputs_of(blueprint, graph)
    left, top, right, _ = extent(graph.nodes)
    return {
        "id": identity(blueprint.name),
        "version": 1,
        "revision": 0,
        "config": {},
        "name": blueprint.name,
        "state": {
            "lastGroupId": len(workflow["groups"]),
            "lastNodeId": workflow["last_node_id"],
            "lastLinkId": graph.last,
            "lastRerouteId": 0,
        },
        "inputNode": border(INSIDE, left - MARGIN - COLUMN, top, inputs),
        "outputNode": border(OUTSIDE, right + MARGIN, top, outputs),
        "inputs": inputs,
        "outputs": outputs,
        "widgets": [],
        "nodes": graph.nodes,
        "groups": [framed for group in workflow["groups"] if (framed := around(group, graph.nodes))],
        "links": graph.links,
        "extra": {},
        "category": "Flux 2",
        "description": blueprint.description,
    }


def inputs_of(blueprint, graph):
    made = []
    for place, name in enumerate(dict.fromkeys(label for label, *_ in blueprint.inputs)):
        targets = [target for label, *target in blueprint.inputs if label == name]
        links = [graph.feed(place, *target) for target in targets]
        made.append(
            {"id": identity(blueprint.name, "in", name), "name": name, "type": targets[0][-1], "linkIds": links}
        )
    return made


def outputs_of(blueprint, graph):
    ends = [(name, *graph.drain(place, *source)) for place, (name, *source) in enumerate(blueprint.outputs)]
    return [
        {"id": identity(blueprint.name, "out", name), "name": name, "type": kind, "linkIds": [link]}
        for name, kind, link in ends
    ]


# --- places, in pixels -----------------------------------------------------------------------------------------------


def border(node, left, top, slots):
    """The node that stands for the subgraph's inputs or outputs; the slots get their places."""
    for number, slot in enumerate(slots):
        slot["pos"] = [left + COLUMN - LINE if node == INSIDE else left + LINE, top + LINE * (number + 1)]
    return {"id": node, "bounding": [left, top, COLUMN, LINE * (len(slots) + 2)]}


def around(group, nodes):
    """The group, drawn around those of its nodes that are still there; None where none is."""
    x, y, width, height = group["bounding"]
    inside = [node for node in nodes if x <= node["pos"][0] <= x + width and y <= node["pos"][1] <= y + height]
    if not inside:
        return None
    left, _, right, bottom = extent(inside)
    return {**group, "bounding": [left - EDGE, y, right - left + 2 * EDGE, bottom + EDGE - y]}


def extent(nodes):
    """(left, top, right, bottom) of all nodes."""
    boxes = [(*node["pos"], node["pos"][0] + node["size"][0], node["pos"][1] + node["size"][1]) for node in nodes]
    return tuple(best(box[edge] for box in boxes) for edge, best in enumerate((min, min, max, max)))
