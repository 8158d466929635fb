"""Is another attention good enough, and is it faster? Two nodes that answer with pictures and numbers from the user's
own model and card.
"""

import dataclasses
import itertools
import json
import os
import time

import comfy.model_management
import comfy.utils
import folder_paths
from comfy_api.latest import io, ui

from ..attention.measuring import time_backends, statistics
from ..attention import registry
from ..attention.measuring.results import STEP, Benchmark, Comparison, BenchmarkRow, ComparisonRow
from ..attention.measuring.statistics import Control, Evidence, Timing, Verdict
from ..attention.measuring.accuracy_probe import AttentionProbe
from ..flux2.measuring import capture as model_bench
from ..flux2.measuring import sampling as runs
from ..flux2 import attention_slot
from . import figures
from .attention import CATEGORY, NO_SECOND, Flux2SelectAttention, known_slugs

# PyTorch's own kernels, all of the same mathematics: two of them on the same noise are the control. The most different
# one comes first.
CONTROL_ORDER = ("sdpa-math", "sdpa-efficient", "sdpa-cudnn", "sdpa-flash", "sdpa")
SLOTS = ("a", "b", "c", "d")
AS_CONNECTED = "as connected"
COMPILED_BEFORE = (
    "No attention call reached this backend: a model that was compiled keeps the kernels it was "
    "compiled with. Measure it before it is compiled."
)


# --- candidates ------------------------------------------------------------------------------------------------------


def backend_candidate(slug, edge_backend=NO_SECOND, first_steps=0, last_steps=0):
    """The Variant of a backend, with a second one in the first and last steps."""
    scheduled = edge_backend != NO_SECOND and (first_steps or last_steps)
    schedule = {"edge_backend": edge_backend, "first_steps": first_steps, "last_steps": last_steps} if scheduled else {}
    name = f"{slug}, {edge_backend} in {first_steps} first and {last_steps} last steps" if schedule else slug
    return runs.Variant(name, lambda model: Flux2SelectAttention.execute(model, slug, **schedule).args[0], selects=True)


def model_candidate(slot, model):
    """The Variant of a MODEL that other nodes prepared."""
    dispatcher = attention_slot.dispatcher_of(model)
    return runs.Variant(f"model_{slot}" + (f" ({dispatcher.describe()})" if dispatcher else ""), lambda _: model)


def log_of(model):
    """(what computed a MODEL's last sampling, in words; its calls) from its dispatcher's log; ("", None) for a model
    without one.
    """
    dispatcher = attention_slot.dispatcher_of(model) if model else None
    if dispatcher is None or not dispatcher.log.current:
        return "", None
    entries = dispatcher.log.current.as_data()["entries"]
    return "; ".join(f"{e['backend']} ({e['kernel'] or e['library']}), {e['calls']} calls" for e in entries), sum(
        e["calls"] for e in entries
    )


def elsewhere(recording, expected):
    """The sentence about attention calls that did not reach the selected backend, or "". expected: calls of the same
    job in the reference, or None.
    """
    if (
        recording.calls is None
        or recording.error
        or (recording.calls and (expected is None or recording.calls >= expected))
    ):
        return ""
    return (
        f"Only {recording.calls} of {expected or 'its'} attention calls reached the selected backend, so the figures "
        "would be of a mixture. "
        "A model that was compiled keeps the kernels it was compiled with: select first, compile behind it, and "
        "connect each compiled model to model_a, model_b, model_c or model_d."
    )


# --- a comparison ----------------------------------------------------------------------------------------------------


def compare(model, job, reference, candidates, vae=None, tick=lambda: None):
    """(Comparison, IMAGE side by side, IMAGE of differences). reference: slug; candidates: [Variant]. ValueError when
    the reference cannot run.
    """
    if not job.steps:  # everything would be equal, and the verdict a bare pass
        raise ValueError(
            "The schedule has no step, so there is nothing to compare with. Connect sigmas with at least one step and "
            "a denoise above 0."
        )

    def record(candidate):
        found = runs.record(candidate, model, job, AttentionProbe, tick)
        found.ran, calls = log_of(found.model)  # now: a later candidate of a compiled model could still add to this log
        found.calls = calls if candidate.selects else None
        return found

    base = record(backend_candidate(reference))
    why = base.error or elsewhere(base, None)
    if why:
        raise ValueError(f"The reference '{reference}' could not run, so there is nothing to compare with. {why}")
    tried = [record(c) for c in candidates]
    control, control_row, note = find_control(model, base, tried, record)
    rows = [row_of(recording, base, control) for recording in tried]
    pictures = draw(model, vae, [base, *tried])
    for row, recording in zip(rows, tried):
        similarity(row, pictures.get(recording.name), pictures[base.name], vae)
    found = Comparison(
        ComparisonRow(base.name, seconds_per_step=base.seconds_per_step, ran=base.ran),
        rows,
        control_row,
        note,
        statistics.machine(model.load_device),
        settings(model, job),
        notes=notes(base, vae),
    )
    others = [(r.name, pictures[r.name]) for r in tried if r.name in pictures]
    return (
        found,
        figures.side_by_side([(base.name + " (reference)", pictures[base.name]), *others]),
        figures.heat_maps(pictures[base.name], others),
    )


def differences(recording, base):
    return tuple(statistics.difference(a, r) for a, r in zip(recording.latents, base.latents))


def row_of(recording, base, control):
    """The ComparisonRow of a recording: its evidence and verdict, or its reason."""
    why = recording.error or elsewhere(recording, base.calls)
    if why:
        return ComparisonRow(recording.name, reason=why, ran=recording.ran)
    evidence = Evidence(differences(recording, base), recording.probe.calls)
    verdict = statistics.judge(evidence, control)
    broken = f"It produced {evidence.non_finite} NaN or infinite values." if evidence.non_finite else ""
    return ComparisonRow(
        recording.name, evidence, verdict, seconds_per_step=recording.seconds_per_step, reason=broken, ran=recording.ran
    )


def trusted(recording, calls):
    """Whether a recording of an exact kernel can serve as yardstick: it ran in all `calls`, each of them as near to
    float32 as rounding allows.
    """
    return (
        not recording.error
        and not elsewhere(recording, calls)
        and all(call.plausible for call in recording.probe.calls.values())
    )


def find_control(model, base, tried, record):
    """(Control, its ComparisonRow, a sentence), or (None, None, why). Two of PyTorch's own kernels on the same noise,
    the reference as one of them if it is exact.
    """
    exact = base.name == registry.AUTO or (base.name in registry.ROWS and registry.row(base.name).exact)
    anchor, known, device = (
        (base if exact and trusted(base, None) else None),
        {r.name: r for r in (base, *tried)},
        model.load_device,
    )
    for slug in CONTROL_ORDER:
        too_large = (
            slug == "sdpa-math"
            and time_backends.math_bytes(base.probe.largest_scores) > comfy.model_management.get_free_memory(device) / 2
        )
        if too_large or registry.unavailable(slug, registry.describe(device)):
            continue
        other = known.get(slug) or record(backend_candidate(slug))
        if not trusted(other, base.calls) or (anchor and all(d.identical for d in differences(other, anchor))):
            continue
        if anchor:
            return control_of(other, anchor)
        anchor = other
    return None, None, "No second exact kernel that gives other values could run here, so there is no control."


def control_of(other, anchor):
    name = f"control: {other.name} against {anchor.name}"
    gaps = differences(other, anchor)
    control = Control(name, gaps, (other.probe.calls, anchor.probe.calls))
    verdict = Verdict("(rounding noise)", "", control.attention_ratio(other.probe.calls), 1.0)
    row = ComparisonRow(name, Evidence(gaps, other.probe.calls), verdict, seconds_per_step=other.seconds_per_step)
    return control, row, f"Rounding noise of this model and seed is {other.name} against {anchor.name}."


def settings(model, job):
    """What was run, in words."""
    return {
        "model": model_text(model),
        "latent": "x".join(map(str, job.latent["samples"].shape)),
        "steps": job.steps,
        "seed": job.seed,
    }


def model_text(model):
    """Kind, width, blocks and number format of a MODEL."""
    params, blocks = getattr(model.model.diffusion_model, "params", None), attention_slot.block_kinds(model)
    size = (
        f", width {params.hidden_size}, {' + '.join(str(n) for _, n in blocks)} blocks"
        if hasattr(params, "hidden_size") and blocks
        else ""
    )
    return f"{type(model.model).__name__}{size}, {str(attention_slot.attention_facts(model)[1]).removeprefix('torch.')}"


def notes(base, vae):
    said = figures.absent()
    if vae is None:
        said.append("No VAE is connected: the images are rough previews of the latents, and there is no PSNR and SSIM.")
    if not base.probe.calls:
        said.append(
            "No attention call could be checked by itself (compiled model, or no attention that ComfyUI knows): the "
            "verdicts rest on the latents."
        )
    if base.seconds_per_step is None:
        said.append(
            "There were too few steps to time one: the steps in which attention is checked are not timed. The "
            "benchmark node times."
        )
    return said


def draw(model, vae, recordings):
    """{name: image (B, H, W, 3)} of the recordings with a finite latent; black for the others that ran."""
    pictures = {}
    for recording in recordings:
        if recording.latent is not None:
            finite = recording.latent.nan_to_num(0, 0, 0)
            picture = runs.decode(vae, finite) if vae else runs.rough_picture(model, finite)
            pictures[recording.name] = picture if bool(recording.latent.isfinite().all()) else picture * 0
    return pictures


def similarity(row, picture, reference, vae):
    """Fill in PSNR and SSIM of a row that has a decoded image."""
    if vae and picture is not None and row.evidence and not row.evidence.non_finite:
        row.psnr, row.ssim = statistics.psnr(picture, reference), figures.ssim(picture, reference)


def unnamed_twice(candidates):
    """Candidates of one name get numbers: names are keys."""
    seen, out = {}, []
    for c in candidates:
        seen[c.name] = seen.get(c.name, 0) + 1
        out.append(c if seen[c.name] == 1 else dataclasses.replace(c, name=f"{c.name} #{seen[c.name]}"))
    return out


class Flux2CompareAttention(io.ComfyNode):
    """The same noise through several attentions, with a verdict."""

    @classmethod
    def define_schema(cls):
        counts = {"default": 0, "min": 0, "max": 1000, "optional": True, "advanced": True}
        choices = [NO_SECOND, *registry.SLUGS]
        candidates = [
            io.Combo.Input(
                f"candidate_{n}",
                display_name=f"candidate {n}",
                options=choices,
                default=registry.AUTO if n == 1 else NO_SECOND,
                optional=True,
                tooltip="A backend to compare with the reference. One that cannot run here becomes a row with its "
                "reason.",
            )
            for n in range(1, 5)
        ]
        models = [
            io.Model.Input(
                f"model_{slot}",
                display_name=f"prepared model {slot.upper()}",
                optional=True,
                tooltip="A model that other nodes prepared, compared as it is: several GPUs, LoRA, compilation, other "
                "packs' patches.",
            )
            for slot in SLOTS
        ]
        return io.Schema(
            node_id="Flux2CompareAttention",
            display_name="Compare Attention",
            category=f"{CATEGORY}/measure",
            is_output_node=True,
            description="Runs the same noise through a reference and up to eight candidates and shows what changes: "
            "images, a heat map, errors per step "
            "and per block, seconds per step, and a verdict that is measured against the rounding noise of two exact "
            "kernels.",
            search_aliases=[
                "accuracy",
                "quality",
                "difference",
                "psnr",
                "ssim",
                "attention backend",
                "is it good enough",
            ],
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model to sample with. It is cloned for each candidate and left as it is."
                ),
                io.Latent.Input(
                    "latent_image",
                    tooltip="The latent to start from, as for a sampler. An empty one gives text to image.",
                ),
                io.Sampler.Input("sampler", tooltip="The sampler. All candidates use the same one."),
                io.Sigmas.Input(
                    "sigmas",
                    tooltip="The schedule. Use the number of steps that you generate with: errors grow from step to "
                    "step.",
                ),
                io.Int.Input(
                    "noise_seed",
                    default=42,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="The seed of the noise, the same for all candidates.",
                ),
                io.Combo.Input(
                    "reference",
                    options=registry.SLUGS,
                    default="sdpa",
                    tooltip="What the candidates are compared with: an exact backend, unless you want to know how two "
                    "others differ.",
                ),
                io.Conditioning.Input(
                    "positive",
                    optional=True,
                    tooltip="The prompt (with guidance and reference images, if any). For a negative prompt connect "
                    "a guider instead.",
                ),
                io.Guider.Input(
                    "guider",
                    optional=True,
                    tooltip="Instead of positive: a guider with its prompts and settings. Its model is replaced by "
                    "the candidates'.",
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="Decodes the images. Without it there are rough previews, and no PSNR and SSIM.",
                ),
                *candidates,
                io.Combo.Input(
                    "edge_backend",
                    display_name="second kernel",
                    options=choices,
                    default=NO_SECOND,
                    optional=True,
                    advanced=True,
                    tooltip="Computes the first and last steps of the candidates chosen above: set at least one of "
                    "the two.",
                ),
                io.Int.Input(
                    "first_steps",
                    display_name="second kernel: first steps",
                    **counts,
                    tooltip="How many steps at the beginning the second kernel computes. 0: none.",
                ),
                io.Int.Input(
                    "last_steps",
                    display_name="second kernel: last steps",
                    **counts,
                    tooltip="How many steps at the end the second kernel computes. 0: none.",
                ),
                *models,
            ],
            outputs=[
                io.Image.Output(
                    display_name="images", tooltip="The reference and the candidates side by side, with their names."
                ),
                io.Image.Output(
                    display_name="differences",
                    tooltip="Where each candidate's image differs from the reference's, on one scale.",
                ),
                io.String.Output(
                    display_name="table",
                    tooltip="Verdicts with their thresholds, errors per step and per block, and times, as text.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(
        cls, reference=None, candidate_1=None, candidate_2=None, candidate_3=None, candidate_4=None, edge_backend=None
    ):
        return known_slugs(reference, candidate_1, candidate_2, candidate_3, candidate_4, edge_backend)

    @classmethod
    def execute(
        cls,
        model,
        latent_image,
        sampler,
        sigmas,
        noise_seed,
        reference="sdpa",
        positive=None,
        guider=None,
        vae=None,
        candidate_1=NO_SECOND,
        candidate_2=NO_SECOND,
        candidate_3=NO_SECOND,
        candidate_4=NO_SECOND,
        edge_backend=NO_SECOND,
        first_steps=0,
        last_steps=0,
        model_a=None,
        model_b=None,
        model_c=None,
        model_d=None,
    ) -> io.NodeOutput:
        if (positive is None) == (guider is None):
            raise ValueError("Connect either positive (a prompt) or guider, not both and not neither.")
        slugs = [s for s in (candidate_1, candidate_2, candidate_3, candidate_4) if s != NO_SECOND]
        prepared = [
            model_candidate(slot, m) for slot, m in zip(SLOTS, (model_a, model_b, model_c, model_d)) if m is not None
        ]
        candidates = unnamed_twice(
            [backend_candidate(s, edge_backend, first_steps, last_steps) for s in slugs] + prepared
        )
        job = runs.SamplingJob(guider or runs.guider_of(model, positive), latent_image, sampler, sigmas, noise_seed)
        bar = comfy.utils.ProgressBar((len(candidates) + 2) * job.steps)  # and the reference and the control
        found, pictures, heat = compare(model, job, reference, candidates, vae, lambda: bar.update(1))
        text = found.as_text()
        return io.NodeOutput(
            pictures,
            heat,
            text,
            ui={**ui.PreviewText(text).as_dict(), "flux2_compare": [statistics.as_json(found.as_data())]},
        )


# --- a benchmark -----------------------------------------------------------------------------------------------------


def benchmark(
    model, sizes, positive=None, wanted=(), call_repeat=time_backends.REPEAT, step_repeat=3, tick=lambda: None
):
    """Benchmark of a MODEL at [Size]: every available backend on the model's own attention calls, then whole steps.
    wanted: only these slugs.
    """
    positive = positive or model_bench.random_conditioning(model)
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
        found.rows += call_rows(model, size, positive, slugs, call_repeat, tick)
    for size in sizes if step_repeat else ():
        found.rows += [
            step_row(model, size, positive, slug, step_repeat, tick) for slug in (AS_CONNECTED, registry.AUTO, *slugs)
        ]
    return found


def call_rows(model, size, positive, slugs, repeat, tick):
    """Rows of all backends on each kind of call that the model makes at a Size; the reason if the model cannot run
    it.
    """
    try:
        calls = model_bench.captured(model, size, positive)
    except Exception as error:  # a picture too large for this card, say: the other sizes go on
        comfy.model_management.soft_empty_cache()
        return [
            BenchmarkRow(
                str(size),
                AS_CONNECTED,
                "attention",
                reason=f"The model could not run this size: {runs.reason_of(error)}",
            )
        ]
    if not calls:
        return [
            BenchmarkRow(
                str(size),
                AS_CONNECTED,
                "attention",
                reason="No attention call of this model could be seen, as in compiled blocks. Measure the model "
                "before it is compiled.",
            )
        ]
    free = comfy.model_management.get_free_memory(model.load_device) / 2
    return [time_backends.bench_backend(str(size), call, slug, repeat, tick, free) for call in calls for slug in slugs]


def step_row(model, size, positive, slug, repeat, tick):
    """The row of whole steps with a backend; AS_CONNECTED leaves the model's attention to whoever holds it."""
    row = BenchmarkRow(str(size), slug, STEP, exact=slug not in registry.ROWS or registry.row(slug).exact)
    try:
        chosen = model if slug == AS_CONNECTED else backend_candidate(slug).transform(model)
        timing = Timing.of(model_bench.step_times(chosen, size, positive, repeat, tick))
        row.kernel, calls = ("", None) if slug == AS_CONNECTED else log_of(chosen)
        row.timing, row.reason = (None, COMPILED_BEFORE) if calls == 0 else (timing, "")
    except Exception as error:  # this backend at this size is out, with the reason; the others go on
        comfy.model_management.soft_empty_cache()
        row.reason = runs.reason_of(error)
    return row


def stopper(bar):
    """A tick that moves the progress bar and raises when the user cancels."""

    def tick():
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update(1)

    return tick


def ticks(model, sizes, wanted, call_repeat, step_repeat):
    """How many ticks a benchmark makes, if each size has one kind of call."""
    slugs = len(time_backends.available(model.load_device, wanted))
    return max(
        1,
        len(sizes)
        * (slugs * (time_backends.WARM_UP + call_repeat) + (slugs + 2) * (step_repeat + 1) * bool(step_repeat)),
    )


def save(data):
    """Write a benchmark into ComfyUI's output folder and say where. A disk that refuses costs only the file: what was
    measured is on the node.
    """
    try:
        return f"Saved as {write_json(data)} in ComfyUI's output folder."
    except OSError as error:
        return (
            f"The JSON file could not be saved in ComfyUI's output folder: {error.strerror or error}. Make room or "
            "give ComfyUI the right to write there."
        )


def write_json(data):
    """A new file in the output folder, never in the place of another one (two ComfyUI may share it); returns its path
    below that folder.
    """
    folder, stamp = "flux2_attention", time.strftime("%Y%m%d-%H%M%S")
    os.makedirs(os.path.join(folder_paths.get_output_directory(), folder), exist_ok=True)
    for again in itertools.count(1):
        name = os.path.join(folder, f"benchmark-{stamp}{f'-{again}' if again > 1 else ''}.json")
        try:
            with open(os.path.join(folder_paths.get_output_directory(), name), "x", encoding="utf-8") as handle:
                json.dump(data, handle, indent=1)
            return name
        except FileExistsError:
            continue


class Flux2BenchmarkAttention(io.ComfyNode):
    """Time every backend on this model and card."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Flux2BenchmarkAttention",
            display_name="Benchmark Attention",
            category=f"{CATEGORY}/measure",
            is_output_node=True,
            description="Times every attention backend that runs here on the calls that this model really makes, then "
            "whole steps of the model. Gives a chart, "
            "a table with the reasons of the backends that cannot run, and a JSON file in ComfyUI's output folder. "
            "The model stays as it is.",
            search_aliases=["speed", "it/s", "fastest attention", "time", "attention backend"],
            inputs=[
                io.Model.Input("model", tooltip="The model to measure, with everything that other nodes did to it."),
                io.String.Input(
                    "sizes",
                    default="1024x1024",
                    tooltip="Image sizes, separated by commas. +1 behind a size adds a reference image of "
                    "1024x1024: 1024x1024, 1024x1024+1, 2048x2048.",
                ),
                io.Conditioning.Input(
                    "positive",
                    optional=True,
                    tooltip="A prompt. FLUX.2 needs none: noise in its place takes the same time. Other models need "
                    "one.",
                ),
                io.String.Input(
                    "backends",
                    display_name="only these (empty = all)",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="Only these kernels, separated by commas. Empty: every one that can run here.",
                ),
                io.Int.Input(
                    "call_repeat",
                    display_name="timed calls",
                    default=time_backends.REPEAT,
                    min=1,
                    max=1000,
                    optional=True,
                    advanced=True,
                    tooltip="How often each attention call is timed, after warming up. The median counts.",
                ),
                io.Int.Input(
                    "step_repeat",
                    display_name="timed steps (0 = skip)",
                    default=3,
                    min=0,
                    max=100,
                    optional=True,
                    advanced=True,
                    tooltip="How many whole steps are timed for each backend, after one that warms up. 0: attention "
                    "calls only.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="chart",
                    tooltip="Bars of the medians, with the spread. Needs matplotlib; without it, a sentence that says "
                    "so.",
                ),
                io.String.Output(
                    display_name="table",
                    tooltip="Every figure, and the reasons of the backends that cannot run here, as text.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, sizes=None, backends=None):
        try:
            model_bench.sizes(sizes) if sizes is not None else None
        except ValueError as error:
            return str(error)
        return known_slugs(*names(backends or ""))

    @classmethod
    def execute(
        cls, model, sizes, positive=None, backends="", call_repeat=time_backends.REPEAT, step_repeat=3
    ) -> io.NodeOutput:
        wanted, parsed = names(backends), model_bench.sizes(sizes)
        tick = stopper(comfy.utils.ProgressBar(ticks(model, parsed, wanted, call_repeat, step_repeat)))
        found = benchmark(model, parsed, positive, wanted, call_repeat, step_repeat, tick)
        found.notes += [sentence for sentence in figures.absent() if sentence == figures.NO_CHART]
        data = statistics.as_json(found.as_data())
        text = f"{found.as_text()}\n\n{save(data)}"
        return io.NodeOutput(
            figures.chart(found), text, ui={**ui.PreviewText(text).as_dict(), "flux2_benchmark": [data]}
        )


def names(text):
    """The slugs in a list separated by commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


NODES = [Flux2CompareAttention, Flux2BenchmarkAttention]
