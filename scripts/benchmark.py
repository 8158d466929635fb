#!/usr/bin/env python3
"""Time every attention backend on a FLUX.2 model: its own attention calls, then whole steps.

  .venv/bin/python scripts/benchmark.py
  .venv/bin/python scripts/benchmark.py --sizes "1024x1024, 1024x1024+1" --model-path flux2-dev.safetensors
  .venv/bin/python scripts/benchmark.py --random-weights dev --sizes "1024x1024, 2048x2048"

Uses a small model and a headless ComfyUI of its own unless told otherwise. Prints the table of the node Benchmark
Attention, writes the chart to --output-path, and prints one JSON object as the last line. Errors go to stderr with a
status that is not zero. A small model's times say nothing about a real one's.
"""

import argparse
import sys

try:
    import measuring
    from api_workflow import load, put
except ImportError as error:
    raise SystemExit(
        f"benchmark: {error.name} is missing in {sys.executable}. Run `bash scripts/demo.sh` once and use "
        ".venv/bin/python, or install aiohttp, tqdm and Pillow."
    ) from None

WORKFLOW, FILES = "flux2_benchmark_attention.json", ("benchmark.png",)
SMALL, REAL = "256x256", "1024x1024, 1024x1024+1, 2048x2048"


def parse(arguments=None):
    parser = argparse.ArgumentParser(prog="benchmark", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add(
        "--sizes",
        help=f'picture sizes, +1 for a reference of 1024x1024 (default "{SMALL}", with weights of your own "{REAL}")',
    )
    add("--backends", default="", help="only these, separated by commas (default every one that runs here)")
    add("--call-repeat", type=int, default=9, help="timed runs of each attention call (default 9)")
    add(
        "--step-repeat", type=int, default=3, help="timed steps of each backend; 0 for attention calls only (default 3)"
    )
    measuring.add_model_options(add)
    args = parser.parse_args(arguments)
    args.sizes = args.sizes or (
        REAL if args.model_path or args.server or args.random_weights not in (None, "small") else SMALL
    )
    return args


def filled(args):
    """The API workflow for these arguments."""
    workflow = load(WORKFLOW)
    put(
        workflow,
        "Flux2BenchmarkAttention",
        sizes=args.sizes,
        backends=args.backends,
        call_repeat=args.call_repeat,
        step_repeat=args.step_repeat,
    )
    return workflow


def in_process(args):
    """(table, data) with random weights."""
    with measuring.random_model(args.random_weights) as model:
        from flux2_pack.attention.measuring.statistics import as_json
        from flux2_pack.flux2.measuring import benchmark, capture
        from flux2_pack.nodes import figures
        from flux2_pack.nodes.compare import names

        found = benchmark.benchmark(
            model, capture.sizes(args.sizes), None, names(args.backends), args.call_repeat, args.step_repeat
        )
        images = measuring.write_pictures(args, [figures.chart(found)], FILES)
        return found.as_text(), {**as_json(found.as_data()), "images": images}


def main():
    args = parse()

    def work():
        table, data = (
            in_process(args)
            if args.random_weights
            else measuring.over_server(args, filled(args), "flux2_benchmark", FILES)
        )
        measuring.finish(args, table, data, measuring.command_line("benchmark.py", sys.argv[1:]))

    measuring.run_program("benchmark", work)


if __name__ == "__main__":
    main()
