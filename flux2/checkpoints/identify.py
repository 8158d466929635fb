"""What a checkpoint is, said in words, from the names and shapes in its header alone.

  found = identify(open_checkpoint(path))     # Identity(kind="flux2-vae", title="FLUX.2 VAE", reason="...", ...)
  expect(checkpoint, "flux2-model")           # the Identity, or a CheckpointError that says what it is and where it
                                              belongs

KINDS is the table of everything that people put into these slots; a new kind is a row there and one in RULES. Not
covered: proof that the weights are those the file's name promises.
"""

import itertools
import re
from collections import Counter
from dataclasses import dataclass

from ..lora import names as lora_names
from . import quantisation, variants
from .header import CheckpointError

MODEL, TEXT_ENCODER, VAE = "flux2-model", "flux2-text-encoder", "flux2-vae"


@dataclass(frozen=True)
class Slot:
    """An input of our loader nodes."""

    node: str  # display name of the node
    folder: str  # ComfyUI's model folder
    expects: str  # what goes in, in words


SLOTS = {
    MODEL: Slot("Load FLUX.2 Model", "diffusion_models", "a FLUX.2 diffusion model (dev or klein)"),
    TEXT_ENCODER: Slot(
        "Load FLUX.2 Text Encoder",
        "text_encoders",
        "the text encoder of FLUX.2 (Mistral 3 for dev, Qwen3 4B or 8B for klein)",
    ),
    VAE: Slot("Load FLUX.2 VAE", "vae", "a FLUX.2 VAE"),
}


@dataclass(frozen=True)
class Identity:
    """What a checkpoint is. `slot` is a key of SLOTS, or None when none of our nodes takes it; `advice` says where it
    belongs then.
    """

    kind: str
    title: str
    reason: str
    slot: str = None
    advice: str = ""
    layout: str = "original"  # "original" or "diffusers" keys
    prefix: str = ""  # what precedes every name in the file, such as "model.diffusion_model."
    variant: variants.Variant = None  # of a FLUX.2 diffusion model
    width: int = 0  # hidden width of a text encoder
    layers: int = 0  # layers of a text encoder
    rope_theta: float = 0.0  # rotary base of a text encoder, where no config.json says it


class Names:
    """The names of a checkpoint, with what the rules below ask of them. They are searched as one text: a rule costs the
    same however many marks it looks for.
    """

    def __init__(self, checkpoint):
        self.checkpoint, self.tensors, self.config = checkpoint, checkpoint.tensors, checkpoint.config
        self.text = "\n" + "\n".join(checkpoint.tensors) + "\n"  # a header's names hold no line breaks
        try:
            self.marked = quantisation.layers(checkpoint)
        except CheckpointError:  # the checks of what it is say so
            self.marked = {}

    def __contains__(self, name):
        return name in self.tensors

    def any(self, *parts):
        """A name that contains one of `parts`, or None."""
        return self._line(next((at for at in map(self.text.find, parts) if at >= 0), -1))

    def ending(self, *suffixes):
        """A name that ends with one of `suffixes`, or None."""
        return self._line(next((at for at in (self.text.find(f"{end}\n") for end in suffixes) if at >= 0), -1))

    def _line(self, at):
        return self.text[self.text.rfind("\n", 0, at) + 1 : self.text.index("\n", at)] if at >= 0 else None

    def shape(self, name, axis):
        """One side of a weight in numbers, or 0 when it is absent or has fewer axes."""
        shape = quantisation.shape(self.checkpoint, name, self.marked) if name in self.tensors else ()
        return shape[axis] if -len(shape) <= axis < len(shape) else 0

    def count(self, prefix, part):
        """How many different numbers follow `prefix` and `part` at the start of the names: of blocks or layers."""
        return len(set(re.findall(rf"\n{re.escape(prefix)}{part}\.([0-9]{{1,9}})\.", self.text)))


# --- rules: each looks at the names and returns an Identity or None --------------------------------------------------


# parts that only an addition to a model has: the factors of LoRA, LoKr and LoHa, differences, lengths of DoRA
LORA_PARTS = (".lora_A", ".lora_B", ".lora_up.", ".lora_down.", ".lora.up.", ".lora.down.", "_lora.up.", "_lora.down.")
LORA_PARTS += (".lora_linear_layer.", ".lora_magnitude_vector", ".lokr_", ".hada_", ".oft_blocks", "lora_unet_")
LORA_ENDS = (".diff", ".diff_b", ".w_norm", ".b_norm", ".set_weight", ".dora_scale")


def _lora(names):
    name = names.any(*LORA_PARTS) or names.ending(*LORA_ENDS)
    if not name:
        return None
    some = itertools.islice(names.tensors, 2000)
    other = lora_names.other_model({lora_names.plain(lora_names.split(each)[0]) for each in some})
    place = "Put it into the folder loras and load it with the node "
    few = None if other else _few_steps(names)
    if few:
        title, why = few
        advice = f"{place}Load FLUX.2 LoRA, behind FLUX.2 dev or klein, and set as many steps as its page says."
        return Identity("lora", title, why, advice=advice)
    return Identity(
        "lora",
        f"a LoRA {f'for {other[0]} ' if other else ''}(an addition to a model, not a model)",
        f"it has the tensor {name}",
        advice=f"{place}{'Load LoRA' if other else 'Load FLUX.2 LoRA'}, behind the model.",
    )


# (what it is, parts of names that only it has) of LoRAs that make FLUX.2 sample in few steps
FEW_STEPS = (
    ("a TwinFlow LoRA for FLUX.2, which samples in 1 to 4 steps", ("time_sign_embed",)),
    (
        "a LoRA that also changes how FLUX.2 dev reads its guidance, as those for few steps do (Turbo)",
        ("guidance_embedder.linear_", "guidance_in.in_layer", "guidance_in.out_layer", "guidance_in_"),
    ),
)
NAMED = re.compile(r"(?<![a-z])(turbo|twinflow)(?![a-z])", re.IGNORECASE)


def _few_steps(names):
    """(what it is, why) of a LoRA for few steps: by layers that others leave alone, or by what its file is called."""
    for title, marks in FEW_STEPS:
        name = names.any(*marks)
        if name:
            return title, f"it has the tensor {name}"
    called = NAMED.search(names.checkpoint.name)
    return called and (f"a LoRA named as one for few steps ({called[1]})", "its layers are those of any LoRA")


@dataclass(frozen=True)
class Beside:
    """Something that people put beside a FLUX.2 model. marks: parts of names that only it has."""

    kind: str
    marks: tuple
    title: str
    advice: str


BESIDE = (
    Beside(
        "dfloat11",
        (".sign_mantissa", ".encoded_exponent"),
        "a model compressed by DFloat11",
        "Neither ComfyUI nor this pack reads that: use the bf16 file, or the nodes of ComfyUI-DFloat11-Extended.",
    ),
    Beside(
        "flux2-controlnet",
        ("control_transformer_blocks.",),
        "a FLUX.2 ControlNet (Fun-Controlnet-Union)",
        "Put it where the pack that loads it looks for it, model_patches for the FLUX.2 nodes of VideoX-Fun; ComfyUI's "
        "own node Load ControlNet Model does not know it yet.",
    ),
    Beside(
        "controlnet",
        ("controlnet_x_embedder.", "controlnet_blocks.", "control_img_in.", "control_blocks.", "control_model."),
        "a ControlNet of another model",
        "Put it into the folder controlnet and load it with the node Load ControlNet Model, with the model that it is "
        "for.",
    ),
    Beside(
        "piflow",
        ("proj_out_logweights.", "proj_out_loggamma.", "proj_out_logstds."),
        "a pi-Flow adapter, which samples in few steps with a sampler of its own",
        "It is no LoRA, although it contains one: load it with the nodes of ComfyUI-piFlow.",
    ),
    Beside(
        "pulid",
        ("pulid_ca", "pulid_encoder.", "id_former."),
        "PuLID, which carries a face into the image",
        "Load it with the nodes of a PuLID pack, behind the model.",
    ),
    Beside(
        "taef2",
        ("3.pool.0.weight", "11.pool.0.weight"),  # of its decoder, of its encoder
        "taef2, the tiny autoencoder of FLUX.2",
        "Put taef2_encoder and taef2_decoder into the folder vae_approx: previews use them with --preview-method "
        "taesd, and ComfyUI's node Load VAE offers them as taef2.",
    ),
)


def _beside(names):
    for row in BESIDE:
        name = names.any(*row.marks)
        if name:
            return Identity(row.kind, row.title, f"it has the tensor {name}", advice=row.advice)


def _flux2_original(names):
    key = names.ending("double_stream_modulation_img.lin.weight")
    if not key:
        return None
    prefix = key.removesuffix("double_stream_modulation_img.lin.weight")
    variant, why = variants.find(
        names.shape(f"{prefix}img_in.weight", 0),
        names.count(prefix, "double_blocks"),
        names.count(prefix, "single_blocks"),
        names.shape(f"{prefix}txt_in.weight", 1),
        f"{prefix}guidance_in.in_layer.weight" in names,
    )
    return Identity(MODEL, f"a {variant.title} diffusion model", why, MODEL, prefix=prefix, variant=variant)


def _flux2_diffusers(names):
    key = names.ending("double_stream_modulation_img.linear.weight")
    if not key:
        return None
    prefix = key.removesuffix("double_stream_modulation_img.linear.weight")
    variant, why = variants.find(
        names.shape(f"{prefix}x_embedder.weight", 0),
        names.count(prefix, "transformer_blocks"),
        names.count(prefix, "single_transformer_blocks"),
        names.shape(f"{prefix}context_embedder.weight", 1),
        f"{prefix}time_guidance_embed.guidance_embedder.linear_1.weight" in names,
    )
    return Identity(
        MODEL,
        f"a {variant.title} diffusion model in diffusers' keys",
        why,
        MODEL,
        layout="diffusers",
        prefix=prefix,
        variant=variant,
    )


def _flux1(names):
    key = names.ending("double_blocks.0.img_mod.lin.weight", "transformer_blocks.0.norm1_context.linear.weight")
    if key:
        return Identity(
            "flux1-model",
            "a FLUX.1 diffusion model",
            f"its blocks have their own modulation ({key})",
            advice="Load it with the node Load Diffusion Model.",
        )


def _flux3(names):
    key = names.any("content_mode_blocks.", "mode_blocks.0.")
    if key:
        return Identity(
            "flux3-model",
            "a FLUX.3 diffusion model",
            f"it has the tensor {key}",
            advice="Load it with the node Load Diffusion Model.",
        )


def _flux2_vae(names):
    if names.shape("bn.running_mean", 0) != variants.LATENT_CHANNELS or not names.any("decoder.conv_in.weight"):
        return None
    diffusers = "decoder.up_blocks.0.resnets.0.norm1.weight" in names
    channels = names.shape("decoder.conv_in.weight", 0)
    size = "" if channels == 512 else f" with a small decoder ({channels} channels)"
    return Identity(
        VAE,
        f"a FLUX.2 VAE{size}",
        "it normalises 128 latent channels (bn.running_mean)",
        VAE,
        layout="diffusers" if diffusers else "original",
    )


def _bare_decoder(names):
    """small_decoder.safetensors: the names start where those of a VAE's decoder go on."""
    if names.shape("conv_in.weight", 1) != 32 or not names.count("", "up") or not names.any("mid.block_1."):
        return None
    return Identity(
        "bare-decoder",
        "the decoder of a FLUX.2 VAE, with names that leave out that it is one (small_decoder.safetensors)",
        "it has conv_in, mid and up, and neither decoder. before them nor an encoder",
        advice="Use full_encoder_small_decoder.safetensors of the same page (FLUX.2-small-decoder) in Load FLUX.2 VAE, "
        "folder vae: it has the same decoder, and the encoder too.",
    )


def _other_vae(names):
    if "decoder.conv_in.weight" not in names and not names.any("first_stage_model.decoder.conv_in"):
        return None
    channels = names.shape("decoder.conv_in.weight", 1)
    family = {
        4: "the VAE of Stable Diffusion 1, 2 or XL",
        16: "a VAE with 16 latent channels (FLUX.1, Stable Diffusion 3 and others)",
    }
    return Identity(
        "other-vae",
        family.get(channels, f"a VAE with {channels} latent channels"),
        f"its decoder takes {channels} channels and it has no bn.running_mean",
        advice="Load it with the node Load VAE.",
    )


def _qwen3(names):
    key = names.ending("layers.0.self_attn.q_norm.weight")
    if not key or names.any("post_feedforward_layernorm"):
        return None
    prefix = key.removesuffix("layers.0.self_attn.q_norm.weight")
    width, layers = names.shape(f"{prefix}embed_tokens.weight", 1), names.count(prefix, "layers")
    sees = names.any("visual.") or "qwen3_vl" in str(names.config.get("model_type", ""))
    family = "Qwen3-VL" if sees else "Qwen3"
    title = {2560: f"{family} 4B", 4096: f"{family} 8B"}.get(width, f"a {family} {width} wide")
    # They differ in width alone; another width is loaded with its own dimensions, as if a Qwen3 4B.
    return Identity(
        "qwen3-8b" if width == 4096 else "qwen3-4b",
        f"{title} ({layers} layers)",
        f"it normalises its queries and is {width} wide" + (", with a vision tower (visual.)" if sees else ""),
        TEXT_ENCODER,
        prefix=prefix,
        width=width,
        layers=layers,
        rope_theta=5e6 if sees else 1e6,
    )


def _mistral3(names):
    key = names.ending("layers.0.self_attn.q_proj.weight")
    if (
        not key
        or names.ending("layers.0.self_attn.q_norm.weight", "layers.0.self_attn.q_proj.bias")
        or names.any("post_feedforward_layernorm")
    ):
        return None
    key = next(
        (
            name
            for name in ("model.language_model.", "language_model.model.", "model.")
            if f"{name}embed_tokens.weight" in names
        ),
        key.removesuffix("layers.0.self_attn.q_proj.weight"),
    )
    width, layers = names.shape(f"{key}embed_tokens.weight", 1), names.count(key, "layers")
    mistral = (
        "tekken_model" in names
        or width == 5120
        or "mistral" in str(names.config.get("model_type", ""))
        or names.any("vision_tower.")
    )
    if not mistral:
        return Identity(
            "llama",
            f"a language model of the Llama kind ({layers} layers, {width} wide)",
            f"it has {key}layers.0.self_attn.q_proj",
            advice="No loader of FLUX.2 takes it.",
        )
    return Identity(
        "mistral3",
        f"Mistral 3 ({layers} layers, {width} wide)",
        f"it has {key}layers and no query norm",
        TEXT_ENCODER,
        prefix=key,
        width=width,
        layers=layers,
        rope_theta=1e9,
    )


def _mistral_native(names):
    if "tok_embeddings.weight" in names and "layers.0.attention.wq.weight" in names:
        return Identity(
            "mistral-native",
            "a language model in Mistral's own key format (consolidated.safetensors)",
            "it has tok_embeddings.weight",
            advice="Use the folder with config.json and model-*.safetensors, or the file mistral_3_small_flux2 made "
            "for ComfyUI.",
        )


def _clip(names):
    key = names.any("text_model.encoder.layers.0.")
    if key:
        return Identity(
            "clip",
            "a CLIP text encoder (Stable Diffusion, SDXL and FLUX.1 use it)",
            f"it has {key}",
            advice="FLUX.2 dev reads prompts from Mistral 3, klein from Qwen3. For FLUX.1 it goes into DualCLIPLoader.",
        )


def _t5(names):
    key = names.ending("encoder.block.0.layer.0.SelfAttention.k.weight")
    if key:
        return Identity(
            "t5",
            "a T5 text encoder (FLUX.1 and Stable Diffusion 3 use it)",
            f"it has {key}",
            advice="FLUX.2 dev reads prompts from Mistral 3, klein from Qwen3. For FLUX.1 it goes into DualCLIPLoader.",
        )


def _language_model(names):
    key = names.any("layers.0.self_attn.", "layers.0.post_feedforward_layernorm")
    if key:
        return Identity(
            "language-model",
            "a language model of another family",
            f"it has {key}",
            advice="No loader of FLUX.2 takes it.",
        )


def _other_model(names):
    key = names.any(
        "input_blocks.0.0.weight",
        "joint_blocks.0.",
        "down_blocks.0.attentions",
        "transformer_blocks.0.img_mod.1.",
        "double_blocks.0.",
        "blocks.0.cross_attn.",
        "cap_embedder.",
    )
    if key:
        return Identity(
            "other-model",
            "a diffusion model of another family",
            f"it has {key}",
            advice="Load it with Load Checkpoint or Load Diffusion Model.",
        )


RULES = (
    _beside,
    _lora,
    _flux2_original,
    _flux2_diffusers,
    _flux1,
    _flux3,
    _flux2_vae,
    _bare_decoder,
    _qwen3,
    _mistral3,
    _mistral_native,
    _clip,
    _t5,
    _other_vae,
    _language_model,
    _other_model,
)


def identify(checkpoint):
    """The first rule that recognises the checkpoint decides. Never raises: what nobody recognises is kind "unknown"."""
    names = Names(checkpoint)
    for rule in RULES:
        found = rule(names)
        if found:
            return found
    some = ", ".join(list(names.tensors)[:3]) or "no tensors at all"
    return Identity(
        "unknown", "something that this pack does not know", f"it holds {len(names.tensors)} tensors: {some[:200]}"
    )


def expect(checkpoint, slot):
    """The Identity of a checkpoint that fits `slot` (a key of SLOTS). Raises CheckpointError that names file, finding,
    and the right place.
    """
    found, wanted = identify(checkpoint), SLOTS[slot]
    shard = re.search(r"-\d{5}-of-(\d{5})\.", checkpoint.path.name)
    if shard and int(shard[1]) > 1:
        raise CheckpointError(
            f"{checkpoint.name} is one of {int(shard[1])} shards of a model. Choose the folder that holds them all, "
            "with its config.json, instead.",
            "missing-file",
        )
    if found.slot == slot:
        _refuse_foreign_quantisation(checkpoint, found)
        return found
    belongs = SLOTS.get(found.slot)
    advice = f"It belongs in the node {belongs.node} (folder {belongs.folder})." if belongs else found.advice
    raise CheckpointError(
        f"{checkpoint.name} is {found.title}: {found.reason}. {wanted.node} expects {wanted.expects}, "
        f"from the folder {wanted.folder}. {advice}".rstrip(),
        "wrong-kind-of-file",
    )


def _refuse_foreign_quantisation(checkpoint, found):
    """Raise for weights quantised by other libraries, which would be read as if their numbers were the weights."""
    names = Names(checkpoint)
    how = next((meaning for mark, meaning in FOREIGN_QUANTISATION if names.ending(mark)), None)
    marked = quantisation.layers(checkpoint)
    described = checkpoint.config.get("quantization_config")
    if how is None and not marked and described:
        method = described.get("quant_method") if isinstance(described, dict) else None
        how = f"by {str(method)[:40] if method else 'a library'}, as its config.json says"
    if how is None and not marked and names.ending(".weight_scale", ".weight_scale_inv", ".scale_weight"):
        how = "with scales that no ComfyUI metadata describes"
        if quantisation.speaks_of_rotation(checkpoint):
            how += ", and with a rotation, of which the scales say nothing"
    if how is None and not marked and _integers(checkpoint):
        how = "by a library that left no description: its weights are whole numbers"
    if how:
        raise CheckpointError(
            f"{checkpoint.name} is {found.title}, quantised {how}. ComfyUI does not read that: use the bf16 file, or "
            f"one quantised for ComfyUI (fp8 scaled, fp8 mixed, int8, nvfp4, mxfp8).",
            "quantised-file",
        )


def _integers(checkpoint):
    """Whether most of the weights are stored as bytes or whole numbers."""
    weights = [tensor.dtype for name, tensor in checkpoint.tensors.items() if name.endswith(".weight")]
    return sum(dtype in ("I8", "U8", "I32") for dtype in weights) * 3 > len(weights)


FOREIGN_QUANTISATION = (  # endings of tensors beside a weight -> who writes them
    (".absmax", "by bitsandbytes"),
    (".SCB", "by bitsandbytes (int8)"),
    (".qweight", "by GPTQ, AWQ or nunchaku"),
    (".wscales", "by nunchaku"),
    (".scales", "by MLX or another library"),
    (".weight_packed", "by compressed-tensors"),
    ("._data", "by quanto"),
    ("._scale", "by quanto"),
    (".svd_up", "by SDNQ"),
    (".weight.scale", "by SDNQ"),
    (".zero_point", "by SDNQ or another library"),
)


# --- number formats --------------------------------------------------------------------------------------------------

DTYPE_WORDS = {
    "BF16": "bf16",
    "F16": "fp16",
    "F32": "fp32",
    "F64": "fp64",
    "F8_E4M3": "fp8 (e4m3)",
    "F8_E5M2": "fp8 (e5m2)",
    "F8_E4M3FNUZ": "fp8 (e4m3 fnuz)",
    "F8_E5M2FNUZ": "fp8 (e5m2 fnuz)",
    "U8": "uint8",
    "I8": "int8",
}


def number_format(checkpoint):
    """How the weights are stored: (words, quantised). Words such as "bf16" or "mixed precision: fp8 scaled (e4m3) in
    120 layers, else bf16".
    """
    kinds = Counter(map(quantisation.words, quantisation.layers(checkpoint).values()))
    stored = Counter()
    for tensor in checkpoint.tensors.values():
        stored[tensor.dtype] += tensor.bytes
    plain = [
        DTYPE_WORDS.get(name, name)
        for name, _ in stored.most_common()
        if name in ("BF16", "F16", "F32", "F64") or not kinds
    ]
    if not kinds:
        return (plain[0] if plain else "empty"), False
    layers = ", ".join(f"{kind} in {count} layers" for kind, count in kinds.most_common())
    return f"mixed precision: {layers}, else {plain[0] if plain else 'nothing'}", True
