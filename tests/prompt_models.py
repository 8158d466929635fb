"""A small Mistral 3 that can write: transformers' own class with random weights, a vision tower and lm_head, as a
Hugging
Face folder.
"""

import torch

import small_models as maker

LAYERS = 32  # two more than FLUX.2 reads
VISION = {
    "model_type": "pixtral",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "patch_size": 14,
    "image_size": 280,
}
# only config.json can tell
OWN = {
    "rope_theta": 1e6,
    "vision": {"num_attention_heads": 2, "head_dim": 32, "hidden_act": "gelu", "rope_theta": 5000.0},
}
# as the published model
PUBLISHED = {
    "rope_theta": 1e9,
    "vision": {"num_attention_heads": 1, "head_dim": 64, "hidden_act": "silu", "rope_theta": 10000.0},
}


def mistral3(about=OWN, seed=1):
    """transformers' Mistral3ForConditionalGeneration in float32, small."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    def rope(theta):
        return {"rope_theta": theta, "rope_parameters": {"rope_type": "default", "rope_theta": theta}}

    text = {
        "model_type": "mistral",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 128,
        "vocab_size": maker.VOCABULARY,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        **rope(about["rope_theta"]),
    }
    vision = {**VISION, **about["vision"], **rope(about["vision"]["rope_theta"])}
    config = Mistral3Config(
        text_config=text,
        vision_config=vision,
        image_token_index=10,
        spatial_merge_size=2,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = Mistral3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(0, 0.05).add_(1.0) if "norm" in name or "ln_pre" in name else weight.normal_(0, 0.3)
    return model


def single_file(path, model, without=()):
    """Save the model as one file with its tokenizer inside, less the weights whose names contain one of `without`."""
    weights = {name: value for name, value in model.state_dict().items() if not any(part in name for part in without)}
    return maker.write(
        path, {**weights, "tekken_model": torch.frombuffer(bytearray(maker.tekken()), dtype=torch.uint8)}
    )


def folder(path, model=None, shards="1MB"):
    """Save the model as the folder `path`, its tokenizer beside it in tokenizer/. Returns (path, model)."""
    model = model or mistral3()
    model.save_pretrained(path, max_shard_size=shards)
    (path.parent / "tokenizer").mkdir(exist_ok=True)
    (path.parent / "tokenizer" / "tekken.json").write_bytes(maker.tekken())
    return path, model
