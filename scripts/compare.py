#!/usr/bin/env python3
"""Compare attention backends on one picture: the same noise through a reference and up to four candidates.

  .venv/bin/python scripts/compare.py --reference sdpa-math --candidate sdpa-flash .venv/bin/python scripts/compare.py
  --candidate sage2 --candidate aiter-fp8 --edge-backend sdpa --first-steps 2 --last-steps 2 --server
  http://127.0.0.1:8188 .venv/bin/python scripts/compare.py --random-weights dev --candidate sdpa-cudnn --width 1024
  --height 1024

Uses the small models and a headless ComfyUI of its own unless told otherwise. Prints the table of the node Compare
Attention, writes the pictures and the heat map to --output-path, and prints one JSON object as the last line. Errors go
to stderr with a status that is not zero.
"""

import argparse
import sys

try:
    import measuring
    from api_workflow import BadSettings, check_range, check_side, load, put
except ImportError as error:
    raise SystemExit(
        f"compare: {error.name} is missing in {sys.executable}. Run `bash scripts/demo.sh` once and use "
        ".venv/bin/python, or install aiohttp, tqdm and Pillow."
    ) from None

WORKFLOW, FILES = "flux2_compare_attention.json", ("compare-pictures.png", "compare-differences.png")
SMALL, REAL = (256, 12), (1024, 20)  # side in pixels and steps, where they are not given


def parse(arguments=None):
    parser = argparse.ArgumentParser(prog="compare", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--reference", default="sdpa", help="backend to compare with (default sdpa)")
    add(
        "--candidate",
        action="append",
        default=[],
        help="backend to compare; give it again for up to four (default sdpa-math)",
    )
    add("--edge-backend", default="none", help="backend of the first and last steps of every candidate")
    add("--first-steps", type=int, default=0)
    add("--last-steps", type=int, default=0)
    add(
        "--prompt",
        default="a small red star above a large blue circle on a grey background",
        help="default: one that the small model can draw",
    )
    add("--width", type=int, help=f"multiple of 16 (default {SMALL[0]}, with weights of your own {REAL[0]})")
    add("--height", type=int, help=f"multiple of 16 (default {SMALL[0]}, with weights of your own {REAL[0]})")
    add("--steps", type=int, help=f"default {SMALL[1]}, with weights of your own {REAL[1]}")
    add("--guidance-scale", type=float, default=4.0)
    add("--seed", type=int, default=42)
    measuring.add_model_options(add)
    args = parser.parse_args(arguments)
    side, steps = REAL if args.model_path or args.server or args.random_weights not in (None, "small") else SMALL
    args.width, args.height, args.steps = args.width or side, args.height or side, args.steps or steps
    args.candidate = args.candidate or ["sdpa-math"]
    return args


def check(args):
    if len(args.candidate) > 4:
        raise BadSettings(f"At most four candidates can be compared at once, not {len(args.candidate)}.")
    check_side("width", args.width)
    check_side("height", args.height)
    check_range("number of steps", args.steps, 1, 4096)
    check_range("seed", args.seed, 0, 2**64 - 1)


def filled(args):
    """The API workflow for these arguments."""
    workflow = load(WORKFLOW)
    put(workflow, "CLIPTextEncode", text=args.prompt)
    put(workflow, "FluxGuidance", guidance=args.guidance_scale)
    put(workflow, "EmptyFlux2LatentImage", width=args.width, height=args.height)
    put(workflow, "Flux2Scheduler", width=args.width, height=args.height, steps=args.steps)
    candidates = {f"candidate_{n}": slug for n, slug in enumerate([*args.candidate, *["none"] * 4][:4], 1)}
    put(
        workflow,
        "Flux2CompareAttention",
        reference=args.reference,
        noise_seed=args.seed,
        edge_backend=args.edge_backend,
        first_steps=args.first_steps,
        last_steps=args.last_steps,
        **candidates,
    )
    return workflow


def in_process(args):
    """(table, data) with random weights."""
    with measuring.random_model(args.random_weights) as model:
        from flux2_pack.attention.measuring.statistics import as_json
        from flux2_pack.flux2.measuring import capture, compare
        from flux2_pack.nodes import figures

        prompt = capture.random_conditioning(model)
        job = capture.sampling_job(model, capture.Size(args.width, args.height), prompt, args.steps, args.seed)
        edges = args.edge_backend, args.first_steps, args.last_steps
        variants = compare.unnamed_twice([compare.backend_variant(slug, *edges) for slug in args.candidate])
        found, ((name, base), *others) = compare.compare(model, job, args.reference, variants)
        images = figures.side_by_side([(f"{name} (reference)", base), *others]), figures.heat_maps(base, others)
        return found.as_text(), {
            **as_json(found.as_data()),
            "images": measuring.write_pictures(args, images, FILES),
        }


def main():
    args = parse()

    def work():
        check(args)
        table, data = (
            in_process(args)
            if args.random_weights
            else measuring.over_server(args, filled(args), "flux2_compare", FILES)
        )
        measuring.finish(args, table, data, measuring.command_line("compare.py", sys.argv[1:]))

    measuring.run_program("compare", work)


if __name__ == "__main__":
    main()
