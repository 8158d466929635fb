"""Figures for people: labelled images side by side, heat maps of differences, bar charts. IMAGE tensors (B, H, W, 3),
float32 from 0 to 1.

matplotlib draws the charts and colours the heat maps; it is optional (pip install flux2-attention[compare]). Without it
there is grey, and a sentence that says what to install.
"""

import importlib.util

import numpy
from PIL import Image, ImageDraw, ImageFont
import torch

from ..attention.measuring.results import named

NO_CHART = (
    "matplotlib is not installed, so there is no chart and heat maps are grey. Install it with: pip install matplotlib "
    "scikit-image"
)
# pixels: height of a label, space between pictures, width below which a label cannot be read
LABEL, GAP, LEAST_WIDTH = 34, 8, 192
FLOOR = 1 / 255  # the smallest difference that an 8-bit image can hold
EXACT, QUANTISED, BASELINE = "#3f789e", "#b06634", "#888888"


def has_chart():
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def side_by_side(titled):
    """IMAGE (1, H, W, 3) of [(title, picture (B, h, w, 3))], the pictures of a batch below each other."""
    panels = [panel(title, picture) for title, picture in titled]
    height = max(p.height for p in panels)
    sheet = Image.new("RGB", (sum(p.width for p in panels) + GAP * (len(panels) - 1), height), "white")
    left = 0
    for drawn in panels:
        sheet.paste(drawn, (left, 0))
        left += drawn.width + GAP
    return as_tensor(sheet)


def panel(title, picture):
    """A picture under its title; small ones are enlarged by a whole factor, so that the title fits and pixels stay
    square.
    """
    column = as_image(picture.reshape(-1, *picture.shape[2:]))
    factor = max(1, -(-LEAST_WIDTH // column.width))
    column = column.resize((column.width * factor, column.height * factor), Image.Resampling.NEAREST)
    sheet = Image.new("RGB", (column.width, column.height + LABEL), "white")
    sheet.paste(column, (0, LABEL))
    write(ImageDraw.Draw(sheet), title, column.width)
    return sheet


def write(draw, title, width):
    """The title in the largest size that fits."""
    for size in range(20, 7, -1):
        font = ImageFont.load_default(size=size)
        if draw.textlength(title, font=font) <= width - 8:
            break
    draw.text((4, LABEL // 2), title, fill="black", font=font, anchor="lm")


def as_image(tensor):
    return Image.fromarray((tensor.clamp(0, 1) * 255).round().to(torch.uint8).numpy())


def as_tensor(image):
    return torch.from_numpy(numpy.asarray(image.convert("RGB")).astype(numpy.float32) / 255).unsqueeze(0)


def heat_maps(reference, titled):
    """IMAGE of |image - reference|, the mean of the colours, one map per (title, image) on one scale.

    The scale ends at the largest difference, and not below FLOOR, one step of an 8-bit image: rounding noise is black.
    Titles say both.
    """
    gaps = [(title, (image - reference).abs().nan_to_num(1.0).mean(dim=-1)) for title, image in titled]
    if not gaps:
        return message("There is no image to compare: no candidate ran.")
    scale = max(FLOOR, *(gap.max().item() for _, gap in gaps))
    return side_by_side([(f"{title}: {largest(gap, scale)}", coloured(gap / scale)) for title, gap in gaps])


def largest(gap, scale):
    """The title of a heat map: its largest difference, and where white is."""
    most = gap.max().item()
    if most == 0:
        return "no difference"
    return f"largest difference {most:.2g} (white: {scale:.2g})" + (", nothing visible" if most < FLOOR else "")


def coloured(values):
    """(B, H, W) from 0 to 1 as colours (B, H, W, 3): matplotlib's inferno, or grey."""
    try:
        from matplotlib import colormaps
    except ImportError:
        return values.unsqueeze(-1).expand(*values.shape, 3)
    return torch.from_numpy(colormaps["inferno"](values.numpy())[..., :3].astype(numpy.float32))


def message(text, width=900):
    """IMAGE with a sentence on it."""
    sheet = Image.new("RGB", (width, 60), "white")
    ImageDraw.Draw(sheet).text((10, 30), text, fill="black", font=ImageFont.load_default(size=14), anchor="lm")
    return as_tensor(sheet)


def chart(benchmark):
    """IMAGE: for each size and call horizontal bars of the medians with their spread, fastest first."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return message(NO_CHART)
    groups = {key: [r for r in rows if r.timing] for key, rows in benchmark.groups().items()}
    groups = {key: rows for key, rows in groups.items() if rows}
    if not groups:
        return message("Nothing could be timed: the table says why.")
    figure = Figure(
        figsize=(10, sum(0.34 * len(rows) + 1.1 for rows in groups.values()) + 0.5), dpi=100, layout="constrained"
    )
    axes = figure.subplots(len(groups), 1, squeeze=False, height_ratios=[len(rows) + 2 for rows in groups.values()])[
        :, 0
    ]
    for axis, ((size, call), rows) in zip(axes, groups.items()):
        bars(axis, f"{size}: {'whole step' if call == 'step' else call}", rows)
    figure.suptitle(
        f"{benchmark.machine['device']} ({benchmark.machine['arch']}), torch {benchmark.machine['torch']}", fontsize=11
    )
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return torch.from_numpy(numpy.asarray(canvas.buffer_rgba())[..., :3].astype(numpy.float32) / 255).unsqueeze(0)


def bars(axis, title, rows):
    """One set of bars; whiskers from the fastest to the slowest run."""
    names, times = [named(r) for r in rows], [r.timing.ms for r in rows]
    spread = [[r.timing.ms - r.timing.min_ms for r in rows], [r.timing.max_ms - r.timing.ms for r in rows]]
    colours = [BASELINE if " " in named(r) else EXACT if r.exact else QUANTISED for r in rows]
    drawn = axis.barh(names, times, xerr=spread, color=colours, ecolor="#333333", capsize=2)
    axis.bar_label(drawn, [f" {t:,.0f} ms" if t >= 1000 else f" {t:.3g} ms" for t in times], fontsize=8)
    axis.invert_yaxis()
    axis.set_title(title, fontsize=9, loc="left")
    axis.set_xlabel(
        "milliseconds, median; whiskers: fastest and slowest run. Blue: exact, orange: quantised, grey: ComfyUI's own "
        "and the model as connected",
        fontsize=7,
    )
    axis.tick_params(labelsize=8)
    axis.margins(x=0.12)
