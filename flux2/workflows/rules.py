"""What the converter knows: which loaders this pack replaces, input by input, and how to tell that a loader belongs to
FLUX.2.

A graph of either file format comes in as a Graph: nodes with the values of their widgets, and who is connected to whom.
`decide` says what to replace and, for every loader that stays, why. Standard library alone. Not covered: reading model
files; names and connections are the evidence.
"""

import re
from dataclasses import dataclass, field

MARK = "flux2_attention"  # where a converted file keeps what was there before
SELECTOR = "Flux2SelectAttention"
NAMES = re.compile(r"flux[ ._-]*2(?!\d)|klein", re.IGNORECASE)
OTHER_NAMES = re.compile(r"flux[ ._-]*[13](?!\d)", re.IGNORECASE)
# other families use this VAE too
VAE_NAMES = re.compile(r"flux[ ._-]*2(?!\d)|full_encoder_small_decoder", re.IGNORECASE)
OTHER_ENCODERS = re.compile(r"ministral|ernie", re.IGNORECASE)  # loaded with type flux2, for another model
NOT_A_FILE = re.compile(r"(light)?tae|pixel_space", re.IGNORECASE)  # choices of VAELoader that are no VAE file
# nodes that no other family's graph has; EmptyFlux2LatentImage is in several
ONLY_FLUX2 = {"Flux2Scheduler", "FluxKVCache"}
GGUF = re.compile(r"gguf", re.IGNORECASE)
# nodes that let a language model write: they read all of its layers, and our loader keeps those that FLUX.2 reads
WRITERS = re.compile(r"TextGenerate|GenerateText", re.IGNORECASE)


class NotConvertible(ValueError):
    """The text says what was expected, what was found, and what to do."""


@dataclass(frozen=True)
class Widget:
    """One input of a loader: its name in ComfyUI's node and in ours (None: ours has no such input), and what its values
    become.

    values: {ComfyUI's: ours}; None where a value means the same in both.
    """

    old: str
    new: str | None
    default: str | None = None  # ComfyUI's, for files that leave it out
    values: dict | None = None

    def takes(self, value):
        return self.values is None or (isinstance(value, str) and value in self.values)

    def ours(self, value):
        return value if self.values is None else self.values[value]

    def theirs(self, value):
        """NotConvertible when ComfyUI's node has no such value."""
        inverse = {ours: theirs for theirs, ours in (self.values or {value: value}).items()}
        if value not in inverse:
            choices = ", ".join(map(repr, inverse))
            raise NotConvertible(
                f"{self.new} is set to {value!r}, which ComfyUI's {self.old} does not have. Set it to one of "
                f"{choices} first."
            )
        return inverse[value]


@dataclass(frozen=True)
class Loader:
    """A loader of ComfyUI and the one that takes its place."""

    old: str
    new: str
    widgets: tuple
    added: dict = field(default_factory=dict)  # inputs that only ours has and that an API workflow must give

    def names(self):
        """{ComfyUI's name: ours} of the inputs that both have."""
        return {widget.old: widget.new for widget in self.widgets if widget.new}

    def value(self, widget, values):
        """What ComfyUI's node has there, its default where a file leaves it out."""
        return values.get(widget.old, widget.default)

    def obstacle(self, values, linked):
        """Why this node cannot be replaced, or None. linked: names of inputs that get their value from another node."""
        if unknown := sorted({*values, *linked} - {widget.old for widget in self.widgets}):
            return f"it has an input that is not known here ({', '.join(unknown)})"
        for widget in self.widgets:
            if widget.values is not None and widget.old in linked:
                return f"its input {widget.old} comes from another node, and {self.new} does not take the same values"
            if not widget.takes(value := self.value(widget, values)):
                return f"its {widget.old} is {value!r}, for which {self.new} has no counterpart"
        return None

    def forward(self, values):
        """{our input: value}, without what neither the file nor a default says."""
        found = {widget.new: widget.ours(self.value(widget, values)) for widget in self.widgets if widget.new}
        return {name: value for name, value in found.items() if value is not None}

    def back(self, now, original):
        """ComfyUI's values again: the original ones, except where ours was changed since. NotConvertible when that has
        no counterpart.
        """
        before, values = self.forward(original), dict(original)
        for widget in self.widgets:
            if widget.new in now and now[widget.new] != before.get(widget.new):
                values[widget.old] = widget.theirs(now[widget.new])
        return values


LOADERS = {
    row.old: row
    for row in (
        Loader(
            "UNETLoader",
            "Flux2LoadModel",
            (
                Widget("unet_name", "model_name"),
                Widget("weight_dtype", "weight_dtype", "default", {"default": "as stored", "fp8_e4m3fn": "fp8"}),
            ),
        ),
        Loader(
            "CLIPLoader",
            "Flux2LoadTextEncoder",
            (
                Widget("clip_name", "text_encoder_name"),
                Widget("type", None, "stable_diffusion", {"flux2": None}),
                Widget("device", "device", "default"),
            ),
        ),
        Loader("VAELoader", "Flux2LoadVAE", (Widget("vae_name", "vae_name"),), {"precision": "auto"}),
    )
}
OURS = {row.new: row for row in LOADERS.values()}


@dataclass(frozen=True)
class Node:
    """A node as both formats can say it. values: {widget: value}; linked: widgets whose value comes from another
    node. model: which output gives a MODEL to other nodes, of a node that is given none itself; texts: its values
    that are text.
    """

    type: str
    label: str
    values: dict
    linked: frozenset = frozenset()
    model: int | None = None
    texts: tuple = ()


@dataclass
class Graph:
    """nodes: {(scope, id): Node}; edges: pairs of keys. A scope is a subgraph, or "" for the canvas; bridges: edges
    between scopes.
    """

    nodes: dict
    edges: list
    bridges: list

    def __post_init__(self):
        self.local, self.whole = components(self.nodes, self.edges), components(self.nodes, self.edges + self.bridges)
        self.everything, self._types = dict.fromkeys(self.nodes), {}

    def around(self, key):
        """The nodes to judge a loader by: the first of these that has a diffusion model's loader or a FLUX.2 scheduler:
        the nodes connected to it in its own scope, in all scopes, and every node, for packs that connect without links.
        """
        for near in (self.local[key], self.whole[key]):
            if self.of_type(near, "UNETLoader", *ONLY_FLUX2):
                return near
        return self.everything

    def of_type(self, keys, *types):
        """Those of `keys`, a set that this graph keeps, with one of these types. Each set is looked through once."""
        if id(keys) not in self._types:
            found = self._types[id(keys)] = {}
            for key in keys:
                found.setdefault(self.nodes[key].type, []).append(key)
        return [key for kind in types for key in self._types[id(keys)].get(kind, ())]

    def givers(self, keys):
        """Those of `keys`, a set that this graph keeps, that load a diffusion model."""
        name = "givers", id(keys)
        if name not in self._types:
            self._types[name] = [key for key in keys if self.nodes[key].model is not None]
        return self._types[name]

    def readers(self, key):
        """The nodes that something of a node reaches directly, in its own scope."""
        if "readers" not in self._types:
            found = self._types["readers"] = {}
            for giver, reader in self.edges:
                found.setdefault(giver, []).append(reader)
        return [self.nodes[reader] for reader in self._types["readers"].get(key, ()) if reader in self.nodes]


def components(keys, edges):
    """{key: the set of keys that are connected with it}."""
    groups = {key: {key} for key in keys}
    for a, b in edges:
        if a in groups and b in groups and groups[a] is not groups[b]:
            small, large = sorted((groups[a], groups[b]), key=len)
            large |= small
            for key in small:
                groups[key] = large
    return groups


@dataclass
class Plan:
    """replace: {key: Loader}; models: keys of FLUX.2's diffusion model loaders, replaced or not; outputs: {key: which
    output gives the MODEL}, where it is not the first; left: {key: why this loader stays}.
    """

    replace: dict = field(default_factory=dict)
    models: list = field(default_factory=list)
    outputs: dict = field(default_factory=dict)
    left: dict = field(default_factory=dict)


def decide(graph, wanted=()):
    """The Plan for a graph. wanted: ids of loaders that the user says are FLUX.2's."""
    plan = Plan()
    for old, evidence in (
        ("UNETLoader", model_evidence),
        ("CLIPLoader", encoder_evidence),
        ("VAELoader", vae_evidence),
    ):
        for key in graph.of_type(graph.everything, old):
            node, foreign = graph.nodes[key], None if str(key[1]) in wanted else evidence(graph, key, plan.models)
            if old == "UNETLoader" and not foreign:
                plan.models.append(key)
            why = foreign or LOADERS[old].obstacle(node.values, node.linked)
            plan.left.update({key: why} if why else {})
            plan.replace.update({} if why else {key: LOADERS[old]})
        if old == "UNETLoader":
            loaders_of_others(graph, plan, wanted)
    return plan


def loaders_of_others(graph, plan, wanted):
    """Loaders that this pack does not replace and whose MODEL FLUX.2's nodes use: they stay, with a selector behind."""
    for key in graph.givers(graph.everything):
        node = graph.nodes[key]
        if node.type in LOADERS or node.type in OURS:
            continue
        doubt = None if str(key[1]) in wanted else others_evidence(graph, key)
        if doubt is None:
            plan.models.append(key)
            plan.outputs[key] = node.model
        elif doubt:
            plan.left[key] = doubt


def others_evidence(graph, key):
    """Why the MODEL of another pack's loader is not taken for FLUX.2's, "" where nothing around it is FLUX.2, or None
    where it is.
    """
    name = next((text for text in graph.nodes[key].texts if OTHER_NAMES.search(text)), None)
    if name:
        return f"{name} is named as another model of the FLUX family"
    around = graph.around(key)
    if any(NAMES.search(text) for text in graph.nodes[key].texts):
        return None
    if not graph.of_type(around, *ONLY_FLUX2):
        return ""
    if len(graph.givers(around)) == 1:
        return None
    return "it gives one of several models here, and neither its file nor its connections say FLUX.2"


def model_evidence(graph, key, _):
    """Why this UNETLoader is not taken for FLUX.2's, or None."""
    name, around = str(graph.nodes[key].values.get("unet_name")), graph.around(key)
    if OTHER_NAMES.search(name):
        return f"{name} is named as another model of the FLUX family"
    alone = len(graph.of_type(around, "UNETLoader")) == 1
    if NAMES.search(name) or (alone and graph.of_type(around, *ONLY_FLUX2)):
        return None
    return f"neither its file {name} nor its connections say FLUX.2"


def encoder_evidence(graph, key, models):
    name, kind = (graph.nodes[key].values.get(widget) for widget in ("clip_name", "type"))
    if kind != "flux2":
        return f"its type is {kind}, not flux2"
    if OTHER_ENCODERS.search(str(name)):
        return f"{name} is the text encoder of another model"
    if GGUF.search(str(name)):
        return f"{name} is a GGUF file, which stays with its loader"
    writer = next((node for node in graph.readers(key) if WRITERS.search(node.type)), None)
    if writer:
        return f"{writer.label} reads it too, and needs the layers that FLUX.2 and this pack's loader leave out"
    return without_model(graph, key, models)


def vae_evidence(graph, key, models):
    name, around = str(graph.nodes[key].values.get("vae_name")), graph.around(key)
    if NOT_A_FILE.match(name):
        return f"{name} is not a VAE file"
    mixed = len(graph.of_type(around, "VAELoader")) > 1 or not set(graph.of_type(around, "UNETLoader")) <= set(models)
    if mixed and not VAE_NAMES.search(name):
        return f"its file {name} does not say FLUX.2, and other models are in the same graph"
    return without_model(graph, key, models)


def without_model(graph, key, models):
    """Why nothing around this loader is a FLUX.2 model, or None. A model that another pack loads shows by its
    scheduler.
    """
    around = graph.around(key)
    loaders = graph.of_type(around, "UNETLoader")
    if set(loaders) & set(models) or (not loaders and graph.of_type(around, *ONLY_FLUX2)):
        return None
    return "no FLUX.2 diffusion model is in its part of the graph"
