"""What a user of a real ComfyUI server waits for: its start, the first and the second image, and in each of them
loading, encoding, steps and decoding; by ComfyUI's own nodes and by this pack's, on one and on several GPUs.

  COMFYUI_PATH=... python benchmarks/server.py [--cases dev-fp8 klein-4b] [--peers core ours ours-fast] [--gpus 1 2]
  [--folder FOLDER] [--json FILE]
  COMFYUI_PATH=... python benchmarks/server.py --small        # the small model on a CPU: to try all paths only

The files have full size and random weights: dev fp8 (33 GB) with Mistral 3 in fp8 (19 GB), klein 4B in bf16 with Qwen3
4B (16 GB), and a VAE. They are made in --folder, where a later run finds them; without it in a temporary folder, one
case after the other. --model, --text-encoder and --vae measure files of your own instead.

For each peer and number of GPUs the server is started --starts times and makes --images images, each with a prompt and
a seed of its own: the first has to load, compile and start the other ranks; the second start of a server finds compiled
code on the disk. One server runs before all others and is not counted, so that every file is in the system's cache.
Seconds are those of a client: start is until the server answers, image_s from queueing to the end. load_s are the
loader nodes, encode_s the prompt, sample_s the sampler with what it moves to the GPU, first_step_s from queueing to the
end of the first step, step_s the median of the others, decode_s the VAE and other_s the rest. `ranks` are the seconds
after which the other ranks had started, loaded and were connected, by Attention Report.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, import_pack, write

sys.path.insert(0, str(ROOT / "scripts"))
from api_workflow import PictureSettings, fill  # noqa: E402
from comfy_client import ComfyClient, ComfyError  # noqa: E402
from comfy_server import ComfyServer, ServerFailed, small_models  # noqa: E402

SAMPLER, DECODER = "SamplerCustomAdvanced", "VAEDecode"
# our loader: core's, its inputs by ours, and what else it takes
CORE = {
    "Flux2LoadModel": ("UNETLoader", {"unet_name": "model_name"}, {"weight_dtype": "default"}),
    "Flux2LoadTextEncoder": ("CLIPLoader", {"clip_name": "text_encoder_name"}, {"type": "flux2"}),
    "Flux2LoadVAE": ("VAELoader", {"vae_name": "vae_name"}, {}),
}
STAGES = {
    **dict.fromkeys([*CORE, *(core for core, _, _ in CORE.values())], "load"),
    "CLIPTextEncode": "encode",
    SAMPLER: "sample",
    DECODER: "decode",
}
PEERS = {"core": None, "ours": "", "ours-fast": "auto"}  # ours: the precision of Fast Blocks, "" for none
STEPS = {"dev-fp8": 20, "klein-4b": 4}
FILES = {
    "dev-fp8": {"diffusion_models": "dev-fp8", "text_encoders": "mistral3-fp8", "vae": "vae"},
    "klein-4b": {"diffusion_models": "klein-4b", "text_encoders": "qwen3-4b", "vae": "vae"},
}


# --- files -----------------------------------------------------------------------------------------------------------


def make(path):
    """Write the file of random weights that its name stands for."""
    import safetensors.torch
    import torch

    import_pack()
    sys.path.append(str(ROOT / "tests"))  # behind everything: it holds the generator of random VAEs
    import encode
    import small_models as maker
    from full_size import DEV, KLEIN_4B, fp8_checkpoint, fp8_layer, import_comfyui, marks, random_weights

    import_comfyui()
    device, layers = "cuda" if torch.cuda.is_available() else "cpu", []
    if path.stem == "dev-fp8":
        weights, layers = fp8_checkpoint(DEV, device, 0)
    elif path.stem == "klein-4b":
        weights = dict(random_weights(KLEIN_4B, device, 0))
    elif path.stem == "qwen3-4b":
        weights = encode.klein.encoder_weights(encode.CASES["qwen3-4b"], device)
    elif path.stem == "mistral3-fp8":
        whole, weights = encode.mistral_weights(encode.MISTRAL, device, torch.bfloat16), {}
        while whole:  # one layer after the other: both together do not fit a GPU of 80 GB
            name, weight = whole.popitem()
            layer = name.removesuffix(".weight")
            is_product = weight.ndim > 1 and ".layers." in name
            weights |= fp8_layer(layer, weight) if is_product else {name: weight}
            layers += [layer] * is_product
        weights["tekken_model"] = torch.frombuffer(bytearray(maker.tekken()), dtype=torch.uint8)
    else:
        weights = maker.vae(decoder_channels=128)
    weights = {name: weight.cpu().contiguous() for name, weight in weights.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    safetensors.torch.save_file(
        weights, part, metadata=marks(dict.fromkeys(layers, {"format": "float8_e4m3fn"})) if layers else None
    )
    part.rename(path)


def files_of(case, folder):
    """{folder under models/: [file]} of a case, made where they are missing: in a process of their own, which gives
    the GPU back.
    """
    found = {kind: folder / f"{name}.safetensors" for kind, name in FILES[case].items()}
    for path in found.values():
        if not path.is_file():
            print(f"making {path}", flush=True)
            subprocess.run([sys.executable, __file__, "--make", str(path)], check=True)
    return {kind: [path] for kind, path in found.items()}


# --- one image -------------------------------------------------------------------------------------------------------


def with_core_nodes(workflow, kept=()):
    """The workflow with ComfyUI's own loaders, but for those `kept`, and without the nodes of this pack that change or
    report a model.
    """
    plain = json.loads(json.dumps(workflow))
    for node in plain.values():
        if node["class_type"] in CORE and node["class_type"] not in kept:
            class_type, names, others = CORE[node["class_type"]]
            node.update(class_type=class_type, inputs={new: node["inputs"][old] for new, old in names.items()} | others)
    passed = {"Flux2SelectAttention": "model", "Flux2AttentionReport": "latent"}  # what they pass on as output 0
    for key, node in list(plain.items()):
        if node["class_type"] in passed:
            before = node["inputs"][passed[node["class_type"]]]
            del plain[key]
            for other in plain.values():
                other["inputs"].update({name: before for name, value in other["inputs"].items() if value == [key, 0]})
    return plain


async def timed(client, workflow, steps):
    """A row of one prompt: seconds of the image and of its parts."""
    begun = time.monotonic()
    moved, spans, last = [], dict.fromkeys(("load", "encode", "sample", "decode", "other"), 0.0), [begun, "other"]

    def enter(stage, now):
        spans[last[1]] += now - last[0]
        last[:] = now, stage

    def note(progress):
        if progress.value is None:
            enter(STAGES.get(progress.class_type, "other"), progress.when)
        # the ranks' own progress is shown on the same node, with their number as its total
        elif progress.class_type == SAMPLER and progress.total == steps:
            moved.append(progress.when)

    result = await client.run(workflow, on_progress=note)
    ended = time.monotonic()
    enter("other", ended)
    reports = result.collect("flux2_attention")
    parallel = (reports[0].get("parallel") if reports else None) or {}
    laps = [after - before for before, after in zip(moved, moved[1:])]
    return {
        "image_s": round(ended - begun, 2),
        **{f"{stage}_s": round(seconds, 2) for stage, seconds in spans.items()},
        "first_step_s": round(moved[0] - begun, 2) if moved else None,
        "step_s": round(statistics.median(laps), 4) if laps else None,
        "backend": reports[0].get("backend") if reports else None,
        "ranks": parallel.get("seconds_to_start", {}),
    }


# --- one server ------------------------------------------------------------------------------------------------------


def server_run(options, case, models, peer, gpus, start):
    """Rows of one server: its images in turn, or one row with the reason why there is none."""
    about = {"case": case, "peer": peer, "gpus": gpus, "start": start}
    names = {folder: files[0].name for folder, files in models.items()}
    steps = options.steps or STEPS.get(case, 4)

    def workflow(number):
        filled = fill(
            PictureSettings(
                f"A red fox in the snow, photograph number {number}",
                models=names,
                width=options.pixels,
                height=options.pixels,
                steps=steps,
                seed=number,
                gpus=gpus,
                fast_blocks=PEERS[peer] or None,
            )
        )
        # ComfyUI's loader knows text encoders of the published sizes only
        return with_core_nodes(filled, ["Flux2LoadTextEncoder"] * options.small) if peer == "core" else filled

    async def images(server, seconds):
        async with ComfyClient(server.url) as client:
            rows = []
            for number in range(1, options.images + 1):
                row = {"image": number, "server_start_s": seconds, **await timed(client, workflow(number), steps)}
                rows.append(about | row)
                print(line(rows[-1]), flush=True)
            return rows

    begun = time.monotonic()
    try:
        with ComfyServer(
            os.environ["COMFYUI_PATH"],
            models=models,
            arguments=["--cpu", "--force-fp32"] if options.small else [],
        ) as server:
            return asyncio.run(images(server, round(time.monotonic() - begun, 2)))
    except (ComfyError, ServerFailed) as error:
        row = about | {"reason": str(error).strip().splitlines()[0]}
        print(line(row), flush=True)
        return [row]


COLUMNS = (
    "server_start_s",
    "image_s",
    "load_s",
    "encode_s",
    "sample_s",
    "first_step_s",
    "step_s",
    "decode_s",
    "other_s",
)
HEAD = f"{'case':<10}{'peer':<11}{'gpus':>4}{'start':>6}{'image':>6}" + "".join(f"{name:>15}" for name in COLUMNS)


def line(row):
    """A row of the table."""
    text = f"{row['case']:<10}{row['peer']:<11}{row['gpus']:>4}{row['start']:>6}"
    if "reason" in row:
        return f"{text}  not run. {row['reason']}"
    values = ("" if row[name] is None else row[name] for name in COLUMNS)
    return f"{text}{row['image']:>6}" + "".join(f"{value:>15}" for value in values)


# --- everything ------------------------------------------------------------------------------------------------------


def measure(options, case, models):
    """Rows of all peers, numbers of GPUs and starts of a case."""
    warm = argparse.Namespace(**{**vars(options), "images": 1})
    print(f"{case}: a first server, which is not counted, brings the files into the system's cache", flush=True)
    server_run(warm, case, models, options.peers[-1], 1, 0)
    print(HEAD)
    rows = []
    for start in range(1, options.starts + 1):
        for peer in options.peers:
            for gpus in [1] if peer == "core" else options.gpus:
                rows += server_run(options, case, models, peer, gpus, start)
    return rows


def summaries(rows):
    """{case: {peer on GPUs: {"first_image_s", "second_image_s", "first_step_over_one_gpu_s"}}} of the first starts."""
    found = {}
    for row in rows:
        if row["start"] == 1 and "reason" not in row and row["image"] <= 2:
            entry = found.setdefault(row["case"], {}).setdefault(f"{row['peer']} on {row['gpus']}", {})
            entry["first_image_s" if row["image"] == 1 else "second_image_s"] = row["image_s"]
            if row["image"] == 1:
                entry["first_step_s"] = row["first_step_s"]
    for peers in found.values():
        for name, entry in peers.items():
            one = peers.get(f"{name.rsplit(' on ', 1)[0]} on 1", {}).get("first_step_s")
            if not name.endswith(" on 1") and one and entry.get("first_step_s"):
                entry["first_step_over_one_gpu_s"] = round(entry["first_step_s"] - one, 2)
    return found


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=FILES, default=list(FILES))
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2], help="how many GPUs compute an image")
    parser.add_argument("--pixels", type=int, default=1024, help="width and height (default 1024)")
    parser.add_argument("--steps", type=int, help="steps of an image (default: 20 by dev, 4 by klein)")
    parser.add_argument("--starts", type=int, default=2, help="of the server, for each peer and number of GPUs")
    parser.add_argument("--images", type=int, default=2, help="of each server")
    parser.add_argument("--folder", type=Path, help="where the files are, or are made and kept")
    parser.add_argument("--small", action="store_true", help="the small model on a CPU, two ranks, 128 pixels")
    for name in ("model", "text-encoder", "vae"):
        parser.add_argument(f"--{name}", type=Path, help="a file of your own; all three go together")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--json", help="file to write the result to")
    options = parser.parse_args()
    if len({path is None for path in (options.model, options.text_encoder, options.vae)}) > 1:
        parser.error("--model, --text-encoder and --vae go together")
    if not os.environ.get("COMFYUI_PATH"):
        parser.error("COMFYUI_PATH must name a ComfyUI folder; `python3 scripts/environment.py --where` prints one")
    return options


def main():
    options = parse()
    if options.make:
        return make(options.make)
    rows = []
    if options.small:
        os.environ["FLUX2_CPU_RANKS"], options.pixels = "2", 128
        rows = measure(options, "small", small_models(Path(os.environ["COMFYUI_PATH"])))
    elif options.model:
        own = zip(("diffusion_models", "text_encoders", "vae"), (options.model, options.text_encoder, options.vae))
        rows = measure(options, "own", {folder: [path] for folder, path in own})
    else:
        for case in options.cases:
            with tempfile.TemporaryDirectory() as folder:
                rows += measure(options, case, files_of(case, options.folder or Path(folder)))
    print(HEAD, *map(line, rows), sep="\n")
    write({"pixels": options.pixels, "summary": summaries(rows), "rows": rows}, options.json)


if __name__ == "__main__":
    main()
