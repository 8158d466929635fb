"""How exact attention backends are inside FLUX.2: the node Compare Attention in this process, without a server, AITER's
Triton kernels included.

  COMFYUI_PATH=... python benchmarks/accuracy.py --weights drawn [--candidates sdpa-cudnn flash4 sage1] [--aiter-source
  FOLDER] [--save FILE]

--weights drawn: the small trained model, whose pictures mean something, with a prompt of its own kind. --weights dev:
FLUX.2-dev at full size with random weights (80 GB): errors of tensors only. --aiter-source: a checkout of ROCm/aiter;
its Triton kernels (aiter-triton, aiter-sage) are portable and are compiled for this card, which says how exact they are
and nothing about their speed on AMD. --edges SLUG N adds every quantised candidate once more with SLUG in the first and
last N steps. Writes what scripts/measured_pages.py makes docs/accuracy.md from.
"""

import argparse
import dataclasses
import importlib
import json
from pathlib import Path
import sys
import tempfile

import torch

from common import ROOT, import_pack
from full_size import DEV, build, import_comfyui

sys.path.insert(0, str(ROOT / "tests"))
import aiter_shim  # noqa: E402

import_pack()
import_comfyui()
import folder_paths  # noqa: E402
from flux2_pack.attention import registry  # noqa: E402

SMALL_MODEL = ROOT / "tests" / "data" / "small_flux2"
PROMPT = "a small red star above a large blue circle on a grey background"
TEXTS = {"drawn": "the small model that draws (docs/small-model.md)", "dev": "random weights, FLUX.2 dev"}


def borrow_aiter(source):
    """Let AITER's portable Triton kernels run on this card."""
    # only gfx942's tiles fit into the shared memory of other GPUs
    aiter_shim.install(source, "gfx942", torch.float8_e4m3fn)
    # the tiles are replaced in modules that are there
    importlib.import_module("flux2_pack.attention.backends.aiter_triton")
    aiter_shim.replace_tiles(aiter_shim.TILES)
    for slug in ("aiter-triton", "aiter-sage"):
        registry.ROWS[slug] = dataclasses.replace(registry.ROWS[slug], hardware=registry.GPU)


def drawn(args):
    """(MODEL, positive, VAE) of the small trained model."""
    from flux2_pack.flux2.loading import load
    from flux2_pack.flux2.prompts.encode import encode

    model, clip, vae = (
        getattr(load, f"load_{kind}")(SMALL_MODEL / name)
        for kind, name in (
            ("model", "flux2-small.safetensors"),
            ("text_encoder", "mistral3-flux2-small.safetensors"),
            ("vae", "flux2-vae-small.safetensors"),
        )
    )
    return (
        model,
        [[context, {**values, "guidance": 4.0}] for context, values in encode.encode(clip, args.prompt).conditioning],
        vae,
    )


def dev(args):
    from flux2_pack.flux2.measuring import capture

    model = build(DEV)
    return model, capture.random_conditioning(model), None


def variants(args):
    from flux2_pack.flux2.measuring import compare

    found = [compare.backend_variant(slug) for slug in args.candidates]
    if args.edges:
        edge, count = args.edges[0], int(args.edges[1])
        found += [
            compare.backend_variant(slug, edge, count, count)
            for slug in args.candidates
            if not registry.row(slug).exact
        ]
    return compare.unnamed_twice(found)


def shareable(script, arguments):
    """The command as somebody else would type it: without the places of this machine."""
    words = list(arguments)
    for flag in ("--save", "--aiter-source"):
        if flag in words:
            words[words.index(flag) + 1] = "FILE" if flag == "--save" else "FOLDER"
    return " ".join([f"python benchmarks/{script}", *(f'"{w}"' if " " in w else w for w in words)])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--weights", choices=TEXTS, default="drawn")
    parser.add_argument("--candidates", nargs="+", default=["sdpa-flash", "sdpa-cudnn", "flash4", "sage1"])
    parser.add_argument("--reference", default="sdpa")
    parser.add_argument("--edges", nargs=2, metavar=("SLUG", "N"))
    parser.add_argument("--aiter-source", help="checkout of ROCm/aiter")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--side", type=int, help="pixels (256 for the small model, 1024 for dev)")
    parser.add_argument("--steps", type=int, help="20 for the small model, 4 for dev")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--save", type=Path, help="JSON file")
    args = parser.parse_args()
    side, steps = (
        args.side or {"drawn": 256, "dev": 1024}[args.weights],
        args.steps or {"drawn": 20, "dev": 4}[args.weights],
    )
    if args.aiter_source:
        borrow_aiter(args.aiter_source)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        folder_paths.set_user_directory(folder)
        from flux2_pack.attention.measuring.statistics import as_json
        from flux2_pack.flux2.measuring import capture, compare

        model, positive, vae = globals()[args.weights](args)
        job = capture.sampling_job(model, capture.Size(side, side), positive, steps, args.seed)
        found, *_ = compare.compare(model, job, args.reference, variants(args), vae)
        data = {
            **as_json(found.as_data()),
            "weights": TEXTS[args.weights],
            "command": shareable("accuracy.py", sys.argv[1:]),
        }
    if args.save:
        args.save.parent.mkdir(parents=True, exist_ok=True)
        args.save.write_text(json.dumps(data, indent=1) + "\n")
    print(found.as_text())
    print(json.dumps(data)[:300])


if __name__ == "__main__":
    main()
