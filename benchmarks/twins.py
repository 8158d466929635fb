"""diffusers' FLUX.2 transformer over the tensors of a ComfyUI MODEL: the same weights in the same memory, so that both
fit on one card.

  pip download --no-deps --only-binary=:all: -d .whl diffusers==0.42.1 importlib_metadata lazy-importer     # pure
      Python, 6 MB
  pip install --no-index --no-deps --target site .whl/*.whl && export PYTHONPATH=site

is enough beside torch, transformers and their own needs (huggingface_hub, safetensors, numpy, regex, requests,
filelock, Pillow, zipp).
"""

import torch

from full_size import variant_of

ATTENTION = ("native", "_native_cudnn", "_native_flash")  # what diffusers can choose from without downloading kernels


def twin(patcher, sizes, attention="native", compiled=None):
    """diffusers' transformer of a bf16 MODEL. compiled: arguments of compile_repeated_blocks, or None for eager.
    ImportError without diffusers.
    """
    from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel

    with torch.device("meta"):
        model = Flux2Transformer2DModel(
            in_channels=128,
            num_layers=sizes["depth"],
            num_single_layers=sizes["depth_single_blocks"],
            attention_head_dim=128,
            num_attention_heads=sizes["hidden_size"] // 128,
            joint_attention_dim=sizes["context_in_dim"],
            guidance_embeds=sizes["guidance_embed"],
        )
    model.load_state_dict(aliases(patcher, sizes), assign=True)
    model = model.eval().requires_grad_(False)
    model.set_attention_backend(attention)
    if compiled is not None:
        model.compile_repeated_blocks(**compiled)
    return model


def aliases(patcher, sizes):
    """The weights of a MODEL in diffusers' names. Views, except for the final modulation, whose halves change
    places.
    """
    from flux2_pack.flux2.checkpoints import keys

    ours, found = patcher.model.diffusion_model.state_dict(), {}
    for name, source in keys.model_sources(variant_of(sizes)).items():
        parts = ours[name].chunk(len(source.names))
        if source.how == keys.SWAP_HALVES:
            parts = (torch.cat(ours[name].chunk(2)[::-1]),)
        found.update(zip(source.names, parts))
    return found


def grid(time, height, width, device):
    """Position ids (H*W, 4) of one latent: time, row, column, 0."""
    return torch.cartesian_prod(
        *(torch.arange(*span, device=device) for span in ((time, time + 1), (height,), (width,), (1,)))
    )


def inputs_of(inputs, dtype):
    """The arguments of diffusers' forward pass for those of full_size.step_inputs."""
    latents, device = [inputs["x"], *inputs.get("ref_latents", ())], inputs["x"].device
    tokens = torch.cat([latent.flatten(2).transpose(1, 2) for latent in latents], dim=1).to(dtype)  # (1, S, 128)
    ids = torch.cat([grid(10 * number, *latent.shape[2:], device) for number, latent in enumerate(latents)])[None]
    text_ids = torch.zeros(inputs["c_crossattn"].shape[1], 4, device=device, dtype=torch.long)
    text_ids[:, 3] = torch.arange(len(text_ids), device=device)
    return {
        "hidden_states": tokens,
        "encoder_hidden_states": inputs["c_crossattn"],
        "timestep": inputs["t"],
        "guidance": inputs.get("guidance"),
        "img_ids": ids,
        "txt_ids": text_ids[None],
    }


def step(model, given, inputs):
    """The denoised latent (1, 128, H, W) of one forward pass, as ComfyUI's apply_model gives it. given:
    inputs_of(inputs).
    """
    height, width = inputs["x"].shape[2:]
    out = model(**given, return_dict=False)[0][:, : height * width]
    return inputs["x"] - inputs["t"].view(-1, 1, 1, 1) * out.transpose(1, 2).reshape(inputs["x"].shape).float()
