"""Damaged model files, made from a seed, through every loader and FLUX.2 Model Info.

  COMFYUI_PATH=... python tests/fuzz_files.py --count 20000 --seed 1      # by hand; tests/test_fuzz.py runs 500

A case is a small valid file or folder with one to three changes: numbers, names and types in the header, marks of
quantisation, config.json, index, tokenizer, tensors left out, added or cut, bytes flipped. It goes through Model Info,
through its own loader, sometimes through another one, and what loads is used once. Each call must end in a result or in
a CheckpointError (or a ValueError of the prompt), within LIMIT seconds. A run prints every other outcome with its seed.
"""

import argparse
import collections
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from pathlib import Path

import pack  # noqa: F401
import torch

import small_models as maker

LIMIT = 3.0  # seconds for one call, on an idle machine
LONGEST = 6000  # characters of an error
HANG = 60  # seconds after which a call counts as hung
NUMBERS = (0, 1, 2, 3, 7, 127, 128, 129, 255, 256, 512, 65535, 2**31 - 1, 2**31, 2**62, 2**63, -1, 10**18, 10**400)
ODD = (None, True, "", "x", [], {}, [[]], {"a": 1}, 1.5, -1.0, 1e308, *NUMBERS)
DTYPES = (
    "BF16",
    "F16",
    "F32",
    "F64",
    "I8",
    "U8",
    "I16",
    "I32",
    "BOOL",
    "F8_E4M3",
    "F8_E5M2",
    "F8_E8M0",
    "F4",
    "X9",
    "C64",
)
NAMES = ("²", "٣", "9" * 40, "a\nb", "..", "/", "𝕏", "layers", "weight", "0", "double_blocks.0", "model.")
FORMATS = (
    "float8_e4m3fn",
    "nvfp4",
    "mxfp8",
    "int8_tensorwise",
    "convrot_w4a4",
    "asym_w4a8_int8",
    "bnb_nf4",
    None,
    3,
    {},
)


# --- valid files -----------------------------------------------------------------------------------------------------


def _marked(weights, layers, kind):
    """Weights with some layers in a quantised format of comfy-kitchen, and the metadata that says so."""
    import comfy.quant_ops

    layout = comfy.quant_ops.get_layout_class(comfy.quant_ops.QUANT_ALGOS[kind]["comfy_tensor_layout"])
    weights = dict(weights)
    for layer in layers:
        data, params = layout.quantize(weights.pop(f"{layer}.weight").float(), scale="recalculate")
        for ending, tensor in layout.state_dict_tensors(data, params).items():
            weights[f"{layer}.weight{ending}"] = tensor
    return weights, {"_quantization_metadata": json.dumps({"layers": {layer: {"format": kind} for layer in layers}})}


def bases(folder):
    """The valid files and folders: name -> (path, loader)."""
    small = maker.diffusion_model(hidden=128, double=1, single=1)
    layers = ("single_blocks.0.linear1", "double_blocks.0.img_mlp.0")
    text = maker.text_encoder()
    qwen = {name: value for name, value in text.items() if name != "tekken_model"}
    for index in range(30):
        for name in ("q_norm", "k_norm"):
            qwen[f"model.layers.{index}.self_attn.{name}.weight"] = torch.ones(128)
    made = {
        "model": (maker.write(folder / "model.safetensors", small), "model"),
        "text": (maker.write(folder / "text.safetensors", text), "text"),
        "qwen": (maker.write(folder / "qwen.safetensors", qwen), "text"),
        "vae": (maker.write(folder / "vae.safetensors", maker.vae()), "vae"),
    }
    for kind in ("float8_e4m3fn", "nvfp4", "mxfp8", "int8_tensorwise"):
        made[kind] = (maker.write(folder / f"{kind}.safetensors", *_marked(small, layers, kind)), "model")
    made["fp8 text"] = (
        maker.write(folder / "text8.safetensors", *_marked(text, ("model.layers.0.mlp.up_proj",), "float8_e4m3fn")),
        "text",
    )
    whole = folder / "folder"
    names = [name for name in text if name != "tekken_model"]
    for number, part in enumerate((names[::2], names[1::2])):
        maker.write(whole / f"model-{number}.safetensors", {name: text[name] for name in part})
    index = {
        name: f"model-{number}.safetensors" for number, part in enumerate((names[::2], names[1::2])) for name in part
    }
    (whole / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (whole / "config.json").write_text(
        json.dumps(
            {"model_type": "mistral3", "text_config": {"hidden_size": 64, "rope_theta": 1e9, "rms_norm_eps": 1e-5}}
        )
    )
    (whole / "tekken.json").write_bytes(maker.tekken())
    made["folder"] = (whole, "text")
    return made


# --- changes ---------------------------------------------------------------------------------------------------------


def change_json(value, rng):
    """A JSON value with one odd value somewhere in it; also an entry left out, doubled or renamed."""
    place, path = value, []
    while isinstance(place, (dict, list)) and place and (not path or rng.random() < 0.8):
        key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
        path.append((place, key))
        place = place[key]
    if not path:
        return rng.choice(ODD)
    parent, key = path[-1]
    what = rng.random()
    if what < 0.15:
        del parent[key]
    elif what < 0.25 and isinstance(parent, dict):
        parent[str(key)[: rng.randrange(len(str(key)) + 1)] + rng.choice(NAMES)] = parent.pop(key)
    elif isinstance(place, bool) or not isinstance(place, int):
        parent[key] = rng.choice(ODD)
    else:
        parent[key] = rng.choice((place + 1, place - 1, place * 2, place // 2, *NUMBERS))
    return value


def change_header(raw, rng):
    """A safetensors file with a changed header. Offsets are made to fit again most of the time, so that the checks
    behind those of the format are reached.
    """
    length = struct.unpack("<Q", raw[:8])[0]
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    for _ in range(rng.randint(1, 3)):
        kind, name = rng.randrange(8), rng.choice(names)
        entry = header.get(name)
        if not isinstance(entry, dict) or not isinstance(entry.get("shape"), list):
            continue
        if kind == 0:
            header = change_json(header, rng)
            if not isinstance(header, dict):
                header = {}
        elif kind == 1:
            entry["dtype"] = rng.choice(DTYPES)
        elif kind == 2:
            rng.shuffle(entry["shape"])
        elif kind == 3 and entry["shape"]:
            entry["shape"][rng.randrange(len(entry["shape"]))] = rng.choice(NUMBERS)
        elif kind == 4:
            entry["shape"] = rng.choice(([], [0], [1] * rng.randrange(12), [*entry["shape"], 1]))
        elif kind == 5:
            header[name.replace(rng.choice((".weight", "0", "blocks", "layers")), rng.choice(NAMES))] = header.pop(name)
        elif kind == 6:
            del header[name]
        else:
            metadata = header.setdefault("__metadata__", {})
            if not isinstance(metadata, dict):
                continue
            if isinstance(metadata.get("_quantization_metadata"), str) and rng.random() < 0.7:
                marks = change_json(json.loads(metadata["_quantization_metadata"]), rng)
                if rng.random() < 0.3 and isinstance(marks, dict):
                    marks["layers"] = {rng.choice(names).removesuffix(".weight"): {"format": rng.choice(FORMATS)}}
                metadata["_quantization_metadata"] = json.dumps(marks)
            else:
                metadata["_quantization_metadata"] = json.dumps(
                    {"layers": {name.removesuffix(".weight"): {"format": rng.choice(FORMATS)}}}
                )
        names = [name for name in header if name != "__metadata__"] or names
    if rng.random() < 0.8:
        data = refit(header, data)
    return packed(header, data)


def refit(header, data):
    """Data as long as the header's tensors claim, where that is little; offsets follow one another."""
    bits = {"BF16": 16, "F16": 16, "F32": 32, "F64": 64, "I16": 16, "I32": 32, "F4": 4, "C64": 64}
    at, parts = 0, []
    for name, entry in header.items():
        try:
            start, _ = entry["data_offsets"]
            size = bits.get(entry["dtype"], 8)
            for side in entry["shape"]:
                size *= side
            size //= 8
            if not 0 <= size <= 2**24:
                continue
            parts.append(data[start : start + size].ljust(size, b"\1"))
            entry["data_offsets"] = [at, at + size]
            at += size
        except (TypeError, KeyError, ValueError, OverflowError):
            continue
    return b"".join(parts)


def packed(header, data):
    content = json.dumps(header).encode()
    return struct.pack("<Q", len(content)) + content + data


def change_bytes(raw, rng):
    kind, raw = rng.randrange(4), bytearray(raw)
    if kind == 0:
        return bytes(raw[: rng.randrange(len(raw))])
    if kind == 1:
        return struct.pack("<Q", rng.choice((0, 1, 2**20, 2**40, 2**63, rng.randrange(2**16)))) + bytes(raw[8:])
    length = struct.unpack("<Q", raw[:8])[0] if kind == 2 else len(raw) - 8
    for _ in range(rng.randint(1, 20)):
        raw[8 + rng.randrange(length)] = rng.randrange(256)
    return bytes(raw)


def change_tokenizer(raw, rng):
    """Mistral's tokenizer with something odd in its configuration, vocabulary or special tokens."""
    content = json.loads(maker.tekken())
    part = rng.choice(("config", "vocab", "special_tokens", None))
    if part:
        content[part] = change_json(content[part], rng)
    else:
        content = change_json(content, rng)
    data = json.dumps(content).encode()
    return data if rng.random() < 0.9 else data[: rng.randrange(len(data))]


def make_case(made, folder, rng):
    """(path of a damaged file or folder, its loader, name of its base)."""
    name = rng.choice(list(made))
    source, loader = made[name]
    if source.is_dir():
        path = folder / "case"
        shutil.copytree(source, path)
        victim = rng.choice(sorted(path.iterdir()))
        raw = victim.read_bytes()
        if victim.suffix == ".safetensors":
            changed = change_header(raw, rng) if rng.random() < 0.7 else change_bytes(raw, rng)
        elif victim.name == "tekken.json":
            changed = change_tokenizer(raw, rng)
        else:
            changed = json.dumps(change_json(json.loads(raw), rng)).encode()
        victim.write_bytes(changed)
        return path, loader, name
    raw, path = source.read_bytes(), folder / "case.safetensors"
    if loader == "text" and rng.random() < 0.2:
        from safetensors.torch import load, save

        weights = load(raw)
        weights["tekken_model"] = torch.frombuffer(bytearray(change_tokenizer(raw, rng) or b"{"), dtype=torch.uint8)
        path.write_bytes(save(weights))
    else:
        path.write_bytes(change_header(raw, rng) if rng.random() < 0.8 else change_bytes(raw, rng))
    return path, loader, name


# --- calls -----------------------------------------------------------------------------------------------------------


class Hung(BaseException):
    pass


def use(loader, loaded):
    """Use what loaded once, on small inputs."""
    if loader == "model":
        model = loaded.model.diffusion_model
        width = model.txt_in.weight.shape[1] if hasattr(model, "txt_in") else 192
        latent = torch.zeros(1, 128, 2, 2, dtype=model.dtype if hasattr(model, "dtype") else torch.float32)
        context = torch.zeros(1, 3, width, dtype=latent.dtype)
        model(latent, torch.tensor([0.5]), context, guidance=torch.tensor([4.0]))
    elif loader == "text":
        loaded.encode_from_tokens(loaded.tokenize("a cat"))
    else:
        loaded.decode(torch.zeros(1, 128, 2, 2))


def calls(path, loader, rng):
    """[(name, function)] for one case."""
    from flux2_pack.flux2.loading import examine, load

    loaders = {"model": load.load_model, "text": load.load_text_encoder, "vae": load.load_vae}
    own = loaders[loader]

    def load_and_use():
        use(loader, own(str(path)))

    found = [("info", lambda: examine.describe_path(str(path))), ("load", load_and_use)]
    if rng.random() < 0.15:
        found.append(("other loader", lambda: loaders[rng.choice(list(loaders))](str(path))))
    return found


def sentence_of(error):
    """The text of an error that is meant for the user, None of any other."""
    from flux2_pack.flux2.checkpoints.header import CheckpointError

    return str(error) if isinstance(error, CheckpointError) else None


def outcome(function, sentence_of=sentence_of):
    """(outcome, seconds, what to print). Outcomes: done, sentence, raw, hang."""

    def hung(*_):
        raise Hung

    signal.signal(signal.SIGALRM, hung)
    signal.alarm(HANG)
    start = time.process_time()
    try:
        with torch.inference_mode():
            function()
        result = ("done", "")
    except Hung:
        result = ("hang", traceback.format_exc()[-1500:])
    except BaseException as error:  # what this program looks for, panics included
        if isinstance(error, KeyboardInterrupt):
            raise
        text = sentence_of(error)
        if text is None:
            result = ("raw", "".join(traceback.format_exception(error))[-1500:])
        elif not text.rstrip().endswith((".", "...", ")")) or len(text) > LONGEST:
            result = ("raw", f"no sentence, or one of {len(text)} characters: {text[:400]}")
        else:
            result = ("sentence", text)
    finally:
        signal.alarm(0)
    return result[0], time.process_time() - start, result[1]


def fuzz(count, seed, folder, show=print, first=0):
    """Counter of outcomes over `count` cases from number `first` on; everything but results and sentences is shown."""
    total, slowest = collections.Counter(), 0.0
    made = bases(Path(folder) / "bases")
    for number in range(first, first + count):
        rng = random.Random(f"{seed}/{number}")
        place = Path(folder) / "now"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        path, loader, base = make_case(made, place, rng)
        for name, function in calls(path, loader, rng):
            result, seconds, text = outcome(function)
            slowest = max(slowest, seconds)
            if result in ("done", "sentence") and seconds > LIMIT:
                result = "slow"
            total[result] += 1
            if result not in ("done", "sentence"):
                show(f"case {seed}/{number} ({base}), {name}: {result} after {seconds:.1f} s\n{text}")
        if number % 1000 == 999:
            rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            show(f"{number + 1} files: {dict(total)}, slowest {slowest:.2f} s, largest memory {rss:.0f} MiB")
    return total, slowest


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20000)
    parser.add_argument("--seed", default="1")
    parser.add_argument("--first", type=int, default=0, help="number of the first case, to try one again")
    args = parser.parse_args()
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    sys.argv = sys.argv[:1]
    import comfy.options

    comfy.options.enable_args_parsing(False)
    from comfy.cli_args import args as core

    core.cpu = True
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        total, slowest = fuzz(args.count, args.seed, folder, lambda text: print(text, flush=True), args.first)
    print(f"{args.count} files, seed {args.seed}: {dict(total)}, slowest call {slowest:.2f} s")
    return 1 if set(total) - {"done", "sentence"} else 0


if __name__ == "__main__":
    sys.exit(main())
