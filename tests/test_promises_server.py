"""Promises of the docs that only a running ComfyUI can break: refusals that leave the server at work, what the loaders
offer, names that stay in their folders.

Each test names the sentence it stands for. Pictures, latents and refusals of backends are in test_server.py, prompts on
disk in test_prompt_server.py, several GPUs in test_parallel_server.py.
"""

import json
import shutil
import urllib.request

import pytest
import torch
from safetensors.torch import save_file

from api_workflow import PictureSettings, fill, nodes_of
from comfy_client import ExecutionFailed, PromptRefused
from server_fixture import TEXT_FILE, run
from test_server import NODE, SIZE, alive, core_latent, difference, latents, names, node, with_latents  # noqa: F401
from test_server import SAME, workflow  # noqa: F401


def shown(server, workflow):  # noqa: F811
    """What the PreviewAny node "show" of a workflow showed."""
    return run(server, workflow).outputs["show"]["text"][0]


def info_of(name):
    """A workflow that asks FLUX.2 Model Info about a file."""
    return {"info": node("Flux2ModelInfo", file_name=name), "show": node("PreviewAny", source=["info", 0])}


def offered(server, node_type, name):
    """The choices of a combo, as the page gets them."""
    with urllib.request.urlopen(f"{server.url}/object_info/{node_type}", timeout=60) as answer:
        kind, *options = json.load(answer)[node_type]["input"]["required"][name]
    return options[0]["options"] if kind == "COMBO" else kind


# --- prompts.md, SECURITY.md: no text takes the server down ----------------------------------------------------------


@pytest.mark.parametrize("encode", ["CLIPTextEncode", "Flux2EncodePrompt"])
@pytest.mark.parametrize(
    "text, said",
    [
        ("a" * 200_001, "200,?001|200,?000"),
        ("word \x00\x07\x1b\u202e\ud7ff\uffff [IMG] [/INST] <s> embedding: (a:1e999)", None),
        ("\u0301" * 40 + "e\u200d" * 40, None),
    ],
    ids=["too long", "odd", "marks"],
)
def test_no_prompt_ends_the_server(server, names, encode, text, said):  # noqa: F811
    """More than 200,000 letters are refused in a sentence; anything else is encoded."""
    asked = {
        "load": node("Flux2LoadTextEncoder", text_encoder_name=names["text_encoders"], device="default"),
        "encode": node(encode, clip=["load", 0], text=text),
        "show": node("PreviewAny", source=["encode", 0]),
    }
    if said:
        with pytest.raises(ExecutionFailed, match=said) as refused:
            run(server, asked)
        assert "Traceback" not in str(refused.value)
    else:
        assert run(server, asked).outputs["show"]["text"]
    assert alive(server)


# --- troubleshooting.md: sentences that lead somewhere ---------------------------------------------------------------


def test_an_error_of_a_run_names_its_section(server, workflow):  # noqa: F811
    """Most errors end with *More:* and the address of a section of troubleshooting.md."""
    workflow[NODE["select"]]["inputs"]["backend"] = "flash3"
    with pytest.raises(ExecutionFailed, match=r"(?s)cannot run here.*More: \S+troubleshooting\S*#backend-unavailable"):
        run(server, workflow)


def test_model_info_describes_without_loading_and_says_what_the_loader_would(server, model_files):
    """*FLUX.2 Model Info* runs the same checks without loading."""
    before = server.log.read_text(errors="replace").count("model weight dtype")
    good = shown(server, info_of(f"diffusion_models/{model_files['diffusion_models'][0].name}"))
    bad = shown(server, info_of(f"diffusion_models/{TEXT_FILE}"))
    assert "FLUX.2" in good and "Load FLUX.2 Model" in good
    assert "safetensors" in bad and "Traceback" not in bad
    assert server.log.read_text(errors="replace").count("model weight dtype") == before


def test_a_lora_of_which_nothing_fits_is_refused_with_what_it_is_for(server, workflow):  # noqa: F811
    """*Load FLUX.2 LoRA* refuses a file of which nothing fits with what it is for."""
    folder = server.base / "models" / "loras"
    folder.mkdir(exist_ok=True)
    file = folder / "for-klein-4b.safetensors"
    base = "diffusion_model.single_blocks.0.linear2"
    save_file({f"{base}.lora_A.weight": torch.zeros(4, 12288), f"{base}.lora_B.weight": torch.zeros(3072, 4)}, file)
    try:
        workflow["lora"] = node("Flux2LoadLoRA", model=[NODE["model"], 0], lora_name=file.name, strength=1.0)
        workflow[NODE["select"]]["inputs"]["model"] = ["lora", 0]
        with pytest.raises(ExecutionFailed, match="klein 4B"):
            run(server, workflow)
    finally:
        file.unlink()


# --- SECURITY.md: names stay in their folders ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../secret.safetensors", "..", ".", "/etc/passwd", "a/../../secret.safetensors"])
def test_names_from_a_workflow_cannot_leave_their_folder(server, names, name):  # noqa: F811
    """Names from a workflow cannot leave the folder that they belong to."""
    (server.base / "models" / "secret.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ")
    (server.base / "secret.safetensors").write_text("a secret prompt")
    loader = {"class_type": "Flux2LoadTextEncoder", "inputs": {"text_encoder_name": names["text_encoders"]}}
    loader["inputs"] |= {"device": "default", "load": "when needed"}
    for asked in (
        {"x": node("Flux2LoadModel", model_name=name, weight_dtype="as stored"), "s": shows("x")},
        {"x": node("Flux2LoadTextEncoder", text_encoder_name=name, device="default"), "s": shows("x")},
        {"x": node("Flux2LoadVAE", vae_name=name, precision="auto"), "s": shows("x")},
        {"x": node("Flux2ModelInfo", file_name=name), "s": shows("x")},
        {"l": loader, "x": node("Flux2EncodePrompts", clip=["l", 0], prompts="", file=name), "s": shows("x", 1)},
    ):
        with pytest.raises((PromptRefused, ExecutionFailed)) as refused:
            run(server, asked)
        assert "a secret prompt" not in str(refused.value) and "Traceback" not in str(refused.value)
    assert alive(server)


def shows(key, output=0):
    return node("PreviewAny", source=[key, output])


# --- loading.md ------------------------------------------------------------------------------------------------------


def test_a_folder_is_offered_in_place_of_the_files_that_it_is_made_of(server, model_files):
    """A folder is offered in place of the files that it is made of, and of no others."""
    folder = server.base / "models" / "diffusion_models" / "in-shards"
    folder.mkdir()
    weight = {"single_transformer_blocks.0.norm.linear.weight": torch.zeros(2, 2)}
    try:
        (folder / "config.json").write_text(json.dumps({"_class_name": "Flux2Transformer2DModel"}))
        shards = {f"diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)}
        for shard in shards:
            save_file(weight, folder / shard)
        index = {"weight_map": {f"{n}.weight": shard for n, shard in enumerate(sorted(shards))}}
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
        save_file(weight, folder / "another.safetensors")
        choices = offered(server, "Flux2LoadModel", "model_name")
    finally:
        shutil.rmtree(folder)
    assert "in-shards" in choices and "in-shards/another.safetensors" in choices
    assert not [choice for choice in choices if choice.rsplit("/", 1)[-1] in shards]
    assert model_files["diffusion_models"][0].name in choices


@pytest.mark.parametrize("memory", ["keep on GPU", "CPU when idle", "layer by layer"])
def test_a_memory_mode_changes_no_latent(server, workflow, core_latent, memory):  # noqa: F811
    """All modes give bit-equal results (here: those of core's own graph, up to the order of its sums)."""
    for kind in ("Flux2LoadModel", "Flux2LoadTextEncoder", "Flux2LoadVAE"):
        (loader,) = nodes_of(workflow, kind)
        loader["inputs"]["memory"] = memory if kind == "Flux2LoadModel" or memory != "layer by layer" else "auto"
    result = run(server, with_latents(workflow, (NODE["sampler"], 0)))
    assert difference(latents(server, result)[0], core_latent) < SAME
