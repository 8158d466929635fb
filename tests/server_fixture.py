"""One headless ComfyUI for the whole test session, on the CPU in float32, with the small models and a few broken ones.

conftest.py takes this module in as a plugin; a test asks for `server`. Every test leaves the server running and its
queue empty. `run(server, workflow)` queues an API workflow and returns its Result. Not covered here: browsers (the page
is at server.url).
"""

import asyncio
import os
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
if str(SCRIPTS) not in sys.path:
    sys.path.insert(0, str(SCRIPTS))

import environment  # noqa: E402
from comfy_client import ComfyClient  # noqa: E402
from comfy_server import MODEL_FOLDERS, ComfyServer, small_models  # noqa: E402

# files that every model folder of the server holds besides the right one; {folder}: its own kind
TEXT_FILE, TRUNCATED, DANGLING = "text.safetensors", "truncated.safetensors", "dangling.safetensors"
# slot: what lies in it
WRONG = {"diffusion_models": "text_encoders", "text_encoders": "diffusion_models", "vae": "diffusion_models"}


def comfyui_path():
    """The ComfyUI folder of tests without a server. Not in conftest.py: tests/gpu has one too, of the same name."""
    path = os.environ.get("COMFYUI_PATH")
    if not path or not (Path(path) / "comfy" / "sd.py").is_file():
        pytest.fail("COMFYUI_PATH must name a ComfyUI checkout. scripts/test.sh sets it.")
    return path


@pytest.fixture(scope="session")
def comfyui():
    """The ComfyUI folder."""
    return environment.comfyui(environment.cache_folder())


@pytest.fixture(scope="session")
def model_files(comfyui):
    """{folder under models/: [the small model]}."""
    return small_models(comfyui)


@pytest.fixture(scope="session")
def server(comfyui, model_files, tmp_path_factory):
    """A running ComfyServer."""
    broken = broken_models(tmp_path_factory.mktemp("broken"), model_files)
    models = {folder: [*model_files[folder], *broken[folder]] for folder in MODEL_FOLDERS}
    with ComfyServer(comfyui, models=models, arguments=["--cpu", "--force-fp32"]) as running:
        yield running


def broken_models(folder, good):
    """{folder: files}: a text file, a truncated copy, a link to nowhere and, as wrong-slot.safetensors, a model of
    another kind.
    """
    made = {}
    for kind in MODEL_FOLDERS:
        place = folder / kind
        place.mkdir()
        (place / TEXT_FILE).write_text("This is a text file, not a model.\n" * 40)
        (place / TRUNCATED).write_bytes(truncated(good[kind][0]))
        (place / wrong_slot(kind)).symlink_to(good[WRONG[kind]][0])
        made[kind] = [place / TEXT_FILE, place / TRUNCATED, place / DANGLING, place / wrong_slot(kind)]
    return made


def truncated(file):
    with open(file, "rb") as handle:
        return handle.read(file.stat().st_size // 2)


def wrong_slot(kind):
    return f"{WRONG[kind]}-in-{kind}.safetensors"


def run(server, workflow, **client_options):
    """Queue an API workflow and wait for it; returns the client's Result."""

    async def work():
        async with ComfyClient(server.url, **client_options) as client:
            return await client.run(workflow)

    return asyncio.run(work())
