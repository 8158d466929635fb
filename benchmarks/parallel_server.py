"""Seconds from pressing Run to the first step and to the image, in a real ComfyUI: one GPU against several.

  COMFYUI_PATH=... python benchmarks/parallel_server.py --model FILE --text-encoder FILE --vae FILE [--gpus 2] [--fast]
  [--json FILE]
  COMFYUI_PATH=... python benchmarks/parallel_server.py --small                # two ranks of a CPU, small models
  COMFYUI_PATH=... python benchmarks/parallel_server.py --make-model FILE     # an fp8 FLUX.2-dev, random weights, 33 GB

For each number of GPUs the server is started --starts times, and makes --images images each time: the first has to
start the other ranks, load and compile; the second start of a server finds compiled code on the disk. One server runs
before all others and is not counted, so that every file is in the system's cache. `ranks` are the seconds after which
the other ranks had started, loaded and were connected, by Attention Report.
"""

import argparse
import asyncio
import os
import sys
import time
from pathlib import Path

from common import ROOT, write

sys.path.insert(0, str(ROOT / "scripts"))
from api_workflow import PictureSettings, fill  # noqa: E402
from comfy_client import ComfyClient  # noqa: E402
from comfy_server import ComfyServer, small_models  # noqa: E402

SAMPLER = "SamplerCustomAdvanced"


async def timed(client, workflow):
    """{"first_step_s", "image_s", "ranks"} of one prompt."""
    steps, begun = [], time.monotonic()

    def note(progress):
        # the ranks' own progress is shown on the same node, with their number as its total
        if progress.class_type == SAMPLER and progress.value == 1 and progress.total == STEPS:
            steps.append(progress.when)

    result = await client.run(workflow, on_progress=note)
    ended = time.monotonic()
    reports = result.collect("flux2_attention")
    parallel = (reports[0].get("parallel") if reports else None) or {}
    return {
        "first_step_s": round(steps[0] - begun, 2),
        "image_s": round(ended - begun, 2),
        "ranks": parallel.get("seconds_to_start", {}),
    }


STEPS = 4


def server_run(options, models, gpus, start):
    """Rows of one server: its images in turn."""
    names = {folder: files[0].name for folder, files in models.items()}

    async def images(server):
        async with ComfyClient(server.url) as client:
            rows = []
            for number in range(options.images):
                settings = PictureSettings(
                    "A red fox in the snow",
                    models=names,
                    width=options.pixels,
                    height=options.pixels,
                    steps=STEPS,
                    seed=number,
                    gpus=gpus,
                    fast_blocks="checkpoint" if options.fast else "",
                )
                rows.append({"gpus": gpus, "start": start, "image": number + 1, **await timed(client, fill(settings))})
                print(rows[-1], flush=True)
            return rows

    arguments = ["--cpu", "--force-fp32"] if options.small else []
    with ComfyServer(os.environ["COMFYUI_PATH"], models=models, arguments=arguments) as server:
        return asyncio.run(images(server))


def make_model(path):
    """Write the fp8 FLUX.2-dev of benchmarks/full_size.py to a file."""
    import json

    import safetensors.torch
    import torch
    from common import import_pack
    from full_size import DEV, fp8_checkpoint, import_comfyui

    import_pack()
    import_comfyui()
    weights, layers = fp8_checkpoint(DEV, "cuda" if torch.cuda.is_available() else "cpu", 0)
    marks = {"format_version": "1.0", "layers": {layer: {"format": "float8_e4m3fn"} for layer in layers}}
    weights = {name: weight.cpu() for name, weight in weights.items()}
    safetensors.torch.save_file(weights, path, metadata={"_quantization_metadata": json.dumps(marks)})


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("model", "text-encoder", "vae"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2], help="how many GPUs compute an image")
    parser.add_argument("--pixels", type=int, default=1024)
    parser.add_argument("--fast", action="store_true", help="with Fast Blocks")
    parser.add_argument("--starts", type=int, default=2, help="of the server, for each number of GPUs")
    parser.add_argument("--images", type=int, default=2, help="of each server")
    parser.add_argument("--small", action="store_true", help="two ranks of the CPU, small models, 128 pixels")
    parser.add_argument("--make-model", type=Path, help="instead: write a model of random weights to this file")
    parser.add_argument("--json", help="file to write the result to")
    options = parser.parse_args()
    if options.make_model:
        return make_model(options.make_model)
    if options.small:
        os.environ["FLUX2_CPU_RANKS"], options.pixels = "2", 128
        models = small_models(Path(os.environ["COMFYUI_PATH"]))
    elif not all((options.model, options.text_encoder, options.vae)):
        raise SystemExit("Give --model, --text-encoder and --vae, or --small.")
    else:
        models = {
            "diffusion_models": [options.model],
            "text_encoders": [options.text_encoder],
            "vae": [options.vae],
        }
    server_run(argparse.Namespace(**{**vars(options), "images": 1}), models, 1, 0)
    rows = []
    for start in range(1, options.starts + 1):
        for gpus in options.gpus:
            rows += server_run(options, models, gpus, start)
    first = {row["gpus"]: row["first_step_s"] for row in rows if (row["start"], row["image"]) == (1, 1)}
    one = first.get(1)
    over = {gpus: round(seconds - one, 2) for gpus, seconds in first.items() if one and gpus > 1}
    write({"pixels": options.pixels, "steps": STEPS, "rows": rows, "first_step_over_one_gpu_s": over}, options.json)


if __name__ == "__main__":
    main()
