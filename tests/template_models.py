"""Small models under the names of the published files, so that shipped and official workflows run as they are.
conftest.py takes this in as a plugin.

`official_server` gives a running server every file that our templates and ComfyUI's FLUX.2 templates name, and a
picture for every LoadImage; what was put there is taken away when the module's tests end, because other tests want a
server on which nothing was downloaded.
"""

import json
from pathlib import Path

import pytest
from PIL import Image

import small_models as maker
from pack import ROOT

SHIPPED = ROOT / "example_workflows"
LORA_RANK = 2


def official_folder():
    """The templates that ComfyUI's requirements install."""
    import comfyui_workflow_templates_json

    return Path(comfyui_workflow_templates_json.__file__).parent / "templates"


def official_files():
    """ComfyUI's own FLUX.2 graphs: {name: path}. image_flux2* is ComfyUI's name for them; gsl_* and all_in_one hold the
    same subgraphs again.
    """
    return {path.stem: path for path in sorted(official_folder().glob("image_flux2*.json"))}


def nodes_in(workflow):
    """Every node of a GUI workflow, those of subgraphs included."""
    parts = [workflow, *(workflow.get("definitions") or {}).get("subgraphs", [])]
    return [node for part in parts for node in part["nodes"]]


def named_models(workflows):
    """{(folder, file name)} of properties.models."""
    models = [
        model
        for workflow in workflows
        for node in nodes_in(workflow)
        for model in node["properties"].get("models") or []
    ]
    return {(model["directory"], model["name"]) for model in models}


def named_pictures(workflows):
    return {
        node["widgets_values"][0]
        for workflow in workflows
        for node in nodes_in(workflow)
        if node["type"] == "LoadImage"
    }


def lora():
    """A LoRA for the small dev model: one matrix product in each kind of block."""
    w = maker.Weights("lora", maker.torch.float32)
    for name, outputs, inputs in (("double_blocks.0.img_attn.proj", 256, 256), ("single_blocks.1.linear2", 256, 1024)):
        w.linear(f"diffusion_model.{name}.lora_A", LORA_RANK, inputs)
        w.linear(f"diffusion_model.{name}.lora_B", outputs, LORA_RANK)
    return w.tensors


def substitutes(model_files, folder):
    """{folder under models/: function from a published file's name to the small file that stands for it}."""
    from test_loaders import small_qwen

    klein = maker.write(folder / "klein.safetensors", maker.diffusion_model(guidance=False))
    qwen = maker.write(folder / "qwen.safetensors", small_qwen(layers=27))
    small_lora = maker.write(folder / "lora.safetensors", lora())
    return {
        "diffusion_models": lambda name: klein if "klein" in name else model_files["diffusion_models"][0],
        "text_encoders": lambda name: qwen if "qwen" in name else model_files["text_encoders"][0],
        "vae": lambda name: model_files["vae"][0],
        "loras": lambda name: small_lora,
    }


@pytest.fixture(scope="module")
def official_server(server, model_files, tmp_path_factory):
    """The server, with everything that the workflows name."""
    workflows = [
        json.loads(path.read_text())
        for path in (*official_files().values(), *SHIPPED.glob("*.json"), *(ROOT / "subgraphs").glob("*.json"))
    ]
    small, made = substitutes(model_files, tmp_path_factory.mktemp("official")), []
    for folder, name in sorted(named_models(workflows)):
        made.append(server.base / "models" / folder / name)
        made[-1].parent.mkdir(exist_ok=True)
        made[-1].symlink_to(small[folder](name))
    for number, name in enumerate(sorted(named_pictures(workflows))):
        made.append(server.base / "input" / name)
        Image.linear_gradient("L").rotate(90 * number).convert("RGB").resize((128, 96)).save(made[-1])
    yield server
    for path in made:
        path.unlink()
