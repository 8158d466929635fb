"""FLUX.2-dev at full size with random weights, in ComfyUI, on one GPU: speed is that of the real model, pictures are noise.

Sizes from the published model (black-forest-labs/flux2, src/flux2/model.py): hidden 6144, 8 double and 48 single blocks, text width 15360.
"""
import os
import sys

import torch

DEV = {"hidden_size": 6144, "depth": 8, "depth_single_blocks": 48, "context_in_dim": 15360, "guidance_embed": True}
KLEIN_9B = {"hidden_size": 4096, "depth": 8, "depth_single_blocks": 24, "context_in_dim": 12288, "guidance_embed": False}
KLEIN_4B = {"hidden_size": 3072, "depth": 5, "depth_single_blocks": 20, "context_in_dim": 7680, "guidance_embed": False}
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
    """A MODEL (comfy.model_patcher.ModelPatcher) of these sizes, its random weights made on the GPU. import_comfyui first."""
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models
    config = {"image_model": "flux2", "axes_dim": [32, 32, 32, 32], "num_heads": sizes["hidden_size"] // 128, "mlp_ratio": 3.0, "theta": 2000, "in_channels": 128,
              "out_channels": 128, "patch_size": 1, "vec_in_dim": None, "global_modulation": True, "mlp_silu_act": True, "qkv_bias": False, "ops_bias": False,
              "default_ref_method": "index", "ref_index_scale": 10.0, "txt_ids_dims": [3], "yak_mlp": False, "txt_norm": False, **sizes}
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


def step_inputs(patcher, pixels, references=0, seed=1):
    """Arguments of one forward pass for a square picture of `pixels`, with that many references of 1024 x 1024."""
    device, dtype = patcher.load_device, patcher.model.get_dtype()
    generator = torch.Generator(device).manual_seed(seed)

    def noise(*shape):
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
    width = patcher.model.diffusion_model.params.context_in_dim
    inputs = {"x": noise(1, 128, pixels // 16, pixels // 16), "t": torch.full((1,), 0.7, device=device), "c_crossattn": noise(1, TEXT_TOKENS, width).to(dtype),
              "guidance": torch.full((1,), 4.0, device=device)}
    if references:
        inputs["ref_latents"] = [noise(1, 128, 64, 64).to(dtype) for _ in range(references)]
    return inputs


def step(patcher, inputs):
    """One forward pass of the model as the sampler makes it, with the patcher's own options."""
    options = patcher.model_options.get("transformer_options", {}).copy()
    options["wrappers"] = {kind: dict(keyed) for kind, keyed in patcher.wrappers.items()}
    return patcher.model.apply_model(**inputs, transformer_options=options)
