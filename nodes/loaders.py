"""The loader nodes: FLUX.2 diffusion model, text encoder and VAE from ComfyUI's model folders, as plain MODEL, CLIP and
VAE.

A choice is a file, or the folder of a diffusers or Hugging Face model. What is wrong with a choice is said in a
sentence, before anything is loaded.
"""

import folder_paths
from comfy_api.latest import io, ui

from ..flux2 import error_links, page_words
from ..flux2.loading import encoder_precision, examine, lazy_clip, load
from ..flux2.vae import prepare as prepare_vae
from ..flux2.checkpoints.header import CheckpointError
from ..flux2.checkpoints.folders import choices, locate, pipeline_parts
from ..flux2.loading.memory import AUTO, MODEL_MODES, MODES
from .attention import ENCODER_BACKENDS, check_encoder_attention, choose_encoder_attention

CATEGORY = "Flux 2"
# of pipelines in ComfyUI's folder diffusers
PIPELINE_PARTS = {"diffusion_models": "transformer", "text_encoders": "text_encoder", "vae": "vae"}
WHERE_IDLE = (
    "auto: ComfyUI moves the weights when the VRAM is needed (recommended).\nStay in VRAM: fastest; other models get "
    "what is left.\nLeave VRAM when idle: after each {run}; most room for other models, one transfer each time."
)
NO_GPU = "\nNo effect without a GPU."
# where files that belong elsewhere are found too
INFO_FOLDERS = ("diffusion_models", "text_encoders", "vae", "checkpoints", "loras")


def _names(folder):
    names = choices(folder_paths.get_filename_list(folder), folder_paths.get_folder_paths(folder))
    return (
        names + pipeline_parts(folder_paths.get_folder_paths("diffusers"), PIPELINE_PARTS[folder])
        if folder in PIPELINE_PARTS
        else names
    )


def _all_names():
    return [f"{folder}/{name}" for folder in INFO_FOLDERS for name in _names(folder)]


def _path(folder, name):
    if folder not in INFO_FOLDERS:
        raise CheckpointError(
            f"There is no model folder {folder[:80]!r}. Choose one of {', '.join(INFO_FOLDERS)}, followed by / and the "
            "name of a file.",
            "missing-file",
        )
    roots = folder_paths.get_folder_paths(folder) + folder_paths.get_folder_paths("diffusers") * (
        folder in PIPELINE_PARTS
    )
    return str(locate(name, _names(folder), roots, folder))


def _validate(folder, name):
    """What validate_inputs returns: True, or a sentence where ComfyUI would only say that a value is not in a list.

    A name of None is not known yet: another node gives it, or it is missing, which ComfyUI itself says.
    """
    if name is None:
        return True
    try:
        return bool(_path(folder, name))
    except CheckpointError as error:
        return error_links.answer(error)


def _parted(name):
    """(folder, name in it) of a choice of FLUX.2 Model Info."""
    folder, _, rest = str(name).partition("/")
    return folder, rest


class Flux2LoadModel(io.ComfyNode):
    """MODEL from the folder diffusion_models."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Flux2LoadModel",
            display_name="Load FLUX.2 Model",
            category=f"{CATEGORY}/loaders",
            description="Loads a FLUX.2 diffusion model, the part that generates the image: dev, klein 4B or klein 9B. "
            "Takes the original file, ComfyUI's bf16 and fp8 files, and diffusers folders. A file of another kind is "
            "refused with what it is and where it belongs.",
            # web/search.js: the page's search looks at the first 30 letters of these
            search_aliases=["vram", "offload", "low vram", "klein", "flux2 unet"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=_names("diffusion_models"),
                    tooltip="A file, or the folder of a diffusers model, in ComfyUI's folder diffusion_models, or in "
                    "a whole diffusers pipeline in the folder diffusers.",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(load.WEIGHT_DTYPES),
                    default="as stored",
                    tooltip=(
                        "How the weights are kept in memory. As in the file: recommended. 'bf16': 2 bytes a weight. "
                        "'fp8': 1 byte a weight, rounded without scales: half the memory of bf16, at a visible loss "
                        "of quality; a file made as fp8 or mixed precision is better."
                    ),
                ),
                io.Combo.Input(
                    "memory",
                    display_name="VRAM use",
                    options=list(MODEL_MODES),
                    default=AUTO,
                    optional=True,
                    advanced=True,
                    tooltip=WHERE_IDLE.format(run="sampling")
                    + "\nLayer by layer: every step fetches each layer from the computer's memory; least VRAM, slowest."
                    + NO_GPU,
                ),
            ],
            outputs=[
                io.Model.Output(
                    tooltip="The diffusion model. An ordinary MODEL: LoRA and all other model nodes work on it."
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, model_name=None):
        return _validate("diffusion_models", model_name)

    @classmethod
    def execute(cls, model_name, weight_dtype, memory=AUTO) -> io.NodeOutput:
        model = load.load_model(_path("diffusion_models", model_name), weight_dtype, memory)
        needs = examine.video_memory(model.model_size(), model.model.diffusion_model.params.hidden_size)
        if needs:
            page_words.tell(needs[0])  # on the node until the run ends
        return io.NodeOutput(model)


class Flux2LoadTextEncoder(io.ComfyNode):
    """CLIP from the folder text_encoders."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Flux2LoadTextEncoder",
            display_name="Load FLUX.2 Text Encoder",
            category=f"{CATEGORY}/loaders",
            description="Loads the language model that reads the prompt: Mistral 3 for FLUX.2 dev, Qwen3 4B or 8B for "
            "klein. Takes ComfyUI's files and Hugging Face folders. Layers that FLUX.2 never reads are not loaded.",
            search_aliases=["vram", "offload", "low vram", "qwen3", "clip", "mistral"],
            inputs=[
                io.Combo.Input(
                    "text_encoder_name",
                    options=_names("text_encoders"),
                    tooltip="A file, or the folder of a Hugging Face model, in ComfyUI's folder text_encoders. FLUX.2 "
                    "dev needs Mistral 3, klein 4B needs Qwen3 4B, klein 9B needs Qwen3 8B.",
                ),
                io.Combo.Input(
                    "device",
                    options=list(load.DEVICES),
                    default="default",
                    tooltip="Where the prompt is read. 'default': ComfyUI decides, normally the GPU. 'cpu': leaves "
                    "GPU memory free, but slow.",
                ),
                io.Combo.Input(
                    "padding",
                    display_name="match images of",
                    options=list(load.PADDINGS),
                    default="zeros",
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "Which program's images to reproduce. ComfyUI: zeros in front of a prompt shorter than 512 "
                        "tokens; longer prompts are read whole. diffusers, as the official code: encoded padding "
                        "tokens, and longer prompts end after 512 tokens. With klein only the cut has an effect."
                    ),
                ),
                io.Combo.Input(
                    "attention",
                    display_name="attention kernel",
                    options=ENCODER_BACKENDS,
                    default=ENCODER_BACKENDS[0],
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "Leave it at 'default', ComfyUI's own: a prompt takes milliseconds with any kernel. Only "
                        "kernels that take float32 and a causal mask are offered; the choice for the diffusion model "
                        "does not reach the text encoder."
                    ),
                ),
                io.Combo.Input(
                    "memory",
                    display_name="VRAM use",
                    options=list(MODES),
                    default=AUTO,
                    optional=True,
                    advanced=True,
                    tooltip=WHERE_IDLE.format(run="prompt") + NO_GPU + " No effect with device 'cpu'.",
                ),
                io.Combo.Input(
                    "load",
                    display_name="read the file",
                    options=list(lazy_clip.LOADS),
                    default=lazy_clip.NOW,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "At once: when this node runs. When a new prompt comes: with Encode Prompt (FLUX.2), prompts "
                        "that are kept on disk never need the file."
                    ),
                ),
                io.Combo.Input(
                    "precision",
                    options=list(encoder_precision.PRECISIONS),
                    default=encoder_precision.AUTO,
                    optional=True,
                    advanced=True,
                    tooltip="Number format in which the prompt is computed. 'auto': bf16 where the device computes it "
                    "natively, else float32 (recommended). 'bf16': as diffusers and the official code do, several "
                    "times faster on a GPU. 'float32': as ComfyUI does.",
                ),
            ],
            outputs=[io.Clip.Output(tooltip="The text encoder. An ordinary CLIP: connect it to CLIP Text Encode.")],
        )

    @classmethod
    def validate_inputs(cls, text_encoder_name=None):
        return _validate("text_encoders", text_encoder_name)

    @classmethod
    def execute(
        cls,
        text_encoder_name,
        device,
        padding="zeros",
        attention=ENCODER_BACKENDS[0],
        memory=AUTO,
        load=lazy_clip.NOW,
        precision=encoder_precision.AUTO,
    ) -> io.NodeOutput:
        path = _path("text_encoders", text_encoder_name)
        source = lazy_clip.EncoderSource(path, device, padding, memory, (("attention", attention),), precision)
        check_encoder_attention(source.load_device, attention)
        return io.NodeOutput(
            lazy_clip.text_encoder(source, lambda: _text_encoder(source, attention), load == lazy_clip.WHEN_NEEDED)
        )


def _text_encoder(source, attention):
    embeddings = folder_paths.get_folder_paths("embeddings")
    return choose_encoder_attention(
        load.load_text_encoder(source.path, source.device, source.padding, embeddings, source.memory, source.precision),
        attention,
    )


class Flux2LoadVAE(io.ComfyNode):
    """VAE from the folder vae."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Flux2LoadVAE",
            display_name="Load FLUX.2 VAE",
            category=f"{CATEGORY}/loaders",
            description="Loads the FLUX.2 autoencoder, which turns images into latents and back. Takes the original "
            "file, the file with the small decoder, and diffusers folders.",
            search_aliases=["vram", "offload", "low vram", "load vae"],
            inputs=[
                io.Combo.Input(
                    "vae_name",
                    options=_names("vae"),
                    tooltip="A file, or the folder of a diffusers VAE, in ComfyUI's folder vae.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(load.PRECISIONS),
                    default="auto",
                    tooltip="Number format of the VAE's calculation. 'auto': ComfyUI decides for your device "
                    "(recommended). 'fp32': exact, twice the memory. 'fp16': can overflow to black images.",
                ),
                io.Combo.Input(
                    "memory",
                    display_name="VRAM use",
                    options=list(MODES),
                    default=AUTO,
                    optional=True,
                    advanced=True,
                    tooltip=WHERE_IDLE.format(run="image or batch") + NO_GPU,
                ),
                io.Combo.Input(
                    "fused_blocks",
                    display_name="fused blocks",
                    options=list(prepare_vae.CHOICES),
                    default=prepare_vae.AUTO,
                    optional=True,
                    advanced=True,
                    tooltip="Fused kernels for decoding and encoding, over twice as fast on an H200, with the same "
                    "result up to rounding. 'auto': on NVIDIA GPUs that have Triton, ComfyUI's blocks elsewhere "
                    "(recommended). 'on': always, or an error that says why not. 'off': never.",
                ),
            ],
            outputs=[
                io.Vae.Output(tooltip="The autoencoder. An ordinary VAE: connect it to VAE Decode and VAE Encode.")
            ],
        )

    @classmethod
    def validate_inputs(cls, vae_name=None):
        return _validate("vae", vae_name)

    @classmethod
    def execute(cls, vae_name, precision, memory=AUTO, fused_blocks=prepare_vae.AUTO) -> io.NodeOutput:
        return io.NodeOutput(load.load_vae(_path("vae", vae_name), precision, memory, fused_blocks))


class Flux2ModelInfo(io.ComfyNode):
    """What a file is, as text, without loading it."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Flux2ModelInfo",
            display_name="FLUX.2 Model Info",
            category=f"{CATEGORY}/loaders",
            description="Says what a model file is without loading it: kind, variant, layers, number format, size, "
            "which node it belongs in, and what will happen on this machine. For a damaged or wrong file it says "
            "what is wrong.",
            search_aliases=["inspect model", "identify checkpoint", "what is this file"],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "file_name",
                    options=_all_names(),
                    tooltip="A file or model folder of any of ComfyUI's model folders, with the folder's name in "
                    "front.",
                ),
            ],
            outputs=[io.String.Output(display_name="text", tooltip="The description, several lines.")],
        )

    @classmethod
    def validate_inputs(cls, file_name=None):
        return True if file_name is None else _validate(*_parted(file_name))

    @classmethod
    def execute(cls, file_name) -> io.NodeOutput:
        text = examine.describe_path(_path(*_parted(file_name)))
        return io.NodeOutput(text, ui=ui.PreviewText(text))


NODES = [Flux2LoadModel, Flux2LoadTextEncoder, Flux2LoadVAE, Flux2ModelInfo]
