"""A worker's copy of rank 0's model: loaded from the same file by the same loader, weights patched (LoRA) and options
set as on rank 0.

  source = source_of(patcher)                 # rank 0: how the MODEL was loaded, in JSON; NotReplicable says in a
                                              sentence why that is not known
  replica = Replica(source, device)           # a worker: maps the file and moves the weights to the device, without a
                                              copy in host memory
  replica.set_weights(data, tensors)          # LoRA patches of this version in place of those before; only the weights
                                              concerned are written again
  replica.set_options(specs)                  # what patch_transfer.py sends

Where the weights are split, a replica keeps its part of each weight on the device (flux2/parallel/tensor_parallel.py),
cut out of the mapped file. LoRA is applied to the whole weight, which is on the device for that moment, and then cut:
so every kind of LoRA gives the numbers that it gives on one GPU.

Host memory: tensors of a safetensors file stay mapped, so their pages are the file's and shared by all processes; the
originals of patched weights are taken from there again. Only files that ComfyUI does not map (.ckpt, .pt) and stacked
weights of diffusers folders are held by each worker.
"""

import hashlib
import importlib
import inspect
from pathlib import Path

import comfy.model_patcher
import comfy.utils
import torch

from ....attention.errors import Explained
from .. import tensor_parallel
from . import gguf, patch_transfer
from .channel import bytes_of
from .serialize import Unsendable, flatten, restore

PACK = Path(__file__).resolve().parents[3]
# What a worker may be told to load: {its name: (module, function)}; a module of
# this pack begins with ".".
# Arguments are plain values (serialize.py). Nothing else is imported or called by name.
LOADERS = {
    "Load FLUX.2 Model": (".flux2.loading.load", "load_model"),
    "Load Diffusion Model": ("comfy.sd", "load_diffusion_model"),
    "Load Checkpoint": ("comfy.sd", "load_checkpoint_guess_config"),
    "Unet Loader (GGUF)": (".flux2.parallel.workers.gguf", "load_model"),  # by the pack that this worker finds itself
    "benchmark, bf16": (".benchmarks.full_size", "build"),  # random weights, for benchmarks/
    "benchmark, fp8": (".benchmarks.full_size", "build_fp8"),
    "benchmark, int8": (".benchmarks.full_size", "build_int8"),
}
OWN_WEIGHTS = {"Unet Loader (GGUF)"}  # these put mapped weights into the modules themselves, as a plain patcher's
SAMPLES = 64  # numbers of each weight that are compared between ranks
PLAIN = {"memory_mode": "auto"}  # arguments of our loader that concern rank 0's memory alone


class NotReplicable(Explained, ValueError):
    """A MODEL cannot be loaded a second time. The text says why and what to do."""

    topic = "several-gpus"


# --- on rank 0
# ---------------------------------------------------------------------------------------------------------


def source_of(patcher):
    """How a MODEL was loaded: {"loader", "arguments", "index", "parts"}, JSON; loader: in LOADERS; parts: into how many
    its weights are split. Raises NotReplicable or gguf.NotFound.
    """
    made = getattr(patcher, "cached_patcher_init", None)
    if made is None and gguf.is_gguf(patcher):
        raise gguf.NotFound(
            "the MODEL does not say which file it came from: only the node Sequence Parallel finds that in the graph."
        )
    if made is None:
        raise NotReplicable(
            "Sequence parallel loads this model on every GPU, and its loader does not say how (it sets no "
            "cached_patcher_init). Use Load FLUX.2 Model or ComfyUI's own Load Diffusion Model or Load Checkpoint."
        )
    function, arguments, *index = made
    share = getattr(patcher, "share", None)  # of a SplitPatcher
    loader = next((name for name, where in LOADERS.items() if where == place_of(function)), None)
    if loader is None:
        raise NotReplicable(
            f"Sequence parallel loads this model on every GPU, and its loader is {patch_transfer.name_of(function)} "
            "of another pack, which the other processes do not have. Use Load FLUX.2 Model or ComfyUI's own Load "
            "Diffusion Model or Load Checkpoint."
        )
    try:
        return {
            "loader": loader,
            "arguments": flatten([in_plain_words(argument) for argument in arguments])[0],
            "index": index[0] if index else None,
            "parts": 1 if share is None else share.parallel.size,
        }
    except Unsendable as error:
        raise NotReplicable(
            f"Sequence parallel loads this model on every GPU, and its loader was given {error}, which cannot be sent "
            "to another process. Leave that option at its default."
        ) from error


def place_of(function):
    """(module, function) as in LOADERS: ComfyUI loads packs, and scripts load ours, under names of their own."""
    try:
        file = Path(inspect.getsourcefile(function) or "").resolve()
    except TypeError:  # no function of Python's
        file = Path()
    module = function.__module__
    if PACK in file.parents:
        module = "." + ".".join(file.relative_to(PACK).with_suffix("").parts)
    return module, function.__qualname__


def in_plain_words(argument):
    """Loaders are given paths of various kinds."""
    return str(argument) if isinstance(argument, Path) else argument


def weights_of(patcher):
    """(JSON data, tensors) of a patcher's weight patches, or Refused with the name of the kind that cannot be sent."""
    try:
        return flatten(patcher.patches)
    except Unsendable as error:
        raise patch_transfer.Refused(
            f"Sequence parallel cannot send these weight patches to the other GPUs: they hold {error}. LoRA of every "
            "kind that ComfyUI knows can be sent; merged models cannot: save the merged model and load that."
        ) from error


# --- on a worker
# -------------------------------------------------------------------------------------------------------


class Replica:
    """The model on a worker's device. rank: the worker's; model: its ModelPatcher as loaded; current: a clone with rank
    0's options.
    """

    def __init__(self, source, device, rank=0):
        self.device = torch.device(device)
        self.model = load(source)
        self.network = self.model.model.diffusion_model
        self.originals = dict(self.model.model.named_parameters())
        if source.get("parts", 1) > 1:
            tensor_parallel.TensorParallel(self.network, rank % source["parts"], source["parts"])
        self._replaced, self._patched, self._applied, self._plain = {}, set(), None, {}
        for key in self.originals:
            place(self.model, key, self.originals[key], self.device)
        for key, buffer in list(self.model.model.named_buffers()):
            comfy.utils.set_attr_buffer(self.model.model, key, buffer.to(self.device))
        self.model.model.device = self.device
        self.current = self.model
        self.digest = digest_of(self.model, self.originals)

    def set_weights(self, data, tensors):
        """Replace the weight patches by these (see weights_of). Returns how many weights carry patches now."""
        patches = restore(data, tensors)
        missing = sorted(set(patches) - set(self.originals))
        if missing:
            raise patch_transfer.Refused(
                f"The weight patches are for {missing[0]}, which the model on this rank does not have."
            )
        self.model.patches = patches
        self._patched |= set(patches)  # memory may run out half-way: until all are written, those of before count too
        for key in sorted(self._patched):
            place(self.model, key, self.originals[key], self.device)
        self._patched = set(patches)
        return len(patches)

    def set_options(self, specs):
        """Put these patches on the model (see patch_transfer.encode_patches), and no others. Plain options may change
        in every pass; what else is on the model stays as it is then, with what it keeps between passes (the references
        of Flux KV Cache).
        """
        patches, self._plain = patch_transfer.split_options(specs)
        if patches == self._applied:
            return
        self._applied = None
        self.current = patch_transfer.apply_patches(self.model, patches)
        for name, value in self._replaced.items():
            comfy.utils.set_attr(self.model.model, name, value)
        self._replaced = {
            name: comfy.utils.set_attr(self.model.model, name, value)
            for name, value in self.current.object_patches.items()
        }
        self._applied = patches

    def options(self):
        """transformer_options for one forward pass."""
        options = {**self.current.model_options["transformer_options"], **self._plain}
        return {
            **options,
            "wrappers": self.current.wrappers,
            "callbacks": self.current.callbacks,
            "prefetch_dynamic_vbars": False,
        }

    def sampled(self):
        """A sampling has ended: patches that keep something between steps forget it."""
        self.current.model_patches_call_function(function_name="cleanup")

    @property
    def bytes(self):
        return sum(weight.numel() * weight.element_size() for weight in self.model.model.parameters())


def place(patcher, key, original, device):
    """Put one weight of a patcher's model on a device: this process's part of it, in the number format of the model,
    with the patches that the patcher has for it. original: the weight as it was loaded.
    """
    root, patched = patcher.model, key in patcher.patches
    parallel = tensor_parallel.of(root.diffusion_model)
    value = parallel.part(key, original) if parallel and not patched else original
    if type(value) in (torch.nn.Parameter, torch.Tensor):
        value = value.data.to(device, placed_dtype(root, key, value))
    else:
        value = value.to(device)
        if getattr(value, "patches", None):  # GGUF: on the CPU this is the original, with the patches of before
            value.patches = []
    comfy.utils.set_attr_param(root, key, value)
    if patched:
        patcher.backup[key] = None  # ours is the mapped file: no copy of the original is to be kept
        patcher.patch_weight_to_device(key, device_to=device)
        patcher.backup.clear()
        if parallel:
            comfy.utils.set_attr_param(root, key, parallel.part(key, comfy.utils.get_attr(root, key)))


def placed_dtype(root, key, weight):
    """The number format in which a weight is put on the device: ComfyUI keeps files in theirs until then."""
    # quantised tensors know their own format: ComfyUI's are a class, those of a GGUF file packed bytes
    if hasattr(weight, "_qdata") or not weight.dtype.is_floating_point:
        return weight.dtype
    module, name = comfy.utils.resolve_attr(root, key)
    return getattr(module, f"{name}_comfy_model_dtype", weight.dtype)


def bytes_on_device(patcher):
    """Bytes that the weights of a MODEL take on each GPU."""
    share = getattr(patcher, "share", None)
    return bytes_of_weights(patcher.model, patcher.model.named_parameters()) if share is None else share.bytes


def bytes_of_weights(root, weights):
    """Bytes that these weights (name, weight) of ComfyUI's model `root` take on a GPU: this process's parts of them."""
    total, parallel = 0, tensor_parallel.of(root.diffusion_model)
    for key, weight in weights:
        stored = getattr(weight, "_qdata", weight)
        size = placed_dtype(root, key, weight).itemsize if stored is weight else stored.element_size()
        total += stored.numel() * size // (parallel.size if parallel and key in parallel.cuts else 1)
    return total


def digest_of(patcher, weights=None):
    """Of a MODEL's weights as they were loaded, whole and without LoRA: 64 hexadecimal digits that are the same on
    every rank that loaded the same ones. Of each weight: name, shape, number format and SAMPLES numbers spread over it,
    the first and the last among them. Two files that differ in other numbers alone are not told apart. weights: {name:
    weight}, where the MODEL's own are not those that were loaded.
    """
    digest, backup, share = hashlib.sha256(), patcher.backup, getattr(patcher, "share", None)
    weights = weights or (dict(patcher.model.named_parameters()) if share is None else share.originals)
    for key, weight in sorted(weights.items()):
        kept = backup.get(key)  # where rank 0 has a LoRA in the weight itself
        weight = weight if kept is None else kept.weight
        stored = getattr(weight, "_qdata", weight).detach().reshape(-1)  # of ComfyUI's quantised tensors
        at = torch.linspace(0, max(stored.numel() - 1, 0), min(SAMPLES, stored.numel()), dtype=torch.float64)
        # by bytes: not every device picks numbers out of fp8
        rows = stored.view(torch.uint8).view(stored.numel(), -1) if stored.numel() else stored.view(0, 1)
        values = rows[at.long().to(stored.device)].cpu().view(stored.dtype)
        if stored.dtype == weight.dtype:  # rank 0 may hold it as the file has it until it is on the GPU
            values = values.to(placed_dtype(patcher.model, key, weight))
        digest.update(f"{key} {tuple(weight.shape)} {values.dtype}\n".encode() + bytes(bytes_of(values)))
    return digest.hexdigest()


class Mapped(comfy.model_patcher.ModelPatcher):
    """What ComfyUI's loaders make while a replica is loaded: they hand a dynamic patcher the file's own tensors, and
    copy them for others.
    """

    loading = False

    def is_dynamic(self):
        return Mapped.loading


def load(source):
    """The ModelPatcher of a source, its weights still mapped from the file."""
    if source["loader"] not in LOADERS:
        raise NotReplicable(f"This worker has no loader of the name '{str(source['loader'])[:80]}'.")
    module, name = LOADERS[source["loader"]]
    package = __package__.split(".")[0] if module.startswith(".") else None
    function, arguments = getattr(importlib.import_module(module, package), name), restore(source["arguments"], [])
    named = inspect.signature(function).bind(*arguments)
    named.arguments.update({name: value for name, value in PLAIN.items() if name in named.arguments})
    # which kind of patcher ComfyUI's loaders make
    before, comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.CoreModelPatcher, Mapped
    Mapped.loading = source["loader"] not in OWN_WEIGHTS
    try:
        made = function(*named.args, **named.kwargs)
    finally:
        comfy.model_patcher.CoreModelPatcher, Mapped.loading = before, False
    return made if source["index"] is None else made[source["index"]]
