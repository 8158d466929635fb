"""Models of the pack ComfyUI-GGUF: which file one came from, and the same loading once more in another process.

  file = file_of(graph, node_id)                       # rank 0: from the graph, for the MODEL itself does not know it
  model.cached_patcher_init = how_loaded(model, file)  # what ComfyUI's own loaders set, and this pack's loader does not
  load_model(file, ...)                                # any process: by the loader of the pack that is installed there

A GGUF file is read by the code of that pack and of nobody else. A worker therefore imports the pack, and what it
imports is its own: the folder is looked for in the worker's own custom_nodes by the names in FOLDERS, and rank 0 tells
no more than the path of a model file, three plain settings and a digest of the pack's code, which has to be the same.
"""

import functools
import hashlib
import importlib.util
import inspect
import os
import sys
from pathlib import Path

import comfy.sd
import folder_paths
from comfy_execution.graph_utils import is_link

from ....attention.errors import UserError
from .launch import CUSTOM_NODES

LOADERS = ("UnetLoaderGGUF", "UnetLoaderGGUFAdvanced")  # ids of the pack's nodes that give a MODEL
PATCHER = "GGUFModelPatcher"  # the class of such a MODEL
FOLDERS = ("comfyui-gguf", "comfyui-gguf-main")  # in custom_nodes, in lower case: cloned or installed, or unpacked
PACK = Path(__file__).resolve().parents[3]
INSTEAD = "Use Load FLUX.2 Model with a safetensors file (fp8 or int8 are small too), or set gpus to 1."


class NotFound(UserError):
    """What is needed to load a GGUF model a second time is not known. The text says what, and what to do."""

    topic = "several-gpus"

    def __init__(self, text):
        super().__init__(f"Sequence parallel loads this GGUF model on every GPU, and {text} {INSTEAD}")


def is_gguf(patcher):
    """Whether a MODEL or the patcher of a CLIP is one of ComfyUI-GGUF."""
    return any(kind.__name__ == PATCHER for kind in type(patcher).__mro__)


# --- rank 0: where a MODEL comes from ---------------------------------------------------------------------------------


def file_of(graph, node_id):
    """Path of the GGUF file whose MODEL arrives at a node. graph: ComfyUI's DynamicPrompt, None where no graph runs.
    Raises NotFound.
    """
    loaders = model_loaders(graph, node_id) if graph is not None else []
    names = {str(node["inputs"].get("unet_name")) for node in loaders}
    if any(is_link(node["inputs"].get("unet_name")) for node in loaders):
        raise NotFound("the file name of Unet Loader (GGUF) comes over a link: choose the file on that node itself.")
    if len(names) != 1:
        found = f"{len(names)} different files are loaded before it" if names else "no Unet Loader (GGUF) is before it"
        raise NotFound(f"the file it came from is not known: {found} in the graph.")
    path = folder_paths.get_full_path("diffusion_models", *names)
    if path is None:
        raise NotFound(f"{', '.join(names)} is in the model folder diffusion_models no more.")
    return path


def model_loaders(graph, node_id):
    """The nodes in LOADERS from which a MODEL can have come to a node, over any nodes that hand a MODEL on."""
    waiting, seen, found = [node_id], set(), []
    while waiting:
        node = graph.get_node(waiting.pop())
        if node["class_type"] in LOADERS:
            found.append(node)
            continue
        links = [value for value in node["inputs"].values() if is_link(value) and graph.has_node(value[0])]
        sources = {source for source, output in links if may_be_model(graph.get_node(source), output)}
        waiting.extend(sources - seen)
        seen |= sources
    return found


def may_be_model(node, output):
    """Whether an output of a node can be a MODEL, by the types that its class declares: MODEL, or a type of any
    kind.
    """
    mapping = getattr(sys.modules.get("nodes"), "NODE_CLASS_MAPPINGS", {})
    types = getattr(mapping.get(node["class_type"]), "RETURN_TYPES", ())
    kind = types[output] if output < len(types) else "*"
    return kind in ("MODEL", "*") or str(kind).startswith("COMFY_")


def how_loaded(patcher, path):
    """(load_model, its arguments) of a MODEL of ComfyUI-GGUF that came from a file. Raises NotFound."""
    code, folder = Path(inspect.getsourcefile(type(patcher))).resolve().parent, pack_folder()
    if code != folder:
        raise NotFound(
            f"it comes from {code.name}, where the other processes look for the pack ComfyUI-GGUF"
            + (f" and find {folder.name}." if folder else f" in a folder called {FOLDERS[0]} of custom_nodes.")
        )
    layer = next((one for one in patcher.model.diffusion_model.modules() if hasattr(one, "dequant_dtype")), None)
    if not (hasattr(layer, "patch_dtype") and hasattr(patcher, "patch_on_device")):
        raise NotFound(
            "this version of ComfyUI-GGUF does not say where earlier ones did how it unpacks weights (dequant_dtype, "
            "patch_dtype, patch_on_device)."
        )
    formats = [str(one or "default").removeprefix("torch.") for one in (layer.dequant_dtype, layer.patch_dtype)]
    return load_model, (str(path), *formats, bool(patcher.patch_on_device), digest_of(code))


# --- any process: loading ---------------------------------------------------------------------------------------------


def load_model(path, dequant_dtype, patch_dtype, patch_on_device, code, disable_dynamic=False):
    """MODEL of a GGUF file by the loader of the pack ComfyUI-GGUF installed here. dequant_dtype, patch_dtype: the
    choices of its advanced node; code: digest_of the pack that rank 0 has. Its patchers are never dynamic. Raises
    NotFound.
    """
    folder = pack_folder()
    if folder is None:
        raise NotFound("the pack ComfyUI-GGUF is not in custom_nodes there. Install the same version on every host.")
    if digest_of(folder) != code:
        raise NotFound(
            "its pack ComfyUI-GGUF is not the same as on rank 0. Install the same version on every host, and restart "
            "ComfyUI after an update."
        )
    return loader_of(folder)().load_unet(known_as(path), dequant_dtype, patch_dtype, patch_on_device)[0]


def pack_folder():
    """The folder of ComfyUI-GGUF among the packs of this process, or None. A worker asks rank 0 for none of it: one
    that rank 0 started has rank 0's folders from its environment, one on another host looks beside its own ComfyUI and
    beside this pack.
    """
    own = os.environ.get(CUSTOM_NODES)
    if own is not None:
        places = [Path(place) for place in own.split(os.pathsep)]
    elif "FLUX2_RANKS_JOINED" in os.environ:
        places = [Path(comfy.sd.__file__).resolve().parents[1] / "custom_nodes", PACK.parent]
    else:
        places = [Path(place) for place in folder_paths.get_folder_paths("custom_nodes")]
    inside = [one for place in places if place.is_dir() for one in sorted(place.iterdir())]
    return next((one.resolve() for one in inside if one.name.lower() in FOLDERS and (one / "nodes.py").is_file()), None)


def digest_of(folder):
    """Eight digits that change with the code of the pack."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.py")):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:8]


def loader_of(folder):
    """The class of the pack's loader: ComfyUI's own where it has loaded the pack, else imported here."""
    mapping = getattr(sys.modules.get("nodes"), "NODE_CLASS_MAPPINGS", {})
    return mapping.get(LOADERS[0]) or imported(folder).NODE_CLASS_MAPPINGS[LOADERS[0]]


@functools.cache
def imported(folder):
    """The pack as a module. It stands on ComfyUI's own `nodes`, which a worker has not imported before."""
    name = "flux2_ranks_gguf"
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise NotFound(f"the pack ComfyUI-GGUF cannot be imported there ({type(error).__name__}: {error}).") from error
    return module


def known_as(path):
    """The name of a file in the model folder diffusion_models, by which the pack asks for it. A worker does not know
    the folders of extra_model_paths.yaml: the file's folder is added there.
    """
    for folder in folder_paths.get_folder_paths("diffusion_models"):
        # not os.path.relpath, which raises for two drives of Windows
        name = str(Path(path).relative_to(folder)) if Path(path).is_relative_to(folder) else None
        if name and folder_paths.get_full_path("diffusion_models", name) == path:
            return name
    folder_paths.add_model_folder_path("diffusion_models", os.path.dirname(path), is_default=True)
    return os.path.basename(path)
