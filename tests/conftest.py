"""Fixtures: the pack as flux2_pack, ComfyUI, the small models, a running server. And what lets several processes
share the tests out (pytest-xdist; scripts/test.sh chooses their number): each has its own server, browser and
temporary folder.
"""

import contextlib
import os
from pathlib import Path
import sys

import pytest

import pack  # noqa: F401
from quick import is_quick

pytest_plugins = ["devices", "summary", "server_fixture", "page_fixture", "template_models"]


@pytest.fixture(scope="session")
def comfy(tmp_path_factory):
    """ComfyUI's modules, importable, on the device of this run (devices.py). Returns its folder.

    Its models, input, output, temp and user are folders of this session: the checkout may be the user's own, and
    nothing is written there.
    """
    from server_fixture import comfyui_path  # a plugin: imported when pytest has loaded it

    path = comfyui_path()
    sys.path.insert(0, path)
    argv, sys.argv = sys.argv, sys.argv[:1]  # ComfyUI reads the command line at import
    import comfy.options

    comfy.options.enable_args_parsing(False)
    from comfy.cli_args import args
    from devices import on_cpu

    args.cpu = on_cpu()
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


# --- several processes -----------------------------------------------------------------------------------------------

# files that take longest, in the order in which they are begun: one that begins last would keep one process busy alone
LONGEST = (
    "test_ranks",
    "test_speed_nodes",
    "test_compare",
    "test_scripts",
    "test_fast_blocks",
    "test_vae_blocks",
    "test_small_model",
    "test_parallel_nodes",
    "test_reference",
    "test_status_browser",
    "test_parallel_server",
    "test_two_hosts",
    "test_split",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    for item in items:
        if is_quick(item.path.stem, item.originalname or item.name):
            item.add_marker(pytest.mark.quick)
    if shared_out(config):
        turn = {name: number for number, name in enumerate(LONGEST)}
        items.sort(key=lambda item: turn.get(item.path.stem, len(turn)))


def shared_out(config):
    """Whether this is one of several processes that share the tests out."""
    return hasattr(config, "workerinput")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """A test marked `alone` has the machine for itself: no other process of this run is in a test meanwhile."""
    if not shared_out(item.config):
        return (yield)
    with in_turn(alone=item.get_closest_marker("alone") is not None):
        return (yield)


@contextlib.contextmanager
def in_turn(alone):
    """Two locks, of files that are there anyway: one that tests share, and a door before it, so that a test that waits
    to be alone is the next one.
    """
    import fcntl

    here = Path(__file__)
    with open(here.with_name("pytest.ini")) as door, open(here) as machine:
        fcntl.flock(door, fcntl.LOCK_EX)
        fcntl.flock(machine, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(door, fcntl.LOCK_UN)
        yield
