"""The same noise through a reference and several variants of a MODEL, judged by a control: two exact kernels.

found, images = compare(model, job, "comfyui", [backend_variant("auto"), model_variant("a", prepared)])
"""

import dataclasses

import comfy.model_management

from ...attention import registry
from ...attention.errors import UserError
from ...attention.measuring import statistics, time_backends
from ...attention.measuring.accuracy_probe import AttentionProbe
from ...attention.measuring.results import Comparison, ComparisonRow
from ...attention.measuring.statistics import Control, Evidence, Verdict
from .. import attention_slot, select_attention
from ..select_attention import NO_SECOND
from . import sampling

TOPIC = "compare-and-benchmark"
# PyTorch's own kernels, all of the same mathematics: two of them on the same noise are the control. The most different
# one comes first.
CONTROL_ORDER = ("sdpa-math", "sdpa-efficient", "sdpa-cudnn", "sdpa-flash", "sdpa")


# --- variants --------------------------------------------------------------------------------------------------------


def backend_variant(slug, edge_backend=NO_SECOND, first_steps=0, last_steps=0):
    """The Variant of a backend, with a second one in the first and last steps."""
    schedule, name = {}, slug
    if edge_backend != NO_SECOND:
        schedule = {"edge_backend": edge_backend, "first_steps": first_steps, "last_steps": last_steps}
        name = f"{slug}, {edge_backend} in {first_steps} first and {last_steps} last steps"
    return sampling.Variant(name, lambda model: select_attention.select(model, slug, **schedule)[0], selects=True)


def model_variant(slot, model):
    """The Variant of a MODEL that other nodes prepared."""
    dispatcher = attention_slot.dispatcher_of(model)
    return sampling.Variant(f"model_{slot}" + (f" ({dispatcher.describe()})" if dispatcher else ""), lambda _: model)


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


def missed_calls(recording, expected):
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
        "would be of a mixture. A model that was compiled keeps the kernels it was compiled with: select first, "
        "compile behind it, and connect each compiled model to model_a, model_b, model_c or model_d."
    )


# --- a comparison ----------------------------------------------------------------------------------------------------


def compare(model, job, reference, candidates, vae=None, tick=lambda: None, say=lambda text: None):
    """(Comparison, [(name, IMAGE)]): of the reference, then of the variants that ran.

    reference: slug; candidates: [Variant]; vae: without one the images are rough previews; say: hears what is running.
    UserError when the reference cannot run.
    """
    if not job.steps:  # everything would be equal, and the verdict a bare pass
        raise UserError(
            "The schedule has no step, so there is nothing to compare with. Connect sigmas with at least one step and "
            "a denoise above 0.",
            TOPIC,
        )

    def record(candidate):
        say(f"{candidate.name}: {job.steps} steps")
        found = sampling.record(candidate, model, job, AttentionProbe, tick)
        found.ran, calls = log_of(found.model)  # now: a later candidate of a compiled model could still add to this log
        found.calls = calls if candidate.selects else None
        return found

    base = record(backend_variant(reference))
    why = base.error or missed_calls(base, None)
    if why:
        raise UserError(f"The reference '{reference}' could not run, so there is nothing to compare with. {why}", TOPIC)
    tried = [record(c) for c in candidates]
    control, control_row, note = find_control(model, base, tried, record)
    rows = [row_of(recording, base, control) for recording in tried]
    images = images_of(model, vae, [base, *tried])
    for row, recording in zip(rows, tried):
        similarity(row, images.get(recording.name), images[base.name], vae)
    found = Comparison(
        ComparisonRow(base.name, seconds_per_step=base.seconds_per_step, ran=base.ran),
        rows,
        control_row,
        note,
        statistics.machine(model.load_device),
        settings(model, job),
        notes=notes(base, vae),
    )
    return found, [(r.name, images[r.name]) for r in (base, *tried) if r.name in images]


def differences(recording, base):
    return tuple(statistics.difference(a, r) for a, r in zip(recording.latents, base.latents))


def row_of(recording, base, control):
    """The ComparisonRow of a recording: its evidence and verdict, or its reason."""
    why = recording.error or missed_calls(recording, base.calls)
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
        and not missed_calls(recording, calls)
        and all(call.plausible for call in recording.probe.calls.values())
    )


def find_control(model, base, tried, record):
    """(Control, its ComparisonRow, a sentence), or (None, None, why). Two of PyTorch's own kernels on the same noise,
    the reference as one of them if it is exact.
    """
    # ComfyUI's own attention is exact unless a flag of the server says otherwise: `trusted` looks at what it computed
    exact = base.name in (registry.AUTO, registry.COMFYUI) or registry.ROWS[base.name].exact
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
        other = known.get(slug) or record(backend_variant(slug))
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
    said = [] if statistics.has_ssim() else [statistics.NO_SSIM]
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


def images_of(model, vae, recordings):
    """{name: image (B, H, W, 3)} of the recordings that ran; black where the latent has NaN or infinite values."""
    images = {}
    for recording in recordings:
        if recording.latent is not None:
            finite = recording.latent.nan_to_num(0, 0, 0)
            image = sampling.decode(vae, finite) if vae else sampling.rough_image(model, finite)
            images[recording.name] = image if bool(recording.latent.isfinite().all()) else image * 0
    return images


def similarity(row, image, reference, vae):
    """Fill in PSNR and SSIM of a row that has a decoded image."""
    if vae and image is not None and row.evidence and not row.evidence.non_finite:
        row.psnr, row.ssim = statistics.psnr(image, reference), statistics.ssim(image, reference)


def unnamed_twice(candidates):
    """Candidates of one name get numbers: names are keys."""
    seen, out = {}, []
    for c in candidates:
        seen[c.name] = seen.get(c.name, 0) + 1
        out.append(c if seen[c.name] == 1 else dataclasses.replace(c, name=f"{c.name} #{seen[c.name]}"))
    return out
