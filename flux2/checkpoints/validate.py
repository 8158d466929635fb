"""Checks of a checkpoint against what it says it is, from its header alone, and what to tell the user about it.

Checks return None or raise CheckpointError; `summary` returns text for the log and for the Flux2ModelInfo node.
"""

from . import identify, keys, variants
from .header import CheckpointError

FLOATS = ("BF16", "F16", "F32", "F64", "F8_E4M3", "F8_E5M2")


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


def check_tensors(checkpoint, title, shapes, tensors):
    """Raise unless each tensor named in `shapes` (name -> shape) holds floating point numbers in that shape."""
    for name, wanted in shapes.items():
        tensor = tensors[name]
        if tensor.dtype not in FLOATS or tensor.shape != tuple(wanted):
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


def check_model(checkpoint, found, weight_dtype):
    """Raise unless the diffusion model is complete, consistent in its sizes, and can be had in the weight type asked
    for.
    """
    tensors = {
        name.removeprefix(found.prefix): tensor
        for name, tensor in checkpoint.tensors.items()
        if name.startswith(found.prefix)
    }
    if found.layout == "diffusers":
        shapes = keys.diffusers_shapes(found.variant)
    else:
        shapes = keys.model_shapes(found.variant)
        tensors = {name.replace("_norm.scale", "_norm.weight"): tensor for name, tensor in tensors.items()}
    check_present(checkpoint, found.title, shapes, tensors)
    stored, quantised = identify.number_format(checkpoint)
    if quantised and weight_dtype != "as stored":
        raise CheckpointError(
            f"{checkpoint.name} is already quantised ({stored}); its weights cannot be turned into {weight_dtype}. "
            "Choose the weight type 'as stored', or load the bf16 file."
        )
    if not quantised:
        check_tensors(checkpoint, found.title, shapes, tensors)
    _check_transformer_config(checkpoint, found.variant)


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
