#!/usr/bin/env python3
"""Train the small FLUX.2 that draws: autoencoder first, then transformer and text encoder together. See docs/small-model.md.

  python benchmarks/train_small.py --out OUT --minutes 9 --to 0.34                    first run: autoencoder and the start of the flow
  python benchmarks/train_small.py --out OUT --minutes 8.5 --resume FOLDER --to 1     next run, from the files of the one before
  python benchmarks/train_small.py --export tests/data/small_flux2 --resume FOLDER    the weights to ship
  python benchmarks/train_small.py --out OUT --smoke                                  every stage, tiny, on a CPU, within a minute

Needs torch and safetensors; one GPU with 40 GB or more. OUT gets three bf16 weight files (the average of the last steps; training goes on from
them), progress.json and a sheet of pictures, every two minutes and at the end. All data is drawn; the seed is --seed plus the number of the run.
"""
import argparse
import contextlib
import copy
import datetime
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from small import encoder, files, sampling, scenes, tokens, train_autoencoder, train_flow, transformer  # noqa: E402
from small.autoencoder import Autoencoder  # noqa: E402
from small.progress import log  # noqa: E402

AUTOENCODER = ("autoencoder",)
FLOW = ("transformer", "text_encoder")
BLOCKS = {block: block.forward for block in (transformer.DoubleBlock, transformer.SingleBlock, encoder.Layer)}
RECIPE = "drawn scenes and edits; flow matching, then distilled guidance; benchmarks/train_small.py, docs/small-model.md"


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, help="folder for the files of this run")
    add("--resume", type=Path, help="folder with the files of an earlier run")
    add("--export", type=Path, help="write the files of --resume here, with the metadata that is shipped, and stop")
    add("--minutes", type=float, default=9.0, help="time of the whole run")
    add("--autoencoder-minutes", type=float, default=3.6, help="time of its first stage, if there is no autoencoder to resume")
    add("--to", type=float, default=1.0, help="progress of the flow's schedule at the end of this run; it starts where the last one ended")
    add("--batch", type=int, default=320, help="pictures in a step of the flow without padding or references; other steps have fewer")
    add("--autoencoder-batch", type=int, default=32, help="pictures of 256 x 256 in a step of the autoencoder; twice as many crops")
    add("--pool", type=int, default=8192, help="encoded scenes kept on the device")
    add("--seed", type=int, default=20261122)
    add("--eager", action="store_true", help="do not compile")
    add("--smoke", action="store_true", help="tiny sizes and seconds instead of minutes")
    args = parser.parse_args(arguments)
    if not args.out and not args.export:
        parser.error("--out or --export is needed")
    if args.resume and not (args.resume / "progress.json").is_file():
        parser.error(f"--resume: there is no progress.json in {args.resume}")
    if args.export and not args.resume:
        parser.error("--export needs --resume: the folder of the finished run")
    return args


def smoke(args):
    """Settings with which every stage runs on a CPU in a few seconds."""
    args.minutes, args.autoencoder_minutes, args.batch, args.autoencoder_batch, args.pool, args.eager = 0.1, 0.02, 2, 2, 8, True
    return args


# --- set up --------------------------------------------------------------------------------------------------------------

def autocast_on(device):
    if device == "cpu":
        return contextlib.nullcontext
    return lambda: torch.autocast("cuda", torch.bfloat16)


def speed_up(eager):
    """TF32 and compiled blocks. Returns the painter."""
    torch.set_float32_matmul_precision("high")
    if eager:
        return scenes.paint
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.suppress_errors = True  # a block that does not compile runs all the same
    for block in BLOCKS:
        block.forward = torch.compile(block.forward)
    return torch.compile(scenes.paint)


def to_eager():
    for block, forward in BLOCKS.items():
        block.forward = forward


def fresh(args):
    """New models, the same for the same seed."""
    torch.manual_seed(args.seed)
    made = {"autoencoder": Autoencoder(), "transformer": transformer.Transformer(), "text_encoder": encoder.TextEncoder(encoder.Sizes(tokens.size()))}
    if args.smoke:
        made["transformer"] = transformer.Transformer(transformer.Sizes(hidden=128, single=1))
    return made


def gathered(args, device):
    """(models on the device, progress): from --resume as far as it goes, else new."""
    models, progress = fresh(args), files.read_progress(args.resume) if args.resume else {}
    there = [kind for kind in models if args.resume and (args.resume / files.NAMES[kind]).is_file()]
    models |= files.load(args.resume, there) if there else {}
    return {kind: model.to(device) for kind, model in models.items()}, {"autoencoder": 0, "flow": 0.0, "steps": 0, "pictures": 0, "runs": 0} | progress


# --- running -------------------------------------------------------------------------------------------------------------

class Run:
    """One run: models, settings, and what is written to --out."""

    def __init__(self, args):
        self.args, self.started = args, time.monotonic()
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.autocast, self.painter = autocast_on(self.device), speed_up(args.eager or self.device == "cpu")
        self.models, self.progress = gathered(args, self.device)
        self.generator = torch.Generator(self.device).manual_seed(args.seed + self.progress["runs"])
        self.progress["runs"] += 1

    def left(self):
        """Seconds until --minutes are over."""
        return self.args.minutes * 60 - (time.monotonic() - self.started)

    def metadata(self):
        return {"recipe": RECIPE, "seed": self.args.seed, "date": datetime.date.today().isoformat(), "licence": "Apache-2.0",
                "progress": f"{self.progress['flow']:.3f}", "steps": self.progress["steps"], "pictures": self.progress["pictures"]}

    def save(self, models):
        files.save(self.args.out, models, self.metadata())
        files.write_progress(self.args.out, self.progress)

    def train_autoencoder(self):
        train_autoencoder.train(self.models["autoencoder"], self.args.autoencoder_minutes * 60, self.args.autoencoder_batch, self.generator,
                                self.painter, self.autocast)
        self.progress["autoencoder"] = 1
        self.save({"autoencoder": self.models["autoencoder"]})

    def train_flow(self):
        autoencoder = self.models["autoencoder"].requires_grad_(False)
        models = {kind: self.models[kind] for kind in FLOW}
        copies = {kind: copy.deepcopy(model) for kind, model in models.items()}
        log(f"flow starts at progress {self.progress['flow']:.3f}, {time.monotonic() - self.started:.0f} s into the run; filling the pools")
        flow = train_flow.Flow(models, copies, train_flow.encoder_of(autoencoder, self.painter, self.autocast, 128), self.generator, self.args.batch,
                               self.args.pool, self.autocast)
        before = dict(self.progress)
        train_flow.train(flow, self.left() - (0 if self.args.smoke else 15), before["flow"], self.args.to,
                         lambda flow, now: self.checkpoint(flow, now, before), to_eager)

    def checkpoint(self, flow, now, before):
        """Write the averages, then look at what they draw."""
        self.progress |= {"flow": now, "steps": before["steps"] + flow.steps, "pictures": before["pictures"] + flow.seen}
        models = flow.average.models | {"autoencoder": self.models["autoencoder"]}
        self.save(models)
        rows = train_flow.ROWS if now >= train_flow.FULL_ROWS else train_flow.captions.LONGEST
        guidance = sampling.GUIDANCE if now >= train_flow.GUIDED + 0.1 else 1.0
        count, steps = (2, 2) if self.args.smoke else (64, sampling.STEPS)
        line, drawn = sampling.check(models, self.autocast, rows, guidance, self.device, count, steps)
        log(f"check at progress {now:.3f} ({rows} rows, guidance {guidance:g}): {line}")
        sampling.write_png(self.args.out / "sheet.png", torch.nn.functional.avg_pool2d(drawn, 2), min(16, count))


def train(args):
    run = Run(args)
    args.out.mkdir(parents=True, exist_ok=True)
    log(f"{torch.cuda.get_device_name() if run.device == 'cuda' else 'CPU'}, torch {torch.__version__}; "
        f"{ {kind: sum(value.numel() for value in model.parameters()) for kind, model in run.models.items()} } parameters")
    if not run.progress["autoencoder"]:
        run.train_autoencoder()
    if run.progress["flow"] < args.to:
        run.train_flow()
    log(f"done in {(time.monotonic() - run.started) / 60:.1f} minutes: {run.progress}")


def export(args):
    """Copy the weights of a finished run, in bf16 and with their metadata."""
    models, progress = files.load(args.resume), files.read_progress(args.resume)
    described = {"recipe": RECIPE, "seed": args.seed, "date": files.metadata(args.resume / files.NAMES["transformer"])["date"], "licence": "Apache-2.0",
                 "steps": progress["steps"], "pictures": progress["pictures"]}
    files.save(args.export, models, described)
    sizes = {name: (args.export / name).stat().st_size for name in files.NAMES.values()}
    log(f"{sizes}, together {sum(sizes.values()) / 1e6:.1f} MB")


def main(arguments=None):
    args = parse(arguments)
    if args.smoke:
        args = smoke(args)
    if args.export:
        export(args)
    else:
        train(args)


if __name__ == "__main__":
    main()
