"""What importing the pack needs and does, in fresh processes."""

import ast
import importlib
import json
import os
import subprocess
import sys

import pytest

from pack import ROOT
from server_fixture import comfyui_path

TORCH_ALONE = f"""
import sys, types
REFUSED = {{
    "comfy", "comfy_api", "folder_paths", "triton", "aiter", "flash_attn", "sageattention", "xformers", "transformers",
    "diffusers", "PIL",
}}
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in REFUSED:
            raise ImportError("refused: " + name)
import torch
sys.meta_path.insert(0, Refuse())
m = types.ModuleType("flux2_pack"); m.__path__ = [{str(ROOT)!r}]; sys.modules["flux2_pack"] = m
from flux2_pack.attention import registry, dispatch, override, autotune, reference, masks
s = dispatch.AttentionDispatcher("auto")
q = torch.randn(1, 8, 2, 16)
out, _ = override.AttentionOverride(s).dispatcher.attend(q, q, q)
assert out.shape == q.shape
print(sorted(slug for slug in registry.ROWS if not registry.unavailable(slug, registry.describe("cpu"))))
"""

LOADED_BY_COMFYUI = """
import asyncio, json, sys
import comfy.options
comfy.options.enable_args_parsing(False)
from comfy.cli_args import args
args.cpu = True
import torch, comfy.ldm.modules.attention as attention, comfy.ldm.flux.math as math, comfy.sd, nodes
def state():
    functions = [attention.optimized_attention, math.attention, comfy.sd.load_diffusion_model, \
torch.nn.functional.scaled_dot_product_attention, torch.nn.Linear.forward]
    return [id(f) for f in functions], list(sys.path), sorted(attention.REGISTERED_ATTENTION_FUNCTIONS), \
len(sys.meta_path), torch.backends.cuda.flash_sdp_enabled()
before, known = state(), set(nodes.NODE_CLASS_MAPPINGS)
modules = set(sys.modules)
ok = asyncio.run(nodes.load_custom_node(sys.argv[1]))
new = sorted(set(nodes.NODE_CLASS_MAPPINGS) - known)
titles = {n: nodes.NODE_DISPLAY_NAME_MAPPINGS.get(n) for n in new}
kernels = sorted(m for m in set(sys.modules) - modules if m.split(".")[0] in {"aiter", "flash_attn", "sageattention", \
"xformers", "diffusers", "flash_attn_interface"})
print(json.dumps({"ok": ok, "new": titles, "unchanged": before == state(), "kernels": kernels, "backends": [m for m in \
sys.modules if ".attention.backends." in m]}))
"""


def run(code, *args, cwd=None, **env):
    done = subprocess.run(
        [sys.executable, "-c", code, *args],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **env},
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().splitlines()[-1]


LAYERS = {"attention": (), "flux2": ("attention",), "nodes": ("attention", "flux2")}  # what each may import
OUTSIDE = {"attention": {"comfy", "comfy_api", "comfy_extras", "comfy_execution", "folder_paths", "nodes", "server"}}


def imported(file):
    """Absolute dotted names of what a file of the pack imports anywhere; the pack's own begin with their folder."""
    package = file.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = package[: len(package) - node.level + 1] if node.level else ()
            names = (alias.name for alias in node.names) if node.module is None else [node.module]
            yield from (".".join((*parent, name)) for name in names)


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_go_one_way(layer):
    """nodes -> flux2 -> attention; attention/ knows neither ComfyUI nor flux2/."""
    found = {
        (str(file.relative_to(ROOT)), name)
        for file in (ROOT / layer).rglob("*.py")
        for name in imported(file)
        if name.split(".")[0] in OUTSIDE.get(layer, set())
        or (name.split(".")[0] in LAYERS and name.split(".")[0] not in (layer, *LAYERS[layer]))
    }
    assert found == set()


def test_attention_needs_torch_alone():
    assert "sdpa-math" in run(TORCH_ALONE)


@pytest.mark.parametrize("name", ["flux2-attention", "a folder.with odd-characters"])
def test_comfyuis_own_loader_takes_the_pack_and_nothing_else_changes(name, tmp_path):
    link = tmp_path / name
    link.symlink_to(ROOT)
    answer = json.loads(run(LOADED_BY_COMFYUI, str(link), cwd=comfyui_path(), PYTHONPATH=comfyui_path()))
    assert answer["ok"] and answer["unchanged"]
    assert {
        "Flux2LoadModel",
        "Flux2LoadTextEncoder",
        "Flux2LoadVAE",
        "Flux2SelectAttention",
        "Flux2AttentionReport",
    } <= answer["new"].keys()
    assert all(answer["new"].values()), "every node has a display name"
    assert answer["kernels"] == [] and answer["backends"] == [], (
        "no kernel library and no backend file is imported before one is chosen"
    )


def test_an_old_pytorch_is_refused_in_words(monkeypatch):
    import torch

    from flux2_pack.attention import requirements

    assert requirements.lacking() == []
    requirements.check()
    monkeypatch.delattr(torch.library, "custom_op")
    monkeypatch.setattr(torch.distributed, "broadcast", lambda tensor, src, group=None: None)
    with pytest.raises(ImportError, match=r"needs PyTorch 2\.6 or newer.*torch\.library\.custom_op.*group_src"):
        requirements.check()


def torch_names(file):
    """The dotted names of torch that a file of the pack imports or reads."""
    tree, known, found = ast.parse(file.read_text()), {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] == "torch":
            known |= {name.asname or name.name: f"{node.module}.{name.name}" for name in node.names}
        elif isinstance(node, ast.Import):
            for name in node.names:
                if name.name.split(".")[0] == "torch":
                    known[name.asname or "torch"] = name.name if name.asname else "torch"
                    found.add(name.name)
    for node in ast.walk(tree):
        parts = []
        while isinstance(node, ast.Attribute):
            node, parts = node.value, [node.attr, *parts]
        if parts and isinstance(node, ast.Name) and node.id in known:
            found.add(".".join([known[node.id], *parts]))
    return found | set(known.values())


def test_this_pytorch_has_every_name_that_is_called():
    """Holds the oldest version too where that one is installed: 2.5.1 fails here."""
    import torch

    def exists(name):
        thing, path = torch, "torch"
        for part in name.split(".")[1:]:
            path = f"{path}.{part}"
            if not hasattr(thing, part):
                try:
                    importlib.import_module(path)
                except ImportError:
                    return False
            thing = getattr(thing, part)
        return True

    names = {
        name
        for folder in ("attention", "flux2", "nodes")
        for f in (ROOT / folder).rglob("*.py")
        for name in torch_names(f)
    }
    assert len(names) > 100 and [name for name in sorted(names) if not exists(name)] == []
