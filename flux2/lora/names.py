"""What trainers call the tensors of a LoRA: the name of a tensor -> its layer and its part.

  split("transformer.x_embedder.lora_A.default.weight")   # ("transformer.x_embedder", "lora_down.weight")
  plain("base_model.model.double_blocks.0.img_attn.qkv")  # "double_blocks_0_img_attn_qkv"

Trainers agree on FLUX.2's modules, in the names of the original code or of diffusers, and differ in what stands before
the name (PREFIXES), in dots or underscores, and in what the two factors are called (PARTS). So a layer is compared in
one plain form: without prefix, with underscores alone. Parts get the names that ComfyUI's weight adapters read. Names
alone: no tensors are held here.
"""

import re

# before the name of a module, longest first: ai-toolkit and BFL, PEFT, diffusers, OneTrainer, LyCORIS, kohya
PREFIXES = (
    "model.diffusion_model.",
    "diffusion_model.",
    "base_model.model.",
    "transformer.",
    "unet.",
    "_orig_mod.",
    "lora_transformer_",
    "lora_unet_",
    "lycoris_",
)
ENCODER_PREFIXES = re.compile(r"(text_encoders?(_\d)?\.|lora_te\d?_|clip\.)")
# modules that stand between the encoder's name and its layers, from several loaders and versions of transformers
ENCODER_LAYER = re.compile(r"(?:.*?_)?(layers_\d+_(?:self_attn|mlp|input_layernorm|post_attention_layernorm).*)")

_ADAPTER = r"(?:\.(?!weight$|bias$)[\w-]+)?"  # PEFT's name of an adapter, such as .default
PARTS = tuple(
    (re.compile(pattern + "$"), part)
    for pattern, part in (
        (rf"[._]lora[._](?:A|down|linear_layer\.down){_ADAPTER}(?:\.weight)?", "lora_down.weight"),
        (rf"[._]lora[._](?:B|up|linear_layer\.up){_ADAPTER}(?:\.weight)?", "lora_up.weight"),
        (rf"[._]lora[._](?:B|up){_ADAPTER}\.bias", "diff_b"),
        (rf"\.(?:dora_scale|lora_magnitude_vector{_ADAPTER}(?:\.weight)?)", "dora_scale"),
        (r"\.(?:network_)?alpha", "alpha"),
        (r"(?<=_norm)\.scale", "set_weight"),
        (r"(?<=_norm)\.weight", "set_weight"),
    )
)
# parts that ComfyUI's adapters read by these very names
ADAPTER_PART = re.compile(
    r"\.((?:lora_mid\.weight|(?:lokr|hada)_\w+|oft_blocks|rescale|[ab][12]\.weight|diff|diff_b|w_norm|b_norm|set_weight"
    r"|reshape_weight|config))$"
)


def split(name):
    """(layer, part) of a tensor's name; part is None for one that is no part of a LoRA that is known here."""
    for pattern, part in PARTS:
        found = pattern.search(name)
        if found:
            return name[: found.start()], part
    found = ADAPTER_PART.search(name)
    return (name[: found.start()], found[1]) if found else (name, None)


def is_encoder(layer):
    """Whether a layer belongs to a text encoder."""
    return bool(ENCODER_PREFIXES.match(layer)) or bool(ENCODER_LAYER.fullmatch(plain(layer)))


def plain(layer):
    """A layer's name without prefix, underscores for dots."""
    while prefix := next((prefix for prefix in PREFIXES if layer.startswith(prefix)), None):
        layer = layer[len(prefix) :]
    layer = layer.replace(".", "_").replace("_processor_", "_")
    return layer.replace("sformer_blocks", "transformer_blocks", 1) if layer.startswith("sformer_blocks") else layer


def plain_encoder(layer):
    """The same for a layer of a text encoder: from "layers" on."""
    found = ENCODER_LAYER.fullmatch(plain(layer))
    return found[1] if found else plain(layer)


def dotted(layer):
    """A layer's name without prefix, as PEFT's patterns of alphas and ranks see it."""
    while prefix := next((prefix for prefix in PREFIXES if layer.startswith(prefix)), None):
        layer = layer[len(prefix) :]
    return layer


# --- other models ----------------------------------------------------------------------------------------------------

# (what the file is for, plain names that only its layers have, the node that loads it)
OTHER_MODELS = tuple(
    (title, re.compile(pattern))
    for title, pattern in (
        (
            "FLUX.1",
            r"double_blocks_\d+_(img|txt)_mod_|single_blocks_\d+_modulation_"
            r"|transformer_blocks_\d+_norm1_(context_)?linear"
            r"|single_transformer_blocks_\d+_(norm_linear|proj_mlp|proj_out)|transformer_blocks_\d+_ff(_context)?_net_"
            r"|vector_in_|time_text_embed_",
        ),
        ("FLUX.3", r"(content_)?mode_blocks_"),
        ("Z-Image or Lumina", r"layers_\d+_(attention|feed_forward|adaLN)_|(noise|context)_refiner_|cap_embedder_"),
        ("Qwen-Image", r"transformer_blocks_\d+_(img|txt)_(mod|mlp)_"),
        ("Stable Diffusion or SDXL", r"(down|up|input|output|mid)_blocks?_\d*_?"),
        ("Stable Diffusion 3", r"joint_blocks_"),
        ("Wan", r"blocks_\d+_(self_attn|cross_attn|ffn)_"),
        ("LTX-Video", r"transformer_blocks_\d+_attn[12]_to_"),
        ("HunyuanVideo", r"double_blocks_\d+_(img|txt)_attn_(q|k|v)_|individual_token_refiner"),
        ("Chroma", r"distilled_guidance_layer_"),
    )
)
BLOCK = re.compile(r"(?:double_blocks|transformer_blocks)_(\d+)_")
MOST_DOUBLE_BLOCKS = 8  # of a published FLUX.2; FLUX.1 has 19


def other_model(layers):
    """The model of another family that layers (plain names) belong to, in words, and the layer that shows it; or
    None.
    """
    for title, pattern in OTHER_MODELS:
        found = next((layer for layer in layers if pattern.match(layer)), None)
        if found:
            return title, found
    return None


def beyond(layers, double_blocks):
    """A layer (plain name) of a double block that neither the model, which has so many, nor a published FLUX.2 has."""
    most = max(double_blocks, MOST_DOUBLE_BLOCKS)
    return next((name for name in layers if (found := BLOCK.match(name)) and int(found[1]) >= most), None)
