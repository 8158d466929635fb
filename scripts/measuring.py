"""What compare.py and benchmark.py share: the models, a server for them, one run of a workflow, or full-size random
weights without a server.

Needs aiohttp and tqdm. Not covered: several GPUs.
"""

import asyncio
import contextlib
import json
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

import environment
from api_workflow import LOADERS, BadSettings, nodes_of, put
from comfy_client import ComfyClient, ComfyError
from comfy_server import ROOT, ComfyServer, ServerFailed, drawing_models
from generate import FLAGS, local_models, stop_on_terminate, wanted_models
from picture import match

RANDOM = {"dev": "DEV", "klein-9b": "KLEIN_9B", "klein-4b": "KLEIN_4B", "small": "SMALL"}
SMALL = {"hidden_size": 256, "depth": 2, "depth_single_blocks": 4, "context_in_dim": 192, "guidance_embed": True}


def add_model_options(add):
    add("--model-path", help="FLUX.2 model file (default: a small model)")
    add("--text-encoder", help="Mistral 3 text encoder file; goes with --model-path")
    add("--vae", help="FLUX.2 VAE file; goes with --model-path")
    add(
        "--random-weights",
        choices=RANDOM,
        help="instead of a file: a FLUX.2 of full size with random weights, in this process. Right for speed and for "
        "errors of "
        "tensors; its pictures are noise. Needs COMFYUI_PATH; dev needs 80 GB of GPU memory",
    )
    add("--server", help="URL of a running ComfyUI; without it one is started")
    add("--output-path", type=Path, default=ROOT / "output", help="folder for the pictures (default output)")
    add(
        "--save",
        type=Path,
        help="also write the result to this JSON file; scripts/measured_pages.py makes the pages of docs/ from such "
        "files",
    )


def weights_text(args):
    """What the figures are worth, for the pages."""
    if args.random_weights:
        return f"random weights, FLUX.2 {args.random_weights}"
    return Path(args.model_path).name if args.model_path else "the small model that draws (docs/small-model.md)"


# --- over a server ---------------------------------------------------------------------------------------------------


def needed(workflow):
    """The model folders that a workflow's loaders read."""
    return [folder for folder, (loader, _) in LOADERS.items() if nodes_of(workflow, loader)]


def models_for(args, workflow, comfyui):
    """{folder: [file]} for a server of our own: the small models, or those that were asked for. Folders that the
    workflow does not read get small ones.
    """
    small, wanted = drawing_models(), wanted_models(args)
    if not any(wanted.values()):
        return small
    missing = [FLAGS[folder] for folder in needed(workflow) if not wanted[folder]]
    if missing:
        raise BadSettings(
            f"With a model of your own {' and '.join(missing)} must be given too; without any, the small models are "
            "used."
        )
    return local_models(
        comfyui, {folder: wanted[folder] if folder in needed(workflow) else str(small[folder][0]) for folder in wanted}
    )


@contextlib.contextmanager
def server_for(args, workflow):
    """(URL, {folder: name}) of the ComfyUI to use, running as long as the block."""
    if args.server:
        yield args.server, {folder: name for folder, name in wanted_models(args).items() if name}
        return
    comfyui = environment.comfyui(environment.cache_folder())
    models = models_for(args, workflow, comfyui)
    print("Starting ComfyUI ...", file=sys.stderr, flush=True)
    with ComfyServer(comfyui, models=models) as server:
        yield server.url, {folder: Path(files[0]).name for folder, files in models.items()}


class Progress:
    """A bar on stderr for the node that counts."""

    def __init__(self):
        self.bar = tqdm(total=1, file=sys.stderr, desc="Waiting")

    def __call__(self, progress):
        self.bar.set_description(progress.title, refresh=False)
        if progress.value is not None:
            self.bar.total, self.bar.n = progress.total, progress.value
        self.bar.refresh()


async def queue(url, names, workflow):
    """Run a workflow: (Result, [PNG bytes of each saved picture])."""
    async with ComfyClient(url) as client:
        for folder in needed(workflow):
            loader, key = LOADERS[folder]
            wanted = names.get(folder) or nodes_of(workflow, loader)[0]["inputs"][key]
            put(workflow, loader, **{key: match(wanted, await client.choices(loader, key), folder, url)})
        bar = Progress()
        try:
            result = await client.run(workflow, bar)
        finally:
            bar.bar.close()
        return result, [await client.download(image) for image in result.images()]


def over_server(args, workflow, ui_key, files):
    """(table, data) of a measuring workflow; its pictures are written into --output-path under the names `files`."""
    with server_for(args, workflow) as (url, names):
        result, pictures = asyncio.run(queue(url, names, workflow))
    (data,) = result.collect(ui_key)
    args.output_path.mkdir(parents=True, exist_ok=True)
    paths = [args.output_path / name for name in files]
    for path, picture in zip(paths, pictures):
        path.write_bytes(picture)
    return "\n".join(map(str, result.collect("text"))), {**data, "images": [str(path) for path in paths]}


# --- in this process -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def random_model(name):
    """A MODEL: FLUX.2 with random weights in this process. From now on `flux2_pack` can be imported; ComfyUI's folders
    are temporary ones meanwhile.
    """
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import common
    import full_size

    common.import_pack()
    full_size.import_comfyui()
    import folder_paths
    import torch

    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        folder_paths.set_user_directory(folder)
        yield full_size.build(SMALL if name == "small" else getattr(full_size, RANDOM[name]))


def write_pictures(args, images, files):
    """IMAGE tensors as PNG files in --output-path; returns their paths."""
    from flux2_pack.nodes import figures

    args.output_path.mkdir(parents=True, exist_ok=True)
    paths = [args.output_path / name for name in files]
    for path, image in zip(paths, images):
        figures.as_image(image[0]).save(path)
    return [str(path) for path in paths]


# --- the end of both programs ----------------------------------------------------------------------------------------


def finish(args, table, data, command):
    """Print the table and one JSON line, and keep the result if asked to."""
    data = {**data, "weights": weights_text(args), "command": command}
    if args.save:
        args.save.parent.mkdir(parents=True, exist_ok=True)
        args.save.write_text(json.dumps({k: v for k, v in data.items() if k != "images"}, indent=1) + "\n")
    print(table)
    print(json.dumps(data))


def run_program(name, work):
    """Run work() with errors as one sentence and a status that is not zero."""
    stop_on_terminate()
    try:
        work()
    except (BadSettings, ComfyError, ServerFailed, ValueError, OSError) as error:
        raise SystemExit(f"{name}: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(f"{name}: cancelled.") from None


def command_line(script, arguments):
    """The command as somebody else would type it: without the places of this machine."""
    kept, skip = [], False
    for word in arguments:
        if skip or word.split("=")[0] in ("--save", "--output-path", "--server"):
            skip = not skip and "=" not in word
            continue
        kept.append(Path(word).name if "/" in word else word)
    return " ".join([f"python scripts/{script}", *(f'"{w}"' if " " in w else w for w in kept)])
