"""Fixtures: the pack as flux2_pack, ComfyUI on the CPU, the small models, a running server."""

import os
from pathlib import Path
import sys

import pytest

import pack  # noqa: F401

pytest_plugins = ["server_fixture", "page_fixture", "template_models"]


def comfyui_path():
    path = os.environ.get("COMFYUI_PATH")
    if not path or not (Path(path) / "comfy" / "sd.py").is_file():
        pytest.fail("COMFYUI_PATH must name a ComfyUI checkout. scripts/test.sh sets it.")
    return path


@pytest.fixture(scope="session")
def comfy(tmp_path_factory):
    """ComfyUI's modules, importable, on the CPU. Returns its folder.

    Its models, input, output, temp and user are folders of this session: the checkout may be the user's own, and
    nothing is written there.
    """
    path = comfyui_path()
    sys.path.insert(0, path)
    argv, sys.argv = sys.argv, sys.argv[:1]  # ComfyUI reads the command line at import
    import comfy.options

    comfy.options.enable_args_parsing(False)
    import torch
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available()
    args.base_directory = str(tmp_path_factory.mktemp("comfyui"))  # folder_paths reads it at import
    assert "folder_paths" not in sys.modules
    sys.argv = argv
    return path


@pytest.fixture(scope="session")
def small_models(model_files):
    """Paths of the small FLUX.2 models: {"root", "model", "text_encoder", "vae"}; made once per machine."""
    found = {
        name: model_files[folder][0]
        for name, folder in (("model", "diffusion_models"), ("text_encoder", "text_encoders"), ("vae", "vae"))
    }
    return {"root": found["vae"].parent.parent, **found}
