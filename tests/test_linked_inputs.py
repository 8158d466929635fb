"""Inputs that another node gives: ComfyUI asks each validator before the value is known, and gives it None.

Every node of the pack that has a validator, and each of its arguments; and a graph through a server, in which a name
comes out of other nodes.
"""

import inspect

import pytest

from api_workflow import PictureSettings, fill
from server_fixture import run


def classes(comfy):
    from flux2_pack import nodes

    import importlib
    import pkgutil

    modules = [
        importlib.import_module(f"{nodes.__name__}.{found.name}") for found in pkgutil.iter_modules(nodes.__path__)
    ]
    found = {node for module in modules for node in getattr(module, "NODES", ())}
    base = next(iter(found)).GET_BASE_CLASS()
    return [node for node in found if node.validate_inputs.__func__ is not base.validate_inputs.__func__]


def test_no_validator_judges_what_is_not_known_yet(comfy):
    with_validators = classes(comfy)
    assert len(with_validators) >= 8
    for node in with_validators:
        arguments = list(inspect.signature(node.validate_inputs).parameters)
        assert node.validate_inputs(**dict.fromkeys(arguments)) is True, node
        assert node.validate_inputs() is True, f"{node}: a missing input is ComfyUI's to say"
        ids = {item.id for item in node.define_schema().inputs}
        assert set(arguments) <= ids, node


@pytest.mark.parametrize(
    "loader, name",
    [("Flux2LoadModel", "model_name"), ("Flux2LoadTextEncoder", "text_encoder_name"), ("Flux2LoadVAE", "vae_name")],
)
def test_a_name_from_another_node_loads(server, model_files, loader, name):
    names = {folder: files[0].name for folder, files in model_files.items()}
    workflow = fill(PictureSettings("A red fox", models=names, width=64, height=64, steps=1))
    key = next(key for key, node in workflow.items() if node["class_type"] == loader)
    workflow["text"] = {"class_type": "PrimitiveString", "inputs": {"value": workflow[key]["inputs"][name]}}
    workflow["switch"] = {
        "class_type": "ComfySwitchNode",
        "inputs": {"switch": True, "on_true": ["text", 0], "on_false": ["text", 0]},
    }
    workflow[key]["inputs"][name] = ["switch", 0]
    assert run(server, workflow)


def test_a_wrong_name_from_another_node_is_said(server, model_files):
    names = {folder: files[0].name for folder, files in model_files.items()}
    workflow = fill(PictureSettings("A red fox", models=names, width=64, height=64, steps=1))
    key = next(key for key, node in workflow.items() if node["class_type"] == "Flux2LoadModel")
    workflow["text"] = {"class_type": "PrimitiveString", "inputs": {"value": "."}}
    workflow["switch"] = {
        "class_type": "ComfySwitchNode",
        "inputs": {"switch": True, "on_true": ["text", 0], "on_false": ["text", 0]},
    }
    workflow[key]["inputs"]["model_name"] = ["switch", 0]
    with pytest.raises(Exception, match="There is no '.' in the model folder diffusion_models"):
        run(server, workflow)
