#!/usr/bin/env python3
"""The README's bar chart of step times, from a file that benchmarks/step.py wrote.

  python scripts/speed_chart.py [FILE]      write docs/speed.png (default FILE: benchmarks/results/step-h200.json)

The baseline, ComfyUI without this pack, is named and comes first; every other bar says how much less time than it a
step takes. Nothing is in the picture that is not in the file. Needs matplotlib.
"""

import io
import json
import sys
from pathlib import Path

from comfy_server import ROOT

RESULTS, CHART = ROOT / "benchmarks" / "results" / "step-h200.json", ROOT / "docs" / "speed.png"
SIZES = {"bf16-1024": "1024 x 1024", "bf16-1024-ref1": "1024 x 1024, one reference", "bf16-2048": "2048 x 2048"}
PEERS = {  # peer in the file -> its bar: (label, colour)
    "core": ("ComfyUI (baseline)", "#9aa0a6"),
    "diffusers-compiled": ("diffusers, torch.compile", "#c9a227"),
    "ours": ("Flux 2 Attention, bf16", "#1f77b4"),
    "ours-fp8": ("Flux 2 Attention, fp8", "#e07b39"),
}


def times(data, case):
    """[(label, colour, ms)] of one case, the baseline first."""
    rows = {row["peer"]: row["ms"] for row in case["rows"] if row.get("ms")}
    return [(*PEERS[peer], rows[peer]) for peer in PEERS if peer in rows]


def bars(axis, title, rows, size):
    """Horizontal bars in seconds; each but the baseline says how much less it is."""
    labels, colours, values = zip(*[(label, colour, ms / 1000) for label, colour, ms in rows])
    base = values[0]
    drawn = axis.barh(labels, values, color=colours, height=0.72)
    said = [f" {value:.2f} s" + (f"  (−{1 - value / base:.0%})" if value < base else "") for value in values]
    axis.bar_label(drawn, said, fontsize=size)
    axis.invert_yaxis()
    axis.set_title(title, fontsize=size + 1, loc="left", fontweight="bold")
    axis.tick_params(labelsize=size, length=0)
    axis.set_xticks([])
    axis.margins(x=0.3)
    for edge in axis.spines.values():
        edge.set_visible(False)


def drawn(width, height, panels, heading, size):
    """A figure of `panels` [(title, rows)] below a heading, as a PIL image of width x height pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(width / 100, height / 100), dpi=100, layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axis, (title, rows) in zip(axes, panels):
        bars(axis, title, rows, size)
    figure.suptitle(heading, fontsize=size + 2, x=0.01, ha="left")
    kept = io.BytesIO()
    FigureCanvasAgg(figure).print_png(kept)
    return Image.open(kept).convert("RGB")


def heading(data, broken=" "):
    """What was measured, on what."""
    versions = data["versions"]
    return (
        f"FLUX.2-dev, seconds per step (less is better){broken}"
        f"{data['machine']['device']}, torch {versions['torch']}, diffusers {versions['diffusers']}, random weights"
    )


def panels(data, names=SIZES):
    cases = {case["name"]: case for case in data["cases"]}
    return [(SIZES[name], times(data, cases[name])) for name in names]


def square(size, which):
    """A card for the template browser: one size."""
    data = json.loads(RESULTS.read_text())
    case = {"kernels": "bf16-2048", "fp8": "bf16-1024"}[which]
    text = f"{data['machine']['device']}, seconds per step"
    return drawn(size, size, panels(data, [case]), text, 11)


def main():
    data = json.loads(Path(sys.argv[1]).read_text() if sys.argv[1:] else RESULTS.read_text())
    drawn(1000, 560, panels(data), heading(data, "\n"), 11).save(CHART, optimize=True)


if __name__ == "__main__":
    main()
