"""The nodes inside a running ComfyUI, over its API: pictures, latents equal to core's, independent clones, and
refusals in words.

  bash scripts/test.sh -k test_server

The server is the session's one from server_fixture.py: CPU, float32, small models. Core's own text encoder loader
builds the 24B Mistral only, so the core side of a comparison shares our text encoder; its model, sampling and attention
are core's. Not covered: GPU backends (they refuse here, which is tested), the GUI page (its own test), quality of
pictures (the weights are random).
"""

import io
import json
import urllib.request

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import api_workflow
from api_workflow import LOADERS, PictureSettings, fill, nodes_of
from comfy_client import ExecutionFailed, PromptRefused
from server_fixture import DANGLING, TEXT_FILE, TRUNCATED, run, wrong_slot

CPU_BACKENDS = ("auto", "sdpa", "sdpa-flash", "sdpa-math")
SIZE = {"width": 128, "height": 96, "steps": 3}
CALLS = 3 * 6  # steps times blocks: the small model has two double and four single blocks
# Another order of summation in attention moves these latents by 1.1e-7 of their largest value (measured, every backend
# against core's sub-quadratic attention); a softmax scale that is off by a tenth moves them by 1.4e-3.
SAME = 5e-6
# ids in the workflow files
NODE = {"model": "1", "select": "4", "sampler": "12", "report": "13", "decode": "14", "save": "15"}


@pytest.fixture(scope="session")
def names(model_files):
    return {folder: files[0].name for folder, files in model_files.items()}


@pytest.fixture
def workflow(names):
    """Text to image with the small models."""
    return fill(PictureSettings("A red fox", models=names, **SIZE))


@pytest.fixture(scope="session")
def photo(server):
    """A picture in the server's input folder; returns its name."""
    gradient = torch.arange(96 * 128 * 3).reshape(96, 128, 3).remainder(251).to(torch.uint8)
    Image.fromarray(gradient.numpy()).save(server.base / "input" / "photo.png")
    return "photo.png"


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


def with_latents(workflow, *sources):
    """The workflow that saves the latents of these (node, output) links instead of pictures; SaveLatent ids are save-0,
    save-1, ...
    """
    kept = {key: entry for key, entry in workflow.items() if key not in (NODE["decode"], NODE["save"])}
    saves = {
        f"save-{i}": node("SaveLatent", samples=list(link), filename_prefix=f"latents/{i}")
        for i, link in enumerate(sources)
    }
    return {**kept, **saves}


def core(workflow, names):
    """The same graph without our model loader, selector and report."""
    bare = {key: entry for key, entry in workflow.items() if key not in (NODE["select"], NODE["report"])}
    bare[NODE["model"]] = node("UNETLoader", unet_name=names["diffusion_models"], weight_dtype="default")
    nodes_of(bare, "BasicGuider")[0]["inputs"]["model"] = [NODE["model"], 0]
    return with_latents(bare, (NODE["sampler"], 0))


def latents(server, result):
    """The tensors of the SaveLatent nodes, in order."""
    saved = [result.outputs[key]["latents"][0] for key in sorted(result.outputs) if "latents" in result.outputs[key]]
    return [load_file(server.base / "output" / item["subfolder"] / item["filename"])["latent_tensor"] for item in saved]


def difference(ours, reference):
    """Largest deviation relative to the largest value."""
    return ((ours - reference).abs().max() / reference.abs().max()).item()


def alive(server):
    with urllib.request.urlopen(f"{server.url}/system_stats", timeout=30) as answer:
        return answer.status == 200 and server.process.poll() is None


@pytest.fixture(scope="session")
def core_latent(server, names):
    """What core ComfyUI makes of the workflow."""
    plain = core(fill(PictureSettings("A red fox", models=names, **SIZE)), names)
    return latents(server, run(server, plain))[0]


# --- pictures --------------------------------------------------------------------------------------------------------


def test_text_to_image_gives_a_picture_and_a_report(server, workflow):
    result = run(server, workflow)
    (picture,) = result.images()
    with Image.open(server.base / "output" / picture["subfolder"] / picture["filename"]) as image:
        assert image.size == (128, 96)
    (report,) = result.collect("flux2_attention")
    assert report["calls"] == CALLS and report["steps"] == 3
    assert report["backend"] in "".join(result.collect("text"))


@pytest.mark.parametrize("references", [1, 2])
def test_edit_takes_references(server, names, photo, references):
    settings = PictureSettings(
        "Add a hat", models=names, references=(photo,) * references, reference_megapixels=0.01, **SIZE
    )
    result = run(server, fill(settings))
    assert len(result.images()) == 1
    assert result.collect("flux2_attention")[0]["calls"] == CALLS


def test_edit_without_a_size_takes_that_of_the_reference(server, names, photo):
    settings = PictureSettings("Add a hat", models=names, references=(photo,), reference_megapixels=0.02, steps=1)
    (picture,) = run(server, fill(settings)).images()
    with Image.open(io.BytesIO((server.base / "output" / picture["filename"]).read_bytes())) as image:
        assert abs(image.width / image.height - 128 / 96) < 0.2 and image.width % 16 == image.height % 16 == 0


# --- latents ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_latents_equal_core(server, workflow, core_latent, backend):
    workflow[NODE["select"]]["inputs"]["backend"] = backend
    result = run(server, with_latents(workflow, (NODE["report"], 0)))
    (ours,) = latents(server, result)
    assert ours.dtype == torch.float32 and difference(ours, core_latent) < SAME
    (report,) = result.collect("flux2_attention")
    assert report["calls"] == CALLS and (backend == "auto" or report["backend"] == backend)


def test_the_comparison_sees_another_seed(server, workflow, names, core_latent):
    nodes_of(workflow, "RandomNoise")[0]["inputs"]["noise_seed"] = 43
    (other,) = latents(server, run(server, core(workflow, names)))
    assert difference(other, core_latent) > 0.1


def second_branch(workflow, model):
    """Adds a second guider, sampler and latent to the graph; returns the link to its latent."""
    workflow["guider-2"] = node(
        "BasicGuider", model=model, conditioning=nodes_of(workflow, "BasicGuider")[0]["inputs"]["conditioning"]
    )
    workflow["sampler-2"] = {
        "class_type": "SamplerCustomAdvanced",
        "inputs": {**workflow[NODE["sampler"]]["inputs"], "guider": ["guider-2", 0]},
    }
    return ["sampler-2", 0]


def test_two_clones_with_different_backends_do_not_disturb_each_other(server, workflow, core_latent):
    workflow[NODE["select"]]["inputs"]["backend"] = "sdpa"
    workflow["select-2"] = node("Flux2SelectAttention", model=[NODE["model"], 0], backend="sdpa-math")
    latent = second_branch(workflow, ["select-2", 0])
    workflow["report-2"] = node("Flux2AttentionReport", model=["select-2", 0], latent=latent)
    result = run(server, with_latents(workflow, (NODE["report"], 0), ("report-2", 0)))
    assert all(difference(ours, core_latent) < SAME for ours in latents(server, result))
    for key, backend in ((NODE["report"], "sdpa"), ("report-2", "sdpa-math")):
        (report,) = result.outputs[key]["flux2_attention"]
        assert (report["backend"], report["calls"]) == (backend, CALLS)


def test_a_branch_without_the_selector_runs_core(server, workflow, core_latent):
    """The dispatcher lives on the clone: the model that went into the selector is untouched, and its calls are not
    counted.
    """
    workflow[NODE["select"]]["inputs"]["backend"] = "sdpa-math"
    latent = second_branch(workflow, [NODE["model"], 0])
    result = run(server, with_latents(workflow, (NODE["report"], 0), latent))
    selected, plain = latents(server, result)
    assert difference(selected, core_latent) < SAME and torch.equal(plain, core_latent)
    assert result.collect("flux2_attention")[0]["calls"] == CALLS


def test_selecting_twice_replaces_the_first(server, workflow, core_latent):
    workflow["select-1"] = node("Flux2SelectAttention", model=[NODE["model"], 0], backend="sdpa-math")
    workflow[NODE["select"]]["inputs"].update(model=["select-1", 0], backend="sdpa-flash")
    result = run(server, with_latents(workflow, (NODE["report"], 0)))
    assert difference(latents(server, result)[0], core_latent) < SAME
    (report,) = result.collect("flux2_attention")
    assert (report["backend"], report["calls"]) == ("sdpa-flash", CALLS)


# --- refusals --------------------------------------------------------------------------------------------------------


def refused(server, workflow, kind=(ExecutionFailed, PromptRefused)):
    """The sentence of an error that the workflow must end in; the server goes on."""
    with pytest.raises(kind) as caught:
        run(server, workflow)
    assert alive(server)
    return str(caught.value)


BAD_FILES = [(folder, file) for folder in LOADERS for file in (TEXT_FILE, TRUNCATED, DANGLING, wrong_slot(folder))]


@pytest.mark.parametrize(
    ("folder", "file"), BAD_FILES, ids=[f"{folder}-{file.split('.')[0]}" for folder, file in BAD_FILES]
)
def test_a_bad_file_is_refused_in_words(server, workflow, folder, file):
    loader, key = LOADERS[folder]
    nodes_of(workflow, loader)[0]["inputs"][key] = file
    sentence = refused(server, workflow)
    assert file in sentence and loader in sentence
    assert ("points nowhere" in sentence) == (file == DANGLING)
    for raw in ("Traceback", "KeyError", "HeaderTooLarge", "size mismatch", "NoneType"):
        assert raw not in sentence


@pytest.mark.parametrize("folder", LOADERS)
def test_a_missing_file_is_refused_when_queued(server, workflow, folder):
    loader, key = LOADERS[folder]
    nodes_of(workflow, loader)[0]["inputs"][key] = "nowhere.safetensors"
    sentence = refused(server, workflow, PromptRefused)
    assert "nowhere.safetensors" in sentence and key in sentence and loader in sentence


def test_an_unknown_backend_is_refused_when_queued(server, workflow):
    workflow[NODE["select"]]["inputs"]["backend"] = "flash9"
    sentence = refused(server, workflow, PromptRefused)
    assert "flash9" in sentence and "sdpa-math" in sentence and "Select Attention" in sentence


@pytest.mark.parametrize(
    ("backend", "hint"),
    [("flash2", "NVIDIA"), ("flash4", "auto finds one"), ("aiter", "an AMD GPU"), ("sdpa-cudnn", "NVIDIA")],
)
def test_a_backend_that_cannot_run_here_refuses_with_reasons(server, workflow, backend, hint):
    workflow[NODE["select"]]["inputs"]["backend"] = backend
    sentence = refused(server, workflow)
    assert backend in sentence and hint.lower() in sentence.lower()


def test_after_all_refusals_a_picture_still_comes_out(server, workflow):
    nodes_of(workflow, "RandomNoise")[0]["inputs"]["noise_seed"] = 7
    assert len(run(server, workflow).images()) == 1


# --- the workflow files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [api_workflow.TEXT_TO_IMAGE, api_workflow.IMAGE_EDIT])
def test_workflow_files_name_what_the_server_has(server, name):
    """Every class is known, every input exists, every required input is given."""
    with urllib.request.urlopen(f"{server.url}/object_info", timeout=60) as answer:
        known = json.load(answer)
    for entry in api_workflow.load(name).values():
        inputs = known[entry["class_type"]]["input"]
        assert set(inputs["required"]) <= set(entry["inputs"]) <= {*inputs["required"], *inputs.get("optional", {})}
        assert entry["_meta"]["title"]
