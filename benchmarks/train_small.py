#!/usr/bin/env python3
"""Train the small FLUX.2 that draws: autoencoder, text encoder, transformer, one after the other. See
docs/small-model.md.

  python benchmarks/train_small.py --out OUT --minutes 9                                     everything from nothing, in
      one run or in several:
  python benchmarks/train_small.py --out OUT --minutes 8 --resume FOLDER                     next run, from the files of
      the one before
  python benchmarks/train_small.py --out OUT --minutes 9 --autoencoder tests/data/small_flux2    all but a trained
      autoencoder
  python benchmarks/train_small.py --out OUT --minutes 48 --resume FOLDER --batch 32 --pool 128 --edits 0.75 --rate 0.15
      --examined 0 --bf16    on a CPU: refine edits
  python benchmarks/train_small.py --export tests/data/small_flux2 --resume FOLDER           the weights to ship
  python benchmarks/train_small.py --out OUT --smoke                                         every stage, tiny, on a
      CPU, within a minute

Needs torch and safetensors; for a training from nothing one GPU with 40 GB or more. OUT gets three bf16 weight files
(the average of the last steps; training goes on from them), progress.json and, with --examined above 0, a sheet of
pictures, every 100 seconds and at the end. The learning rate falls at the end of every run and rises again in the next:
each run ends with weights that can be used. All data is drawn; the seed is --seed plus the number of the run.
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
from small import encoder, files, sampling, scenes, tokens, transformer  # noqa: E402
from small import train_autoencoder, train_flow, train_text  # noqa: E402
from small.autoencoder import Autoencoder  # noqa: E402
from small.progress import log  # noqa: E402

ENDING = 14  # seconds kept for the last check and the files
BLOCKS = {block: block.forward for block in (transformer.DoubleBlock, transformer.SingleBlock, encoder.Layer)}
RECIPE = (
    "drawn scenes and edits; supervised text encoder; flow matching with model guidance; "
    "benchmarks/train_small.py, docs/small-model.md"
)


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, help="folder for the files of this run")
    add("--resume", type=Path, help="folder with the files of an earlier run")
    add("--export", type=Path, help="write the files of --resume here, with the metadata that is shipped, and stop")
    add("--minutes", type=float, default=9.0, help="time of the whole run")
    add(
        "--autoencoder-minutes",
        type=float,
        default=3.6,
        help="time of its first stage, if there is no autoencoder to resume",
    )
    add("--text-minutes", type=float, default=1.2, help="time of the text encoder's stage, if there is none to resume")
    add("--autoencoder", type=Path, help="folder whose autoencoder is used as it is")
    add(
        "--batch",
        type=int,
        default=256,
        help="pictures in a step of the flow without padding or references; other steps have fewer",
    )
    add("--text-batch", type=int, default=512, help="captions in a step of the text encoder")
    add(
        "--autoencoder-batch",
        type=int,
        default=32,
        help="pictures of 256 x 256 in a step of the autoencoder; twice as many crops",
    )
    add("--pool", type=int, default=12288, help="encoded scenes kept on the device; half as many edits")
    add("--edits", type=float, default=train_flow.EDITS, help="share of the flow's steps that train edits")
    add(
        "--edit-counts",
        type=float,
        nargs=3,
        default=train_text.EDIT_COUNTS,
        help="how often edited scenes have one, two and three shapes",
    )
    add(
        "--edit-tasks",
        type=float,
        nargs=3,
        default=(1, 1, 1),
        help="how often an edit changes a colour, removes a shape and adds a hat",
    )
    add(
        "--rate",
        type=float,
        default=1.0,
        help="share of the flow's learning rates, for a run that refines; small batches want less",
    )
    add("--examined", type=int, default=96, help="pictures of a check, and as many edits; 0 for no checks")
    add("--bf16", action="store_true", help="bf16 products on a CPU too")
    add("--seed", type=int, default=20261124)
    add("--eager", action="store_true", help="do not compile")
    add("--smoke", action="store_true", help="tiny sizes and seconds instead of minutes")
    args = parser.parse_args(arguments)
    if not args.out and not args.export:
        parser.error("--out or --export is needed")
    if args.resume and not (args.resume / "progress.json").is_file():
        parser.error(f"--resume: there is no progress.json in {args.resume}")
    if args.export and not args.resume:
        parser.error("--export needs --resume: the folder of the finished run")
    if args.autoencoder and not (args.autoencoder / files.NAMES["autoencoder"]).is_file():
        parser.error(f"--autoencoder: there is no {files.NAMES['autoencoder']} in {args.autoencoder}")
    return args


def smoke(args):
    """Settings with which every stage runs on a CPU in a few seconds."""
    args.minutes, args.autoencoder_minutes, args.text_minutes, args.eager = 0.1, 0.02, 0.02, True
    args.batch, args.autoencoder_batch, args.text_batch, args.pool, args.examined = 2, 2, 8, 4, 4
    return args


# --- set up
# --------------------------------------------------------------------------------------------------------------


def autocast_on(device, wanted):
    """bf16 autocast on a GPU, and on a CPU where it is wanted."""
    return (lambda: torch.autocast(device, torch.bfloat16)) if device != "cpu" or wanted else contextlib.nullcontext


def speed_up(eager):
    """TF32 and compiled blocks. Returns the painter."""
    torch.set_float32_matmul_precision("high")
    if eager:
        return scenes.paint
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.suppress_errors = True  # what does not compile runs all the same, and is warned of
    for block in BLOCKS:
        block.forward = torch.compile(block.forward)
    return torch.compile(scenes.paint)


def to_eager():
    for block, forward in BLOCKS.items():
        block.forward = forward


def fresh(args):
    """New models, the same for the same seed."""
    torch.manual_seed(args.seed)
    made = {
        "autoencoder": Autoencoder(),
        "transformer": transformer.Transformer(),
        "text_encoder": encoder.TextEncoder(encoder.Sizes(tokens.size())),
    }
    if args.smoke:
        made["transformer"] = transformer.Transformer(transformer.Sizes(hidden=128, single=1))
    return made


STAGES = {"autoencoder": 0, "text_encoder": 0, "transformer": 0, "steps": 0, "pictures": 0, "runs": 0, "minutes": 0.0}


def gathered(args, device):
    """(models on the device, progress): from --resume as far as it goes, and --autoencoder, else new."""
    models, progress = fresh(args), STAGES | (files.read_progress(args.resume) if args.resume else {})
    done = [kind for kind in models if progress[kind]]
    models |= files.load(args.resume, done) if done else {}
    if args.autoencoder:
        models |= files.load(args.autoencoder, ["autoencoder"])
        progress["autoencoder"] = 1
    return {kind: model.to(device) for kind, model in models.items()}, progress


# --- running
# -------------------------------------------------------------------------------------------------------------


class Run:
    """One run: models, settings, and what is written to --out."""

    def __init__(self, args):
        self.args, self.started = args, time.monotonic()
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.autocast, self.painter = autocast_on(self.device, args.bf16), speed_up(args.eager or self.device == "cpu")
        self.models, self.progress = gathered(args, self.device)
        self.generator = torch.Generator(self.device).manual_seed(args.seed + self.progress["runs"])
        self.progress["runs"] += 1
        self.examination = None

    @property
    def spent(self):
        """Seconds since the start."""
        return time.monotonic() - self.started

    def left(self):
        """Seconds until --minutes are over."""
        return self.args.minutes * 60 - self.spent

    def metadata(self):
        return {
            "recipe": RECIPE,
            "seed": self.args.seed,
            "date": datetime.date.today().isoformat(),
            "licence": "Apache-2.0",
            "steps": self.progress["steps"],
            "pictures": self.progress["pictures"],
        }

    def save(self):
        """Write everything that is trained so far."""
        files.save(
            self.args.out, {kind: model for kind, model in self.models.items() if self.progress[kind]}, self.metadata()
        )
        spent = self.spent / 60
        files.write_progress(self.args.out, self.progress | {"minutes": round(self.progress["minutes"] + spent, 2)})

    def train_autoencoder(self):
        train_autoencoder.train(
            self.models["autoencoder"],
            self.args.autoencoder_minutes * 60,
            self.args.autoencoder_batch,
            self.generator,
            self.painter,
            self.autocast,
        )
        self.progress["autoencoder"] = 1
        self.save()

    def train_text(self):
        train_text.train(
            self.models["text_encoder"],
            self.args.text_minutes * 60,
            self.args.text_batch,
            self.generator,
            self.autocast,
        )
        self.progress["text_encoder"] = 1
        self.save()

    def train_flow(self):
        frozen = [self.models[kind].requires_grad_(False) for kind in ("autoencoder", "text_encoder")]
        model = self.models["transformer"]
        log(f"flow starts {self.spent:.0f} s into the run; filling the pools")
        maker = train_flow.Maker(
            *frozen,
            self.painter,
            self.generator,
            self.autocast,
            edits={"counts": self.args.edit_counts, "tasks": self.args.edit_tasks},
        )
        flow = train_flow.Flow(
            model,
            copy.deepcopy(model),
            maker,
            self.args.batch,
            self.args.pool,
            self.autocast,
            0.0 if self.progress["transformer"] else train_flow.GUIDED,
            self.args.edits,
            self.args.rate,
        )
        if not self.progress["transformer"]:
            train_flow.match_scale(model, flow.pools[0].entries)
        log(f"pools filled {self.spent:.0f} s into the run")
        before, self.progress["transformer"] = dict(self.progress), 1
        self.models["transformer"] = flow.average.models["transformer"]
        train_flow.train(
            flow, max(self.left() - ENDING, 2.0), lambda flow, share: self.checkpoint(flow, share, before), to_eager
        )

    def checkpoint(self, flow, share, before):
        """Write the averages, then look at what they draw."""
        self.progress |= {"steps": before["steps"] + flow.steps, "pictures": before["pictures"] + flow.pictures}
        self.save()
        if not self.args.examined:
            return
        self.examination = self.examination or sampling.Examination(self.args.examined, self.device)
        line, drawn = self.examination.sit(self.models, self.autocast, steps=2 if self.args.smoke else sampling.STEPS)
        log(f"check at {share:.3f} of the run, {self.spent:.0f} s into it: {line}")
        sampling.write_png(self.args.out / "sheet.png", torch.nn.functional.avg_pool2d(drawn, 2), min(16, len(drawn)))


def train(args):
    run = Run(args)
    args.out.mkdir(parents=True, exist_ok=True)
    log(
        f"{torch.cuda.get_device_name() if run.device == 'cuda' else 'CPU'}, torch {torch.__version__}; "
        f"{ {kind: sum(value.numel() for value in model.parameters()) for kind, model in run.models.items()} } "
        f"parameters; {run.spent:.0f} s"
    )
    if not run.progress["autoencoder"]:
        run.train_autoencoder()
    if not run.progress["text_encoder"]:
        run.train_text()
    run.train_flow()
    log(f"done in {run.spent / 60:.1f} minutes: {run.progress}")


def export(args):
    """Copy the weights of a finished run, in bf16 and with their metadata."""
    models, progress = files.load(args.resume), files.read_progress(args.resume)
    train_text.tidy(models["text_encoder"])
    described = {
        "recipe": RECIPE,
        "seed": args.seed,
        "date": files.metadata(args.resume / files.NAMES["transformer"])["date"],
        "licence": "Apache-2.0",
        "steps": progress["steps"],
        "pictures": progress["pictures"],
    }
    files.save(args.export, models, described)
    files.write_progress(args.export, progress)
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
