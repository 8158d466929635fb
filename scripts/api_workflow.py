"""The workflows of example_workflows/api/, filled with what one picture needs.

  workflow = fill(PictureSettings(prompt="a cat", width=512, height=512))

Without reference images it is the text-to-image graph, with them the edit graph: its four nodes per reference (load,
scale, encode, use) are repeated and chained. Settings are checked when made. Standard library alone; knows nothing of
servers. Not covered: graphs of other people.
"""

import copy
import json
import re
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "example_workflows" / "api"
TEXT_TO_IMAGE, IMAGE_EDIT = "flux2_text_to_image.json", "flux2_image_edit.json"
# in the order in which the model goes through them
MODEL_CHAIN = ("Flux2SelectAttention", "Flux2FastBlocks", "Flux2CompileBlocks", "Flux2SequenceParallel", "Flux2WarmUp")
LARGEST_SIDE, PATCH = 16384, 16  # limits of EmptyFlux2LatentImage: one latent token is 16 x 16 pixels
# which input of which loader holds each model file
LOADERS = {
    "diffusion_models": ("Flux2LoadModel", "model_name"),
    "text_encoders": ("Flux2LoadTextEncoder", "text_encoder_name"),
    "vae": ("Flux2LoadVAE", "vae_name"),
}


class BadSettings(ValueError):
    """A setting that no server would take; the text names it, what it was and what it may be."""


@dataclass(frozen=True)
class PictureSettings:
    """What to draw. References are names on the server. Width or height None: 1024, or with references that of the
    first one.

    models: {folder under models/: name}; a folder left out keeps the name in the workflow file. memory: {the same
    folders: memory mode}. fast_blocks: precision of Fast Blocks, or None; compile_blocks: whether blocks are compiled;
    warmup: sizes to warm up at, or None. gpus: how many compute the picture, 0 for all; ulysses, ring: their degrees, 0
    for a choice.
    """

    prompt: str
    width: int | None = None
    height: int | None = None
    steps: int = 20
    guidance: float = 4.0
    seed: int = 42
    backend: str = "auto"
    references: tuple = ()
    reference_megapixels: float = 1.0
    models: dict | None = None
    memory: dict | None = None
    vae_precision: str = "auto"
    fast_blocks: str | None = None
    compile_blocks: bool = False
    warmup: str | None = None
    warmup_steps: int = 1
    gpus: int = 1
    ulysses: int = 0
    ring: int = 0

    def __post_init__(self):
        check_side("width", self.width)
        check_side("height", self.height)
        check_range("number of steps", self.steps, 1, 4096)
        check_range("guidance scale", self.guidance, 0, 100)
        check_range("seed", self.seed, 0, 2**64 - 1)
        check_range("reference size in megapixels", self.reference_megapixels, 0.01, 16)
        check_range("number of warm-up steps", self.warmup_steps, 1, 100)
        check_range("number of GPUs", self.gpus, 0, 64)
        check_range("Ulysses degree", self.ulysses, 0, 64)
        check_range("ring degree", self.ring, 0, 64)


def check_side(name, value):
    if value is None or (PATCH <= value <= LARGEST_SIDE and value % PATCH == 0):
        return
    near = min(max(round(value / PATCH), 1) * PATCH, LARGEST_SIDE)
    raise BadSettings(
        f"The {name} must be a multiple of {PATCH} from {PATCH} to {LARGEST_SIDE}, not {value}; the nearest is {near}."
    )


def check_range(name, value, low, high):
    if not low <= value <= high:
        raise BadSettings(f"The {name} must lie between {low} and {high}, not {value}.")


def load(name):
    return json.loads((FOLDER / name).read_text())


def nodes_of(workflow, class_type):
    return [node for node in workflow.values() if node["class_type"] == class_type]


def default_models():
    """{folder: the official file name that the workflows ask for}."""
    workflow = load(TEXT_TO_IMAGE)
    return {folder: nodes_of(workflow, loader)[0]["inputs"][key] for folder, (loader, key) in LOADERS.items()}


def put(workflow, class_type, **inputs):
    """Set inputs on every node of a class."""
    for node in nodes_of(workflow, class_type):
        node["inputs"].update(inputs)


def fill(settings):
    """Returns the API workflow for these settings."""
    workflow = load(IMAGE_EDIT if settings.references else TEXT_TO_IMAGE)
    put(workflow, "CLIPTextEncode", text=settings.prompt)
    put(workflow, "FluxGuidance", guidance=settings.guidance)
    put(workflow, "RandomNoise", noise_seed=settings.seed)
    put(workflow, "Flux2Scheduler", steps=settings.steps)
    put(workflow, "Flux2SelectAttention", backend=settings.backend)
    for side in ("width", "height"):
        if getattr(settings, side) is not None:
            put(workflow, "Flux2Scheduler", **{side: getattr(settings, side)})
            put(workflow, "EmptyFlux2LatentImage", **{side: getattr(settings, side)})
    for folder, name in (settings.models or {}).items():
        loader, key = LOADERS[folder]
        put(workflow, loader, **{key: name})
    for folder, mode in (settings.memory or {}).items():
        put(workflow, LOADERS[folder][0], memory=mode)
    put(workflow, LOADERS["vae"][0], precision=settings.vae_precision)
    if settings.references:
        add_references(workflow, settings)
    add_speed(workflow, settings)
    return workflow


def add_speed(workflow, settings):
    """The speed nodes that were asked for, behind Select Attention: fused blocks, compiled blocks, several GPUs, then
    the warm-up of all that.
    """
    if settings.fast_blocks:
        insert(workflow, "Flux2FastBlocks", precision=settings.fast_blocks)
    if settings.compile_blocks:
        insert(workflow, "Flux2CompileBlocks")
    if settings.gpus != 1 or settings.ulysses > 1 or settings.ring > 1:
        insert(workflow, "Flux2SequenceParallel", gpus=settings.gpus, ulysses=settings.ulysses, ring=settings.ring)
    if settings.warmup:
        clip, vae = (
            [key, 0]
            for folder in ("text_encoders", "vae")
            for key, node in workflow.items()
            if node["class_type"] == LOADERS[folder][0]
        )
        insert(
            workflow,
            "Flux2WarmUp",
            sizes=settings.warmup,
            steps=settings.warmup_steps,
            references=len(settings.references),
            clip=clip,
            vae=vae,
        )


def insert(workflow, class_type, **inputs):
    """Put a node MODEL -> MODEL in front of whatever reads the model that Select Attention, or the node inserted
    before, gives.
    """
    last = next(key for key, node in reversed(workflow.items()) if node["class_type"] in MODEL_CHAIN)
    for node in workflow.values():
        node["inputs"].update({name: [class_type, 0] for name, value in node["inputs"].items() if value == [last, 0]})
    title = re.sub("(?<=[a-z])(?=[A-Z])", " ", class_type.removeprefix("Flux2"))
    workflow[class_type] = {
        "class_type": class_type,
        "inputs": {"model": [last, 0], **inputs},
        "_meta": {"title": title},
    }


def add_references(workflow, settings):
    """The first reference goes into the graph's own nodes; each further one gets copies of them behind the one
    before.
    """
    put(workflow, "ImageScaleToTotalPixels", megapixels=settings.reference_megapixels)
    put(workflow, "LoadImage", image=settings.references[0])
    kinds = ("LoadImage", "ImageScaleToTotalPixels", "VAEEncode", "ReferenceLatent")
    chain = [next(key for key, node in workflow.items() if node["class_type"] == kind) for kind in kinds]
    last = chain[-1]
    for number, image in enumerate(settings.references[1:], 2):
        last = copy_reference(workflow, chain, number, image, last)
    put(workflow, "BasicGuider", conditioning=[last, 0])


def copy_reference(workflow, chain, number, image, previous):
    """Copies the nodes named in chain, rewired among themselves; returns the id of the new ReferenceLatent."""
    names = {old: f"{old}_{number}" for old in chain}
    for old, new in names.items():
        node = workflow[new] = copy.deepcopy(workflow[old])
        node["_meta"]["title"] += f" {number}"
        for key, value in node["inputs"].items():
            if isinstance(value, list) and value[0] in names:
                node["inputs"][key] = [names[value[0]], value[1]]
    load_image, *_, use = names.values()
    workflow[load_image]["inputs"]["image"] = image
    workflow[use]["inputs"]["conditioning"] = [previous, 0]
    return use
