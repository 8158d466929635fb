"""The result of a comparison or a benchmark as data, as a table for people, and as Markdown for docs/. torch only;
nothing is measured here.
"""

from dataclasses import dataclass, field

from ..registry import COMFYUI
from .statistics import DIFFERENT, NO_VERDICT, NOISE, SLIGHT, Evidence, Thresholds, Verdict, as_json

NOT_MEASURED = "-"
OWN = "ComfyUI's own"


def number(value, form=".2e"):
    """A figure, or a dash where there is none."""
    return NOT_MEASURED if value is None else format(value, form)


def where(machine, settings):
    """Device and settings, for the first line of a report."""
    return f"{machine['device']} ({machine['arch']}): " + ", ".join(
        f"{name} {value}" for name, value in settings.items()
    )


def table(header, rows):
    """Lines of text with aligned columns; the first column to the left, the others to the right."""
    cells = [list(map(str, line)) for line in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))).rstrip()
        for line in cells
    ]


def compared(time, base):
    """A time against another one, in words."""
    if round(time / base, 2) == 1:
        return "as long as the reference"
    return f"{abs(1 - time / base):.0%} {'less' if time < base else 'more'} than the reference"


# --- comparison ------------------------------------------------------------------------------------------------------


@dataclass
class ComparisonRow:
    """One candidate. reason: why it has no figures. psnr in dB and ssim of the decoded picture, None without one; ran:
    what computed, from its log.
    """

    name: str
    evidence: Evidence | None = None
    verdict: Verdict | None = None
    psnr: float | None = None
    ssim: float | None = None
    seconds_per_step: float | None = None
    reason: str = ""
    ran: str = ""

    def figures(self):
        """Cells of the summary table."""
        if self.evidence is None:
            return [self.name, "did not run", *[NOT_MEASURED] * 8]
        last, worst = self.evidence.latents[-1], self.evidence.worst_call()
        return [
            self.name,
            self.verdict.word,
            number(worst and worst[1].total),
            number(self.verdict.attention_ratio, ".3g"),
            number(last.relative),
            number(last.cosine, ".6f"),
            number(self.verdict.latent_ratio, ".3g"),
            number(self.psnr, ".1f"),
            number(self.ssim, ".4f"),
            number(self.seconds_per_step, ".3f"),
        ]

    def notes(self):
        """Sentences below the table."""
        said = [f"{self.name}: {self.reason}"] if self.reason else []
        said += [f"{self.name}: {self.verdict.word}: {self.verdict.why}."] if self.verdict else []
        return said + ([f"{self.name} ran: {self.ran}"] if self.ran else [])

    def as_data(self):
        evidence = self.evidence and {
            "steps": [as_json(d) for d in self.evidence.latents[:-1]],
            "latent": as_json(self.evidence.latents[-1]),
            "non_finite": self.evidence.non_finite,
            "attention": [
                {"step": step, "block": block, **as_json(call)} for (step, block), call in self.evidence.calls.items()
            ],
        }
        return {
            "name": self.name,
            "verdict": self.verdict and as_json(self.verdict),
            "psnr": as_json(self.psnr),
            "ssim": self.ssim,
            "seconds_per_step": self.seconds_per_step,
            "reason": self.reason,
            "ran": self.ran,
            **(evidence or {}),
        }


IN_SHORT = {
    NOISE: "same image as {}",
    SLIGHT: "slightly different image than {}",
    DIFFERENT: "different image than {}",
    NO_VERDICT: "no verdict, because there is nothing to tell rounding noise by",
}
COMPARE_HEADER = [
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


@dataclass
class Comparison:
    """Everything one comparison found. reference: a ComparisonRow that holds no evidence but a time; control: its name,
    or why there is none.
    """

    reference: ComparisonRow
    rows: list
    control: ComparisonRow | None
    control_note: str
    machine: dict
    settings: dict
    thresholds: Thresholds = Thresholds()
    notes: list = field(default_factory=list)

    def shown(self):
        """Rows that have figures, the control first."""
        return ([self.control] if self.control else []) + self.rows

    def answer(self, row):
        """One candidate in one line: whether the image is the same, and whether it came faster."""
        if row.evidence is None:
            return f"{row.name}: did not run. {row.reason}"
        said = f"{row.name}: {IN_SHORT[row.verdict.word].format(self.reference.name)}"
        time, base = row.seconds_per_step, self.reference.seconds_per_step
        return f"{said}, {time:.3f} s per step, {compared(time, base)} ({base:.3f} s)" if time and base else said

    def as_text(self):
        lines = [*(self.answer(row) for row in self.rows), ""]
        lines += [f"Compared with {self.reference.name} on {where(self.machine, self.settings)}"]
        lines += table(COMPARE_HEADER, [r.figures() for r in self.shown()])
        lines += [
            (
                f"{self.reference.name} itself: {number(self.reference.seconds_per_step, '.3f')} seconds per step. "
                f"{self.control_note}"
            ),
            f"Thresholds. {self.thresholds}",
        ]
        lines += [line for row in self.rows for line in row.notes()] + self.notes
        return "\n".join([*lines, "", *self.step_lines(), "", *self.block_lines()]).rstrip()

    def step_lines(self):
        """Relative error and cosine of the predicted latent, step by step."""
        rows = [r for r in self.shown() if r.evidence]
        if not rows:
            return []
        steps = range(len(rows[0].evidence.latents) - 1)
        cells = [
            [
                f"step {s + 1}",
                *(f"{r.evidence.latents[s].relative:.2e} / {r.evidence.latents[s].cosine:.6f}" for r in rows),
            ]
            for s in steps
        ]
        return [
            "Latent predicted in each step against the reference's: relative error / cosine",
            *table(["", *(r.name for r in rows)], cells),
        ]

    def block_lines(self):
        """Error of each block's attention against float32, the worst of the steps that were checked."""
        rows = [r for r in self.shown() if r.evidence and r.evidence.calls]
        blocks = list(dict.fromkeys(block for r in rows for _, block in r.evidence.calls))
        cells = [
            [
                block,
                *(
                    number(max((c.total for (_, b), c in r.evidence.calls.items() if b == block), default=None))
                    for r in rows
                ),
            ]
            for block in blocks
        ]
        title = "Attention of each block against float32 on the same inputs: relative error, worst of the steps checked"
        return [title, *table(["", *(r.name for r in rows)], cells)] if rows else []

    def as_data(self):
        return {
            "kind": "comparison",
            "machine": self.machine,
            "settings": self.settings,
            "thresholds": as_json(self.thresholds),
            "reference": self.reference.as_data(),
            "control": self.control and self.control.as_data(),
            "control_note": self.control_note,
            "candidates": [r.as_data() for r in self.rows],
            "notes": self.notes,
        }


# --- benchmark -------------------------------------------------------------------------------------------------------


@dataclass
class BenchmarkRow:
    """One backend at one size. call: which attention call, in words, or "step" for a whole step. timing: Timing or None
    with the reason.
    """

    size: str
    backend: str
    call: str
    timing: object = None
    error: float | None = None
    tflops: float | None = None
    library: str = ""
    kernel: str = ""
    exact: bool = True
    reason: str = ""

    def as_data(self):
        return as_json(self)


STEP = "step"


@dataclass
class Benchmark:
    """Everything one benchmark found. missing: {backend: reasons} of those that cannot run here."""

    rows: list
    missing: dict
    machine: dict
    settings: dict
    notes: list = field(default_factory=list)

    def sizes(self):
        return list(dict.fromkeys(r.size for r in self.rows))

    def groups(self):
        """{(size, call): rows}, the fastest first, those without a time last; whole steps before single calls."""
        keys = dict.fromkeys((r.size, r.call) for r in self.rows)
        ordered = sorted(keys, key=lambda key: (key[1] != STEP, self.sizes().index(key[0])))
        return {
            key: sorted(
                (r for r in self.rows if (r.size, r.call) == key),
                key=lambda r: (r.timing is None, r.timing and r.timing.ms),
            )
            for key in ordered
        }

    def answers(self):
        """A line per size: the fastest backend, and against ComfyUI's own; of single calls where no step was timed."""
        groups = {key: [r for r in rows if r.timing] for key, rows in self.groups().items()}
        whole = {size for (size, call), rows in groups.items() if call == STEP and rows}
        return [
            f"{size}: {fastest(rows, call)}"
            for (size, call), rows in groups.items()
            if rows and (call == STEP or size not in whole)
        ]

    def as_text(self):
        lines = [*self.answers(), "", f"Benchmark on {where(self.machine, self.settings)}"]
        for (size, call), rows in self.groups().items():
            lines += [
                "",
                f"{size}, {'a whole step of the model' if call == STEP else f'one attention call: {call}'}",
                *self.group_lines(call, rows),
            ]
        causes = {}
        for slug, reasons in self.missing.items():
            causes.setdefault(" ".join(reasons), []).append(slug)
        lines += ["", "Cannot run here:"] if causes else []
        lines += [f"  {', '.join(slugs)}: {cause}" for cause, slugs in causes.items()]
        return "\n".join(lines + self.notes).lstrip("\n")

    @staticmethod
    def group_lines(call, rows):
        timed = [r for r in rows if r.timing]
        cells = [
            [
                named(r),
                f"{r.timing.ms:.3f}",
                f"{r.timing.min_ms:.3f} to {r.timing.max_ms:.3f}",
                str(r.timing.runs),
                *([] if call == STEP else [number(r.tflops, ".3g"), number(r.error)]),
                r.kernel or r.library,
            ]
            for r in timed
        ]
        header = [
            "backend",
            "ms (median)",
            "spread",
            "runs",
            *([] if call == STEP else ["TFLOP/s", "error"]),
            "what ran",
        ]
        return (table(header, cells) if timed else []) + [f"{named(r)}: {r.reason}" for r in rows if not r.timing]

    def as_data(self):
        return {
            "kind": "benchmark",
            "machine": self.machine,
            "settings": self.settings,
            "rows": [r.as_data() for r in self.rows],
            "missing": self.missing,
            "notes": self.notes,
        }


def named(row):
    """What a benchmark calls a row's backend."""
    return OWN if row.backend == COMFYUI else row.backend


def duration(row):
    return f"{row.timing.ms / 1e3:.3f} s per step" if row.call == STEP else f"{row.timing.ms:.3f} ms per attention call"


def fastest(rows, call):
    """The fastest of some timed rows in words; rows: fastest first."""
    first, own = rows[0], next((r for r in rows if r.backend == COMFYUI), None)
    said = f"fastest: {named(first)}{'' if first.exact else ' (approximate)'}, {duration(first)}"
    if own is not None and own is not first:
        said += f", {1 - first.timing.ms / own.timing.ms:.0%} less than {OWN} ({duration(own).split(' per')[0]})"
    exact = next((r for r in rows if r.exact), None)
    return said if exact in (None, first) else f"{said}; fastest exact: {named(exact)}, {duration(exact)}"
