"""A LoRA file onto a MODEL and a CLIP.

  model, clip, report = apply(model, clip, "klein-style.safetensors", 0.8)

Reads any of the key families of names.py and every kind that ComfyUI's weight adapters compute (LoRA, LoKr, LoHa, OFT,
differences), with the alphas in the file or in its metadata. What is applied are ordinary weight patches: loading,
offloading, saving and other LoRAs work as with ComfyUI's own loader. A layer that does not fit is left out and named; a
file of which nothing fits is refused with what it is for. Not covered: ComfyUI's hooks, which load LoRA by themselves.
"""

import json
import math
import re
from collections import Counter
from dataclasses import dataclass, field

import comfy.utils
import comfy.weight_adapter
import torch

try:
    from comfy.configurable import ConfigurableModule
except ImportError:  # ComfyUI before 0.36
    ConfigurableModule = None

from ..checkpoints import identify, variants
from ..checkpoints.header import CheckpointError, open_checkpoint, read_json
from . import names, targets
from .dora import Decomposed

METADATA = "lora_adapter_metadata"  # diffusers and SimpleTuner: PEFT's configuration, as JSON
BESIDE = "adapter_config.json"  # PEFT: the same in a file of its own
SHOWN = 6  # layers that a report names before it counts
FP8 = tuple(getattr(torch, name) for name in dir(torch) if name.startswith("float8_"))
# on a module that a LoRA configured: the configuration, so that other GPUs can be given the same
CONFIG_MARK = "flux2_lora_config"
DIFFERENCES = {"diff": "diff", "w_norm": "diff", "set_weight": "set"}  # part -> kind of ComfyUI's patch


@dataclass
class Layer:
    """A layer of a LoRA file: its tensors by part, and why it cannot be applied, if so."""

    name: str
    parts: dict = field(default_factory=dict)
    reason: str = ""


def apply(model, clip, path, strength):
    """(MODEL, CLIP, report): clones with the file's patches; the CLIP itself where the file has nothing for it.

    path: a .safetensors file. strength: factor of the change, 0 leaves all as it is. Raises CheckpointError with what
    the file is and where it belongs when no layer of it fits.
    """
    variant = targets.variant_of(model)
    if variant is None:
        raise CheckpointError(
            f"Load FLUX.2 LoRA expects a FLUX.2 model, and this MODEL is {type(model.model).__name__}. Use ComfyUI's "
            "node Load LoRA.",
            "lora",
        )
    checkpoint = open_checkpoint(path)
    refuse_models(checkpoint)
    layers = read_layers(checkpoint)
    image = [layer for layer in layers if not names.is_encoder(layer.name)]
    text = [layer for layer in layers if names.is_encoder(layer.name)]
    refuse_other_models(checkpoint, image, variant)

    patches = patches_of(image, targets.model_targets(variant), names.plain)
    if image and not patches:
        raise CheckpointError(nothing_fits(checkpoint, image, variant), "lora")
    text_patches = patches_of(text, targets.encoder_targets(clip), names.plain_encoder) if text and clip else []
    if not patches and not text_patches:
        raise CheckpointError(nothing_fits(checkpoint, image or text, variant, only_text=bool(text)), "lora")

    report = "\n".join(
        [
            f"{checkpoint.name} ({kinds(layers)}) for {variant.title}, strength {strength:g}.",
            *counted("", image),
            *(counted("text encoder: ", text) if clip else not_connected(text)),
        ]
    )
    if strength == 0:
        return model, clip, f"{report}\nStrength 0: nothing was changed."
    model = patched(model, patches, strength) if patches else model
    clip = patched(clip, text_patches, strength) if text_patches else clip
    return model, clip, report


def patched(model, patches, strength):
    """A clone of a MODEL or CLIP with patches [(key, patch)]; one call of ComfyUI's unless a key comes twice."""
    model, rest = model.clone(), list(patches)
    while rest:
        batch, later = {}, []
        for key, patch in rest:
            batch[key] = patch if key not in batch else later.append((key, patch)) or batch[key]
        model.add_patches(batch, strength)
        rest = later
    for key, patch in patches:
        module = getattr(model, "object_patches", {}).get(str(key).removesuffix(".config"))
        if is_config(patch) and module is not None:
            setattr(module, CONFIG_MARK, patch[1][0].tolist())
    return model


def is_config(patch):
    """Whether a patch is the configuration of a module (ComfyUI from 0.36 on), no change of a weight."""
    return isinstance(patch, tuple) and patch[0] == "config"


# --- the file --------------------------------------------------------------------------------------------------------


def read_layers(checkpoint):
    """[Layer] of a LoRA file, alphas included. Raises CheckpointError for a file that is no LoRA."""
    weights = comfy.utils.load_torch_file(str(checkpoint.path), safe_load=True)
    layers = {}
    for name, tensor in weights.items():
        layer_name, part = names.split(name)
        layer = layers.setdefault(layer_name, Layer(layer_name))
        if part is None:
            layer.reason = "it is no part of a LoRA that is known here"
        elif part in layer.parts:
            layer.reason = "the file has several adapters for it"
        else:
            # ComfyUI's arithmetic has no fp8 tensors; bf16 holds each of their values
            layer.parts[part] = tensor.to(torch.bfloat16) if tensor.dtype in FP8 else tensor
    if not any(layer.parts for layer in layers.values()):
        raise CheckpointError(
            f"{checkpoint.name} is no LoRA: none of its {len(weights)} tensors is part of one. FLUX.2 Model Info says "
            "what it is.",
            "lora",
        )
    config = peft_config(checkpoint)
    for layer in layers.values():
        set_alpha(layer, config)
    return list(layers.values())


def peft_config(checkpoint):
    """PEFT's configuration of the adapter: r, lora_alpha, rank_pattern, alpha_pattern, use_rslora; {} without one."""
    try:
        if METADATA in checkpoint.metadata:
            found = json.loads(checkpoint.metadata[METADATA])
            return {
                key.removeprefix("transformer."): value for key, value in found.items() if "text_encoder" not in key
            }
    except (ValueError, AttributeError, RecursionError):
        raise CheckpointError(
            f"{checkpoint.name} is damaged: the alphas in its metadata ({METADATA}) cannot be read. Download it again.",
            "lora",
        ) from None
    beside = checkpoint.path.with_name(BESIDE)
    return read_json(beside) if checkpoint.path.stem == "adapter_model" and beside.is_file() else {}


def set_alpha(layer, config):
    """Give a layer of factors its alpha: its own tensor, or PEFT's; ComfyUI multiplies by alpha / rank."""
    single = [
        part for part, value in layer.parts.items() if value.numel() == 0 or (value.ndim == 0 and part != "alpha")
    ]
    if single:
        layer.reason, layer.parts = f"its part {single[0]} is no matrix", {}
    elif "alpha" in layer.parts:
        layer.parts["alpha"] = float(layer.parts["alpha"].float().reshape(-1)[0])
    elif "lora_down.weight" in layer.parts and "lora_alpha" in config:
        rank = len(layer.parts["lora_down.weight"])
        alpha = _pattern(config.get("alpha_pattern"), layer.name, config["lora_alpha"])
        try:
            layer.parts["alpha"] = float(alpha) * (math.sqrt(rank) if config.get("use_rslora") else 1.0)
        except (TypeError, ValueError):
            layer.reason = f"its alpha in the file's metadata is {str(alpha)[:40]!r}"
    if not math.isfinite(layer.parts.get("alpha", 1.0)):
        layer.reason = "its alpha is not a finite number"


def _pattern(table, layer, default):
    """PEFT's rule: the first pattern that matches the end of the module's name decides."""
    name = names.dotted(layer)
    for pattern, value in (table or {}).items():
        try:
            if re.fullmatch(rf"(.*\.)?({pattern})", name):
                return value
        except re.error:
            continue
    return default


# --- layers -> patches -----------------------------------------------------------------------------------------------


def patches_of(layers, known, spelled):
    """[(key, patch)] for ModelPatcher.add_patches. A layer without a patch gets its reason."""
    made = []
    for layer in layers:
        if set(layer.parts) == {"config"}:
            layer.reason = "" if ConfigurableModule else "this ComfyUI does not know configurations of layers"
            made += [(f"diffusion_model.{names.dotted(layer.name)}.config", ("config", (layer.parts["config"],)))]
            continue
        target = known.get(spelled(layer.name))
        layer.reason = layer.reason or unfit(layer, target)
        if not layer.reason:
            made += [(target.key, patch) for patch in patches_of_layer(layer, target.swap)]
    return made


def unfit(layer, target):
    """Why a layer cannot be applied to a target, as a part of a sentence; empty when it can."""
    if target is None:
        return "the model has no such layer"
    try:
        shape, read = change_shape(layer.parts), adapter_of(layer.parts)[1]
    except (KeyError, IndexError, ValueError):
        return "its parts do not fit together"
    if shape is not None and shape != target.shape:
        return (
            f"it changes {' x '.join(map(str, shape))} numbers where the model has {' x '.join(map(str, target.shape))}"
        )
    if "dora_scale" in layer.parts and layer.parts["dora_scale"].numel() not in target.shape:
        return "its lengths (DoRA) are not as many as the model has rows or columns"
    known = {"alpha", "dora_scale", *DIFFERENCES, *read}
    strange = sorted(set(layer.parts) - known)
    if strange:
        return f"its part {strange[0]} is not used by FLUX.2" + (", which has no biases" if "_b" in strange[0] else "")
    return "" if set(layer.parts) - {"alpha", "dora_scale"} else "the file has only its alpha"


def adapter_of(parts, alpha=None):
    """(adapter of ComfyUI or None, the parts that it reads)."""
    given = {f"x.{part}": value for part, value in parts.items() if isinstance(value, torch.Tensor)}
    for kind in comfy.weight_adapter.adapters:
        read = set()
        adapter = kind.load("x", given, alpha, None, read)
        if adapter is not None:
            return adapter, {name.removeprefix("x.") for name in read}
    return None, set()


def change_shape(parts):
    """Shape of the change that a layer makes to a weight; None for kinds that do not tell. Raises KeyError, IndexError
    or ValueError for parts that do not fit together.
    """
    if "lora_up.weight" in parts or "lora_down.weight" in parts:
        up, down = parts["lora_up.weight"], parts["lora_down.weight"]
        if up.shape[1] != down.shape[0]:
            raise ValueError
        return up.shape[0], down[0].numel()
    if any(part.startswith("lokr_") for part in parts):
        first, second = (_factor(parts, f"lokr_w{number}") for number in (1, 2))
        return first[0] * second[0], first[1] * second[1]
    if any(part.startswith("hada_") for part in parts):
        first, second = (_factor(parts, f"hada_w{number}") for number in (1, 2))
        if first != second:
            raise ValueError
        return first
    whole = next((parts[part] for part in DIFFERENCES if part in parts), None)
    return None if whole is None else tuple(whole.shape)


def _factor(parts, name):
    """Shape of a matrix that a file has whole, or as the product of two."""
    if name in parts:
        rows, columns = parts[name].shape
        return rows, columns
    left, right = parts[f"{name}_a"], parts[f"{name}_b"]
    if left.shape[1] != right.shape[0]:
        raise ValueError
    return left.shape[0], right.shape[1]


def patches_of_layer(layer, swap):
    """The patches of a layer that fits: one adapter, or differences."""
    parts = swapped(layer.parts) if swap else layer.parts
    adapter, _ = adapter_of(parts, parts.get("alpha"))
    if adapter is not None and "dora_scale" in parts:
        adapter = Decomposed(set(), (adapter, parts["dora_scale"]))
    whole = [(kind, (parts[part],)) for part, kind in DIFFERENCES.items() if part in parts]
    return ([adapter] if adapter is not None else []) + whole


def swapped(parts):
    """The parts of a layer whose output rows change places by halves. A Kronecker product moves with its first
    factor.
    """
    rows = {"lora_up.weight", "hada_w1_a", "hada_w2_a", "diff", "set_weight", "dora_scale"}
    moved = dict(parts)
    for part, value in parts.items():
        if part in rows and len(value) > 1:
            moved[part] = _halves(value)
    if any(part.startswith("lokr_") for part in parts):
        first = "lokr_w1" if "lokr_w1" in parts else "lokr_w1_a"
        if len(parts[first]) % 2:
            moved = {"diff": _halves(kronecker(parts)), **{k: v for k, v in moved.items() if k == "dora_scale"}}
        else:
            moved[first] = _halves(parts[first])
    return moved


def _halves(value):
    return torch.cat(value.chunk(2)[::-1])


def kronecker(parts):
    """The change of a LoKr layer, float32. As LyCORIS: alpha / rank counts where a factor is a product."""
    whole, rank = [], None
    for name in ("lokr_w1", "lokr_w2"):
        if name in parts:
            whole.append(parts[name].float())
        else:
            left, right = parts[f"{name}_a"].float(), parts[f"{name}_b"].float()
            rank = len(right)
            whole.append(left @ right)
    return torch.kron(*whole) * (parts["alpha"] / rank if rank and "alpha" in parts else 1.0)


# --- in words --------------------------------------------------------------------------------------------------------


def kinds(layers):
    """What the layers are: "LoRA of rank 16", "LoKr, DoRA"."""
    found = Counter()
    for layer in layers:
        parts = layer.parts
        if "lora_down.weight" in parts:
            found["LoRA"] += 1
        elif any(part.startswith("lokr_") for part in parts):
            found["LoKr"] += 1
        elif any(part.startswith("hada_") for part in parts):
            found["LoHa"] += 1
        elif any(part in parts for part in DIFFERENCES):
            found["differences"] += 1
        elif parts:
            found["other kinds"] += 1
    ranks = {len(layer.parts["lora_down.weight"]) for layer in layers if "lora_down.weight" in layer.parts}
    words = ", ".join(kind for kind, _ in found.most_common())
    ranked = f" of rank {min(ranks)}" + (f" to {max(ranks)}" if len(ranks) > 1 else "") if ranks else ""
    return words + ranked + (", DoRA" if any("dora_scale" in layer.parts for layer in layers) else "")


def counted(what, layers):
    """ "n of m layers applied", and which were not, with the reasons; nothing when the file has no such layers."""
    if not layers:
        return []
    left = [layer for layer in layers if layer.reason]
    lines = [
        f"{what}{len(layers) - len(left)} of {len(layers)} layers applied" + ("; these were not:" if left else ".")
    ]
    by_reason = {}
    for layer in left:
        by_reason.setdefault(layer.reason, []).append(layer.name)
    for reason, named in by_reason.items():
        more = f" and {len(named) - SHOWN} more" if len(named) > SHOWN else ""
        lines.append(f"  {', '.join(name[:100] for name in named[:SHOWN])}{more}: {reason}.")
    return lines


def not_connected(text):
    return [f"{len(text)} layers are for the text encoder and were not applied: connect clip."] if text else []


def refuse_models(checkpoint):
    """Raise for a file that is a model itself."""
    found = identify.identify(checkpoint)
    if found.kind in ("lora", "unknown"):
        return
    slot = identify.SLOTS.get(found.slot)
    advice = f"It belongs in the node {slot.node} (folder {slot.folder})." if slot else found.advice
    raise CheckpointError(
        f"{checkpoint.name} is {found.title}: {found.reason}. Load FLUX.2 LoRA expects a LoRA for FLUX.2, from the "
        f"folder loras. {advice}".rstrip(),
        "wrong-kind-of-file",
    )


def refuse_other_models(checkpoint, layers, variant):
    """Raise for a file of another model, of which some layers may fit by chance."""
    plain = [names.plain(layer.name) for layer in layers]
    other = names.other_model(plain)
    far = names.beyond(plain, variant.double_blocks)
    if other is None and far:
        other = "FLUX.1 or another model", far
    if other:
        raise CheckpointError(
            f"{checkpoint.name} is a LoRA for {other[0]}: it has the layer {other[1]}, which no FLUX.2 has. "
            f"Load FLUX.2 LoRA expects one for {variant.title}. Put ComfyUI's node Load LoRA behind the model that "
            "this file is for.",
            "lora",
        )


def nothing_fits(checkpoint, layers, variant, only_text=False):
    """The sentence for a file of which no layer fits this model."""
    if only_text:
        return (
            f"{checkpoint.name} changes the text encoder alone ({len(layers)} layers). Connect clip with the text "
            "encoder that it was made for."
        )
    for other in variants.VARIANTS:
        known = targets.model_targets(other)
        if other != variant and any(not unfit(layer, known.get(names.plain(layer.name))) for layer in layers):
            return (
                f"{checkpoint.name} is a LoRA for {other.title}, which is {other.hidden} wide. This model is "
                f"{variant.title}, {variant.hidden} wide, and none of the {len(layers)} layers fits. Use it with "
                f"{other.title}."
            )
    first = layers[0]
    return (
        f"{checkpoint.name} does not fit {variant.title}: none of its {len(layers)} layers was applied. The first is "
        f"{first.name[:120]}: {first.reason}."
    )
