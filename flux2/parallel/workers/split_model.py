"""Rank 0's part of a model whose weights are split over the GPUs, as a ComfyUI MODEL.

  patched = split_model(model, 2)     # a clone: same options, patches and LoRA; its weights are those of rank 0's part

The model is loaded from its file a second time, mapped, as a worker loads it (replica.py): that takes address space and
no memory, and leaves the MODEL that came in, which ComfyUI may have loaded whole for another branch of the graph, as it
is. ComfyUI asks a SplitPatcher to load and unload like any other; what lies on the GPU meanwhile is the part. Unloaded,
its weights are those of the file, whole. Not covered: a part that is larger than the GPU. It is refused, as a worker
refuses it: ComfyUI's offloading knows whole weights only.
"""

from dataclasses import dataclass, field
import uuid
import weakref

import comfy.model_management as management
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP
import comfy.utils

from ....attention.errors import UserError
from .. import tensor_parallel
from . import replica


@dataclass
class Share:
    """Rank 0's part of the weights of one model. originals: {name: weight}, mapped; bytes: that the part takes on the
    GPU; patched: names of the weights that are on the GPU with patches.
    """

    parallel: tensor_parallel.TensorParallel
    originals: dict
    bytes: int
    patched: set = field(default_factory=set)


class SplitPatcher(ModelPatcher):
    """A ModelPatcher whose model has rank 0's part of the weights while it is loaded. Clones share the part."""

    @property
    def share(self):
        return self.model.flux2_share

    def is_dynamic(self):
        return False

    def model_size(self):
        return self.share.bytes

    def with_everything_of(self, model):
        """A clone of this with the options, patches and LoRA of another MODEL of the same file."""
        clone = model.clone(disable_dynamic=True, model_override=self.get_clone_model_override())
        clone.__class__ = SplitPatcher  # a MODEL's clone is of its class, and there is no other way to copy all it has
        clone.parent, clone.size, clone.clone_base_uuid = self, self.share.bytes, self.clone_base_uuid
        return clone

    # --- what ComfyUI asks for

    def partially_load(self, device_to, extra_memory=0, force_patch_weights=False):
        """All of the part, whatever memory ComfyUI offers: see the module's text. Returns the bytes that were taken."""
        before = self.loaded_size()
        with self.use_ejected(skip_and_inject_on_exit_only=True):
            self.unpatch_model(unpatch_weights=False)
            self.patch_model(load_weights=False)
            try:
                self.load(device_to)
            except BaseException:
                self.detach()
                raise
        return self.loaded_size() - before

    def load(self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False):
        """Put the part on the device, or what differs from the patches that are on it."""
        model, share = self.model, self.share
        if self.loaded_size() and model.current_weight_patches_uuid == self.patches_uuid:
            return
        changed = share.patched | set(self.patches)
        if not self.loaded_size():
            self._refuse_without_room(device_to)
            changed = share.originals
            for name, buffer in list(model.named_buffers()):
                comfy.utils.set_attr_buffer(model, name, buffer.to(device_to))
        model.current_weight_patches_uuid, model.model_loaded_weight_memory = None, share.bytes
        share.patched |= set(self.patches)  # memory may run out half-way
        for name in changed:
            if name in share.originals:
                replica.place(self, name, share.originals[name], device_to)
        share.patched, model.device = set(self.patches), device_to
        model.current_weight_patches_uuid = self.patches_uuid
        for callback in self.get_all_callbacks(CallbacksMP.ON_LOAD):
            callback(self, device_to, lowvram_model_memory, force_patch_weights, True)

    def _refuse_without_room(self, device):
        if management.is_device_cpu(device):
            return
        free, needed = management.get_free_memory(device), self.share.bytes
        if free < needed:
            raise UserError(
                f"Rank 0 ({management.get_torch_device_name(device)}) has {free / 1e9:.1f} GB free, and its part of "
                f"the weights takes {needed / 1e9:.1f}: it does not fit on that GPU. Split the weights over more GPUs, "
                "use an fp8 checkpoint, or end what else uses that GPU.",
                "several-gpus",
            )

    def unpatch_model(self, device_to=None, unpatch_weights=True):
        super().unpatch_model(None, unpatch_weights=False)
        if unpatch_weights:
            model, share = self.model, self.share
            for name, original in share.originals.items():
                comfy.utils.set_attr_param(model, name, original)
            for name, buffer in list(model.named_buffers()):
                comfy.utils.set_attr_buffer(model, name, buffer.to(self.offload_device))
            share.patched = set()
            model.current_weight_patches_uuid, model.model_loaded_weight_memory = None, 0
            model.device = self.offload_device

    def partially_unload(self, device_to, memory_to_free=0, force_patch_weights=False):
        """Nothing: ComfyUI unloads all of it then."""
        return 0


def split_model(model, parts):
    """A clone of a MODEL with rank 0's part of its weights, which are split into so many. The part is kept as long as
    the MODEL's own model: another LoRA loads nothing again. Raises UserError or replica.NotReplicable.
    """
    if isinstance(model, SplitPatcher):
        if model.share.parallel.size != parts:
            raise UserError(
                f"The weights of this model are split over {model.share.parallel.size} GPUs already: use one Sequence "
                "Parallel.",
                "several-gpus",
            )
        return model.clone()
    root = _roots.get(model.model)
    if root is None or root.share.parallel.size != parts or root.load_device != model.load_device:
        root = _roots[model.model] = load_part(model, parts)
    return root.with_everything_of(model)


_roots = weakref.WeakKeyDictionary()  # the SplitPatcher of each model (BaseModel) that was split


def load_part(model, parts):
    """The SplitPatcher of rank 0's part, without patches."""
    source = replica.source_of(model)
    reasons = tensor_parallel.unsupported(model.model.diffusion_model, parts)
    if reasons:
        raise UserError(" ".join(reasons), "several-gpus")
    made = replica.load(source)
    base = made.model
    parallel = tensor_parallel.TensorParallel(base.diffusion_model, 0, parts)
    originals = dict(base.named_parameters())
    base.flux2_share = Share(parallel, originals, replica.bytes_of_weights(base, originals.items()))
    root = SplitPatcher(base, model.load_device, model.offload_device)
    root.cached_patcher_init, root.clone_base_uuid = made.cached_patcher_init, uuid.uuid4()
    return root
