"""Memory modes: where the weights of one component are between and during its runs, on top of ComfyUI's own memory
management.

  patcher = manage(patcher, "CPU when idle")     # a MODEL, or the patcher of a CLIP or VAE

"auto" leaves everything to ComfyUI: weights come to the GPU when they are needed and go when the room is needed. The
other modes go through what ComfyUI asks of every patcher, so its accounting stays true, and clones (LoRA, attention,
other devices) keep the mode. Without a GPU they change nothing. They are kinds of ModelPatcher rather than offload
devices, because with the GPU as offload device ComfyUI moves even the weights that did not fit there.
"""

import logging

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP

AUTO, ON_GPU, IDLE_ON_CPU, LAYERS = "auto", "keep on GPU", "CPU when idle", "layer by layer"
MODES = (AUTO, ON_GPU, IDLE_ON_CPU)
MODEL_MODES = (*MODES, LAYERS)
KEY = "flux2_memory"
LEAST = 0.1  # bytes; what ComfyUI 0.30 itself allows a model under --novram, since 0 means everything
log = logging.getLogger(__name__)


class ManagedPatcher(ModelPatcher):
    """A ModelPatcher that differs in when its weights move. ComfyUI's clone() makes copies of the same class."""

    @classmethod
    def taking_over(cls, fresh):
        """A patcher of this class with the model and all settings of one that its loader has just made."""
        made = cls(fresh.model, fresh.load_device, fresh.offload_device, fresh.size, fresh.weight_inplace_update)
        vars(made).update(vars(fresh))
        return made


class Kept(ManagedPatcher):
    """A patcher whose weights stay on the GPU once they are there, whoever needs the room. They go when the last clone
    is dropped.
    """

    def partially_unload(self, device_to, memory_to_free=0, force_patch_weights=False):
        return 0

    def detach(self, unpatch_all=True):
        # nothing counted as loaded: a load that failed half-way
        return super().detach(unpatch_all and not self.loaded_size())


class Streamed(ManagedPatcher):
    """A patcher whose layers come to the GPU one after another in every forward pass, and never stay."""

    def partially_load(self, device_to, extra_memory=0, force_patch_weights=False):
        allowed = extra_memory if comfy.model_management.is_device_cpu(device_to) else min(extra_memory, LEAST)
        return super().partially_load(device_to, allowed, force_patch_weights=force_patch_weights)


KINDS = {ON_GPU: Kept, LAYERS: Streamed}


def needs_plain_patcher(mode):
    """Whether a mode needs ComfyUI's plain patcher, not the dynamic one, which moves weights during the forward pass as
    it sees fit.
    """
    return mode in KINDS


def manage(patcher, mode):
    """The patcher in a memory mode: the one given, which must be fresh from its loader, or a plain one of the same
    model.
    """
    if mode == AUTO:
        return patcher
    if comfy.model_management.is_device_cpu(patcher.load_device):
        log.info("Memory mode %r changes nothing: ComfyUI runs this component on the CPU.", mode)
    patcher.offload_device = torch.device("cpu")  # also where start options such as --gpu-only say otherwise
    if mode == IDLE_ON_CPU:
        patcher.add_callback_with_key(CallbacksMP.ON_CLEANUP, KEY, free)  # called when a sampling ends, however it ends
        return patcher
    if patcher.is_dynamic():
        patcher = patcher.clone(disable_dynamic=True, model_override=patcher.get_clone_model_override())
        patcher.parent = None
    return KINDS[mode].taking_over(patcher)


def start_on_gpu(patcher):
    """Load a text encoder at once where ComfyUI would make it on the GPU: when it is large and there is room."""
    management, device = comfy.model_management, patcher.load_device
    if management.text_encoder_initial_device(device, patcher.offload_device, patcher.model_size()) == device:
        management.load_models_gpu([patcher], force_full_load=True)


def free(patcher):
    """Take the weights of a patcher's model off its GPU, through ComfyUI's list of what is loaded."""
    management = comfy.model_management
    if not management.is_device_cpu(patcher.load_device):
        others = [
            loaded
            for loaded in management.current_loaded_models
            if loaded.model is None or not patcher.is_clone(loaded.model)
        ]
        management.free_memory(1e30, patcher.load_device, keep_loaded=others)


def free_module(module):
    """`free` for a module whose patcher is not at hand. Kept while prompts are scheduled by hooks, which encode several
    times in a row.
    """
    for loaded in list(comfy.model_management.current_loaded_models):
        patcher = loaded.model
        if patcher is not None and patcher.model is module and patcher.forced_hooks is None:
            free(patcher)


def idle_text_model(text_model, mode):
    """The class of a text encoder, which in the mode "CPU when idle" leaves the GPU after each prompt."""
    if mode != IDLE_ON_CPU:
        return text_model

    class IdleOnCPU(text_model):
        def encode_token_weights(self, *args, **kwargs):
            try:
                return super().encode_token_weights(*args, **kwargs)
            finally:
                free_module(self)

    return IdleOnCPU


def idle_vae(vae, mode):
    """The class of a VAE, which in the mode "CPU when idle" leaves the GPU after each image, and after each batch or
    set of tiles as a whole.
    """
    if mode != IDLE_ON_CPU:
        return vae

    class IdleOnCPU(vae):
        def decode(self, *args, **kwargs):
            return self._then_free(super().decode, args, kwargs)

        def decode_tiled(self, *args, **kwargs):
            return self._then_free(super().decode_tiled, args, kwargs)

        def encode(self, *args, **kwargs):
            return self._then_free(super().encode, args, kwargs)

        def encode_tiled(self, *args, **kwargs):
            return self._then_free(super().encode_tiled, args, kwargs)

        def _then_free(self, work, args, kwargs):
            try:
                return work(*args, **kwargs)
            finally:
                free(self.patcher)

    return IdleOnCPU
