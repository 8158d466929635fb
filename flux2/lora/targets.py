"""Where a LoRA's layers are in ComfyUI's models: plain name -> Target.

  model_targets(model)["transformer_blocks_0_attn_to_k"]
      # Target("diffusion_model.double_blocks.0.img_attn.qkv.weight", (256, 256), rows=(256, 256))

Every spelling of a layer leads to one weight, or to some of its rows: diffusers keeps q, k and v apart where the
original joins them. Shapes come from the model's dimensions, never from its tensors, whose storage may be packed.
"""

from dataclasses import dataclass

from ..checkpoints import keys, variants
from .names import plain, plain_encoder


@dataclass(frozen=True)
class Target:
    """A weight of a loaded model, or some of its rows. rows: (first, count). swap: the layer's output rows are in the
    order of diffusers' final modulation, whose halves ComfyUI has the other way round.
    """

    weight: str
    shape: tuple
    rows: tuple = None
    swap: bool = False

    @property
    def key(self):
        """What ModelPatcher.add_patches takes: the weight's name, or with the rows along axis 0."""
        return (self.weight, (0, *self.rows)) if self.rows else self.weight


def variant_of(model):
    """The Variant of a MODEL, or None when it is no FLUX.2."""
    config = model.model.model_config.unet_config
    if config.get("image_model") != "flux2":
        return None
    sizes = (config[name] for name in ("hidden_size", "depth", "depth_single_blocks", "context_in_dim"))
    guidance = hasattr(model.model.diffusion_model, "guidance_in")
    return variants.find(*sizes, guidance)[0]


def model_targets(variant):
    """{plain name: Target} of every layer of a FLUX.2 diffusion model, in the original's and in diffusers' names."""
    found, h = {}, variant.hidden
    for name, shape in keys.model_shapes(variant).items():
        found[plain(name.removesuffix(".weight"))] = Target(f"diffusion_model.{name}", shape)
    for name, source in keys.model_sources(variant).items():
        whole = found[plain(name.removesuffix(".weight"))]
        count = whole.shape[0] // len(source.names)
        for index, part in enumerate(source.names):
            rows = (index * count, count) if source.how == keys.JOIN else None
            swap = source.how == keys.SWAP_HALVES
            shape = (count, *whole.shape[1:]) if rows else whole.shape
            found[plain(part.removesuffix(".weight"))] = Target(whole.weight, shape, rows, swap)
    for index in range(variant.double_blocks):  # diffusers with fused projections
        for stream, fused in (("img", "to_qkv"), ("txt", "to_added_qkv")):
            found[f"transformer_blocks_{index}_attn_{fused}"] = found[f"double_blocks_{index}_{stream}_attn_qkv"]
    for index in range(variant.single_blocks):  # parts of the fused projection
        weight = found[f"single_blocks_{index}_linear1"].weight
        parts = {f"to_{part}": (number * h, h) for number, part in enumerate("qkv")}
        parts |= {"to_qkv": (0, 3 * h), "to_mlp_proj": (3 * h, 6 * h)}
        for part, rows in parts.items():
            found[f"single_transformer_blocks_{index}_attn_{part}"] = Target(weight, (rows[1], h), rows)
        found[f"single_blocks_{index}_linear1_qkv"] = found[f"single_transformer_blocks_{index}_attn_to_qkv"]
    return found


def encoder_targets(clip):
    """{plain name: Target} of every layer of a text encoder. Loads a CLIP that was not read yet."""
    # not state_dict, in which packed formats (nvfp4, GGUF) have the shape of what is stored
    return {
        plain_encoder(name.removesuffix(".weight")): Target(name, tuple(value.shape))
        for name, value in clip.cond_stage_model.named_parameters()
        if name.endswith(".weight") and ".layers." in name
    }
