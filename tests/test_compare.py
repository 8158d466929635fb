"""The compare and benchmark nodes on a real FLUX.2 MODEL: faults are caught, exact kernels are not, whatever fails is a
row; and both run headless.

Faults and exact kernels of other rounding are fake backends (fault_backends.py), judged on the small model that was
trained to draw: random weights make flat scores, which forgive. All other tests take any small FLUX.2. Not covered: GPU
kernels, which docs/ has figures for.
"""

import dataclasses
import json
import os
import subprocess
import sys
import types

import pytest
import torch

import fault_backends as fakes
from comfy_server import drawing_models
from fault_backends import FAITHFUL, FAULTS, GROSS, slug
from server_fixture import SCRIPTS

STEPS, PIXELS = 3, (128, 96)
PROMPT = "a small red star above a large blue circle on a grey background"


@pytest.fixture(scope="module")
def tools(comfy):
    """The nodes and what they stand on, imported after ComfyUI is importable."""
    import comfy.sd
    import comfy.utils
    from flux2_pack.attention.measuring import statistics
    from flux2_pack.flux2.measuring import capture, sampling
    from flux2_pack.flux2 import attention_slot as patch
    from flux2_pack.flux2.select_attention import select
    from flux2_pack.flux2.measuring import benchmark, compare, result_file
    from flux2_pack.nodes import compare as nodes
    from flux2_pack.nodes import figures
    import comfy

    return types.SimpleNamespace(
        comfy=comfy,
        nodes=nodes,
        comparing=compare,
        timing=benchmark,
        kept=result_file,
        figures=figures,
        measure=statistics,
        bench=capture,
        runs=sampling,
        patch=patch,
        select=select,
    )


def computing_in(dtype, tools, path):
    """MODEL of a file that computes in `dtype`. On a CPU ComfyUI would compute bfloat16 weights in float32; a GPU does
    not, and neither does this.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tools.comfy.model_management, "unet_manual_cast", lambda *_, **__: None)
        return tools.comfy.sd.load_diffusion_model(str(path), model_options={"dtype": dtype})


@pytest.fixture(scope="module")
def flux2(tools, small_models):
    return computing_in(torch.float32, tools, small_models["model"])


@pytest.fixture(scope="module")
def drawn_prompt(tools):
    """The conditioning of a prompt that the trained model draws."""
    from flux2_pack.flux2.loading import load
    from flux2_pack.flux2.prompts.encode import encode

    with torch.inference_mode():
        done = encode(load.load_text_encoder(drawing_models()["text_encoders"][0]), PROMPT)
    return [[context, {**values, "guidance": 4.0}] for context, values in done.conditioning]


@pytest.fixture(scope="module")
def vae(tools, small_models):
    return tools.comfy.sd.VAE(sd=tools.comfy.utils.load_torch_file(str(small_models["vae"])))


def job(tools, model, steps=STEPS, seed=0, positive=None):
    return tools.bench.sampling_job(
        model, tools.bench.Size(*PIXELS), positive or tools.bench.random_conditioning(model, seed), steps, seed
    )


def compare_with_figures(tools, *arguments, **options):
    """(Comparison, images side by side, heat maps), as the node makes them."""
    found, images = tools.comparing.compare(*arguments, **options)
    (_, base), *others = images
    return found, tools.figures.side_by_side(images), tools.figures.heat_maps(base, others)


def compared(tools, model, slugs, reference="sdpa", vae=None, **options):
    """(Comparison, pictures, heat map) of backends by slug."""
    with torch.inference_mode():
        return compare_with_figures(
            tools,
            model,
            job(tools, model, **options),
            reference,
            [tools.comparing.backend_variant(s) for s in slugs],
            vae,
        )


def rows(comparison):
    return {row.name: row for row in comparison.rows}


# --- faults and faithful kernels -------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def judged(request, tools, drawn_prompt):
    """{name: Row} of every faithful kernel and every fault on the trained model, in two number formats."""
    model = computing_in(request.param, tools, drawing_models()["diffusion_models"][0])
    with fakes.registered():
        found, _, _ = compared(tools, model, [slug(f) for f in (*FAITHFUL, *FAULTS)], positive=drawn_prompt)
    assert found.control.name == "control: sdpa-math against sdpa"
    print(found.as_text())
    return rows(found)


@pytest.mark.parametrize("function", FAITHFUL)
def test_an_exact_kernel_that_rounds_in_another_way_is_rounding_noise(tools, judged, function):
    row = judged[slug(function)]
    assert row.verdict.word == tools.measure.NOISE, row.verdict
    assert row.verdict.attention_ratio < 1.6 and row.verdict.latent_ratio < 2, (
        "the thresholds leave room: see Thresholds"
    )
    assert not row.evidence.identical


@pytest.mark.parametrize("function", FAULTS)
def test_a_fault_is_never_rounding_noise(tools, judged, function):
    if function is fakes.one_key_of_padding and judged[slug(function)].evidence.calls[0, "double 0"].eps > 1e-3:
        pytest.skip("one key of padding in 560 lies below bfloat16's own rounding")
    verdict = judged[slug(function)].verdict
    assert verdict.word in (tools.measure.SLIGHT, tools.measure.DIFFERENT), verdict
    assert verdict.attention_ratio > tools.measure.Thresholds().attention_ratio


@pytest.mark.parametrize("function", GROSS)
def test_a_gross_fault_is_a_different_picture(tools, judged, function):
    assert judged[slug(function)].verdict.word == tools.measure.DIFFERENT, judged[slug(function)].verdict


@pytest.mark.parametrize("seed", range(2))
def test_other_seeds_keep_the_verdicts(tools, flux2, seed):
    with fakes.registered():
        found, _, _ = compared(
            tools, flux2, [slug(fakes.by_definition), slug(fakes.scale_off_by_a_percent)], steps=2, seed=seed + 1
        )
    first, second = found.rows
    assert first.verdict.word == tools.measure.NOISE and second.verdict.word != tools.measure.NOISE


def test_a_fault_in_pytorchs_own_kernel_cannot_become_the_yardstick(tools, flux2, monkeypatch):
    """The control is made of kernels that were near float32 in this very run: a broken one would excuse itself."""
    from flux2_pack.attention import registry

    adapters = dict(registry._module("sdpa")[0].ADAPTERS)
    monkeypatch.setitem(registry._module("sdpa")[0].ADAPTERS, "sdpa-math", fakes.Fake(fakes.scale_off_by_a_percent))
    found, _, _ = compared(tools, flux2, ["sdpa-math"], steps=1)
    assert found.control is None and "no control" in found.control_note
    assert found.rows[0].verdict.word == tools.measure.NO_VERDICT
    monkeypatch.setitem(registry._module("sdpa")[0].ADAPTERS, "sdpa-flash", fakes.Fake(fakes.by_definition))
    found, _, _ = compared(tools, flux2, ["sdpa-math"], steps=1)
    assert (
        found.control.name == "control: sdpa-flash against sdpa" and found.rows[0].verdict.word == tools.measure.SLIGHT
    )
    assert adapters["sdpa"] is registry._module("sdpa")[0].ADAPTERS["sdpa"]


# --- rows that are no comparison -------------------------------------------------------------------------------------


def test_a_backend_and_itself_differ_by_exactly_nothing(tools, flux2, vae):
    found, pictures, heat = compared(tools, flux2, ["sdpa", "sdpa-math"], vae=vae)
    same, other = found.rows
    assert same.evidence.identical and all(
        d.relative == 0 and d.cosine == 1 and d.change == 0 for d in same.evidence.latents
    )
    assert same.verdict.word == tools.measure.NOISE and "identical" in same.verdict.why
    assert same.psnr == float("inf") and same.ssim == pytest.approx(1) and 60 < other.psnr < float("inf")
    assert not other.evidence.identical and len(same.evidence.latents) == STEPS + 1
    assert pictures.shape[1] > PIXELS[1] and heat.shape[0] == 1 and 0 <= heat.min() and heat.max() <= 1


def test_nan_a_crash_and_an_absent_library_are_rows_with_reasons(tools, flux2):
    with fakes.registered():
        found, pictures, _ = compared(tools, flux2, [slug(fakes.nan), slug(fakes.raises), "flash4", "sdpa-math"])
    broken, crashed, absent, fine = found.rows
    assert broken.verdict.word == tools.measure.DIFFERENT and "NaN" in broken.reason and broken.evidence.non_finite > 0
    assert crashed.evidence is None and "illegal memory access" in crashed.reason
    assert absent.evidence is None and "needs an NVIDIA GPU" in absent.reason and "pip install" not in absent.reason
    assert fine.verdict.word == tools.measure.NOISE and torch.isfinite(pictures).all()
    text = found.as_text()
    assert text.count("did not run") == 4 and all(row.reason in text for row in found.rows)
    json.dumps(tools.measure.as_json(found.as_data()), allow_nan=False)


def test_gross_faults_are_refused_by_the_selectors_test_call_already(tools, flux2):
    with fakes.registered(probed=True):
        found, _, _ = compared(tools, flux2, [slug(fakes.head_dropped)], steps=1)
    assert "gave a wrong result" in found.rows[0].reason


def test_a_reference_that_cannot_run_stops_with_its_reason(tools, flux2):
    with pytest.raises(ValueError, match=r"(?s)'flash4' could not run, so there is nothing to compare with.*NVIDIA"):
        compared(tools, flux2, ["sdpa"], reference="flash4")


def test_a_schedule_without_steps_gets_no_verdict(tools, flux2):
    """core's schedulers give one for denoise 0; everything is equal then, and "same as rounding noise" would be a bare
    pass.
    """
    for sigmas in (torch.FloatTensor([]), torch.zeros(1)):
        with pytest.raises(
            ValueError, match="schedule has no step, so there is nothing to compare with.*denoise above 0"
        ):
            compare_with_figures(tools, flux2, dataclasses.replace(job(tools, flux2), sigmas=sigmas), "sdpa", [])


def test_a_reason_is_more_than_a_word(tools):
    said = tools.runs.reason_of
    assert (
        said(KeyError("slot")) == "KeyError: 'slot'"
        and said(RuntimeError()) == "RuntimeError"
        and said(RuntimeError("It is too large.")) == "It is too large."
    )


def test_a_cancel_is_not_a_row(tools, flux2):
    cancel = tools.comfy.model_management.InterruptProcessingException

    def tick():
        raise cancel

    with torch.inference_mode(), pytest.raises(cancel):
        compare_with_figures(tools, flux2, job(tools, flux2), "sdpa", [], tick=tick)


def test_a_quantised_reference_is_judged_by_two_exact_kernels(tools, flux2):
    from flux2_pack.attention import registry

    with fakes.registered(), pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            registry.ROWS,
            slug(fakes.fp8_values_unscaled),
            registry.BackendRow("fake", "a test", registry.ANY, False, "", ""),
        )
        found, _, _ = compared(tools, flux2, ["sdpa"], reference=slug(fakes.fp8_values_unscaled), steps=1)
    assert found.control.name == "control: sdpa-flash against sdpa-math"
    assert found.rows[0].verdict.word != tools.measure.NOISE


# --- schedules, prepared models, guiders -----------------------------------------------------------------------------


def test_a_precision_schedule_is_exact_where_it_says_so(tools, flux2):
    with fakes.registered(), torch.inference_mode():
        scheduled = tools.comparing.backend_variant(slug(fakes.fp8_values_unscaled), "sdpa", 2, 1)
        found, _, _ = compare_with_figures(
            tools,
            flux2,
            job(tools, flux2, steps=4),
            "sdpa",
            [scheduled, tools.comparing.backend_variant(slug(fakes.fp8_values_unscaled))],
        )
    with_edges, without = found.rows
    assert "sdpa in 2 first and 1 last steps" in with_edges.name and "; " in with_edges.ran
    first, second, third, _, last = with_edges.evidence.latents
    assert first.identical and second.identical and not third.identical
    assert last.relative < without.evidence.latents[-1].relative


def progress(tools, monkeypatch):
    """A list that gets (value, total) of every move of ComfyUI's progress bar."""
    moved = []
    monkeypatch.setattr(
        tools.comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, preview, node_id=None: moved.append((value, total))
    )
    return moved


def test_a_prepared_model_and_a_guider_are_candidates_like_any(tools, flux2, monkeypatch):
    nodes, moved = tools.nodes, progress(tools, monkeypatch)
    prepared = tools.select(flux2, "sdpa-math")[0]
    base = job(tools, flux2)
    with torch.inference_mode():
        output = nodes.Flux2CompareAttention.execute(
            flux2,
            base.latent,
            base.sampler,
            base.sigmas,
            0,
            guider=base.guider,
            candidate_1="sdpa-math",
            model_a=prepared,
            model_b=flux2,
        )
    assert len(moved) > 3 and moved == sorted(moved) and {total for _, total in moved} == {5 * STEPS}, (
        "reference, three candidates, the control"
    )
    (data,) = output.ui["flux2_compare"]
    names = [row["name"] for row in data["candidates"]]
    assert names == ["sdpa-math", "model_a (sdpa-math)", "model_b"] and output.ui["text"][0] == output.args[2]
    assert (
        data["candidates"][0]["latent"] == data["candidates"][1]["latent"] and "No VAE is connected" in output.args[2]
    )
    assert {"machine", "settings", "thresholds", "control", "reference"} <= data.keys() and len(
        data["candidates"][0]["steps"]
    ) == STEPS


def test_a_disk_that_refuses_costs_the_slider_and_says_so(tools, flux2, monkeypatch):
    base = job(tools, flux2)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tools.nodes.ui, "PreviewImage", full)
    inputs = {"positive": tools.bench.random_conditioning(flux2), "candidate_1": "sdpa-math"}
    with torch.inference_mode():
        output = tools.nodes.Flux2CompareAttention.execute(flux2, base.latent, base.sampler, base.sigmas, 0, **inputs)
    assert output.ui["flux2_pair"] == [] and tools.nodes.NO_SLIDER in output.args[2]


@pytest.mark.parametrize("given", [0, 2])
def test_a_prompt_or_a_guider_is_needed_and_not_both(tools, flux2, given):
    base = job(tools, flux2)
    inputs = {"positive": tools.bench.random_conditioning(flux2), "guider": base.guider} if given else {}
    with pytest.raises(ValueError, match="either positive .* or guider"):
        tools.nodes.Flux2CompareAttention.execute(flux2, base.latent, base.sampler, base.sigmas, 0, **inputs)


def compiled_as_by_core(model):
    """A clone, its blocks compiled without guards on transformer_options, as core's node and its followers do."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    torch._dynamo.reset()
    clone = model.clone(disable_dynamic=True)
    set_torch_compile_wrapper(
        model=clone,
        backend="aot_eager",
        options={"guard_filter_fn": lambda entries: ["transformer_options" not in e.name for e in entries]},
        keys=[f"diffusion_model.{kind}_blocks.{i}" for kind, n in (("double", 2), ("single", 4)) for i in range(n)],
    )
    return clone


@pytest.mark.parametrize("node", ["compare", "compare as model_a", "benchmark"])
def test_a_compiled_model_still_draws_the_same_afterwards(tools, flux2, node):
    """Its graphs are traced in the first run. Were that a run of these nodes, they would keep our guest, and the next
    picture would fail or differ.
    """
    model = compiled_as_by_core(flux2)
    with torch.inference_mode():
        if node == "benchmark":
            found = tools.timing.benchmark(
                model, [tools.bench.Size(*PIXELS)], wanted=["sdpa-math"], call_repeat=1, step_repeat=1
            )
            assert next(row for row in found.rows if row.backend == "as connected" and row.call == "step").timing
        else:
            prepared = [tools.comparing.model_variant("a", model)] if node != "compare" else []
            compare_with_figures(tools, flux2 if prepared else model, job(tools, flux2, steps=2), "sdpa-math", prepared)
        assert torch.equal(
            tools.runs.run(model, job(tools, model, steps=2), None),
            tools.runs.run(flux2, job(tools, flux2, steps=2), None),
        )


def test_a_model_compiled_before_the_selection_is_not_believed(tools, flux2):
    """Its graph may keep the attention of the selection that it was compiled with: such a row says so instead of
    comparing a backend with itself.
    """
    model = compiled_as_by_core(flux2)
    found, _, _ = compared(tools, model, ["sdpa-math"], steps=2)
    (row,) = found.rows
    whole = "sdpa-math (PyTorch math), 12 calls"
    assert (
        row.ran == whole
        and not row.evidence.identical
        or "select first, compile behind it" in row.reason
        and row.evidence is None
    ), row
    assert found.control is None or whole in row.ran
    assert found.reference.ran == "sdpa (PyTorch flash), 12 calls"


def test_calls_that_went_elsewhere_are_said(tools):
    found = tools.runs.Recording("sdpa-math", calls=8)
    assert "Only 8 of 12 attention calls" in tools.comparing.missed_calls(found, 12) and tools.comparing.missed_calls(
        found, 8
    ) == "" == tools.comparing.missed_calls(found, None)
    assert "Only 0 of its" in tools.comparing.missed_calls(tools.runs.Recording("x", calls=0), None)
    assert tools.comparing.missed_calls(tools.runs.Recording("a model without a log"), 12) == ""


def test_the_model_is_left_as_it_was(tools, flux2):
    options, wrappers, patches = json.dumps(flux2.model_options, default=str), dict(flux2.wrappers), dict(flux2.patches)
    compared(tools, flux2, ["sdpa-math"])
    with torch.inference_mode():
        tools.timing.benchmark(flux2, tools.bench.sizes("64x64"), wanted=["sdpa"], call_repeat=1, step_repeat=1)
    assert (
        json.dumps(flux2.model_options, default=str) == options
        and flux2.wrappers == wrappers
        and flux2.patches == patches
    )
    assert tools.patch.override_of(flux2) is None


@pytest.mark.parametrize("steps, checked", [(1, {0}), (2, {0}), (3, {0, 2}), (4, {0, 2, 3}), (20, {0, 10, 19})])
def test_some_steps_are_checked_and_some_are_timed(tools, steps, checked):
    assert tools.runs.checked_steps(steps) == checked


def test_without_matplotlib_and_scikit_image_there_are_numbers_and_a_sentence(tools, flux2, vae, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg", "skimage", "skimage.metrics"):
        monkeypatch.setitem(sys.modules, name, None)
    found, _, heat = compared(tools, flux2, ["sdpa-math"], vae=vae, steps=1)
    assert found.rows[0].ssim is None and found.rows[0].psnr > 60
    assert found.as_text().count("pip install matplotlib scikit-image") == 1 and heat.shape[-1] == 3
    assert tools.figures.chart(None).shape == (1, 60, 900, 3)


# --- the benchmark ---------------------------------------------------------------------------------------------------


def test_the_benchmark_times_the_models_own_calls_and_steps(tools, flux2, monkeypatch, tmp_path):
    import folder_paths

    moved = progress(tools, monkeypatch)
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    with fakes.registered(), torch.inference_mode():
        output = tools.nodes.Flux2BenchmarkAttention.execute(
            flux2, "64x48, 64x64", backends="sdpa, sdpa-math, flash4, fake-raises", call_repeat=2, step_repeat=1
        )
    assert len(moved) > 5 and moved == sorted(moved) and {total for _, total in moved} == {60}
    chart, text = output.args
    data = json.loads(next((tmp_path / "flux2_attention").glob("benchmark-*.json")).read_text())
    assert data == output.ui["flux2_benchmark"][0] and data["machine"]["torch"] == torch.__version__
    calls = [r for r in data["rows"] if r["call"] != "step"]
    assert (
        {r["size"] for r in calls} == {"64x48", "64x64"}
        and "524 tokens, 2 heads of 128" in calls[0]["call"]
        and "6 times a step" in calls[0]["call"]
    )
    timed = {r["backend"]: r for r in calls if r["timing"]}
    assert (
        timed.keys() == {"comfyui", "sdpa", "sdpa-math"}
        and timed["sdpa"]["timing"]["runs"] == 2
        and timed["sdpa"]["error"] < 1e-5
        and timed["sdpa"]["tflops"] > 0
    )
    steps = {r["backend"]: r for r in data["rows"] if r["call"] == "step" and r["size"] == "64x48"}
    assert (
        list(steps) == ["comfyui", "auto", "sdpa", "sdpa-math", "fake-raises"]
        and "illegal memory" in steps["fake-raises"]["reason"]
    )
    assert data["missing"].keys() == {"flash4"} and "needs an NVIDIA GPU" in text and "illegal memory" in text
    assert chart.shape[0] == 1 and chart.shape[-1] == 3 and chart.shape[2] >= 900


def hide_calls(tools, monkeypatch):
    """As in a compiled model: the guest of the override slot sees nothing, and a backend selected afterwards gets no
    call.
    """
    monkeypatch.setattr(tools.bench.Capture, "keep", lambda *_: None)
    monkeypatch.setattr(tools.timing, "log_of", lambda model: ("", 0))


def test_the_benchmark_says_when_attention_calls_are_hidden(tools, flux2, monkeypatch):
    hide_calls(tools, monkeypatch)
    with torch.inference_mode():
        found = tools.timing.benchmark(flux2, tools.bench.sizes("64x64"), wanted=["sdpa"], call_repeat=1, step_repeat=1)
    calls, own, connected, *selected = found.rows
    assert connected.backend == "as connected" and own.backend == "comfyui"
    assert (
        calls.timing is None
        and "No attention call of this model could be seen" in calls.reason
        and "before it is compiled" in calls.reason
    )
    assert connected.timing and all(
        row.timing is None and "No attention call reached this backend" in row.reason for row in (own, *selected)
    )
    assert calls.reason in found.as_text()


def test_results_never_replace_one_another(tools, monkeypatch, tmp_path):
    """Two benchmarks in one second, or two ComfyUI processes with one output folder; and a disk that refuses costs only
    the file.
    """
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    monkeypatch.setattr(tools.kept.time, "strftime", lambda _: "20260101-000000")
    said = [tools.kept.save({"run": number}) for number in range(3)]
    files = sorted((tmp_path / "flux2_attention").iterdir())
    assert sorted(json.loads(file.read_text())["run"] for file in files) == [0, 1, 2] and all(
        file.name in "".join(said) for file in files
    )
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(files[0]))
    assert "could not be saved" in tools.kept.save({}) and "Not a directory" in tools.kept.save({})

    def half(data, handle, indent):
        handle.write("{")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    monkeypatch.setattr(tools.kept.json, "dump", half)
    assert "No space left" in tools.kept.save({}) and sorted((tmp_path / "flux2_attention").iterdir()) == files


def test_the_benchmark_stops_when_it_is_cancelled(tools, flux2):
    tools.comfy.model_management.interrupt_current_processing()
    tick = tools.runs.stopper(tools.comfy.utils.ProgressBar(3))
    with torch.inference_mode(), pytest.raises(tools.comfy.model_management.InterruptProcessingException):
        tools.timing.benchmark(flux2, tools.bench.sizes("64x64"), tick=tick)


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "no size"),
        ("big", "'big' is not a size"),
        ("1000x1000", "multiples of 16"),
        ("64x64+x", "is not a size"),
        ("0x64", "multiples of 16"),
    ],
)
def test_sizes_that_cannot_be_drawn_are_refused_when_queued(tools, text, said):
    assert said in tools.nodes.Flux2BenchmarkAttention.validate_inputs(sizes=text)
    assert tools.nodes.Flux2BenchmarkAttention.validate_inputs(sizes="1024x1024+1, 64x32", backends="sdpa") is True
    assert "flash9" in tools.nodes.Flux2BenchmarkAttention.validate_inputs(sizes="64x64", backends="flash9")


def test_references_lengthen_the_sequence(tools, flux2):
    (size,) = tools.bench.sizes("64x64+1")
    with torch.inference_mode():
        (call,) = tools.bench.captured(flux2, size, tools.bench.random_conditioning(flux2))
    assert call.q.shape == (1, 2, 512 + 16 + 4096, 128) and call.count == 6


# --- headless --------------------------------------------------------------------------------------------------------


def program(name, server, model_files, *arguments):
    """A script of scripts/ on the session's server; returns (lines of stdout, its JSON)."""
    flags = ("--model-path", "--text-encoder", "--vae")
    files = [
        str(word)
        for pair in zip(flags, (model_files[f][0] for f in ("diffusion_models", "text_encoders", "vae")))
        for word in pair
    ]
    done = subprocess.run(
        [sys.executable, SCRIPTS / name, "--server", server.url, *files, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    return lines, json.loads(lines[-1])


def test_compare_py_prints_the_table_and_one_json_line(server, model_files, tmp_path):
    lines, data = program(
        "compare.py",
        server,
        model_files,
        "--reference",
        "sdpa-math",
        "--candidate",
        "sdpa-flash",
        "--candidate",
        "flash4",
        "--width",
        96,
        "--height",
        64,
        "--steps",
        2,
        "--output-path",
        tmp_path,
        "--save",
        tmp_path / "accuracy-test.json",
    )
    assert [row["name"] for row in data["candidates"]] == ["sdpa-flash", "flash4"] and data["candidates"][0]["verdict"][
        "word"
    ] == "same as rounding noise"
    assert data["candidates"][0]["ssim"] == pytest.approx(1) and "NVIDIA" in data["candidates"][1]["reason"]
    assert (
        lines[0].startswith("sdpa-flash: same image as sdpa-math")
        and all(os.path.getsize(path) > 500 for path in data["images"])
        and len(data["images"]) == 2
    )
    assert str(tmp_path) not in (tmp_path / "accuracy-test.json").read_text() and server.url not in data["command"]


def test_benchmark_py_prints_the_table_and_one_json_line(server, model_files, tmp_path):
    lines, data = program(
        "benchmark.py",
        server,
        model_files,
        "--sizes",
        "64x64",
        "--backends",
        "sdpa,sdpa-math",
        "--call-repeat",
        2,
        "--step-repeat",
        1,
        "--output-path",
        tmp_path,
    )
    assert lines[0].startswith("64x64: fastest: ") and {r["backend"] for r in data["rows"]} == {
        "sdpa",
        "sdpa-math",
        "auto",
        "comfyui",
    }
    assert os.path.getsize(data["images"][0]) > 5000 and list(
        (server.base / "output" / "flux2_attention").glob("benchmark-*.json")
    )


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--width", "100"], "multiple of 16"),
        (["--candidate", "sdpa"] * 5, "At most four"),
        (["--server", "http://127.0.0.1:9"], "No ComfyUI server answers"),
    ],
)
def test_compare_py_says_what_is_wrong_in_a_sentence(arguments, said):
    done = subprocess.run(
        [sys.executable, SCRIPTS / "compare.py", *arguments], capture_output=True, text=True, timeout=100
    )
    assert (
        done.returncode == 1
        and done.stderr.strip().splitlines()[-1].startswith("compare: ")
        and said in done.stderr
        and "Traceback" not in done.stderr
    )


@pytest.mark.parametrize("name", ["flux2_compare_attention.json", "flux2_benchmark_attention.json"])
def test_workflow_files_name_what_the_server_has(server, name):
    import urllib.request
    import api_workflow

    with urllib.request.urlopen(f"{server.url}/object_info", timeout=60) as answer:
        known = json.load(answer)
    for entry in api_workflow.load(name).values():
        inputs = known[entry["class_type"]]["input"]
        assert set(inputs["required"]) <= set(entry["inputs"]) <= {*inputs["required"], *inputs.get("optional", {})}
        assert entry["_meta"]["title"]


# --- pages -----------------------------------------------------------------------------------------------------------


def test_pages_are_made_from_results_alone(tools, flux2, tmp_path):
    import measured_pages

    found, _, _ = compared(tools, flux2, ["sdpa-math", "flash4"], steps=1)
    with torch.inference_mode():
        speed = tools.timing.benchmark(
            flux2, tools.bench.sizes("64x64"), wanted=["sdpa", "flash4"], call_repeat=1, step_repeat=1
        )
    for name, result in (("accuracy-a", found), ("speed-b", speed)):
        data = {**tools.measure.as_json(result.as_data()), "weights": "small weights", "command": "python scripts/x.py"}
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
    accuracy, fast = (path.read_text() for path in measured_pages.pages(tmp_path, tmp_path / "docs"))
    assert (
        "| `sdpa-math` | same as rounding noise |" in accuracy
        and "| `flash4` | did not run |" in accuracy
        and "needs an NVIDIA GPU" in accuracy
    )
    assert (
        "What random weights can tell" in accuracy
        and "small weights" in accuracy
        and "Thresholds: rounding noise up to 2 times" in accuracy
    )
    assert "| `sdpa` |" in fast and "| `comfyui` |" in fast and "- `flash4`: It needs an NVIDIA GPU" in fast
    assert measured_pages.pages(tmp_path / "docs", tmp_path) == []


def test_the_parts_of_a_step_take_the_fastest_exact_attention():
    import step_parts

    row = lambda backend, ms, exact, call="attention": {
        "size": "1024x1024",
        "backend": backend,
        "call": call,
        "exact": exact,
        "timing": ms and {"ms": ms},
    }
    rows = [
        row("sdpa", 2.0, True),
        row("flash4", 1.5, True),
        row("aiter-sage", 1.0, False),
        row("sdpa-math", None, True),
        row("auto", 0.5, True, "step"),
    ]
    assert step_parts.attention_ms({"rows": rows}, "1024x1024") == 1.5


def test_the_pages_in_the_repository_are_those_of_its_results(tmp_path):
    import measured_pages

    written = measured_pages.pages(measured_pages.ROOT / "benchmarks" / "results", tmp_path)
    assert {path.name for path in written} == {"accuracy.md", "speed.md", "steps.md"}
    for path in written:
        assert path.read_text() == (measured_pages.ROOT / "docs" / path.name).read_text(), (
            f"run scripts/measured_pages.py: docs/{path.name} is not what the results say"
        )
