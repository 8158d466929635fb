"""The two families of text encoder, and their dimensions as found in a file.

The dimensions go to ComfyUI's own language model through its configuration override, so a file of another size (a small
one for tests, a distilled one) loads without new code. FLUX.2 joins three hidden states; the layers above the last of
them are never read and never loaded.
"""

from collections.abc import Callable
from dataclasses import dataclass

from ..checkpoints import keys
from ..checkpoints.header import CheckpointError
from ..checkpoints.validate import check_config, check_present, check_tensors
from ..checkpoints.identify import number_format
from ..checkpoints.variants import HEAD_CHANNELS


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


def dimensions(checkpoint, found, family):
    """Dimensions of the language model as ComfyUI's configuration names them. Raises CheckpointError if it is
    incomplete or misdescribed.
    """
    if found.layers < family.last_tap:
        raise CheckpointError(
            f"{checkpoint.name} is {found.title}: FLUX.2 reads the hidden state after layer {family.last_tap}, which "
            f"it does not have. Use the full {family.title}, or one pruned to {family.last_tap} layers or more."
        )
    tensors = {
        f"model.{name.removeprefix(found.prefix)}": tensor
        for name, tensor in checkpoint.tensors.items()
        if name.startswith(found.prefix)
    }
    sizes = {
        "vocab_size": _rows(tensors, "embed_tokens"),
        "hidden_size": found.width,
        "num_hidden_layers": family.last_tap,
        "num_attention_heads": _heads(checkpoint, tensors, "q"),
        "num_key_value_heads": _heads(checkpoint, tensors, "k"),
        "intermediate_size": _rows(tensors, "layers.0.mlp.gate_proj"),
    }
    _check_weights(checkpoint, found, keys.encoder_shapes(sizes, family.query_norms), tensors)
    return {**sizes, "final_norm": False, "lm_head": False, **_from_config(checkpoint, found, sizes)}


def _check_weights(checkpoint, found, shapes, tensors):
    check_present(checkpoint, found.title, shapes, tensors)
    _, quantised = number_format(checkpoint)
    # Quantised projections may be packed; what stays unquantised must still fit.
    check_tensors(
        checkpoint,
        found.title,
        {name: shape for name, shape in shapes.items() if not (quantised and "_proj." in name)},
        tensors,
    )


def _rows(tensors, name):
    """Rows of a weight, or 0 when it is absent, which the check for missing weights then names."""
    shape = tensors[f"model.{name}.weight"].shape if f"model.{name}.weight" in tensors else ()
    return shape[0] if shape else 0


def _heads(checkpoint, tensors, name):
    rows = _rows(tensors, f"layers.0.self_attn.{name}_proj")
    if rows % HEAD_CHANNELS:
        raise CheckpointError(
            f"{checkpoint.name} has {rows} rows in {name}_proj, which heads of {HEAD_CHANNELS} channels do not "
            "divide. It is not the text encoder of a FLUX.2 model."
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
        if value is not None and not (isinstance(value, (int, float)) and value > 0):
            raise CheckpointError(
                f"{checkpoint.name}/config.json says {name} is {value!r}, which is not a positive number. Download it "
                "again."
            )
    return {name: float(value) for name, value in found_values.items() if value is not None}
