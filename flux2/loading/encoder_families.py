"""The two families of text encoder, and their dimensions as found in a file.

The dimensions go to ComfyUI's own language model through its configuration override, so a file of another size (a small
one for tests, a distilled one) loads without new code. FLUX.2 joins three hidden states; the layers above the last of
them are never read and never loaded.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from ..checkpoints import keys, quantisation
from ..checkpoints.header import CheckpointError
from ..checkpoints.validate import MOST_WIDTH, check_config, check_present, check_tensors, marks_of, without_prefix
from ..checkpoints.variants import HEAD_CHANNELS

MOST_VOCABULARY = 2**20  # rows of an embedding; Qwen3 has 151,936


@dataclass(frozen=True)
class Family:
    """A family of text encoders. The two callables take ComfyUI's module comfy.text_encoders.flux and pick what CLIP
    builds from it.
    """

    title: str
    name: str  # ComfyUI's name of the encoder, which its configuration overrides are keyed by
    last_tap: int  # number of layers that FLUX.2 reads: the highest hidden state it joins
    query_norms: bool  # its layers normalise queries and keys
    # id of <pad> where ComfyUI pads with zeros and the reference encodes padding; 0 where both encode it
    pad_token: int
    needs_tokenizer: bool  # the tokenizer comes with the checkpoint; ComfyUI ships Qwen's
    text_model: Callable  # (module, what was detected) -> class of the encoder
    tokenizer: Callable  # module -> class of the tokenizer


FAMILIES = {
    "mistral3": Family(
        "Mistral 3",
        "mistral3_24b",
        30,
        False,
        11,
        True,
        lambda flux, detected: flux.flux2_te(**detected),
        lambda flux: flux.Flux2Tokenizer,
    ),
    "qwen3-4b": Family(
        "Qwen3",
        "qwen3_4b",
        27,
        True,
        0,
        False,
        lambda flux, detected: flux.klein_te(**detected, model_type="qwen3_4b"),
        lambda flux: flux.KleinTokenizer,
    ),
    "qwen3-8b": Family(
        "Qwen3",
        "qwen3_8b",
        27,
        True,
        0,
        False,
        lambda flux, detected: flux.klein_te(**detected, model_type="qwen3_8b"),
        lambda flux: flux.KleinTokenizer8B,
    ),
}


def dimensions(checkpoint, found, family, computed=tuple(quantisation.FORMATS)):
    """Dimensions of the language model as ComfyUI's configuration names them. Raises CheckpointError if it is
    incomplete, misdescribed, or quantised in a way that is not in `computed`.
    """
    if found.layers < family.last_tap:
        raise CheckpointError(
            f"{checkpoint.name} is {found.title}: FLUX.2 reads the hidden state after layer {family.last_tap}, which "
            f"it does not have. Use the full {family.title}, or one pruned to {family.last_tap} layers or more.",
            "wrong-kind-of-file",
        )
    part = without_prefix(checkpoint, found.prefix)
    part = replace(part, tensors={f"model.{name}": tensor for name, tensor in part.tensors.items()})
    marked = {f"model.{layer}": mark for layer, mark in marks_of(checkpoint, found.prefix).items()}
    sizes = {
        "vocab_size": _rows(part, "embed_tokens"),
        "hidden_size": found.width,
        "num_hidden_layers": family.last_tap,
        "num_attention_heads": _heads(part, "q"),
        "num_key_value_heads": _heads(part, "k"),
        "intermediate_size": _rows(part, "layers.0.mlp.gate_proj"),
    }
    shapes = keys.encoder_shapes(sizes, family.query_norms)
    check_present(checkpoint, found.title, shapes, part.tensors)
    if not (
        0 < sizes["vocab_size"] <= MOST_VOCABULARY
        and all(0 < size <= MOST_WIDTH for name, size in sizes.items() if name != "vocab_size")
    ):
        raise CheckpointError(
            f"{checkpoint.name} is {found.title} with sizes that no language model has "
            f"({', '.join(f'{name} {size}' for name, size in sizes.items())}). It is damaged: download it again."
        )
    check_tensors(part, found.title, shapes, marked, computed)
    kind = marked.get("model.embed_tokens", {}).get("format")
    if kind not in (None, *EMBEDDING_FORMATS):
        raise CheckpointError(
            f"{checkpoint.name} has an embedding quantised as {kind}, of which ComfyUI cannot read single rows. Use a "
            f"file whose embedding is bf16, fp8 or int8.",
            "quantised-file",
        )
    said = _from_config(checkpoint, found, sizes)
    return {**sizes, "final_norm": False, "lm_head": False, "rope_theta": found.rope_theta, **said}


EMBEDDING_FORMATS = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise")


def _rows(part, name):
    """Rows of a weight, or 0 when it is absent, which the check for missing weights then names."""
    tensor = part.tensors.get(f"model.{name}.weight")
    return tensor.shape[0] if tensor and tensor.shape else 0


def _heads(part, name):
    rows = _rows(part, f"layers.0.self_attn.{name}_proj")
    if rows % HEAD_CHANNELS:
        raise CheckpointError(
            f"{part.name} has {rows} rows in {name}_proj, which heads of {HEAD_CHANNELS} channels do not divide. "
            f"It is not the text encoder of a FLUX.2 model.",
            "wrong-kind-of-file",
        )
    return rows // HEAD_CHANNELS


def _from_config(checkpoint, found, sizes):
    """What only config.json knows (rotary base, norm epsilon), after checking that the rest of it describes these
    weights.
    """
    config = checkpoint.config.get("text_config", checkpoint.config)
    if not isinstance(config, dict):
        raise CheckpointError(
            f"{checkpoint.name}/config.json has a text_config that is not a table. Download it again."
        )
    described = {
        name: sizes[name]
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    }
    check_config(checkpoint, {**described, "num_hidden_layers": found.layers, "head_dim": HEAD_CHANNELS}, config)
    rope = config.get("rope_parameters") or {}
    found_values = {
        "rope_theta": config.get("rope_theta", rope.get("rope_theta") if isinstance(rope, dict) else None),
        "rms_norm_eps": config.get("rms_norm_eps"),
    }
    for name, value in found_values.items():
        if value is not None and not (type(value) in (int, float) and 0 < value < 1e18):
            raise CheckpointError(
                f"{checkpoint.name}/config.json says {name} is {str(value)[:40]}, which is not a positive "
                f"number. Download it again."
            )
    return {name: float(value) for name, value in found_values.items() if value is not None}
