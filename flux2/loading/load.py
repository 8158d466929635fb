"""Paths of FLUX.2 checkpoints -> ComfyUI's MODEL, CLIP and VAE, loaded by ComfyUI's own machinery.

  model = load_model("flux2-dev.safetensors", "as stored")
  clip = load_text_encoder("mistral_3_small_flux2_bf16.safetensors")
  vae = load_vae("flux2-vae.safetensors", "auto")

The results are plain ComfyUI types. Each patcher carries `cached_patcher_init`, with which ComfyUI loads the same
weights again (for torch.compile, and for other devices). Files are mapped by ComfyUI, so tensors that are not used are
never read. What a file is, and what is wrong with it, is settled from its header before anything is loaded: every
failure is a CheckpointError with a sentence.
"""

import json
import logging

import comfy.diffusers_convert
import comfy.model_management
import comfy.patcher_extension
import comfy.sd
import comfy.sd1_clip
import comfy.text_encoders.flux
import comfy.utils
import torch

from ...attention.errors import is_out_of_memory
from .. import error_links
from ..checkpoints import identify, keys, quantisation, variants
from ..vae import prepare as prepare_vae
from ..checkpoints.header import CheckpointError, open_checkpoint
from ..checkpoints.validate import check_present, marks_of
from ..prompts.text import check_bounds, check_characters
from . import encoder_precision, memory, reference_padding as prompt_padding, tekken as tokenizer
from .encoder_families import FAMILIES, dimensions
from .examine import computed_formats, describe, examine, tokenizer_place

WEIGHT_DTYPES = {"as stored": None, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
PRECISIONS = {"auto": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DEVICES = ("default", "cpu")
PADDINGS = ("zeros", "reference")
log = logging.getLogger(__name__)


def read(checkpoint):
    """State dict of a checkpoint, mapped: the bytes of a tensor are read when it is used. Raises CheckpointError."""
    weights = {}
    for file in checkpoint.files:
        try:
            with tokenizer.panics_as_sentences(file.name):
                part = comfy.utils.load_torch_file(str(file), safe_load=True)
        except Exception as error:  # the safetensors library and ComfyUI's reader raise several kinds
            if is_out_of_memory(error):
                raise
            raise CheckpointError(f"{file.name} cannot be read: {error}. Download it again.") from error
        weights.update((name, part[name]) for name in part if name in checkpoint.tensors)
    return weights


def _built(checkpoint, build):
    """Run `build`, in which ComfyUI makes a module and copies weights into it. The header was checked before; what
    ComfyUI still refuses becomes a CheckpointError.
    """
    try:
        return build()
    except CheckpointError:
        raise
    except Exception as error:  # of any kind: it is ComfyUI's code
        if is_out_of_memory(error):
            raise
        fits = "size mismatch" not in str(error) and "shape" not in str(error)
        why = "ComfyUI cannot use its weights" if fits else "holds weights whose sizes do not fit together"
        raise CheckpointError(
            f"{checkpoint.name} {'cannot be loaded: ' if fits else ''}{why} ({type(error).__name__}: "
            f"{str(error)[:300]}). It is damaged or pieced together: download it again."
        ) from error


def _add_marks(weights, marked):
    """Put the marks of quantised layers into a state dict, as ComfyUI reads them."""
    for layer, mark in marked.items():
        scale = weights.get(f"{layer}.weight_scale")
        if mark.get("format") == "int8_tensorwise" and scale is not None and scale.ndim == 1:
            weights[f"{layer}.weight_scale"] = scale.reshape(-1, 1)  # one for each row, which broadcasts to rows alone
        weights[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(mark).encode()), dtype=torch.uint8)
    return weights


# --- diffusion model -------------------------------------------------------------------------------------------------


def load_model(path, weight_dtype="as stored", memory_mode="auto", disable_dynamic=False):
    """MODEL from a FLUX.2 diffusion model: a file, or a diffusers folder. `weight_dtype` is a key of WEIGHT_DTYPES.

    `memory_mode` is one of memory.MODEL_MODES.
    """
    checkpoint = open_checkpoint(path)
    found = examine(checkpoint, identify.MODEL, weight_dtype)
    log.info("%s", describe(checkpoint, found))
    weights, joined = _model_weights(checkpoint, found)
    metadata = {name: text for name, text in checkpoint.metadata.items() if name != "_quantization_metadata"}
    plain = disable_dynamic or memory.needs_plain_patcher(memory_mode)
    patcher = _built(checkpoint, lambda: _model(weights, metadata, checkpoint.name, weight_dtype, plain))
    _join(patcher, joined)
    patcher = memory.manage(patcher, memory_mode)
    patcher.cached_patcher_init = (load_model, (str(path), weight_dtype, memory_mode))
    _check_text_width(patcher, found.variant, checkpoint.name)
    return patcher


def _model_weights(checkpoint, found):
    """(state dict in ComfyUI's keys, name -> parts of the weights that are stacked from several tensors)."""
    named, marked = read(checkpoint).items(), marks_of(checkpoint, found.prefix)
    weights = {name[len(found.prefix) :]: value for name, value in named if name.startswith(found.prefix)}
    if not quantisation.is_old(checkpoint):  # ComfyUI itself turns the older marks into its own
        weights = {name: value for name, value in weights.items() if not name.endswith(".comfy_quant")}
        if found.layout != "diffusers":
            return _add_marks(weights, marked), {}
    elif found.layout != "diffusers":
        return weights, {}
    try:
        weights, joined, marked = keys.convert_model(weights, found.variant, marked)
    except ValueError as error:
        raise CheckpointError(
            f"{checkpoint.name} is {found.title}, quantised so that its layers {error} cannot be joined to one, as "
            f"ComfyUI has them: they have scales or formats of their own. Use the bf16 file, or one made for ComfyUI.",
            "quantised-file",
        ) from None
    if marked:  # ComfyUI's layers of mixed precision take the tensors of the state dict as they are
        weights |= {name: torch.cat(list(parts)) for name, parts in joined.items()}
        joined = {}
    return _add_marks(weights, marked), joined


def _model(weights, metadata, name, weight_dtype, disable_dynamic):
    """ComfyUI's MODEL from a state dict in its keys."""
    options = {} if WEIGHT_DTYPES[weight_dtype] is None else {"dtype": WEIGHT_DTYPES[weight_dtype]}
    patcher = comfy.sd.load_diffusion_model_state_dict(weights, options, metadata, disable_dynamic)
    if patcher is None:
        raise CheckpointError(
            f"ComfyUI does not recognise {name}, although it looks like a FLUX.2 model. Update ComfyUI.",
            "update-comfyui",
        )
    return patcher


@torch.no_grad()
def _join(patcher, joined):
    """Put weights that are stacked from several tensors (name -> parts) into a loaded model, one after another, without
    a copy beside the model's.

    A dynamic patcher's model holds the mapped tensors themselves: there the stack takes the place of the stand-in.
    """
    network = patcher.model.diffusion_model
    for name, parts in joined.items():
        if patcher.is_dynamic():
            comfy.utils.set_attr_param(network, name, torch.cat(parts))
        else:
            rows = comfy.utils.get_attr(network, name).split([len(part) for part in parts])
            for target, part in zip(rows, parts):
                target.copy_(part)


def _check_text_width(patcher, variant, name):
    """Make sampling refuse a prompt of another text encoder by name, where ComfyUI would report two matrix shapes."""

    def check(executor, *args, **kwargs):
        for conds in executor.class_obj.conds.values():
            for width in {cond["cross_attn"].shape[-1] for cond in conds if cond.get("cross_attn") is not None}:
                if width != variant.text_width:
                    raise error_links.link(
                        CheckpointError(
                            f"{name} ({variant.title}) reads prompts {variant.text_width} wide, from "
                            f"{variant.text_encoder}; this prompt is {width} wide, from "
                            f"{variants.encoder_for(width)}. Load the text encoder that belongs to the model.",
                            "prompt-of-another-text-encoder",
                        )
                    )
        return executor(*args, **kwargs)

    patcher.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, "flux2_text_width", check)


# --- text encoder ----------------------------------------------------------------------------------------------------


class Target:
    """What comfy.sd.CLIP asks of the text encoder that it builds."""

    def __init__(self, clip, tokenizer):
        self.clip, self.tokenizer, self.params = clip, tokenizer, {}


def load_text_encoder(
    path,
    device="default",
    padding="zeros",
    embedding_directory=None,
    memory_mode="auto",
    precision="auto",
    disable_dynamic=False,
):
    """CLIP from Mistral 3 (FLUX.2 dev) or Qwen3 (klein): a file, or a Hugging Face folder. Layers above the last one
    used are not loaded.

    `device` is "default" (where ComfyUI keeps text encoders) or "cpu". `padding` says what fills short prompts up to
    512 tokens: "zeros" as ComfyUI does, or what the "reference" (diffusers) has there, which also cuts longer ones.
    `embedding_directory` is where prompts find embeddings. `memory_mode` is one of memory.MODES, `precision` of
    encoder_precision.PRECISIONS.
    """
    checkpoint = open_checkpoint(path)
    found = examine(checkpoint, identify.TEXT_ENCODER)
    family = FAMILIES[found.kind]
    sizes = dimensions(checkpoint, found, family, computed_formats())
    weights = read(checkpoint)
    tokenizer_data = _tokenizer_data(checkpoint, family, weights, sizes)
    weights = _language_weights(checkpoint, weights, found.prefix, family)
    options = {f"{family.name}_model_config": sizes, **_text_devices(device, memory_mode)}
    run_on = options.get("load_device", comfy.model_management.text_encoder_device())
    computed = encoder_precision.resolved(precision, run_on)
    text_model = _text_model(family, weights, padding, memory_mode, computed)
    target = Target(
        for_flux2_alone(text_model, checkpoint.name, family, sizes["vocab_size"]),
        bounded(family.tokenizer(comfy.text_encoders.flux)),
    )
    log.info("%s", describe(checkpoint, found))
    clip = _built(
        checkpoint,
        lambda: comfy.sd.CLIP(
            target,
            embedding_directory=embedding_directory,
            tokenizer_data=tokenizer_data,
            parameters=comfy.utils.calculate_parameters(weights),
            state_dict=[weights],
            model_options=options,
            disable_dynamic=disable_dynamic or memory.needs_plain_patcher(memory_mode),
        ),
    )
    if computed == "bf16":
        clip.patcher.set_model_compute_dtype(torch.bfloat16)  # of weights that ComfyUI casts or patches on their way
    clip.patcher = memory.manage(clip.patcher, memory_mode)
    if memory_mode == memory.ON_GPU:
        memory.start_on_gpu(clip.patcher)
    clip.patcher.cached_patcher_init = (
        _text_encoder_patcher,
        (str(path), device, padding, embedding_directory, memory_mode, precision),
    )
    return clip


def _text_devices(device, memory_mode):
    """ComfyUI's options for where a text encoder is run and kept. Else it loads large ones to the GPU at once."""
    cpu = torch.device("cpu")
    if device == "cpu":
        return {"load_device": cpu, "offload_device": cpu}
    return {} if memory_mode == memory.AUTO else {"initial_device": cpu}


def _text_model(family, weights, padding, memory_mode, precision):
    """The class of ComfyUI's text encoder, with what `padding`, the memory mode and the precision change."""
    text_model = family.text_model(comfy.text_encoders.flux, comfy.sd.llama_detect([weights]))
    if precision == "bf16":
        text_model = encoder_precision.bf16_text_model(text_model, family)
    if padding == "reference":
        text_model = prompt_padding.like_the_reference(text_model, family, encoder_precision.PRECISIONS[precision])
    return memory.idle_text_model(text_model, memory_mode)


def _text_encoder_patcher(path, device, padding, embedding_directory, memory_mode, precision, disable_dynamic=False):
    return load_text_encoder(
        path, device, padding, embedding_directory, memory_mode, precision, disable_dynamic
    ).patcher


def _language_weights(checkpoint, weights, prefix, family):
    """The layers that FLUX.2 reads, in ComfyUI's keys, quantisation marks included."""
    if quantisation.is_old(checkpoint):
        weights, _ = comfy.utils.convert_old_quants(weights, "", {})
    else:
        weights = _add_marks(weights, quantisation.layers(checkpoint))
    renamed = ((keys.encoder_name(name, prefix, family.last_tap), value) for name, value in weights.items())
    return {name: value for name, value in renamed if name}


def for_flux2_alone(text_model, file, family, vocabulary):
    """The class of a text encoder that was cut to what FLUX.2 reads: it refuses in words to write text, and tokens that
    its embedding does not have, on which a GPU would stop with everything on it.
    """

    class ForFlux2(text_model):
        def encode_token_weights(self, token_weight_pairs):
            rows = token_weight_pairs.get(family.name, ())
            highest = max((entry[0] for row in rows for entry in row if type(entry[0]) is int), default=0)
            if highest >= vocabulary:
                raise CheckpointError(
                    f"{file} has an embedding of {vocabulary} tokens, and this prompt has the token {highest}: weights "
                    f"and tokenizer are not of the same model. Download the text encoder again.",
                    "tokenizer",
                )
            return super().encode_token_weights(token_weight_pairs)

        def generate(self, *args, **kwargs):
            raise CheckpointError(
                f"{file} was loaded by Load FLUX.2 Text Encoder, without the layers above {family.last_tap} and the "
                f"head, which FLUX.2 never reads: it cannot write text. Load the same file with the node Load CLIP for "
                f"Generate Text, or use Improve Prompt with Mistral (FLUX.2).",
                "improving-prompts",
            )

    return ForFlux2


def bounded(tokenizer_class):
    """The class of ComfyUI's tokenizer around the language model's, refusing texts that are no prompts any more."""

    class Bounded(tokenizer_class):
        def tokenize_with_weights(self, text, *args, **kwargs):
            check_bounds(text)
            check_characters(text)
            with tokenizer.panics_as_sentences("The prompt"):
                return super().tokenize_with_weights(text, *args, **kwargs)

    return Bounded


def _tokenizer_data(checkpoint, family, weights, sizes):
    """What the tokenizer classes need: nothing for Qwen3, whose tokenizer ComfyUI ships; Mistral's is in the file or
    beside it.
    """
    place = tokenizer_place(checkpoint, family)
    if place is None:
        return {}
    data = checkpoint.read(place, tokenizer.FILE_LIMIT) if isinstance(place, str) else tokenizer.read_file(place)
    ready = tokenizer.build(data, checkpoint.name if isinstance(place, str) else place)
    highest = max(ready.get_vocab(with_added_tokens=True).values(), default=0)
    if highest >= sizes["vocab_size"]:
        raise CheckpointError(
            f"{checkpoint.name} has an embedding of {sizes['vocab_size']} tokens, and its tokenizer has {highest + 1}: "
            f"they are not of the same model. Download the text encoder again.",
            "tokenizer",
        )
    return {f"{family.name}_tokenizer_class": _mistral_tokenizer(ready, data, sizes["hidden_size"])}


def _mistral_tokenizer(ready, data, width):
    """A ComfyUI tokenizer class around a `tokenizers.Tokenizer`: no weights in prompts, no end token, padding on the
    left.
    """
    from transformers import PreTrainedTokenizerFast

    class Wrapped:
        @staticmethod
        def from_pretrained(path):
            return PreTrainedTokenizerFast(tokenizer_object=ready)

    class MistralTokenizer(comfy.sd1_clip.SDTokenizer):
        def __init__(self, embedding_directory=None, tokenizer_data={}):
            super().__init__(
                "",
                tokenizer_class=Wrapped,
                start_token=ready.token_to_id("<s>"),
                pad_token=ready.token_to_id("<pad>"),
                has_end_token=False,
                pad_with_end=False,
                pad_to_max_length=False,
                pad_left=True,
                min_length=1,
                max_length=2**31,
                disable_weights=True,
                embedding_directory=embedding_directory,
                embedding_size=width,
                embedding_key="mistral3_24b",
                tokenizer_data=tokenizer_data,
            )

        def tokenize_with_weights(self, text, *args, **kwargs):
            # "[IMG]" stands for an image that is not given: the reference drops it from prompts too.
            return super().tokenize_with_weights(text.replace("[IMG]", ""), *args, **kwargs)

        def state_dict(self):
            name = "tekken_model" if b'"special_tokens"' in data else "tokenizer_json"
            return {name: torch.frombuffer(bytearray(data), dtype=torch.uint8)}

    return MistralTokenizer


# --- VAE -------------------------------------------------------------------------------------------------------------


def load_vae(path, precision="auto", memory_mode="auto", fused_blocks="auto"):
    """VAE from a FLUX.2 autoencoder: a file, or a diffusers folder. `precision` is a key of PRECISIONS; "auto" is
    ComfyUI's choice.

    `memory_mode` is one of memory.MODES, `fused_blocks` of flux2.vae.prepare.CHOICES.
    """
    checkpoint = open_checkpoint(path)
    found = examine(checkpoint, identify.VAE)
    log.info("%s", describe(checkpoint, found))
    weights = read(checkpoint)
    if found.layout == "diffusers":
        weights = comfy.diffusers_convert.convert_vae_state_dict(weights)
    names = {
        name.replace("decoder.post_quant_conv.", "post_quant_conv.").replace("encoder.quant_conv.", "quant_conv.")
        for name in weights
    }
    width = _encoder_width(weights)
    kind = DecoderVAE if width is None else comfy.sd.VAE if width == 128 else NarrowEncoderVAE
    options = {"sd": weights, "dtype": PRECISIONS[precision], "metadata": dict(checkpoint.metadata)}
    vae = _built(checkpoint, lambda: memory.idle_vae(kind, memory_mode)(**options))
    vae.throw_exception_if_invalid()
    wanted = [
        name
        for name in vae.first_stage_model.state_dict()
        if width is not None or not name.startswith(("encoder.", "quant_conv."))
    ]
    check_present(checkpoint, found.title, wanted, names | {"bn.num_batches_tracked"})
    prepare_vae.prepare(vae, fused_blocks)
    vae.patcher = memory.manage(vae.patcher, memory_mode)
    vae.patcher.cached_patcher_init = (_vae_patcher, (str(path), precision, memory_mode, fused_blocks))
    return vae


def _encoder_width(weights):
    """Channels of the encoder's first layer, or None for a decoder alone."""
    return weights["encoder.conv_in.weight"].shape[0] if "encoder.conv_in.weight" in weights else None


class DecoderVAE(comfy.sd.VAE):
    """ComfyUI's VAE for a file without an encoder: latents become images, and images are refused in words."""

    def encode(self, *args, **kwargs):
        raise CheckpointError(
            "This VAE has a decoder alone: it turns latents into images, and cannot encode an image. Load a whole "
            "FLUX.2 VAE for VAE Encode and reference images, such as flux2-vae.safetensors or "
            "full_encoder_small_decoder.safetensors.",
            "wrong-kind-of-file",
        )

    encode_tiled = encode


class NarrowEncoderVAE(comfy.sd.VAE):
    """ComfyUI's VAE for an encoder that is not 128 wide. Version 0.30 finds the width of the decoder in the file but
    takes the encoder's as 128; told another one, it does not see by itself that the latents are FLUX.2's.
    """

    def __init__(self, sd, **options):
        renamed = comfy.utils.state_dict_prefix_replace(
            dict(sd), {"decoder.post_quant_conv.": "post_quant_conv.", "encoder.quant_conv.": "quant_conv."}
        )
        encoder, decoder = _encoder_width(sd), sd["decoder.conv_in.weight"].shape[0] // 4
        sizes = {"ddconfig": AUTOENCODER | {"ch": encoder}, "decoder_ddconfig": AUTOENCODER | {"ch": decoder}}
        super().__init__(sd=renamed, config={"params": {**sizes, "embed_dim": 32}}, **options)
        self.downscale_ratio = self.upscale_ratio = 16
        self.latent_channels = 128
        in_pixels = self.memory_used_decode  # for 64 pixels for each place of the latent; FLUX.2's is of 256
        self.memory_used_decode = lambda shape, dtype: 4.0 * in_pixels(shape, dtype)


AUTOENCODER = {
    "double_z": True,
    "z_channels": 32,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [],
    "dropout": 0.0,
    "batch_norm_latent": True,
}


def _vae_patcher(path, precision, memory_mode, fused_blocks, disable_dynamic=False):
    """ComfyUI's VAE decides by itself whether its patcher is dynamic (0.30 has no argument for it, and reloads VAEs
    this way too).
    """
    return load_vae(path, precision, memory_mode, fused_blocks).patcher
