"""How long every attention backend takes on the calls that a MODEL really makes, and whole steps of the model."""

import comfy.model_management
from comfy.ldm.modules.attention import optimized_attention

from ...attention import registry
from ...attention.measuring import statistics, time_backends
from ...attention.measuring.results import STEP, Benchmark, BenchmarkRow
from ...attention.measuring.statistics import Timing
from .. import attention_slot
from . import capture, sampling
from .compare import backend_variant, log_of, model_text

AS_CONNECTED = "as connected"
HIDDEN = "No attention call of this model could be seen"
COMPILED_BEFORE = (
    "No attention call reached this backend: a model that was compiled keeps the kernels it was "
    "compiled with. Measure it before it is compiled."
)


def benchmark(
    model,
    sizes,
    positive=None,
    wanted=(),
    call_repeat=time_backends.REPEAT,
    step_repeat=3,
    tick=lambda: None,
    say=lambda text: None,
):
    """Benchmark of a MODEL at [Size]: every available backend on the model's own attention calls, then whole steps.
    wanted: only these slugs. say: hears what is being timed.
    """
    positive = positive or capture.random_conditioning(model)
    device = model.load_device
    slugs, missing = (
        time_backends.available(device, wanted),
        {slug: why for slug, why in time_backends.missing(device).items() if not wanted or slug in wanted},
    )
    found = Benchmark(
        [],
        missing,
        statistics.machine(device),
        {"model": model_text(model), "runs per call": call_repeat, "steps per backend": step_repeat},
    )
    for size in sizes:
        found.rows += call_rows(model, size, positive, slugs, call_repeat, tick, say)
    for size in sizes if step_repeat else ():
        hidden = any(HIDDEN in row.reason for row in found.rows)
        for slug in step_slugs(model, slugs, hidden):
            say(f"{slug}, {size}: whole steps")
            found.rows.append(step_row(model, size, positive, slug, step_repeat, tick))
    return found


def step_slugs(model, slugs, hidden=False):
    """Whose steps are timed: ComfyUI's own attention first, then the model as it came if somebody has changed how it
    attends or its calls are hidden, then `auto` and the backends.
    """
    changed = hidden or attention_slot.override_of(model) is not None or sampling.is_compiled(model)
    return [registry.COMFYUI, *([AS_CONNECTED] if changed else []), registry.AUTO, *slugs]


def call_rows(model, size, positive, slugs, repeat, tick, say=lambda text: None):
    """Rows of all backends on each kind of call that the model makes at a Size; the reason if the model cannot run
    it.
    """
    try:
        calls = capture.captured(model, size, positive)
    except Exception as error:  # an image too large for this card, say: the other sizes go on
        comfy.model_management.soft_empty_cache()
        return [
            BenchmarkRow(
                str(size),
                AS_CONNECTED,
                "attention",
                reason=f"The model could not run this size: {sampling.reason_of(error)}",
            )
        ]
    if not calls:
        return [
            BenchmarkRow(
                str(size),
                AS_CONNECTED,
                "attention",
                reason=f"{HIDDEN}, as in compiled blocks. Measure the model before it is compiled.",
            )
        ]
    free, rows = comfy.model_management.get_free_memory(model.load_device) / 2, []
    for call in calls:
        for slug in (registry.COMFYUI, *slugs):
            say(f"{slug}, {size}: attention calls")
            rows.append(time_backends.bench_backend(str(size), call, slug, repeat, tick, free, optimized_attention))
    return rows


def step_row(model, size, positive, slug, repeat, tick):
    """The row of whole steps with a backend; AS_CONNECTED leaves the model's attention to whoever holds it."""
    row = BenchmarkRow(str(size), slug, STEP, exact=slug not in registry.ROWS or registry.row(slug).exact)
    try:
        chosen = model if slug == AS_CONNECTED else backend_variant(slug).transform(model)
        timing = Timing.of(capture.step_times(chosen, size, positive, repeat, tick))
        row.kernel, calls = ("", None) if slug == AS_CONNECTED else log_of(chosen)
        row.timing, row.reason = (None, COMPILED_BEFORE) if calls == 0 else (timing, "")
    except Exception as error:  # this backend at this size is out, with the reason; the others go on
        comfy.model_management.soft_empty_cache()
        row.reason = sampling.reason_of(error)
    return row


def ticks(model, sizes, wanted, call_repeat, step_repeat):
    """How many ticks a benchmark makes, if each size has one kind of call."""
    slugs = len(time_backends.available(model.load_device, wanted))
    return max(
        1,
        len(sizes)
        * (
            (slugs + 1) * (time_backends.WARM_UP + call_repeat)
            + len(step_slugs(model, range(slugs))) * (step_repeat + 1) * bool(step_repeat)
        ),
    )
