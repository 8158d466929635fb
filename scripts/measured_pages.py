#!/usr/bin/env python3
"""Write docs/accuracy.md, docs/speed.md and docs/steps.md from what compare.py, benchmark.py and benchmarks/step.py
measured.

  python scripts/compare.py ... --save benchmarks/results/accuracy-NAME.json
  python scripts/benchmark.py ... --save benchmarks/results/speed-NAME.json
  python scripts/measured_pages.py            a page for each kind of result that is there; figures are never typed by
                                              hand

One section per file, in the order of their names. Standard library alone.
"""

import argparse
import json
from pathlib import Path

import step_parts

ROOT = Path(__file__).resolve().parent.parent
NOT_MEASURED = "-"
ACCURACY = """# How exact each attention backend is

Made by `scripts/measured_pages.py` from runs of the node Compare Attention; each section names its command. \
*Attention error* is the largest relative error of a
block's attention against float32 on the same inputs; *x control* divides an error by that of two exact kernels on the \
same noise, because every block amplifies
the last bit; *latent error* is the relative error of the last latent against the reference's. A verdict is one of \
"same as rounding noise", "slightly
different picture" and "different picture", by the thresholds below its table, or "no verdict" where there was no \
second exact kernel to tell rounding noise by.

**What random weights can tell:** the error of each attention call at full size, and whether it is rounding. **What \
they cannot:** how a picture changes. Their scores
are flat and have no outliers, so a quantised kernel's error can be smaller or larger than on a real model, and what \
attention gets wrong hardly reaches the picture. The
small trained model shows what happens to pictures; how large the change is on FLUX.2 itself, the node tells on your \
own card. (It was trained further, on edits, after its
section was measured.)
"""
SPEED = """# How fast each attention backend is

Made by `scripts/measured_pages.py` from runs of the node Benchmark Attention; each section names its command. \
Milliseconds are medians after warm-up with the fastest
and slowest run beside them, on tensors that the model really handed to its attention. *Error* is relative, against \
float32. Whole steps are forward passes inside
ComfyUI's sampler; *as connected* is the model without a selected backend.

Random weights cost the same time as trained ones, but say little about the *error* of a quantised kernel on trained \
ones (accuracy.md). A small model's times, and any
on a CPU, only show that the measuring works. `sdpa-math` is not tried on a single call whose score matrix could take \
more than half of the free memory; whole steps try it
in any case.
"""


STEP = """# How fast a step is

Made by `scripts/measured_pages.py` from runs of `benchmarks/step.py`: one forward pass of the whole model. *core* is \
ComfyUI with its own blocks and its own choice of
attention; *core-attention* the same with `auto`; *ours* adds Fast Blocks; *ours-fp8* is Fast Blocks with `precision: \
fp8` on the same bf16 weights; *ours-cudnn-fp8* is *ours* with backend `cudnn-fp8`; *diffusers* uses the fastest
of its attention backends on that card, eager or with compiled blocks. All share one set of weights and are timed in \
rounds that go around all of them; milliseconds are
medians with the fastest and slowest run. Random weights cost the same time as trained ones, and their outputs are \
noise: *distance from core's output* is relative, and only
says that the same thing was computed; peaks behind an *ours-fp8* row contain its fp8 copies of the weights, which are \
made anew for each
sampling: that time is not in the medians. The first version of the fused blocks was measured. Since then they look \
more closely at which
calls they may compute, and give up their largest tensor before the
second product of a single block; neither has been measured. Two exact attention kernels under core's own blocks \
are 1.2e-2 to 1.3e-2 apart on such weights in bf16 (docs/accuracy.md); no such control was measured in fp8.
"""


def number(value, form):
    """A figure, or a dash; what JSON has no word for was written as text ("inf")."""
    return NOT_MEASURED if value is None else value if isinstance(value, str) else format(value, form)


def markdown(header, rows):
    lines = [f"| {' | '.join(header)} |", f"|{'|'.join(['---'] + ['---:'] * (len(header) - 1))}|"]
    return lines + [f"| {' | '.join(map(str, row))} |" for row in rows]


def heading(result):
    """Which machine and model, how, and with which versions."""
    machine = result["machine"]
    where = (
        f"{machine['device']} ({machine['arch']})"
        if machine["device"] != machine["arch"]
        else f"a CPU ({machine['arch']})"
    )
    shown = ("device", "arch", "platform", "system", "threads", "gpus")
    versions = ", ".join(f"{name} {value}" for name, value in machine.items() if name not in shown)
    settings = ", ".join(f"{name} {value}" for name, value in result["settings"].items())
    return [
        f"## {where}: {result['weights']}",
        "",
        f"{settings}. Versions: {versions}.",
        "",
        f"```\n{result['command']}\n```",
        "",
    ]


def accuracy(result):
    """One section of docs/accuracy.md."""
    rows = [accuracy_row(r) for r in [result["control"], *result["candidates"]] if r]
    header = [
        "candidate",
        "verdict",
        "attention error",
        "x control",
        "latent error",
        "cosine",
        "x control",
        "PSNR dB",
        "SSIM",
        "s/step",
    ]
    reference = (
        f"Reference: `{result['reference']['name']}`, "
        f"{number(result['reference']['seconds_per_step'], '.3f')} seconds per step. {result['control_note']}"
    )
    t = result["thresholds"]
    limits = (
        f"Thresholds: rounding noise up to {t['attention_ratio']:g} times the control's attention error and "
        f"{t['latent_ratio']:g} times its latent difference; "
        f"a different picture from {t['picture_change']:.0%} of the last latent's own variation, or a head wrong by "
        f"more than {t['head_error']:.0%}."
    )
    return [
        *heading(result),
        *markdown(header, rows),
        "",
        reference,
        "",
        limits,
        *reasons((c["name"], c["reason"]) for c in result["candidates"]),
        "",
    ]


def accuracy_row(row):
    if "latent" not in row:
        return [f"`{row['name']}`", "did not run", *[NOT_MEASURED] * 8]
    worst, last, verdict = max((c["total"] for c in row["attention"]), default=None), row["latent"], row["verdict"]
    return [
        f"`{row['name']}`",
        verdict["word"],
        number(worst, ".2e"),
        number(verdict["attention_ratio"], ".3g"),
        number(last["relative"], ".2e"),
        number(last["cosine"], ".6f"),
        number(verdict["latent_ratio"], ".3g"),
        number(row["psnr"], ".1f"),
        number(row["ssim"], ".4f"),
        number(row["seconds_per_step"], ".3f"),
    ]


def speed(result):
    """One section of docs/speed.md."""
    lines = heading(result)
    for size, call in dict.fromkeys((r["size"], r["call"]) for r in result["rows"]):
        rows = [r for r in result["rows"] if (r["size"], r["call"]) == (size, call)]
        timed = sorted((r for r in rows if r["timing"]), key=lambda r: r["timing"]["ms"])
        lines += [f"**{size}, {'a whole step' if call == 'step' else f'one attention call: {call}'}**", ""]
        lines += [
            *markdown(["backend", "ms", "spread", "TFLOP/s", "error", "what ran"], map(speed_row, timed)),
            *reasons((r["backend"], r["reason"]) for r in rows),
            "",
        ]
    return lines + (
        ["Not measured, because it could not run there:", *absent(result["missing"]), ""] if result["missing"] else []
    )


def absent(missing):
    """A line for each reason, with the backends that it kept from running: {slug: [sentences]} -> Markdown."""
    alike = {}
    for slug, sentences in sorted(missing.items()):
        alike.setdefault(" ".join(" ".join(sentences).split()), []).append(slug)
    return ["", *(f"- {', '.join(f'`{slug}`' for slug in slugs)}: {why}" for why, slugs in alike.items())]


def speed_row(row):
    t = row["timing"]
    return [
        f"`{row['backend']}`",
        f"{t['ms']:.3f}",
        f"{t['min_ms']:.3f} to {t['max_ms']:.3f}",
        number(row["tflops"], ".3g"),
        number(row["error"], ".2e"),
        row["kernel"] or row["library"],
    ]


def reasons(pairs):
    said = [f"- `{name}`: {' '.join(reason.split())}" for name, reason in pairs if reason]
    return ["", *said] if said else []


def step(result):
    """One section of docs/steps.md: benchmarks/step.py's cases."""
    versions = ", ".join(f"{name} {value}" for name, value in result["versions"].items())
    lines = [
        f"## {result['machine']['device']}: {result['model']}",
        "",
        f"Versions: {versions}.",
        "",
        f"```\n{result['command']}\n```",
        "",
    ]
    for case in result["cases"]:
        ceilings = " and ".join(
            f"{value:.0f} TFLOP/s in {kind}" for kind, value in case["ceiling_tflops"].items() if value
        )
        lines += [
            f"**{case['name']}**: {case['tokens']} tokens, {case['tflop']:.0f} TFLOP; the two large products of a "
            f"single block alone reach {ceilings}.",
            "",
            *markdown(
                [
                    "who",
                    "ms",
                    "spread",
                    "core's time / this",
                    "TFLOP/s",
                    "of the ceiling",
                    "peak GiB",
                    "kernels",
                    "distance from core's output",
                ],
                [step_row(row, case["core_ms"]) for row in case["rows"] if "ms" in row],
            ),
            "",
        ]
    return lines


def step_row(row, core_ms):
    return [
        f"`{row['peer']}`",
        f"{row['ms']:.1f}",
        f"{row['min_ms']:.1f} to {row['max_ms']:.1f}",
        f"{core_ms / row['ms']:.2f}",
        number(row["tflops"], ".0f"),
        number(row["share_of_ceiling"], ".0%"),
        number(row["peak_gib"], ".1f"),
        number(row["kernels"], "d"),
        number(row["error_to_core"], ".1e"),
    ]


def parts(results):
    """The section of docs/steps.md on where the time goes, or nothing where a part was not measured. results: the
    folder.
    """
    names = ("step", "fast-check", "speed", "power")
    files = {name: Path(results) / f"{name}-h200.json" for name in names}
    if not all(file.is_file() for file in files.values()):
        return []
    step, check, speed, power = (json.loads(files[name].read_text()) for name in names)
    rows = [step_parts.row(case, check, speed) for case in step["cases"] if case["name"] in step_parts.SIZES]
    return ["## Where the time goes", "", *markdown(step_parts.HEADER, rows), "", step_parts.notes(check, power), ""]


PAGES = {"accuracy": (ACCURACY, accuracy), "speed": (SPEED, speed), "step": (STEP, step)}
NAMES = {"step": "steps"}  # of the pages, where they differ


def pages(results, docs):
    """Write the pages for which there are results; returns their paths."""
    written = []
    for kind, (opening, section) in PAGES.items():
        found = [json.loads(file.read_text()) for file in sorted(Path(results).glob(f"{kind}-*.json"))]
        # step-attention-*.json is an older kind
        found = [result for result in found if kind != "step" or "tflop" in result["cases"][0]]
        if found:
            text = "\n".join(
                [
                    opening,
                    *(line for result in found for line in section(result)),
                    *(parts(results) if kind == "step" else []),
                ]
            )
            path = Path(docs) / f"{NAMES.get(kind, kind)}.md"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text.rstrip() + "\n")
            written.append(path)
    return written


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--results",
        type=Path,
        default=ROOT / "benchmarks" / "results",
        help="folder with accuracy-*.json and speed-*.json",
    )
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of the pages")
    options = parser.parse_args()
    written = pages(options.results, options.docs)
    if not written:
        raise SystemExit(
            f"measured_pages: there is no accuracy-*.json and no speed-*.json in {options.results}. compare.py and "
            "benchmark.py write them with --save."
        )
    print("\n".join(map(str, written)))


if __name__ == "__main__":
    main()
