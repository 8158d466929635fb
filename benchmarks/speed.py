"""How fast attention backends are inside FLUX.2: the node Benchmark Attention in this process, without a server,
AITER's
Triton kernels included.

  COMFYUI_PATH=... python benchmarks/speed.py --weights dev [--sizes "1024x1024, 2048x2048"] [--backends flash4
  aiter-triton] [--aiter-source FOLDER] [--save FILE]

Random weights, which cost the same time as trained ones; dev needs 80 GB of GPU memory. --aiter-source: a checkout of
ROCm/aiter; its Triton kernels are compiled for this card, which says nothing about their speed on AMD. Without
--aiter-source, scripts/benchmark.py --random-weights does the same. Writes what scripts/measured_pages.py makes
docs/speed.md from.
"""

import argparse
import json
from pathlib import Path
import sys
import tempfile

import torch

import full_size
from accuracy import borrow_aiter, folder_paths, shareable

WEIGHTS = {"dev": "DEV", "klein-9b": "KLEIN_9B", "klein-4b": "KLEIN_4B", "small": "SMALL"}


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--weights", choices=WEIGHTS, default="dev")
    add("--sizes", default="1024x1024, 1024x1024+1, 2048x2048", help="picture sizes, +1 for a reference of 1024x1024")
    add("--backends", nargs="*", default=[], help="only these (default every one that runs here)")
    add("--call-repeat", type=int, default=9, help="timed runs of each attention call")
    add("--step-repeat", type=int, default=3, help="timed steps of each backend; 0 for attention calls only")
    add("--aiter-source", help="checkout of ROCm/aiter")
    add("--save", type=Path, help="JSON file")
    return parser.parse_args(arguments)


def measured(args):
    """(table, data) of one run."""
    from flux2_pack.attention.measuring.statistics import as_json
    from flux2_pack.flux2.measuring import benchmark, capture

    model = full_size.build(getattr(full_size, WEIGHTS[args.weights]))
    found = benchmark.benchmark(
        model, capture.sizes(args.sizes), None, args.backends, args.call_repeat, args.step_repeat
    )
    borrowed = ", AITER's Triton kernels compiled for this card" if args.aiter_source else ""
    return found.as_text(), {
        **as_json(found.as_data()),
        "weights": f"random weights, FLUX.2 {args.weights}{borrowed}",
        "command": shareable("speed.py", sys.argv[1:]),
    }


def main():
    args = parse()
    if args.aiter_source:
        borrow_aiter(args.aiter_source)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        folder_paths.set_user_directory(folder)
        table, data = measured(args)
    if args.save:
        args.save.parent.mkdir(parents=True, exist_ok=True)
        args.save.write_text(json.dumps(data, indent=1) + "\n")
    print(table)
    print(json.dumps(data)[:300])


if __name__ == "__main__":
    main()
