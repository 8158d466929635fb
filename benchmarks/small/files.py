"""The three weight files: names, writing with metadata, reading. bf16, the keys of the original FLUX.2 files (ComfyUI's
for the text encoder).
"""

import json
import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from . import encoder, tokens, transformer
from .autoencoder import Autoencoder

NAMES = {
    "transformer": "flux2-small.safetensors",
    "text_encoder": "mistral3-flux2-small.safetensors",
    "autoencoder": "flux2-vae-small.safetensors",
}
TOKENIZER, COUNTER = "tekken_model", "bn.num_batches_tracked"


def state(kind, model):
    """State dict of a file, bf16 on the CPU."""
    tensors = {
        name: value.detach().to("cpu", torch.bfloat16).contiguous()
        for name, value in model.state_dict().items()
        if name != COUNTER
    }
    if kind == "text_encoder":
        tensors[TOKENIZER] = torch.frombuffer(bytearray(tokens.tekken()), dtype=torch.uint8)
    return tensors | ({COUNTER: model.state_dict()[COUNTER].cpu()} if kind == "autoencoder" else {})


def write(path, tensors, metadata):
    """Whoever reads `path` sees the old file or the whole new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(tensors, temporary, metadata={"format": "pt", **{name: str(value) for name, value in metadata.items()}})
    os.replace(temporary, path)


def save(folder, models, metadata):
    """Write the files of `models` ({kind: model}) into `folder`."""
    for kind, model in models.items():
        write(Path(folder) / NAMES[kind], state(kind, model), metadata)


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def load(folder, kinds=tuple(NAMES)):
    """{kind: model in float32}; the dimensions come from the files."""
    return {kind: _model(kind, load_file(Path(folder) / NAMES[kind])) for kind in kinds}


def _model(kind, tensors):
    tensors = {
        name: value if name == COUNTER else value.float() for name, value in tensors.items() if name != TOKENIZER
    }
    model = SHAPES[kind](tensors)
    model.load_state_dict(tensors)
    return model


def _count(tensors, prefix):
    return 1 + max(int(name.removeprefix(prefix).split(".")[0]) for name in tensors if name.startswith(prefix))


def _transformer(tensors):
    return transformer.Transformer(
        transformer.Sizes(
            tensors["img_in.weight"].shape[0],
            _count(tensors, "double_blocks."),
            _count(tensors, "single_blocks."),
            tensors["txt_in.weight"].shape[1],
        )
    )


def _text_encoder(tensors):
    layer = "model.layers.0."
    return encoder.TextEncoder(
        encoder.Sizes(
            *tensors["model.embed_tokens.weight"].shape,
            tensors[f"{layer}self_attn.q_proj.weight"].shape[0] // encoder.HEAD,
            tensors[f"{layer}self_attn.k_proj.weight"].shape[0] // encoder.HEAD,
            tensors[f"{layer}mlp.gate_proj.weight"].shape[0],
        )
    )


def _autoencoder(tensors):
    return Autoencoder(tensors["encoder.conv_in.weight"].shape[0])


SHAPES = {"transformer": _transformer, "text_encoder": _text_encoder, "autoencoder": _autoencoder}


def read_progress(folder):
    path = Path(folder) / "progress.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def write_progress(folder, progress):
    path = Path(folder) / "progress.json"
    path.with_suffix(".part").write_text(json.dumps(progress, indent=1))
    os.replace(path.with_suffix(".part"), path)
