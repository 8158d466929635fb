"""Names of weights: what a FLUX.2 model must contain in ComfyUI's keys, and which of diffusers' and transformers' keys
those come from.

All tables map *to* ComfyUI's keys, which are those of the original FLUX.2 files. In shapes h is the model's width.
Names alone: no tensors are held here, so the same tables check headers and convert weights.
"""

from dataclasses import dataclass

from .variants import HEAD_CHANNELS, LATENT_CHANNELS

COPY, JOIN, SWAP_HALVES = "copy", "join", "swap halves"
ENDINGS = ("weight", "weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale")  # of a quantised layer
ROW_FORMATS = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise")  # whose rows can be stacked and exchanged


@dataclass(frozen=True)
class WeightSource:
    """Where one ComfyUI weight comes from: diffusers' names, and what to do with them.

    JOIN stacks rows in the order given (q, k, v). SWAP_HALVES exchanges the two halves of the rows: the original final
    modulation is (shift, scale), diffusers' is (scale, shift).
    """

    names: tuple
    how: str = COPY


def _block_pairs(stream, q, k, v, out, norm_q, norm_k, feed_forward):
    return {
        f"{stream}_attn.qkv.weight": WeightSource((f"attn.{q}.weight", f"attn.{k}.weight", f"attn.{v}.weight"), JOIN),
        f"{stream}_attn.proj.weight": WeightSource((f"attn.{out}.weight",)),
        f"{stream}_attn.norm.query_norm.weight": WeightSource((f"attn.{norm_q}.weight",)),
        f"{stream}_attn.norm.key_norm.weight": WeightSource((f"attn.{norm_k}.weight",)),
        f"{stream}_mlp.0.weight": WeightSource((f"{feed_forward}.linear_in.weight",)),
        f"{stream}_mlp.2.weight": WeightSource((f"{feed_forward}.linear_out.weight",)),
    }


DOUBLE_BLOCK = {
    **_block_pairs("img", "to_q", "to_k", "to_v", "to_out.0", "norm_q", "norm_k", "ff"),
    **_block_pairs(
        "txt", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "norm_added_q", "norm_added_k", "ff_context"
    ),
}
SINGLE_BLOCK = {
    "linear1.weight": WeightSource(("attn.to_qkv_mlp_proj.weight",)),
    "linear2.weight": WeightSource(("attn.to_out.weight",)),
    "norm.query_norm.weight": WeightSource(("attn.norm_q.weight",)),
    "norm.key_norm.weight": WeightSource(("attn.norm_k.weight",)),
}
OUTSIDE_BLOCKS = {
    "img_in.weight": WeightSource(("x_embedder.weight",)),
    "txt_in.weight": WeightSource(("context_embedder.weight",)),
    "time_in.in_layer.weight": WeightSource(("time_guidance_embed.timestep_embedder.linear_1.weight",)),
    "time_in.out_layer.weight": WeightSource(("time_guidance_embed.timestep_embedder.linear_2.weight",)),
    "double_stream_modulation_img.lin.weight": WeightSource(("double_stream_modulation_img.linear.weight",)),
    "double_stream_modulation_txt.lin.weight": WeightSource(("double_stream_modulation_txt.linear.weight",)),
    "single_stream_modulation.lin.weight": WeightSource(("single_stream_modulation.linear.weight",)),
    "final_layer.adaLN_modulation.1.weight": WeightSource(("norm_out.linear.weight",), SWAP_HALVES),
    "final_layer.linear.weight": WeightSource(("proj_out.weight",)),
}
GUIDANCE = {
    "guidance_in.in_layer.weight": WeightSource(("time_guidance_embed.guidance_embedder.linear_1.weight",)),
    "guidance_in.out_layer.weight": WeightSource(("time_guidance_embed.guidance_embedder.linear_2.weight",)),
}


def model_sources(variant):
    """Every weight of a FLUX.2 diffusion model: ComfyUI name -> WeightSource in diffusers' names."""
    sources = {**OUTSIDE_BLOCKS, **(GUIDANCE if variant.guidance else {})}
    for ours, theirs, count, table in (
        ("double_blocks", "transformer_blocks", variant.double_blocks, DOUBLE_BLOCK),
        ("single_blocks", "single_transformer_blocks", variant.single_blocks, SINGLE_BLOCK),
    ):
        for index in range(count):
            for name, source in table.items():
                sources[f"{ours}.{index}.{name}"] = WeightSource(
                    tuple(f"{theirs}.{index}.{part}" for part in source.names), source.how
                )
    return sources


def model_shapes(variant):
    """The shape of every weight in `model_sources(variant)`: ComfyUI name -> tuple."""
    h, d, c = variant.hidden, HEAD_CHANNELS, LATENT_CHANNELS
    fixed = {
        "img_in": (h, c),
        "txt_in": (h, variant.text_width),
        "in_layer": (h, 256),
        "out_layer": (h, h),
        "modulation_img.lin": (6 * h, h),
        "modulation_txt.lin": (6 * h, h),
        "single_stream_modulation.lin": (3 * h, h),
        "adaLN_modulation.1": (2 * h, h),
        "final_layer.linear": (c, h),
        "attn.qkv": (3 * h, h),
        "attn.proj": (h, h),
        "query_norm": (d,),
        "key_norm": (d,),
        "mlp.0": (6 * h, h),
        "mlp.2": (h, 3 * h),
        "linear1": (9 * h, h),
        "linear2": (h, 4 * h),
    }
    endings = tuple(fixed.items())
    return {
        name: next(shape for ending, shape in endings if name.removesuffix(".weight").endswith(ending))
        for name in model_sources(variant)
    }


def diffusers_shapes(variant):
    """The shape of every weight of the model in diffusers' names: a joined weight is three equal parts there."""
    shapes = model_shapes(variant)
    return {
        part: (shapes[name][0] // len(source.names), *shapes[name][1:])
        for name, source in model_sources(variant).items()
        for part in source.names
    }


def convert_model(weights, variant, marked=()):
    """A state dict in diffusers' keys -> (state dict in ComfyUI's keys, name -> parts of the weights that are stacked,
    marks of quantised layers in ComfyUI's keys). Empties `weights`; what is left in it has no place in the model.

    `marked` are the marks (quantisation.layers) in diffusers' keys. Weights that are not quantised are not copied: in
    the state dict, a stacked one has a stand-in of its shape and type that takes no memory. ValueError, with the names
    of the layers, for quantised parts that cannot be stacked.
    """
    converted, stacked, marks = {}, {}, {}
    for name, source in model_sources(variant).items():
        layers = [part.removesuffix(".weight") for part in source.names]
        if any(layer in marked for layer in layers):
            found, marks[name.removesuffix(".weight")] = _quantised(weights, layers, source.how, marked)
            converted |= {f"{name.removesuffix('.weight')}.{ending}": value for ending, value in found.items()}
            continue
        parts = _parts([weights.pop(part) for part in source.names], source.how)
        if len(parts) > 1:
            stacked[name] = parts
        converted[name] = _stand_in(parts) if len(parts) > 1 else parts[0]
    return converted, stacked, marks


def _quantised(weights, layers, how, marked):
    """(weight and what belongs to it by ending, mark) of quantised layers of diffusers that are one of ComfyUI's."""
    taken = [
        {ending: weights.pop(f"{layer}.{ending}") for ending in ENDINGS if f"{layer}.{ending}" in weights}
        for layer in layers
    ]
    if how == COPY:
        return taken[0], marked[layers[0]]
    import torch

    same = all(
        marked.get(layer) == marked.get(layers[0]) and part.keys() == taken[0].keys()
        for layer, part in zip(layers, taken)
    )
    rows_of = [len(part["weight"]) for part in taken]
    if not same or marked[layers[0]]["format"] not in ROW_FORMATS:
        raise ValueError(" ".join(layers))
    out = {}
    for ending in taken[0]:
        parts = [part[ending] for part in taken]
        if ending != "weight" and all(part.numel() == 1 and torch.equal(part, parts[0]) for part in parts):
            out[ending] = parts[0]  # one scale for all rows
            continue
        if ending != "weight":
            if ending != "weight_scale" or marked[layers[0]]["format"] != "int8_tensorwise":
                raise ValueError(" ".join(layers))
            parts = [part.reshape(-1, 1).expand(rows, 1) for part, rows in zip(parts, rows_of)]
        out[ending] = torch.cat(list(_parts(parts, how)))
    return out, marked[layers[0]]


def _parts(tensors, how):
    """The tensors whose rows follow one another in ComfyUI's weight."""
    return tensors[0].chunk(2)[::-1] if how == SWAP_HALVES else tensors


def _stand_in(parts):
    return parts[0].new_zeros(()).expand(sum(map(len, parts)), *parts[0].shape[1:])


# --- text encoders ---------------------------------------------------------------------------------------------------


def encoder_shapes(sizes, query_norms=False):
    """The weights of a language model's embedding and layers with their shapes, in ComfyUI's keys.

    `sizes` has ComfyUI's names of dimensions; `query_norms` adds the norms of queries and keys that Qwen3 has and
    Mistral 3 has not.
    """
    h, inner = sizes["hidden_size"], sizes["intermediate_size"]
    q, kv = HEAD_CHANNELS * sizes["num_attention_heads"], HEAD_CHANNELS * sizes["num_key_value_heads"]
    layer = {
        "input_layernorm": (h,),
        "post_attention_layernorm": (h,),
        "self_attn.q_proj": (q, h),
        "self_attn.k_proj": (kv, h),
        "self_attn.v_proj": (kv, h),
        "self_attn.o_proj": (h, q),
        "mlp.gate_proj": (inner, h),
        "mlp.up_proj": (inner, h),
        "mlp.down_proj": (h, inner),
    }
    if query_norms:
        layer |= {"self_attn.q_norm": (HEAD_CHANNELS,), "self_attn.k_norm": (HEAD_CHANNELS,)}
    layers = {
        f"model.layers.{index}.{name}.weight": shape
        for index in range(sizes["num_hidden_layers"])
        for name, shape in layer.items()
    }
    return {"model.embed_tokens.weight": (sizes["vocab_size"], h), **layers}


def encoder_name(name, prefix, layers):
    """ComfyUI's key for a weight of a language model, or None for what FLUX.2 never reads.

    `prefix` is what precedes "layers." and "embed_tokens." in the file: "model.", or "language_model.model."
    (transformers before 4.52), or "model.language_model." (since). Dropped are the layers from number `layers` on, the
    final norm, lm_head and the vision tower.
    """
    if not name.startswith(prefix):
        return None
    rest = name[len(prefix) :]
    if rest.startswith("layers."):
        number = rest.split(".")[1]
        counted = number.isascii() and number.isdecimal() and len(number) <= 4
        return f"model.{rest}" if counted and int(number) < layers else None
    return f"model.{rest}" if rest.startswith("embed_tokens.") else None
