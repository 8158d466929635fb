"""Subgraph blueprints from the finished templates: one node that holds a whole graph, listed in ComfyUI's node library
and
search.

`write(folder)` makes subgraphs/*.json, which ComfyUI serves to its page (GET /global_subgraphs). A blueprint is a
template without its note, its picture and its saving node; what a user sets is an input of the subgraph, connected to
widgets inside. Standard library alone.
"""

import json
import uuid
from dataclasses import dataclass
from pathlib import Path

NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "flux2-attention/blueprints")  # the same ids at every run
INSIDE, OUTSIDE = -10, -20  # the ids of a subgraph's own inputs and outputs in its links
LEFT_OUT = ("MarkdownNote", "LoadImage", "SaveImage")
LINK = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
# pixels: width of the two border nodes, height of an input there, distance from the graph
COLUMN, LINE, MARGIN = 160, 20, 120
EDGE = 18  # between a group's frame and its nodes, as in the templates


@dataclass(frozen=True)
class Blueprint:
    """name: of the file and in the library. inputs: (label, type of the node, its input, type); one label may stand for
    several inputs.

    outputs: (label, type of the node, number of its output).
    """

    name: str
    template: str
    description: str
    aliases: tuple
    inputs: tuple
    outputs: tuple


PROMPT = ("prompt", "CLIPTextEncode", "text", "STRING")
SIZE = tuple(
    (side, node, side, "INT") for side in ("width", "height") for node in ("EmptyFlux2LatentImage", "Flux2Scheduler")
)
PICTURE = ("picture", "ImageScaleToTotalPixels", "image", "IMAGE")
MEGAPIXELS = ("megapixels", "ImageScaleToTotalPixels", "megapixels", "FLOAT")
DRAWING = (
    ("seed", "RandomNoise", "noise_seed", "INT"),
    ("steps", "Flux2Scheduler", "steps", "INT"),
    ("guidance", "FluxGuidance", "guidance", "FLOAT"),
    ("attention", "Flux2SelectAttention", "backend", "COMBO"),
    ("model", "Flux2LoadModel", "model_name", "COMBO"),
    ("text_encoder", "Flux2LoadTextEncoder", "text_encoder_name", "COMBO"),
    ("vae", "Flux2LoadVAE", "vae_name", "COMBO"),
)
OUTPUTS = (("image", "VAEDecode", 0), ("report", "Flux2AttentionReport", 1))
KERNEL = "with FLUX.2 dev and the attention kernel you choose. The second output says which kernel ran."
KERNEL_ALIASES = ("flux2", "flash attention", "aiter", "rocm")
BLUEPRINTS = (
    Blueprint(
        "FLUX.2 text to image",
        "flux2_text_to_image",
        f"Draws a picture from a prompt {KERNEL}",
        ("text to image", *KERNEL_ALIASES),
        (PROMPT, *SIZE, *DRAWING),
        OUTPUTS,
    ),
    Blueprint(
        "FLUX.2 edit",
        "flux2_image_edit",
        f"Changes a picture as the prompt says, {KERNEL}",
        ("image edit", "reference", "kontext", *KERNEL_ALIASES),
        (PICTURE, PROMPT, *DRAWING, MEGAPIXELS),
        OUTPUTS,
    ),
)


def write(folder):
    """Make all blueprints from the templates in `folder`, into the folder subgraphs beside it."""
    target = Path(folder).parent / "subgraphs"
    target.mkdir(exist_ok=True)
    for blueprint in BLUEPRINTS:
        workflow = json.loads((Path(folder) / f"{blueprint.template}.json").read_text())
        (target / f"{blueprint.name}.json").write_text(json.dumps(build(blueprint, workflow), indent=2) + "\n")


def identity(*parts):
    return str(uuid.uuid5(NAMESPACE, "/".join(parts)))


def build(blueprint, workflow):
    """The blueprint file, as the page writes them: a workflow of one node and the definition of its subgraph."""
    definition = subgraph(blueprint, workflow)
    node = instance(blueprint, definition, workflow["last_node_id"] + 1)
    return {
        "id": identity(blueprint.name, "file"),
        "revision": 0,
        "last_node_id": node["id"],
        "last_link_id": definition["state"]["lastLinkId"],
        "nodes": [node],
        "links": [],
        "groups": [],
        "definitions": {"subgraphs": [definition]},
        "config": {},
        "extra": {"BlueprintDescription": blueprint.description, "BlueprintSearchAliases": list(blueprint.aliases)},
        "version": 0.4,
    }


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
        self.nodes = [node for node in workflow["nodes"] if node["type"] not in LEFT_OUT]
        self.of_type, kept = {node["type"]: node for node in self.nodes}, {node["id"] for node in self.nodes}
        self.links = [dict(zip(LINK, link)) for link in workflow["links"] if link[1] in kept and link[3] in kept]
        self.last = workflow["last_link_id"]
        self.disconnect({link["id"] for link in self.links})

    def disconnect(self, kept):
        """Take links to nodes that were left out off the others."""
        for node in self.nodes:
            for slot in node["inputs"]:
                slot["link"] = slot["link"] if slot["link"] in kept else None
            for slot in node["outputs"]:
                slot["links"] = [link for link in slot["links"] or [] if link in kept]

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
        "groups": [around(group, graph.nodes) for group in workflow["groups"]],
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
    """The group, drawn around those of its nodes that are still there."""
    x, y, width, height = group["bounding"]
    left, _, right, bottom = extent(
        [node for node in nodes if x <= node["pos"][0] <= x + width and y <= node["pos"][1] <= y + height]
    )
    return {**group, "bounding": [left - EDGE, y, right - left + 2 * EDGE, bottom + EDGE - y]}


def extent(nodes):
    """(left, top, right, bottom) of all nodes."""
    boxes = [(*node["pos"], node["pos"][0] + node["size"][0], node["pos"][1] + node["size"][1]) for node in nodes]
    return tuple(best(box[edge] for box in boxes) for edge, best in enumerate((min, min, max, max)))
