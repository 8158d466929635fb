#!/usr/bin/env python3
"""Draw 200 held-out prompts and 100 edits with the small FLUX.2, through ComfyUI, and judge the pictures by code. See
docs/small-model.md.

  COMFYUI_PATH=... python benchmarks/judge_small.py                    the shipped weights: writes
                                                                       results/small-model.json, the table in
                                                                       docs/small-model.md and docs/small-model.png
  COMFYUI_PATH=... python benchmarks/judge_small.py --weights FOLDER --prompts 20 --edits 10 --results -     a quick
      look, written nowhere

Runs on the CPU or on the GPU that ComfyUI finds; 20 steps of Euler's method, Flux2Scheduler's noise levels, guidance 4,
seeds fixed. Prompts are drawn in batches, which changes nothing but time: about five seconds per picture and CPU core
(all cores are used unless OMP_NUM_THREADS says otherwise). Prints a table, then one JSON line. Needs scikit-image.
"""

import argparse
import json
import os
import sys
import time
import types
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from small import captions, files, judge, sampling, scenes  # noqa: E402

SEED = 6  # of the scenes and the noise; training uses others, and never these sets of objects
TASKS = ("recolour", "remove", "hat")
MARKS = ("<!-- written by benchmarks/judge_small.py -->", "<!-- end -->")


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--weights", type=Path, default=HERE.parent / "tests/data/small_flux2")
    add("--prompts", type=int, default=200)
    add("--edits", type=int, default=100)
    add("--steps", type=int, default=20)
    add("--guidance", type=float, default=4.0)
    add("--batch", type=int, default=10)
    add("--results", default=str(HERE / "results/small-model.json"), help='a file, or "-" to write nothing')
    add(
        "--sheet",
        type=Path,
        default=None,
        help="contact sheet (default docs/small-model.png, nothing with --results -)",
    )
    args = parser.parse_args(arguments)
    args.sheet = args.sheet or (None if args.results == "-" else HERE.parent / "docs/small-model.png")
    return args


# --- ComfyUI
# -------------------------------------------------------------------------------------------------------------


class Comfy:
    """The three models loaded by the pack, as ComfyUI's MODEL, CLIP and VAE."""

    def __init__(self, folder):
        load = _loaders()
        self.model, self.clip, self.vae = (
            getattr(load, f"load_{kind}")(folder / files.NAMES[name])
            for kind, name in (("model", "transformer"), ("text_encoder", "text_encoder"), ("vae", "autoencoder"))
        )

    def prompts(self, texts):
        """(B, 512, C): what FLUX.2 gets for each prompt; ComfyUI pads a single one with zeros on the left in the same
        way.
        """
        states = [self.clip.encode_from_tokens(self.clip.tokenize(text)) for text in texts]
        return torch.cat([torch.nn.functional.pad(state, (0, 0, 512 - state.shape[1], 0)) for state in states])

    def encode(self, pixels):
        return self.vae.encode((pixels.movedim(1, -1) + 1) / 2)

    def draw(self, texts, noise, reference, steps, guidance):
        """Pictures (B, 3, 256, 256) in -1..1."""
        import comfy.sample
        import comfy.samplers

        options = {"guidance": guidance} | ({} if reference is None else {"reference_latents": [reference]})
        prompt, levels = (
            [[self.prompts(texts), options]],
            sampling.noise_schedule(steps, noise.shape[2] * noise.shape[3]),
        )
        latent = comfy.sample.sample_custom(
            self.model,
            noise,
            1.0,
            comfy.samplers.sampler_object("euler"),
            levels,
            prompt,
            prompt,
            torch.zeros_like(noise),
            disable_pbar=True,
            seed=SEED,
        )
        return self.vae.decode(latent).movedim(-1, 1) * 2 - 1


def _loaders():
    """The pack's loaders; the pack's own folder must not be on sys.path, where its nodes/ would hide ComfyUI's
    nodes.py.
    """
    if "COMFYUI_PATH" not in os.environ:
        raise SystemExit(
            "judge_small: COMFYUI_PATH must name a ComfyUI folder; `python3 scripts/environment.py --where` prints one."
        )
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    import comfy.options

    comfy.options.enable_args_parsing(False)
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available()
    pack = types.ModuleType("flux2_pack")
    pack.__path__ = [str(HERE.parent)]
    sys.modules["flux2_pack"] = pack
    from flux2_pack.flux2.loading import load

    return load


# --- drawing and judging
# ---------------------------------------------------------------------------------------------------


class Prompts:
    """Held-out scenes and captions that say everything that is judged."""

    def __init__(self, count):
        generator = torch.Generator().manual_seed(SEED)
        self.table = scenes.sample(count, generator, counts=(1, 1, 1), cats=False, held_out=True)
        phrases, self.relation = captions.describe(self.table, generator, full=True)
        self.texts = [captions.text(row) for row in phrases.tolist()]
        self.noise = torch.randn(count, 128, 16, 16, generator=generator)

    def verdict(self, row, picture):
        # captions of one shape say its place
        cell = int(self.table.cell[row, 0]) if self.table.count[row] == 1 else None
        return judge.judge(picture, judge.wanted(self.table, row), int(self.relation[row]), cell)


class Edits:
    """Held-out scenes, instructions, and the drawn results."""

    def __init__(self, count):
        generator = torch.Generator().manual_seed(SEED + 1)
        before = scenes.sample(count, generator, cats=False, held_out=True, for_edits=True)
        self.result, self.task, target, colour = scenes.edit(before, generator)
        self.texts = [
            captions.text(row)
            for row in captions.instruct(before, self.task, target, colour, generator, full=True).tolist()
        ]
        self.noise = torch.randn(count, 128, 16, 16, generator=generator)
        self.before, self.after = scenes.draw(before), scenes.draw(self.result)

    def right(self, row, picture):
        return judge.judge_edit(
            picture, judge.as_pictures(self.after[row : row + 1])[0], judge.cut_colours(self.result, row)
        )


def draw_all(comfy, work, args, references=None):
    drawn, started = [], time.monotonic()
    for start in range(0, len(work.texts), args.batch):
        part = slice(start, start + args.batch)
        reference = None if references is None else comfy.encode(references[part])
        drawn.append(comfy.draw(work.texts[part], work.noise[part], reference, args.steps, args.guidance))
        done = min(start + args.batch, len(work.texts))
        print(
            f"\r{done} of {len(work.texts)}, {(time.monotonic() - started) / done:.1f} s each",
            end="",
            file=sys.stderr,
            flush=True,
        )
    print(file=sys.stderr)
    return torch.cat(drawn)


def share(name, verdicts):
    """{name: fraction, name_count, name_interval} of a list of booleans."""
    right, count = sum(verdicts), len(verdicts)
    low, high = judge.wilson(right, count)
    print(f"{name:24} {right:4d} of {count:4d}   {right / max(count, 1):6.1%}   95 % interval {low:.1%} to {high:.1%}")
    return {
        name: round(right / max(count, 1), 4),
        f"{name}_of": count,
        f"{name}_interval": [round(low, 4), round(high, 4)],
    }


def results(prompts, drawn, edits, edited, args):
    verdicts = [prompts.verdict(row, picture) for row, picture in enumerate(judge.as_pictures(drawn))]
    right = [edits.right(row, picture) for row, picture in enumerate(judge.as_pictures(edited))]
    for text, verdict in zip(prompts.texts, verdicts):
        if False in (verdict.shapes, verdict.relation, verdict.place):
            print(f"wrong: {text}: {', '.join(f'{shape.colour} {shape.kind}' for shape in verdict.found) or 'nothing'}")
    for text in (text for text, fine in zip(edits.texts, right) if not fine):
        print(f"wrong edit: {text}")
    found = {"prompts": len(verdicts), "steps": args.steps, "guidance": args.guidance, "seed": SEED}
    found |= share("shapes_right", [verdict.shapes for verdict in verdicts])
    for count in (1, 2, 3):
        found |= share(
            f"shapes_right_of_{count}",
            [verdict.shapes for row, verdict in enumerate(verdicts) if prompts.table.count[row] == count],
        )
    found |= share("relation_right", [verdict.relation for verdict in verdicts if verdict.relation is not None])
    found |= share("place_right", [verdict.place for verdict in verdicts if verdict.place is not None])
    found |= share("edits_right", right)
    for number, task in enumerate(TASKS):
        found |= share(f"edits_right_{task}", [fine for row, fine in enumerate(right) if edits.task[row] == number])
    return found


def contact_sheet(path, drawn, edits, edited):
    """64 pictures, 8 in a row: 48 prompts, then 8 references above their 8 edits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    every = torch.cat([drawn[:48], edits.before[:8], edited[:8]])
    sampling.write_png(path, torch.nn.functional.avg_pool2d(every, 2), 8)


def into_document(path, found):
    """Put the numbers between the two marks of docs/small-model.md."""
    rows = [
        ("every shape asked for and no other, of the right colour and kind", "shapes_right"),
        ("of one shape", "shapes_right_of_1"),
        ("of two", "shapes_right_of_2"),
        ("of three", "shapes_right_of_3"),
        ("relation of the first two shapes", "relation_right"),
        ("place of a single shape", "place_right"),
        ("edits, the rest untouched", "edits_right"),
        *((f"edits: {task}", f"edits_right_{task}") for task in TASKS),
    ]
    lines = ["| what is right | pictures | share | 95 % interval |", "|---|---|---|---|"]
    for title, name in rows:
        low, high = found[f"{name}_interval"]
        lines.append(f"| {title} | {found[f'{name}_of']} | {found[name]:.1%} | {low:.1%} to {high:.1%} |")
    before, rest = path.read_text().split(MARKS[0])
    path.write_text(f"{before}{MARKS[0]}\n" + "\n".join(lines) + f"\n{MARKS[1]}{rest.split(MARKS[1])[1]}")


def main(arguments=None):
    args = parse(arguments)
    with torch.inference_mode():
        comfy, prompts, edits = Comfy(args.weights), Prompts(args.prompts), Edits(args.edits)
        drawn, edited = draw_all(comfy, prompts, args), draw_all(comfy, edits, args, edits.before)
    found = results(prompts, drawn, edits, edited, args)
    found["weights"] = {name: files.metadata(args.weights / name) for name in files.NAMES.values()}
    if args.sheet:
        contact_sheet(args.sheet, drawn, edits, edited)
    if args.results != "-":
        Path(args.results).write_text(json.dumps(found, indent=1) + "\n")
        into_document(HERE.parent / "docs/small-model.md", found)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
