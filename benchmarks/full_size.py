"""FLUX.2-dev at full size with random weights, in ComfyUI, on one GPU: speed is that of the real model, pictures are
noise.

Sizes from the published model (black-forest-labs/flux2, src/flux2/model.py): hidden 6144, 8 double and 48 single
blocks, text width 15360.
"""

import json
import os
import sys

import torch

DEV = {"hidden_size": 6144, "depth": 8, "depth_single_blocks": 48, "context_in_dim": 15360, "guidance_embed": True}
KLEIN_9B = {
    "hidden_size": 4096,
    "depth": 8,
    "depth_single_blocks": 24,
    "context_in_dim": 12288,
    "guidance_embed": False,
}
KLEIN_4B = {"hidden_size": 3072, "depth": 5, "depth_single_blocks": 20, "context_in_dim": 7680, "guidance_embed": False}
# to try every path on a CPU
SMALL = {"hidden_size": 256, "depth": 1, "depth_single_blocks": 2, "context_in_dim": 192, "guidance_embed": True}
TEXT_TOKENS = 512


def import_comfyui():
    """ComfyUI from COMFYUI_PATH, without reading this program's command line."""
    if not os.environ.get("COMFYUI_PATH"):
        raise SystemExit("Set COMFYUI_PATH to a ComfyUI checkout.")
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    import comfy.options

    comfy.options.enable_args_parsing(False)
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available()


def build(sizes=DEV, dtype=torch.bfloat16, seed=0):
    """A MODEL (comfy.model_patcher.ModelPatcher) of these sizes, its random weights made on the GPU. import_comfyui
    first.
    """
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    config = {
        "image_model": "flux2",
        "axes_dim": [32, 32, 32, 32],
        "num_heads": sizes["hidden_size"] // 128,
        "mlp_ratio": 3.0,
        "theta": 2000,
        "in_channels": 128,
        "out_channels": 128,
        "patch_size": 1,
        "vec_in_dim": None,
        "global_modulation": True,
        "mlp_silu_act": True,
        "qkv_bias": False,
        "ops_bias": False,
        "default_ref_method": "index",
        "ref_index_scale": 10.0,
        "txt_ids_dims": [3],
        "yak_mlp": False,
        "txt_norm": False,
        **sizes,
    }
    description = comfy.supported_models.Flux2(config)
    description.set_inference_dtype(dtype, None)
    device = comfy.model_management.get_torch_device()
    model = description.get_model({}, "", device=device).to(device)
    fill(model.diffusion_model, seed)
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=torch.device("cpu"))


def fill(network, seed):
    """Random weights whose activations stay near one: scaled by the fan-in, norms at one."""
    generator = torch.Generator(next(network.parameters()).device).manual_seed(seed)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if weight.ndim == 1:
                weight.fill_(1.0)
            else:
                weight.normal_(0.0, weight.shape[1] ** -0.5, generator=generator)


def variant_of(sizes):
    """The row of flux2/checkpoints/variants.py with these sizes. common.import_pack first."""
    from flux2_pack.flux2.checkpoints import variants

    return variants.Variant(
        "",
        sizes["hidden_size"],
        sizes["depth"],
        sizes["depth_single_blocks"],
        sizes["context_in_dim"],
        sizes["guidance_embed"],
        "",
    )


# of the fp8 inputs of every layer: what is above 448 times this is cut off, which random activations of size one never
# reach
INPUT_SCALE = 0.02


def build_fp8(sizes=DEV, seed=0):
    """A MODEL as ComfyUI loads an fp8 checkpoint: every product of the blocks in e4m3 with a scale for its weight and
    one for its input, the rest in bf16.
    """
    import comfy.model_management
    import comfy.sd

    device = comfy.model_management.get_torch_device()
    weights, quantised = fp8_checkpoint(sizes, device, seed)
    metadata = marks(dict.fromkeys(quantised, {"format": "float8_e4m3fn"}))
    patcher = comfy.sd.load_diffusion_model_state_dict(weights, {}, metadata, disable_dynamic=True)
    patcher.model.to(device)
    return patcher


def build_int8(sizes=DEV, seed=0):
    """A MODEL as ComfyUI loads an int8 ConvRot checkpoint: every product of the blocks in int8 with a scale for each
    output and rotated groups of 256, the rest in bf16.
    """
    import comfy.model_management
    import comfy.sd
    from comfy.quant_ops import TensorWiseINT8Layout

    device = comfy.model_management.get_torch_device()
    weights, layers = {}, {}
    for name, weight in random_weights(sizes, device, seed):
        if weight.ndim > 1 and "_blocks." in name:
            weight, params = TensorWiseINT8Layout.quantize(weight, per_channel=True, convrot=True)
            weights[f"{name}_scale"] = params.scale
            layers[name.removesuffix(".weight")] = {"format": "int8_tensorwise", "convrot": True}
        weights[name] = weight
    metadata = marks(layers)
    patcher = comfy.sd.load_diffusion_model_state_dict(weights, {}, metadata, disable_dynamic=True)
    patcher.model.to(device)
    return patcher


def marks(layers):
    """The metadata of a file whose layers are quantised. layers: {name: {"format": ...}}."""
    return {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}


def random_weights(sizes, device, seed):
    """(name in ComfyUI's keys, bf16 weight) of a diffusion model of these sizes, made on `device` one at a time."""
    from flux2_pack.flux2.checkpoints import keys

    generator = torch.Generator(device).manual_seed(seed)
    for name, shape in keys.model_shapes(variant_of(sizes)).items():
        weight = torch.ones(shape, device=device, dtype=torch.bfloat16)
        yield name, weight.normal_(0.0, shape[1] ** -0.5, generator=generator) if len(shape) > 1 else weight


def fp8_checkpoint(sizes, device, seed):
    """(state dict in ComfyUI's keys, names of the fp8 layers), random, made on `device` one layer at a time."""
    weights, quantised = {}, []
    for name, weight in random_weights(sizes, device, seed):
        if weight.ndim > 1 and "_blocks." in name:
            layer = name.removesuffix(".weight")
            weights |= fp8_layer(layer, weight) | {f"{layer}.input_scale": torch.tensor(INPUT_SCALE, device=device)}
            quantised.append(layer)
        else:
            weights[name] = weight
    return weights, quantised


def fp8_layer(layer, weight):
    """A layer's weight in e4m3 with one scale, as a state dict."""
    scale = weight.abs().max().float() / 448
    return {f"{layer}.weight": (weight / scale).to(torch.float8_e4m3fn), f"{layer}.weight_scale": scale}


def weights_file(fp8, sizes, folder):
    """The path of a safetensors file with random weights of these sizes, bf16 or fp8, in the keys of the original
    files. Its tensors are made on the GPU one after another, and held in host memory until they are written.
    """
    import comfy.model_management
    from safetensors.torch import save_file

    weights, layers = {}, {}
    for name, weight in random_weights(sizes, comfy.model_management.get_torch_device(), 0):
        made, layer = {name: weight}, name.removesuffix(".weight")
        if fp8 and weight.ndim > 1 and "_blocks." in name:
            made = fp8_layer(layer, weight) | {f"{layer}.input_scale": torch.tensor(INPUT_SCALE)}
            layers[layer] = {"format": "float8_e4m3fn"}
        weights |= {name: tensor.cpu() for name, tensor in made.items()}
    path = os.path.join(folder, f"flux2-random-{'fp8' if fp8 else 'bf16'}.safetensors")
    save_file(weights, path, marks(layers) if fp8 else {"format": "pt"})
    return path


def step_inputs(patcher, pixels, references=0, seed=1, reference_pixels=1024, text_tokens=TEXT_TOKENS):
    """Arguments of one forward pass for a square picture of `pixels`, with that many square references."""
    device, dtype = patcher.load_device, patcher.model.get_dtype_inference()
    generator = torch.Generator(device).manual_seed(seed)

    def noise(*shape):
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32)

    width = patcher.model.diffusion_model.params.context_in_dim
    inputs = {
        "x": noise(1, 128, pixels // 16, pixels // 16),
        "t": torch.full((1,), 0.7, device=device),
        "c_crossattn": noise(1, text_tokens, width).to(dtype),
        "guidance": torch.full((1,), 4.0, device=device),
    }
    if references:
        inputs["ref_latents"] = [
            noise(1, 128, reference_pixels // 16, reference_pixels // 16).to(dtype) for _ in range(references)
        ]
    return inputs


def step(patcher, inputs):
    """One forward pass of the model as the sampler makes it, with the patcher's own options."""
    options = patcher.model_options.get("transformer_options", {}).copy()
    options["wrappers"] = {kind: dict(keyed) for kind, keyed in patcher.wrappers.items()}
    return patcher.model.apply_model(**inputs, transformer_options=options)
