"""Checks of a checkpoint against what it says it is, from its header alone, and what to tell the user about it.

Checks return None or raise CheckpointError; `summary` returns text for the log and for the Flux2ModelInfo node.
"""

from dataclasses import replace

from . import identify, keys, quantisation, variants
from .header import ITEM_BITS, CheckpointError

# Number formats of weights: floating point, of the formats that a header may name.
FLOATS = tuple(name for name in ITEM_BITS if name[0] in "FB" and name not in ("BOOL", "F4", "F8_E8M0"))
MOST_BLOCKS = 512  # blocks of each kind; FLUX.2 dev has 48
MOST_VAE = 512  # channels of a VAE's first layer; the published ones have 128 and less
MOST_WIDTH = 2**16  # of a transformer; FLUX.2 dev has 6144


def check_present(checkpoint, title, wanted, names):
    """Raise unless every name in `wanted` is in `names`."""
    missing = [name for name in wanted if name not in names]
    if missing:
        raise CheckpointError(
            f"{checkpoint.name} is incomplete: it is {title}, but {len(missing)} of {len(list(wanted))} weights are "
            f"missing, such as {missing[0]}. Download it again; a file that was pruned or split cannot be used alone."
        )


def check_config(checkpoint, expected, config=None):
    """Raise if config.json of a folder says anything else than `expected` (name -> value read from the weights). Absent
    entries are fine.
    """
    config = checkpoint.config if config is None else config
    for name, value in expected.items():
        said = config.get(name)
        if said is not None and said != value:
            raise CheckpointError(
                f"config.json of {checkpoint.name} says {name} is {said!r}, but the weights beside it say {value!r}. "
                "They are not of the same model: download the folder again."
            )


def check_tensors(checkpoint, title, shapes, marked=(), computed=tuple(quantisation.FORMATS)):
    """Raise unless each tensor named in `shapes` (name -> shape) holds floating point numbers in that shape, or what
    the mark of its layer in `marked` says it holds.
    """
    quantisation.check_marks(checkpoint, title, marked or {}, computed)
    for name, wanted in shapes.items():
        tensor, layer = checkpoint.tensors[name], name.removesuffix(".weight")
        if layer in marked:
            quantisation.check_weight(checkpoint, title, layer, marked[layer], tuple(wanted))
        elif tensor.dtype not in FLOATS or tensor.shape != tuple(wanted):
            raise CheckpointError(
                f"{checkpoint.name} stores {name} as {tensor.dtype} of shape {list(tensor.shape)}, where {title} has "
                f"floating point numbers of shape {list(wanted)}. It is damaged or pieced together: download it again."
            )


def check_floats(checkpoint):
    """Raise if a weight or bias is stored as anything but floating point numbers."""
    for name, tensor in checkpoint.tensors.items():
        if name.endswith((".weight", ".bias")) and tensor.dtype not in FLOATS:
            raise CheckpointError(
                f"{checkpoint.name} stores {name} as {tensor.dtype}, where floating point numbers were expected. It "
                "is damaged: download it again."
            )


def check_model(checkpoint, found, weight_dtype, computed=tuple(quantisation.FORMATS)):
    """Raise unless the diffusion model is complete, consistent in its sizes, in formats that ComfyUI computes (names
    in `computed`), and can be had in the weight type asked for.
    """
    variant = found.variant
    if not (
        0 < variant.hidden <= MOST_WIDTH
        and variant.hidden % variants.HEAD_CHANNELS == 0
        and 0 < variant.text_width <= 4 * MOST_WIDTH
        and max(variant.double_blocks, variant.single_blocks) <= MOST_BLOCKS
    ):
        raise CheckpointError(
            f"{checkpoint.name} is damaged or pieced together: {found.reason}, and no such model can be. "
            f"Download it again."
        )
    part = without_prefix(checkpoint, found.prefix)
    if found.layout == "diffusers":
        shapes = keys.diffusers_shapes(variant)
    else:
        shapes = keys.model_shapes(variant)
        renamed = {name.replace("_norm.scale", "_norm.weight"): tensor for name, tensor in part.tensors.items()}
        part = replace(part, tensors=renamed)
    check_present(checkpoint, found.title, shapes, part.tensors)
    stored, quantised = identify.number_format(checkpoint)
    if quantised and weight_dtype != "as stored":
        raise CheckpointError(
            f"{checkpoint.name} is already quantised ({stored}); its weights cannot be turned into {weight_dtype}. "
            f"Choose the weight type 'as stored', or load the bf16 file.",
            "quantised-file",
        )
    check_tensors(part, found.title, shapes, marks_of(checkpoint, found.prefix), computed)
    if found.layout == "diffusers":
        _check_all_convertible(part, found.title, shapes)
    _check_transformer_config(checkpoint, variant)


def without_prefix(checkpoint, prefix):
    """The part of a checkpoint whose names begin with `prefix`, under the rest of their names."""
    named = ((name, tensor) for name, tensor in checkpoint.tensors.items() if name.startswith(prefix))
    return replace(checkpoint, tensors={name[len(prefix) :]: tensor for name, tensor in named})


def marks_of(checkpoint, prefix):
    """The marks of quantised layers (quantisation.layers), without the prefix of their names."""
    marked = quantisation.layers(checkpoint)
    return {layer[len(prefix) :]: mark for layer, mark in marked.items() if layer.startswith(prefix)}


def _check_all_convertible(part, title, shapes):
    """Raise for a file in diffusers' keys that holds tensors which the conversion would drop."""
    layers = {name.removesuffix(".weight") for name in shapes}
    left = [
        name
        for name in part.tensors
        if name not in shapes
        and not (name.rpartition(".")[0] in layers and name.rpartition(".")[2] in quantisation.COMPANIONS)
    ]
    if left:
        raise CheckpointError(
            f"{part.name} is {title}, and {len(left)} of its tensors have no place in the model, such as "
            f"{left[0][:80]}. Left out they would change the image, so it is refused: use the bf16 file, or one made "
            f"for ComfyUI.",
            "quantised-file",
        )


def check_vae(checkpoint, found):
    """Raise unless number formats, and the sizes that everything else follows from, are those of a FLUX.2 VAE."""
    check_config(checkpoint, {"latent_channels": 32, "batch_norm_eps": 1e-4, "patch_size": [2, 2]})
    check_floats(checkpoint)
    tensors = checkpoint.tensors
    half = next((name for name in tensors if name.startswith("encoder.")), None)
    wanted = ["decoder.conv_in.weight", "bn.running_mean", "bn.running_var"]
    check_present(checkpoint, found.title, wanted + ["encoder.conv_in.weight"] * bool(half), tensors)
    for name, inputs, most in (("decoder.conv_in.weight", 32, 4 * MOST_VAE), ("encoder.conv_in.weight", 3, MOST_VAE)):
        shape = tensors[name].shape if name in tensors else None
        if shape and not (shape[1:] == (inputs, 3, 3) and 0 < shape[0] <= most and shape[0] % 32 == 0):
            raise CheckpointError(
                f"{checkpoint.name} stores {name} in the shape {list(shape)}, where {found.title} has "
                f"[a multiple of 32 up to {most}, {inputs}, 3, 3]. It is damaged or pieced together: download it again."
            )


def _check_transformer_config(checkpoint, variant):
    check_config(
        checkpoint,
        {
            "num_layers": variant.double_blocks,
            "num_single_layers": variant.single_blocks,
            "num_attention_heads": variant.heads,
            "attention_head_dim": variants.HEAD_CHANNELS,
            "joint_attention_dim": variant.text_width,
            "in_channels": variants.LATENT_CHANNELS,
            "mlp_ratio": 3.0,
            "axes_dims_rope": [32, 32, 32, 32],
            "rope_theta": 2000,
            "patch_size": 1,
            "guidance_embeds": variant.guidance,
        },
    )


def summary(checkpoint, found):
    """What a checkpoint is, in a few lines: kind, size, number format; variant or layers; where it goes."""
    stored, _ = identify.number_format(checkpoint)
    place = identify.SLOTS.get(found.slot)
    lines = [
        f"{checkpoint.name}: {found.title}, {len(checkpoint.tensors)} tensors, {gigabytes(checkpoint.bytes)}, "
        f"{stored}.",
        f"Known by: {found.reason}.",
        variants.describe(found.variant) + "." if found.variant else "",
        f"Goes into: {place.node} (folder {place.folder})." if place else found.advice,
    ]
    return "\n".join(line for line in lines if line)


def gigabytes(count):
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def used_bytes(checkpoint, found, layers):
    """Bytes of the weights that are loaded from a text encoder: its embedding and first `layers` layers."""
    return sum(
        tensor.bytes for name, tensor in checkpoint.tensors.items() if keys.encoder_name(name, found.prefix, layers)
    )
