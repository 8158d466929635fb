"""How the layers of a checkpoint are quantised, by ComfyUI's marks, and whether what a mark promises is in the file.

  layers(checkpoint)                          # {"single_blocks.0.linear1": {"format": "float8_e4m3fn"}, ...}
  shape(checkpoint, "txt_in.weight")          # of the numbers, where the tensor may hold two of them in a byte

A mark is an entry of the metadata `_quantization_metadata`, a tensor LAYER.comfy_quant with the same JSON, or, in older
files, LAYER.scale_weight beside a tensor scaled_fp8. FORMATS is the table of what a weight and its scales look like in
each format; which of them the installed ComfyUI computes is asked of ComfyUI (loading/examine.py). Shapes of scales
follow the layouts of comfy-kitchen 0.2.26, which ComfyUI 0.30 pins.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field

from .header import CheckpointError

OLD_MARK, OLD_SCALE, OLD_INPUT_SCALE = "scaled_fp8", ".scale_weight", ".scale_input"


@dataclass(frozen=True)
class QuantFormat:
    """One format. Shapes are those of a weight (rows, columns) as numbers; a scale's size is its number of elements."""

    words: str
    stored: tuple  # number formats of the tensor, as headers name them
    packed: int = 1  # numbers in one element of the tensor, along the columns
    multiple: int = 1  # of which the stored rows and columns are a multiple, filled with zeros
    scales: dict = field(default_factory=dict)  # ending -> Scale

    def stored_shape(self, shape):
        rows, columns = (_up(side, self.multiple) for side in shape)
        return (rows, columns // self.packed)


def _up(number, multiple):
    return -(-number // multiple) * multiple


FLOATING = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Scale:
    """A tensor beside a weight: which numbers of elements it may have for (rows, columns), and in which formats."""

    sizes: Callable
    stored: tuple = FLOATING


PER_TENSOR = Scale(lambda rows, columns: {1})
PER_ROW = Scale(lambda rows, columns: {rows})
PER_TENSOR_OR_ROW = Scale(lambda rows, columns: {1, rows})


def _per_group(group, stored):
    """One scale for `group` columns of a row, in tiles of 128 x 4 as the tensor cores read them, 8 bits each."""
    return Scale(lambda rows, columns: {_up(rows, 128) * _up(-(-columns // group), 4)}, (stored, "U8"))


FP8 = {"weight_scale": PER_TENSOR}
GROUPS = (4, 8, 16, 32, 64, 128, 256)  # columns that may share a scale of w4a8
W4A8 = {
    "weight_s_rel": Scale(lambda rows, columns: {rows * (columns // group) for group in GROUPS}, ("F8_E4M3", "U8")),
    "weight_s_channel": PER_ROW,
}
NVFP4 = {"weight_scale": _per_group(16, "F8_E4M3"), "weight_scale_2": PER_TENSOR}
FORMATS = {
    "float8_e4m3fn": QuantFormat("fp8 scaled (e4m3)", ("F8_E4M3",), scales=FP8),
    "float8_e5m2": QuantFormat("fp8 scaled (e5m2)", ("F8_E5M2",), scales=FP8),
    "mxfp8": QuantFormat("mxfp8", ("F8_E4M3",), multiple=32, scales={"weight_scale": _per_group(32, "F8_E8M0")}),
    "nvfp4": QuantFormat("nvfp4", ("U8",), 2, 16, NVFP4),
    "int8_tensorwise": QuantFormat("int8 scaled", ("I8",), scales={"weight_scale": PER_TENSOR_OR_ROW}),
    "convrot_w4a4": QuantFormat("int4 ConvRot (w4a4)", ("I8",), 2, scales={"weight_scale": PER_ROW}),
    # computed by newer versions of ComfyUI: W4A8 by 0.33's layout; the scales of AWQ are left to ComfyUI
    "asym_w4a8_int8": QuantFormat("int4 ConvRot with int8 products (w4a8)", ("I8",), 2, scales=W4A8),
    "awq_w4a16": QuantFormat("int4 AWQ (w4a16)", ("I8", "U8", "I32"), 2),
}
CODEBOOK = Scale(lambda rows, columns: {16})  # the values of the 16 codes of w4a8
OPTIONAL = {
    "input_scale": PER_TENSOR,
    "pre_quant_scale": Scale(lambda rows, columns: {columns}),
    "weight_codebook": CODEBOOK,
}
ROTATED = ("convrot_w4a4", "asym_w4a8_int8")  # always, also where the mark does not say so
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "model.")  # that metadata may leave out
SINCE = {"asym_w4a8_int8": "0.33", "awq_w4a16": "0.38"}  # version of ComfyUI that computes it; the others: 0.30
COMPANIONS = ("weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale", "comfy_quant")


# --- marks -----------------------------------------------------------------------------------------------------------


def layers(checkpoint):
    """Every marked layer, by the file's own name -> its mark as a table. Raises CheckpointError for unreadable ones."""
    marked = {name: _table(checkpoint, content) for name, content in checkpoint.marks.items()}
    text = checkpoint.metadata.get("_quantization_metadata")
    if text:
        found = _table(checkpoint, text).get("layers")
        if not isinstance(found, dict) or not all(isinstance(mark, dict) for mark in found.values()):
            raise _unreadable(checkpoint)
        marked |= {_in_file(checkpoint, layer): mark for layer, mark in found.items()}
    elif is_old(checkpoint):
        old = (name for name in checkpoint.tensors if name.endswith(OLD_SCALE))
        marked |= {name.removesuffix(OLD_SCALE): {"format": "float8_e4m3fn"} for name in old}
    return marked or unmarked_int8(checkpoint)


def described(checkpoint):
    """Whether the file itself says how it is quantised."""
    return bool(checkpoint.marks or checkpoint.metadata.get("_quantization_metadata") or is_old(checkpoint))


def is_old(checkpoint):
    """Whether the marks are those of the first files with scaled fp8, which ComfyUI turns into its own."""
    return any(name.endswith(OLD_MARK) for name in checkpoint.tensors)


def _in_file(checkpoint, layer):
    """The name of a layer in the file: its metadata may leave out what precedes all names."""
    names = (layer, *(prefix + layer for prefix in PREFIXES))
    return next((name for name in names if f"{name}.weight" in checkpoint.tensors), layer)


def unmarked_int8(checkpoint):
    """Marks for int8 weights of other tools, which have one scale for a row or a tensor and no description. None where
    the file speaks of a rotation, of which the scales alone say nothing.
    """
    if speaks_of_rotation(checkpoint):
        return {}
    found = {}
    for name, tensor in checkpoint.tensors.items():
        scale = checkpoint.tensors.get(f"{name}_scale") if name.endswith(".weight") and tensor.dtype == "I8" else None
        if scale and len(tensor.shape) == 2 and math.prod(scale.shape) in (1, tensor.shape[0]):
            found[name.removesuffix(".weight")] = {"format": "int8_tensorwise"}
    return found


def speaks_of_rotation(checkpoint):
    about = f"{checkpoint.path} {json.dumps(checkpoint.metadata)} {json.dumps(checkpoint.config)}".lower()
    return any(word in about for word in ("convrot", "quarot", "hadamard", "rotat"))


def _table(checkpoint, text):
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise _unreadable(checkpoint)
    return found


def _unreadable(checkpoint):
    return CheckpointError(
        f"{checkpoint.name} is damaged: its quantisation metadata cannot be read. Download it again."
    )


def rotated(mark):
    """Whether the columns of a weight are rotated (ConvRot), so that it is no weight without its format."""
    inner = mark.get("params")
    return bool(mark.get("convrot", inner.get("convrot") if isinstance(inner, dict) else False))


def words(mark):
    """The format of a mark in words."""
    name = str(mark.get("format", "a format without a name"))[:40]
    known = FORMATS[name].words if name in FORMATS else name
    return f"{known} with ConvRot" if name == "int8_tensorwise" and rotated(mark) else known


# --- checks ----------------------------------------------------------------------------------------------------------


def shape(checkpoint, name, marked):
    """The shape of the numbers in a weight: the tensor's own, or what a format that packs them stands for."""
    stored = checkpoint.tensors[name].shape
    mark = marked.get(name.removesuffix(".weight"))
    kind = FORMATS.get(mark.get("format")) if mark and isinstance(mark.get("format"), str) else None
    if kind is None or len(stored) != 2:
        return stored
    return (stored[0], stored[1] * kind.packed)


def check_marks(checkpoint, title, marked, computed):
    """Raise unless every marked layer is there and in a format that the installed ComfyUI computes (`computed`)."""
    for layer, mark in marked.items():
        kind = mark.get("format")
        if not isinstance(kind, str):
            raise CheckpointError(
                f"{checkpoint.name} is {title} whose layer {layer[:80]} is marked as quantised without a format. "
                f"ComfyUI cannot read that: use the bf16 file, or one quantised for ComfyUI.",
                "quantised-file",
            )
        if kind not in computed:
            wanted = f"ComfyUI {SINCE[kind]} or newer computes it" if kind in SINCE else "a newer ComfyUI may know it"
            raise CheckpointError(
                f"{checkpoint.name} is {title} quantised as {kind[:40]}, which this version of ComfyUI does not "
                f"compute; {wanted}. Update ComfyUI, or use a file in another format ({', '.join(sorted(computed))}).",
                "update-comfyui",
            )
        if f"{layer}.weight" not in checkpoint.tensors:
            raise CheckpointError(
                f"{checkpoint.name} is damaged: its quantisation metadata names the layer {layer[:80]}, which is not "
                f"in the file. Download it again."
            )


def check_weight(checkpoint, title, layer, mark, wanted):
    """Raise unless the weight of a marked layer holds numbers of the shape `wanted`, with the scales of its format."""
    kind, tensor = FORMATS.get(mark["format"]), checkpoint.tensors[f"{layer}.weight"]
    if kind is None:  # known to ComfyUI alone
        return
    if len(wanted) != 2 or tensor.dtype not in kind.stored or tensor.shape != kind.stored_shape(wanted):
        raise CheckpointError(
            f"{checkpoint.name} stores {layer}.weight as {tensor.dtype} of shape {list(tensor.shape)}, which is no "
            f"{kind.words} of the shape {list(wanted)} that {title} has. It is damaged or pieced together: download "
            f"it again."
        )
    if mark["format"] in ROTATED or rotated(mark):
        _check_rotation(checkpoint, layer, mark, wanted[1])
    if mark["format"] == "asym_w4a8_int8":
        _check_w4a8(checkpoint, layer, mark, wanted)
    for ending, scale in {**kind.scales, **OPTIONAL}.items():
        tensor = checkpoint.tensors.get(f"{layer}.{ending}")
        if tensor is None and ending == "weight_scale":
            tensor = checkpoint.tensors.get(layer + OLD_SCALE)
        if tensor is None and ending in OPTIONAL:
            continue
        if tensor is None:
            raise CheckpointError(
                f"{checkpoint.name} is incomplete: its layer {layer} is {kind.words} without {ending}. "
                f"Download it again."
            )
        count, allowed = math.prod(tensor.shape), scale.sizes(*wanted)
        if count not in allowed or tensor.dtype not in scale.stored:
            raise CheckpointError(
                f"{checkpoint.name} has {count} numbers in {tensor.dtype} as {ending} of its layer {layer}, which is "
                f"{kind.words} of {wanted[0]} x {wanted[1]}; ComfyUI computes with "
                f"{' or '.join(map(str, sorted(allowed)))} in {' or '.join(scale.stored)}. Use the bf16 file, or one "
                f"quantised for ComfyUI.",
                "quantised-file",
            )


def _setting(mark, name, default):
    """A setting of a mark, at its top or in its table params."""
    inner = mark.get("params")
    return mark.get(name, inner.get(name, default) if isinstance(inner, dict) else default)


def _check_w4a8(checkpoint, layer, mark, wanted):
    """Raise unless the groups of w4a8 are as wide as the mark says, and nothing is in the file that ComfyUI 0.33 does
    not read.
    """
    group, scales = _setting(mark, "group_size", 16), checkpoint.tensors.get(f"{layer}.weight_s_rel")
    if f"{layer}.weight_correction" in checkpoint.tensors:
        raise CheckpointError(
            f"{checkpoint.name} has numbers off centre in its layer {layer} (weight_correction), which ComfyUI does "
            f"not read: the image would be another. Use the bf16 file, or one quantised for ComfyUI.",
            "quantised-file",
        )
    if scales and (group not in GROUPS or wanted[1] % group or scales.shape != (wanted[0], wanted[1] // group)):
        raise CheckpointError(
            f"{checkpoint.name} says that {str(group)[:20]} columns of its layer {layer} share a scale, and has "
            f"scales of the shape {list(scales.shape)} for {wanted[0]} x {wanted[1]} numbers. It is damaged: download "
            f"it again."
        )


def _check_rotation(checkpoint, layer, mark, columns):
    """Raise unless the rotation's groups (of 4, 16, 64, 256 ... columns) divide the columns of the weight."""
    group = _setting(mark, "convrot_groupsize", 256)
    kind = _setting(mark, "linear_dtype", "int4")
    if type(group) is not int or group not in (4**power for power in range(1, 8)) or columns % group:
        raise CheckpointError(
            f"{checkpoint.name} says that {columns} columns of its layer {layer} are rotated in groups of "
            f"{str(group)[:20]}, which cannot be. It is damaged: download it again."
        )
    if kind not in ("int4", "int8"):
        raise CheckpointError(
            f"{checkpoint.name} asks for products in {str(kind)[:20]!r} in its layer {layer}; there are int4 and int8."
        )
