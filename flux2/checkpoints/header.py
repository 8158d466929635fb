"""Reading what is inside a checkpoint without reading its weights: safetensors headers, and folders as diffusers and
transformers write them.

  checkpoint = open_checkpoint("flux2-dev.safetensors")      # or a folder with config.json and shards
  checkpoint.tensors["img_in.weight"].shape                  # (6144, 128)

Everything that can be wrong with a file is found here and said in one sentence (CheckpointError); the weights
themselves are read by load.py. Nothing is unpickled: a pickle is refused. Not covered: GGUF files, which are named as
such.
"""

import functools
import json
import math
import os
import stat
import struct
from dataclasses import dataclass, field
from pathlib import Path

from ...attention.errors import UserError

SUFFIXES = (".safetensors", ".sft")
# Bounds on what a file may claim, far above any model for these slots: a FLUX.2 of 4 bits has some 3,000 tensors.
HEADER_LIMIT = 32 * 2**20  # bytes; the safetensors library allows 100 MB
MOST_TENSORS = 50_000
MOST_AXES = 8
JSON_LIMIT = 16 * 2**20  # bytes of a config.json or an index
MARK_LIMIT = 4096  # bytes of a layer's .comfy_quant
NAME_LIMIT = 255  # letters of a file name, where file systems stop


def _item_bits():
    """Number format of a header -> bits: what the format's description names, and what the installed safetensors
    library knows beyond that.
    """
    bits = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
    bits |= {"I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32}
    bits |= {"I64": 64, "U64": 64, "F64": 64, "C64": 64}
    try:
        from safetensors.torch import _TYPES  # a version without it knows what is listed above
    except ImportError:
        return bits
    return bits | {name: 8 * dtype.itemsize for name, dtype in _TYPES.items() if name not in bits}


ITEM_BITS = _item_bits()
NOT_SAFETENSORS = (  # first bytes -> what such a file is
    (b"PK\x03\x04", "a zip archive, most likely a PyTorch pickle checkpoint"),
    (b"\x80", "a Python pickle"),
    (
        b"GGUF",
        "a GGUF file; load it with Unet Loader (GGUF) or CLIPLoader (GGUF) of the pack ComfyUI-GGUF, and put this "
        "pack's nodes behind it",
    ),
    (
        b"version https://git-lfs",
        "a Git LFS pointer, not the model itself; run 'git lfs pull' or download the file again",
    ),
    (b"<", "a web page (HTML or XML), not a model; the download needs a login or a direct link"),
)


class CheckpointError(UserError):
    """A checkpoint that cannot be used. The text is a sentence for the user: which file, what is wrong, what to do."""

    topic = "damaged-file"


@dataclass(frozen=True)
class Tensor:
    """One entry of a safetensors header: shape, dtype name as in the header ("BF16"), size in bytes, the file that
    holds it, and where in its data.
    """

    shape: tuple
    dtype: str
    bytes: int
    file: Path
    start: int = 0  # bytes of data before it, counted from the end of the header


@dataclass(frozen=True)
class Checkpoint:
    """A file, or a folder of shards, known by its headers. `config` is config.json of a folder; `metadata` is that of
    the file.
    """

    path: Path
    tensors: dict
    metadata: dict = field(default_factory=dict)
    config: dict = field(default_factory=dict)

    @property
    def name(self):
        return label(self.path)

    @property
    def files(self):
        """The files that hold tensors, each once, in the order of the headers."""
        return tuple(dict.fromkeys(tensor.file for tensor in self.tensors.values()))

    @property
    def bytes(self):
        return sum(tensor.bytes for tensor in self.tensors.values())

    @functools.cached_property
    def marks(self):
        """Content of the .comfy_quant tensors, which say how a layer is quantised: layer -> bytes. Raises
        CheckpointError.
        """
        names = [name for name in self.tensors if name.endswith(".comfy_quant")]
        return {name.removesuffix(".comfy_quant"): self.read(name, MARK_LIMIT) for name in names}

    def read(self, name, limit):
        """The bytes of one small tensor. Raises CheckpointError when it has more than `limit`."""
        tensor = self.tensors[name]
        if tensor.bytes > limit:
            raise _damaged(
                self.path, f"the tensor {name[:80]!r} has {tensor.bytes} bytes, where at most {limit} belong"
            )
        try:
            with open_regular(tensor.file) as file:
                file.seek(8 + struct.unpack("<Q", file.read(8))[0] + tensor.start)
                return file.read(tensor.bytes)
        except (OSError, struct.error) as error:
            raise CheckpointError(f"{label(tensor.file)} cannot be read: {error}.") from error


def label(path):
    """How messages name a path: the last part, or the last two for the folders of a diffusers pipeline."""
    path = Path(path)
    return f"{path.parent.name}/{path.name}" if os.path.isdir(path) else path.name


def open_checkpoint(path):
    """Checkpoint of a .safetensors file or of a folder. Raises CheckpointError with the reason when there is none to be
    had.
    """
    path = Path(path)
    if os.path.isdir(path):
        return _open_folder(path)
    if not os.path.lexists(path):
        raise CheckpointError(
            f"{path} does not exist. Choose a file that is there, or put the model at this path.", "missing-file"
        )
    tensors, metadata = read_header(path)
    return Checkpoint(path, tensors, metadata)


# --- one file --------------------------------------------------------------------------------------------------------


def open_regular(path):
    """Open an ordinary file for reading. Pipes, devices and sockets, which could be read for ever, are refused without
    waiting for them: CheckpointError. OSError as from `open`.
    """
    path = Path(path)
    opened = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        os.close(opened)
        raise CheckpointError(
            f"{label(path)} is no ordinary file but a pipe, a device or a folder. Put a file in its place."
        )
    return os.fdopen(opened, "rb")


def read_small(path, limit):
    """The bytes of an ordinary file of at most `limit` bytes. Raises CheckpointError."""
    path = Path(path)
    name = f"{path.parent.name}/{path.name}"
    try:
        with open_regular(path) as file:
            size = file.seek(0, 2)
            if size > limit:
                raise CheckpointError(
                    f"{name} has {size / 2**20:.0f} MiB, where at most {limit / 2**20:.0f} MiB belong."
                )
            file.seek(0)
            return file.read(limit)
    except OSError as error:
        raise CheckpointError(f"{name} cannot be read: {error.strerror or error}.") from error


def read_header(path):
    """(name -> Tensor, metadata) of one safetensors file; reads the header alone. Raises CheckpointError."""
    path = Path(path)
    try:
        with open_regular(path) as file:
            raw, room = _raw_header(path, file)
    except OSError as error:
        raise CheckpointError(f"{label(path)} cannot be read: {error.strerror or error}.") from error
    header = _parse(path, raw)
    metadata = header.pop("__metadata__", {}) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, "its metadata is not a table of strings")
    tensors = {name: _tensor(path, name, entry) for name, entry in header.items()}
    _check_offsets(path, header, room)
    if path.suffix.lower() not in SUFFIXES:
        raise CheckpointError(
            f"{label(path)} holds safetensors but is not named so. Rename it to {path.stem}.safetensors."
        )
    return tensors, metadata


def _raw_header(path, file):
    """The header's bytes, and how many bytes of data follow it."""
    size = file.seek(0, 2)
    file.seek(0)
    start = file.read(32)
    _refuse_other_formats(path, start)
    length = struct.unpack("<Q", start[:8])[0] if size >= 8 else 0
    if not 2 <= length <= HEADER_LIMIT:
        raise CheckpointError(
            f"{label(path)} is not a safetensors file: it has {size} bytes and does not begin with the length of a "
            "header. Download it again or choose another file."
        )
    if 8 + length > size:
        raise _truncated(path, f"its header alone should take {length} bytes and the file has {size}")
    file.seek(8)
    return file.read(length), size - 8 - length


def _refuse_other_formats(path, start):
    for magic, meaning in NOT_SAFETENSORS:
        # A header of 0x..80 or 0x..3c bytes begins like a pickle or a web page; its ninth byte is then the JSON's
        # opening brace.
        if start.startswith(magic) and start[8:9] != b"{":
            refusal = (
                " Pickles can run code when they are opened and are refused: convert it to safetensors."
                if "pickle" in meaning
                else ""
            )
            raise CheckpointError(f"{label(path)} is {meaning}, where a safetensors file was expected.{refusal}")


def _parse(path, raw):
    """The header's table. Its size is bounded before it is read: parsing is one call, during which nothing else in the
    process runs.
    """
    most = max(raw.count(b'"data_offsets"'), (raw.count(b"[") + raw.count(b"{")) // 8)
    if most > MOST_TENSORS:
        raise CheckpointError(
            f"{label(path)} lists more than {MOST_TENSORS} tensors; no model that this pack loads has so many. "
            f"Choose another file."
        )
    try:
        header = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError):
        raise CheckpointError(
            f"{label(path)} is not a safetensors file, or a damaged one: its header is not JSON. Download it again or "
            "choose another file."
        ) from None
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a table of tensors")
    return header


def _tensor(path, name, entry):
    entry = entry if isinstance(entry, dict) else {}
    shape, dtype, span = entry.get("shape"), entry.get("dtype"), entry.get("data_offsets")
    if (
        not (name.isprintable() and _naturals(shape, MOST_AXES) and _naturals(span, 2) and len(span) == 2)
        or span[0] > span[1]
    ):
        raise _damaged(path, f"the entry of the tensor {name[:80]!r} is malformed")
    if not isinstance(dtype, str) or dtype not in ITEM_BITS:
        raise CheckpointError(
            f"{label(path)} stores the tensor {name[:80]!r} as {str(dtype)[:20]!r}, a type that is not known here. "
            f"Known are {', '.join(ITEM_BITS)}."
        )
    if math.prod(shape) * ITEM_BITS[dtype] != 8 * (span[1] - span[0]):
        raise _damaged(
            path, f"the tensor {name[:80]!r} of shape {shape} and type {dtype} cannot take {span[1] - span[0]} bytes"
        )
    return Tensor(tuple(shape), dtype, span[1] - span[0], path, span[0])


def _naturals(value, most):
    """Whether a value is a list of at most `most` numbers that 63 bits can hold."""
    return (
        isinstance(value, list)
        and len(value) <= most
        and all(type(item) is int and 0 <= item < 2**63 for item in value)
    )


def _check_offsets(path, header, room):
    """The tensors must fill the data part without holes or overlaps, as the format demands."""
    end = 0
    for first, last in sorted(entry["data_offsets"] for entry in header.values()):
        if first != end:
            raise _damaged(path, f"its tensors overlap or leave a hole at byte {end} of the data")
        end = last
    if end > room:
        raise _truncated(path, f"its tensors take {end} bytes and the file holds {room}")
    if end < room:
        raise _damaged(path, f"{room - end} bytes follow the last tensor")


def _truncated(path, why):
    return CheckpointError(f"{label(path)} is incomplete: {why}. The download or copy was cut off: download it again.")


def _damaged(path, why):
    return CheckpointError(f"{label(path)} is damaged: {why}. Download it again.")


# --- folders ---------------------------------------------------------------------------------------------------------


def _open_folder(folder):
    index = _index_file(folder)
    tensors, metadata = _sharded(folder, index) if index else read_header(_only_file(folder))
    return Checkpoint(
        folder, tensors, metadata, read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    )


def read_json(path, limit=JSON_LIMIT):
    """A JSON object from a file of a model folder. Raises CheckpointError when it is anything else."""
    name = f"{Path(path).parent.name}/{Path(path).name}"
    try:
        value = json.loads(read_small(path, limit).decode("utf-8"))
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name} cannot be read as JSON: {error}.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{name} is not a JSON object.")
    return value


def _index_file(folder):
    found = sorted(folder.glob("*.safetensors.index.json"))
    # A folder may hold a second precision beside the main one ("...fp16.safetensors.index.json"): the shortest name is
    # the main one.
    return min(found, key=lambda path: len(path.name)) if found else None


def files_of(folder):
    """Names of the files that a model folder is made of: those of its index, or its only weights. Empty where it is no
    model as a whole, such as a folder with several models.
    """
    try:
        index = _index_file(folder)
        return set(map(str, read_json(index)["weight_map"].values())) if index else {_only_file(folder).name}
    except (CheckpointError, KeyError, AttributeError):
        return set()


def _only_file(folder):
    files = sorted(path for path in folder.glob("*.safetensors") if path.name != "consolidated.safetensors")
    standard = [path for path in files if path.name in ("diffusion_pytorch_model.safetensors", "model.safetensors")]
    if len(files) == 1 or standard:
        return (standard or files)[0]
    if not files:
        raise CheckpointError(
            f"The folder {label(folder)} holds no .safetensors file. Choose the folder that holds the weights, or "
            "download the model again.",
            "missing-file",
        )
    raise CheckpointError(
        f"The folder {label(folder)} holds {len(files)} .safetensors files and no index that joins them "
        "(*.safetensors.index.json). Download the index too, or choose one file.",
        "missing-file",
    )


def _sharded(folder, index):
    """All tensors of a sharded model. Shard names are plain file names: an index that points elsewhere is refused."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise CheckpointError(f"{label(folder)}/{index.name} has no table of weights (weight_map). Download it again.")
    headers = {}
    for file in dict.fromkeys(places.values()):
        if file in ("", ".", "..") or len(file) > NAME_LIMIT or any(mark in file for mark in "/\\:\0"):
            raise CheckpointError(
                f"{label(folder)}/{index.name} points to {file[:80]!r}, outside its folder. Such an index is refused."
            )
        if not os.path.lexists(folder / file):
            raise CheckpointError(
                f"The shard {file} is missing from the folder {label(folder)}. Download it into that folder.",
                "missing-file",
            )
        headers[file] = read_header(folder / file)
        if sum(len(tensors) for tensors, _ in headers.values()) > MOST_TENSORS:
            raise CheckpointError(f"The shards in {label(folder)} list more than {MOST_TENSORS} tensors in all.")
    absent = [(name, file) for name, file in places.items() if name not in headers[file][0]]
    if absent:
        raise CheckpointError(
            f"{label(folder)}/{index.name} promises the tensor {absent[0][0]!r} in {absent[0][1]}, which does not "
            "have it. Index and shards are not of the same model: download both again."
        )
    return {name: headers[file][0][name] for name, file in places.items()}, next(iter(headers.values()))[1]
