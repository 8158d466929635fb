"""transformers' Mistral 3 as a writer, built around the layers that a CLIP has already loaded.

FLUX.2 reads 30 layers of Mistral 3; writing takes all of them, the final norm, lm_head, and for images the vision
tower. `Writer` makes transformers' network without memory, puts the CLIP's own modules in where they are the same, and
loads the rest from the same file or folder. Both halves are ModelPatchers, so ComfyUI moves and unloads them like any
model and no weight exists twice. All products go through ComfyUI's layers, which take weights that stay in main memory,
and which stop the moment that the user cancels.
"""

import math
import weakref
from dataclasses import dataclass

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.text_encoders.llama
import torch

from ..checkpoints import identify, keys
from ..loading import load, memory
from ..checkpoints.header import CheckpointError, open_checkpoint
from ..loading.direct_weights import DirectWeights
from ..loading.encoder_families import FAMILIES, dimensions
from ..checkpoints.variants import HEAD_CHANNELS

VISION_HEAD = 64  # channels of a head in the vision tower
DEFAULTS = {"rms_norm_eps": 1e-5, "rope_theta": 1e9}
GROUPS = ("vision_tower", "multi_modal_projector")
ADVICE = (
    "Choose the folder text_encoder of FLUX.2-dev from Hugging Face, or another Mistral Small 3.1 or 3.2 with all "
    "its weights, in Load FLUX.2 Text Encoder."
)
TOO_OLD = (
    "This version of the Python package transformers has no Mistral 3 that can be used here; 4.52 is the first. "
    "Update it: pip install -U transformers."
)
_writers = weakref.WeakKeyDictionary()  # a CLIP's network -> its Writer


@dataclass(frozen=True)
class Parts:
    """A checkpoint that can write: where its weights are. `vision`: it can look at images."""

    checkpoint: object
    found: identify.Identity
    sizes: dict  # of the language model, in ComfyUI's names
    names: dict  # name in our `own` module -> name in the file
    vision: bool


def parts_of(source):
    """Parts of the file or folder that a CLIP was loaded from, by its header alone. CheckpointError when it cannot
    write.
    """
    if source is None:
        raise CheckpointError(
            "This CLIP is not from Load FLUX.2 Text Encoder, so the rest of its language model cannot be found. Use "
            "that node.",
            "improving-prompts",
        )
    checkpoint = open_checkpoint(source.path)
    found = identify.expect(checkpoint, identify.TEXT_ENCODER)
    if found.kind != "mistral3":
        raise CheckpointError(
            f"{checkpoint.name} is {found.title}: prompts are improved by Mistral 3, the text encoder of FLUX.2 dev. "
            f"{ADVICE}",
            "improving-prompts",
        )
    names = own_names(checkpoint.tensors, found)
    if "lm_head.weight" not in names or "norm.weight" not in names:
        missing = "lm_head" if "lm_head.weight" not in names else "final norm"
        raise CheckpointError(
            f"{checkpoint.name} can read prompts but not write them: it has {found.layers} layers and no {missing}. "
            f"{ADVICE}",
            "improving-prompts",
        )
    if identify.number_format(checkpoint)[1]:
        raise CheckpointError(
            f"{checkpoint.name} is quantised, which the layers that only writing needs cannot be. Use the bf16 "
            f"weights. {ADVICE}",
            "improving-prompts",
        )
    vision = all(any(name.startswith(f"{group}.") for name in names) for group in GROUPS)
    return Parts(checkpoint, found, dimensions(checkpoint, found, FAMILIES[found.kind]), names, vision)


def own_names(tensors, found):
    """What a CLIP leaves in its file: name in `own` -> name in the file. Layers keep their numbers less those that the
    CLIP has.
    """
    names, read = {}, FAMILIES[found.kind].last_tap
    for name in tensors:
        rest = name.removeprefix(found.prefix) if name.startswith(found.prefix) else ""
        group = next((group for group in GROUPS if f"{group}." in name), None)
        if group:
            names[name[name.index(group) :]] = name
        elif name.endswith("lm_head.weight"):
            names["lm_head.weight"] = name
        elif rest == "norm.weight":
            names[rest] = name
        elif rest.startswith("layers.") and not keys.encoder_name(name, found.prefix, read):
            _, number, tail = rest.split(".", 2)
            names[f"layers.{int(number) - read}.{tail}"] = name
    return names


def configuration(parts, image_token):
    """transformers' configuration of the network: sizes from the weights, the rest from config.json if there is one."""
    try:
        from transformers import Mistral3Config
    except ImportError:
        raise CheckpointError(TOO_OLD, "improving-prompts") from None
    said, sizes, tensors = parts.checkpoint.config, parts.sizes, parts.checkpoint.tensors
    theta = sizes.get("rope_theta", DEFAULTS["rope_theta"])
    text = {
        "model_type": "mistral",
        "head_dim": HEAD_CHANNELS,
        "hidden_act": "silu",
        "sliding_window": None,
        "max_position_embeddings": 131072,
        "num_hidden_layers": parts.found.layers,
        "rms_norm_eps": sizes.get("rms_norm_eps", DEFAULTS["rms_norm_eps"]),
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "tie_word_embeddings": False,
    }
    text |= {
        name: sizes[name]
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    }
    shape = {name: tensors[inside].shape for name, inside in parts.names.items()}
    try:
        vision = vision_configuration(shape, said.get("vision_config") or {}) if parts.vision else None
        merged = shape["multi_modal_projector.patch_merger.merging_layer.weight"] if parts.vision else (1, 4)
        merge = math.isqrt(merged[1] // merged[0])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{parts.checkpoint.name} has a vision tower that cannot be used: its weights and the vision_config of "
            f"config.json do not describe one ({type(error).__name__}: {str(error)[:100]}). Download it again.",
            "improving-prompts",
        ) from None
    return Mistral3Config(
        text_config=text,
        vision_config=vision,
        image_token_index=image_token,
        tie_word_embeddings=False,
        spatial_merge_size=merge,
        projector_hidden_act=said.get("projector_hidden_act", "gelu"),
        vision_feature_layer=said.get("vision_feature_layer", -1),
        multimodal_projector_bias="multi_modal_projector.linear_1.bias" in shape,
    )


def vision_configuration(shape, said):
    """The vision tower's part of the configuration, from the shapes of its weights."""
    width, channels, patch, _ = shape["vision_tower.patch_conv.weight"]
    layers = {name.split(".")[3] for name in shape if name.startswith("vision_tower.transformer.layers.")}
    theta, head = (said.get("rope_parameters") or said).get("rope_theta", 10000.0), said.get("head_dim", VISION_HEAD)
    # transformers leaves out of config.json what is its default; a file without config.json is the published model,
    # whose towers use silu
    return {
        "model_type": "pixtral",
        "hidden_size": width,
        "num_channels": channels,
        "patch_size": patch,
        "num_hidden_layers": len(layers),
        "intermediate_size": shape["vision_tower.transformer.layers.0.feed_forward.gate_proj.weight"][0],
        "hidden_act": said.get("hidden_act", "gelu" if said else "silu"),
        "head_dim": head,
        "num_attention_heads": said.get("num_attention_heads", width // head),
        "image_size": said.get("image_size", 1540),
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
    }


def writer_of(clip, parts, image_token, memory_mode=memory.AUTO):
    """The Writer of a loaded CLIP; made once for each network that CLIPs share."""
    writer = _writers.get(clip.cond_stage_model)
    if writer is None:
        writer = _writers[clip.cond_stage_model] = Writer(clip, parts, image_token, memory_mode)
    return writer


class Writer:
    """A language model that writes: `network` is transformers' model, `patcher` the ModelPatcher of what the CLIP does
    not hold.
    """

    def __init__(self, clip, parts, image_token, memory_mode):
        config = configuration(parts, image_token)
        self.network, self.vision = skeleton(config, parts.vision), parts.vision
        shared = getattr(clip.cond_stage_model, clip.tokenizer.clip).transformer.model
        language = self.network.model.language_model
        for theirs, ours in zip(language.layers, shared.layers):
            adopt(theirs, ours)
        weight = shared.embed_tokens.weight
        self.dtype = weight.dtype if weight.dtype in (torch.bfloat16, torch.float16, torch.float32) else torch.bfloat16
        language.embed_tokens = Embedding(shared.embed_tokens, self.dtype)
        own = owned(self.network, len(shared.layers))
        fill(own, load.read(parts.checkpoint), parts)
        self.rotary = fresh_rotary(self.network, config)
        patcher = comfy.model_patcher.ModelPatcher(
            own, load_device=clip.patcher.load_device, offload_device=clip.patcher.offload_device
        )
        self.patcher, self.memory_mode = memory.manage(patcher, memory_mode), memory_mode

    def load(self, clip, tokens):
        """Bring both halves to the device, with room for the memory of `tokens` tokens."""
        text = self.network.config.text_config
        # numbers per token
        each = 2 * text.num_hidden_layers * text.num_key_value_heads * HEAD_CHANNELS + 8 * (
            text.intermediate_size + text.hidden_size
        )
        comfy.model_management.load_models_gpu(
            [clip.patcher, self.patcher], memory_required=each * tokens * self.dtype.itemsize
        )
        self.network.run_on, self.network.run_as = clip.patcher.load_device, self.dtype
        for module in self.rotary:
            module.to(clip.patcher.load_device)

    def rest(self, clip):
        """What a memory mode does when the work is done."""
        if self.memory_mode == memory.IDLE_ON_CPU:
            memory.free(self.patcher)
            memory.free(clip.patcher)


def direct(writer):
    """A with block in which the layers of a Writer use weights that need no cast as they are."""
    return DirectWeights(writer.network, writer.network.run_on, writer.dtype)


class Embedding(torch.nn.Module):
    """The CLIP's embedding, asked for the number format of the calculation."""

    def __init__(self, inner, dtype):
        super().__init__()
        self.inner, self.dtype = inner, dtype

    def forward(self, ids):
        return self.inner(ids, out_dtype=self.dtype)


def skeleton(config, vision):
    """transformers' network without memory, in ComfyUI's layers, that believes to be where it is told."""
    from transformers import Mistral3ForConditionalGeneration

    class Network(Mistral3ForConditionalGeneration):
        run_on, run_as = torch.device("cpu"), torch.float32
        device = property(lambda self: self.run_on)
        dtype = property(lambda self: self.run_as)

    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        network = Network(config).eval()
        if not hasattr(getattr(network, "model", None), "language_model"):
            raise CheckpointError(TOO_OLD, "improving-prompts")
        if not vision:
            network.model.vision_tower = network.model.multi_modal_projector = None
        in_comfyuis_layers(network)
    return network.requires_grad_(False)


def in_comfyuis_layers(network):
    """Put ComfyUI's Linear, Conv2d and RMSNorm in the place of transformers'."""
    for parent in list(network.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, torch.nn.Linear):
                setattr(
                    parent,
                    name,
                    comfy.ops.manual_cast.Linear(module.in_features, module.out_features, bias=module.bias is not None),
                )
            elif isinstance(module, torch.nn.Conv2d):
                sizes = module.in_channels, module.out_channels, module.kernel_size, module.stride
                setattr(parent, name, comfy.ops.manual_cast.Conv2d(*sizes, bias=module.bias is not None))
            elif type(module).__name__.endswith("RMSNorm"):
                setattr(
                    parent, name, comfy.text_encoders.llama.RMSNorm(len(module.weight), eps=module.variance_epsilon)
                )


def adopt(theirs, ours):
    """Make a layer of transformers use the modules of a layer of ComfyUI's; both name them alike."""
    products = [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    for path in ["input_layernorm", "post_attention_layernorm", *products]:
        theirs.set_submodule(path, ours.get_submodule(path))


def owned(network, shared):
    """The modules that the CLIP does not have, as one module: the layers from number `shared` on, the final norm,
    lm_head, the vision tower.
    """
    language = network.model.language_model
    parts = {"layers": torch.nn.ModuleList(language.layers[shared:]), "norm": language.norm, "lm_head": network.lm_head}
    own = torch.nn.Module()
    for name, module in {**parts, **{name: getattr(network.model, name) for name in GROUPS}}.items():
        if module is not None:
            own.add_module(name, module)
    return own


def fill(own, weights, parts):
    """Give our own modules their weights, mapped from the file. CheckpointError when some are missing or do not fit."""
    mine = {
        name: weights[inside] for name, inside in parts.names.items() if parts.vision or not name.startswith(GROUPS)
    }
    try:
        missing, _ = own.load_state_dict(mine, strict=False, assign=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"{parts.checkpoint.name} holds weights whose sizes do not fit together: {str(error)[:300]}. Download it "
            "again."
        ) from error
    if missing:
        raise CheckpointError(
            f"{parts.checkpoint.name} is incomplete: {len(missing)} weights that writing needs are missing, such as "
            f"{missing[0]}. {ADVICE}",
            "improving-prompts",
        )
    own.requires_grad_(False)


def fresh_rotary(network, config):
    """Replace the tables of rotary angles, which the skeleton made without content; they come from no file. Returns the
    modules.
    """
    language = network.model.language_model
    language.rotary_emb = type(language.rotary_emb)(config.text_config)
    if network.model.vision_tower is None:
        return [language.rotary_emb]
    tower = network.model.vision_tower
    tower.patch_positional_embedding = type(tower.patch_positional_embedding)(config.vision_config)
    return [language.rotary_emb, tower.patch_positional_embedding]
