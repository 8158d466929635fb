"""What a checkpoint is, whether it can be loaded, and what will happen to it on this machine: from its header alone.

  found = examine(open_checkpoint(path), identify.MODEL)      # the checks of Load FLUX.2 Model; CheckpointError
  print(describe_path(path))                                  # FLUX.2 Model Info

One list of checks serves the loaders and Model Info, so Model Info never praises a file that its loader refuses.
"""

import math
import os

import comfy.model_management
import comfy.quant_ops
import torch

from ..checkpoints import identify, quantisation
from ..checkpoints.header import CheckpointError, open_checkpoint
from ..checkpoints.validate import check_model, check_vae, gigabytes, summary, used_bytes
from . import tekken
from .encoder_families import FAMILIES, dimensions


def examine(checkpoint, slot, weight_dtype="as stored"):
    """The Identity of a Checkpoint that the loader of `slot` takes. Raises CheckpointError with what is wrong."""
    found = identify.expect(checkpoint, slot)
    if found.slot == identify.MODEL:
        check_model(checkpoint, found, weight_dtype, computed_formats())
    elif found.slot == identify.TEXT_ENCODER:
        dimensions(checkpoint, found, FAMILIES[found.kind], computed_formats())
        tokenizer_place(checkpoint, FAMILIES[found.kind])
    elif found.slot == identify.VAE:
        check_vae(checkpoint, found)
    return found


def computed_formats():
    """Names of the quantised formats that the installed ComfyUI computes."""
    return tuple(comfy.quant_ops.QUANT_ALGOS)


def tokenizer_place(checkpoint, family):
    """Where the tokenizer of a text encoder is: the name of a tensor, a Path, or None where ComfyUI ships it. Raises
    CheckpointError when there is none.
    """
    if not family.needs_tokenizer:
        return None
    place = next((name for name in tekken.TENSORS if name in checkpoint.tensors), None)
    if place is None and os.path.isdir(checkpoint.path):
        place = tekken.find(checkpoint.path)
    if place is None:
        raise CheckpointError(
            f"{checkpoint.name} is {family.title} without its tokenizer, so no prompt can be read. Use the file made "
            f"for ComfyUI (mistral_3_small_flux2_bf16.safetensors), which carries it as the tensor tekken_model, or a "
            f"Hugging Face folder with tekken.json or tokenizer.json in it or in tokenizer/ beside it.",
            "tokenizer",
        )
    return place


# --- in words --------------------------------------------------------------------------------------------------------


def describe_path(path):
    """What the file or folder at a path is, and where its loader would refuse it, its sentence."""
    try:
        checkpoint = open_checkpoint(path)
        found = identify.identify(checkpoint)
    except CheckpointError as error:
        return str(error)
    try:
        if found.slot is not None:
            examine(checkpoint, found.slot)
        return describe(checkpoint, found)
    except CheckpointError as error:
        refuses = f"{identify.SLOTS[found.slot].node} refuses it: " if found.slot else ""  # no loader of ours takes it
        return f"{_summary(checkpoint, found)}\n{refuses}{error}"


def _summary(checkpoint, found):
    try:
        return summary(checkpoint, found)
    except CheckpointError:  # marks that cannot be read; the refusal below says so
        return f"{checkpoint.name}: {found.title}, {len(checkpoint.tensors)} tensors, {gigabytes(checkpoint.bytes)}."


def describe(checkpoint, found):
    """What a checkpoint is and what will happen to it on this machine, as lines of text."""
    return "\n".join([summary(checkpoint, found), *_on_this_machine(checkpoint, found)])


def _on_this_machine(checkpoint, found):
    marked = quantisation.layers(checkpoint)
    lines = quantised_products(marked)
    if marked and not quantisation.described(checkpoint):
        lines.append(
            "The file does not say how it is quantised: its int8 weights are taken as they are, without a rotation."
        )
    if found.slot == identify.MODEL and not marked:
        lines.append(_plain_products(checkpoint))
    if found.slot == identify.MODEL:
        lines += video_memory(checkpoint.bytes, found.variant.hidden)
    if found.slot == identify.TEXT_ENCODER:
        last = FAMILIES[found.kind].last_tap
        kept = used_bytes(checkpoint, found, last)
        lines.append(
            f"Loaded: {min(last, found.layers)} of {found.layers} layers, {gigabytes(kept)} of "
            f"{gigabytes(checkpoint.bytes)}. FLUX.2 never reads layers above {last}."
        )
        lines.append(_rotary_base(checkpoint, found))
    return lines


SIZES = (1024, 2048)  # sides of the square images that Model Info reckons with
TEXT_TOKENS = 512  # of a prompt
# What a step of ComfyUI's own model holds at its peak, in hidden states of all tokens: the difference of two sizes in
# benchmarks/results/step-h200.json; Fast Blocks holds 15. BESIDE is what memory-h200.json has more on the whole card:
# the context, the libraries' workspaces and what PyTorch's allocator keeps in reserve.
HIDDEN_STATES, BESIDE = 17, int(0.8 * 2**30)


def working_memory(hidden, width, height, references=0):
    """Bytes of one step beside the weights, in 16-bit numbers: an estimate from what was measured on an H200.

    hidden: width of the transformer. width, height: of the image, in pixels. references: images of 1024x1024.
    """
    tokens = (width // 16) * (height // 16) + references * (1024 // 16) ** 2 + TEXT_TOKENS
    return HIDDEN_STATES * tokens * hidden * 2


def video_memory(weights, hidden):
    """What a run needs on the GPU at each of SIZES and whether it fits, as sentences; none where ComfyUI has no GPU.

    weights: bytes of the diffusion model as it is loaded. hidden: width of the transformer.
    """
    management, device = comfy.model_management, comfy.model_management.get_torch_device()
    if management.is_device_cpu(device) or device.type == "mps":
        return []
    room = management.get_total_memory(device)
    lines = []
    for side in SIZES:
        working = working_memory(hidden, side, side)
        fits = (
            "it fits"
            if weights + working + BESIDE <= room
            else "it does not fit whole, so a part of the weights stays in main memory and is fetched in every step"
        )
        lines.append(
            f"VRAM at {side} x {side}: {gigabytes(weights)} of weights, {gigabytes(working)} for a step and about "
            f"{gigabytes(BESIDE)} beside it, estimated from measurements on an H200; of {gigabytes(room)} on this GPU: "
            f"{fits}."
        )
    return lines


def _rotary_base(checkpoint, found):
    """The rotary base of a text encoder, which no weight shows, and where it is from."""
    base = dimensions(checkpoint, found, FAMILIES[found.kind])["rope_theta"]
    origin = "from config.json" if base != found.rope_theta else "that of the published model"
    if not checkpoint.config:
        origin += (
            ": a single file does not say it. If this model was made with another, load its folder with config.json"
        )
    foreign = " It is not the encoder that klein was trained with." if "Qwen3-VL" in found.title else ""
    return f"Rotary base: {base:.0f}, {origin}.{foreign}"


def quantised_products(marked):
    """What the device does with each format among the marks of quantised layers, one sentence each."""
    device = comfy.model_management.get_torch_device()
    kinds = {str(mark.get("format")): quantisation.words(mark) for mark in marked.values()}
    return [
        f"On this device ({device}), {words}: "
        + (
            "products in low precision."
            if _native(kind, device)
            else "weights are widened for each product. That saves memory, not time."
        )
        for kind, words in kinds.items()
    ]


def _native(kind, device):
    """Whether ComfyUI multiplies in a format itself on a device, rather than widening the weights first."""
    management = comfy.model_management
    asked = {"nvfp4": "supports_nvfp4_compute", "mxfp8": "supports_mxfp8_compute"}.get(kind)
    if str(kind).startswith("float8"):
        asked = "supports_fp8_compute"
    if asked:
        return bool(getattr(management, asked, lambda device: False)(device))
    layout = comfy.quant_ops.QUANT_ALGOS.get(kind, {}).get("comfy_tensor_layout")
    return (
        device.type == "cuda" and layout is not None and comfy.quant_ops.get_layout_class(layout).supports_fast_matmul()
    )


def _plain_products(checkpoint):
    """How ComfyUI will keep and multiply the weights of a diffusion model that is loaded as stored, as one sentence."""
    device = comfy.model_management.get_torch_device()
    stored, _ = identify.number_format(checkpoint)
    fp8 = {"fp8 (e4m3)": torch.float8_e4m3fn, "fp8 (e5m2)": torch.float8_e5m2}.get(stored)
    numbers = sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values())
    supported = [torch.bfloat16, torch.float16, torch.float32]
    kept = comfy.model_management.unet_dtype(model_params=numbers, supported_dtypes=supported, weight_dtype=fp8)
    used = comfy.model_management.unet_manual_cast(kept, device, supported) or kept
    return (
        f"On this device ({device}): weights kept as {str(kept).removeprefix('torch.')}, computed in "
        f"{str(used).removeprefix('torch.')}."
    )
