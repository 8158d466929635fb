"""Small FLUX.2 models: the real architecture, keys and file formats, with seeded random weights in a few megabytes.

  python tests/small_models.py FOLDER     write (or keep) diffusion_models/, text_encoders/ and vae/ under FOLDER, print
                                          the three paths

The pictures they make are noise; what they are for is every path that a real checkpoint takes. ComfyUI's own detection
accepts the diffusion model and the VAE; the text encoder is Mistral 3 with 30 layers, 64 wide, and carries a small
tokenizer in the tekken format, as the official file does. Needs torch and safetensors alone. Not covered: quantised
files and diffusers folders (the tests make those from these).
"""

import base64
import hashlib
import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

FILES = {
    "model": "diffusion_models/flux2-small.safetensors",
    "text_encoder": "text_encoders/mistral3-flux2-small.safetensors",
    "vae": "vae/flux2-vae-small.safetensors",
}
MARKER = "flux2-small-models.json"  # written last: a folder without it was never finished
TEXT_HIDDEN, HEAD = 64, 128  # width of the encoder; both the encoder and the diffusion model have heads of 128 channels
SEED = 20251125


class Weights:
    """Makes named, seeded tensors. Every tensor has its own stream, so adding a key does not change the others."""

    def __init__(self, seed, dtype):
        self.seed, self.dtype, self.tensors = seed, dtype, {}

    def generator(self, name):
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    def uniform(self, name, shape, low, high):
        value = torch.rand(shape, generator=self.generator(name)) * (high - low) + low
        self.tensors[name] = value.to(self.dtype)

    def linear(self, name, outputs, *inputs):
        """A weight (outputs, *inputs) at torch's default scale: uniform within one over the square root of the
        fan-in.
        """
        fan_in = torch.Size(inputs).numel()
        self.uniform(f"{name}.weight", (outputs, *inputs), -(fan_in**-0.5), fan_in**-0.5)

    def conv(self, name, outputs, inputs, size):
        self.linear(name, outputs, inputs, size, size)
        self.uniform(f"{name}.bias", (outputs,), -0.05, 0.05)

    def norm(self, name, width, suffix="weight"):
        self.uniform(f"{name}.{suffix}", (width,), 0.9, 1.1)

    def group_norm(self, name, width):
        self.norm(name, width)
        self.uniform(f"{name}.bias", (width,), -0.05, 0.05)


# --- diffusion model -------------------------------------------------------------------------------------------------


def diffusion_model(
    hidden=256, double=2, single=4, guidance=True, context=3 * TEXT_HIDDEN, dtype=torch.bfloat16, seed=SEED
):
    """State dict of a FLUX.2 diffusion model in the keys of the original (black-forest-labs) file. `hidden` is a
    multiple of 128.
    """
    w = Weights(f"{seed}/model", dtype)
    w.linear("img_in", hidden, 128)
    w.linear("txt_in", hidden, context)
    for name in ["time_in"] + ["guidance_in"] * guidance:
        w.linear(f"{name}.in_layer", hidden, 256)
        w.linear(f"{name}.out_layer", hidden, hidden)
    for name, parts in (
        ("double_stream_modulation_img", 6),
        ("double_stream_modulation_txt", 6),
        ("single_stream_modulation", 3),
    ):
        w.linear(f"{name}.lin", parts * hidden, hidden)
    for index in range(double):
        _double_block(w, f"double_blocks.{index}", hidden)
    for index in range(single):
        _single_block(w, f"single_blocks.{index}", hidden)
    w.linear("final_layer.adaLN_modulation.1", 2 * hidden, hidden)
    w.linear("final_layer.linear", 128, hidden)
    return w.tensors


def _double_block(w, block, hidden):
    for stream in ("img", "txt"):
        w.linear(f"{block}.{stream}_attn.qkv", 3 * hidden, hidden)
        w.norm(f"{block}.{stream}_attn.norm.query_norm", HEAD, "scale")
        w.norm(f"{block}.{stream}_attn.norm.key_norm", HEAD, "scale")
        w.linear(f"{block}.{stream}_attn.proj", hidden, hidden)
        w.linear(f"{block}.{stream}_mlp.0", 6 * hidden, hidden)
        w.linear(f"{block}.{stream}_mlp.2", hidden, 3 * hidden)


def _single_block(w, block, hidden):
    w.linear(f"{block}.linear1", 9 * hidden, hidden)
    w.linear(f"{block}.linear2", hidden, 4 * hidden)
    w.norm(f"{block}.norm.query_norm", HEAD, "scale")
    w.norm(f"{block}.norm.key_norm", HEAD, "scale")


# --- text encoder ----------------------------------------------------------------------------------------------------

SPECIAL_TOKENS = (
    "<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS] [TOOL_CALLS] "
    "[IMG] <pad> "
    "[IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] [TOOL_CONTENT]"
).split()
# The pattern of the published tekken files.
PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS = (
    " the a of and to in is on at with it that this image images cat cats dog hat cool add red green blue yellow "
    "black white small large "
    "photo photograph painting of about are an AI You give structured responses descriptions focusing object "
    "relationships attribution "
    "actions without speculation reasons picture sign holding hello world sky night morning light street house tree"
).split()
VOCABULARY = 512


def tekken(vocabulary=VOCABULARY):
    """A tokenizer in Mistral's tekken format, as bytes of JSON: every byte, then prefixes of common words, until
    `vocabulary` ids are used.
    """
    tokens = [bytes([value]) for value in range(256)]
    for word in WORDS:
        for text in (word, " " + word):
            tokens += [text[:length].encode() for length in range(2, len(text) + 1)]
    tokens = list(dict.fromkeys(tokens))[: vocabulary - len(SPECIAL_TOKENS)]
    return json.dumps(
        {
            "config": {
                "pattern": PATTERN,
                "num_vocab_tokens": len(tokens),
                "default_vocab_size": len(SPECIAL_TOKENS) + len(tokens),
                "default_num_special_tokens": len(SPECIAL_TOKENS),
                "version": "v7",
            },
            "vocab": [
                {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
                for rank, token in enumerate(tokens)
            ],
            "special_tokens": [
                {"rank": rank, "token_str": text, "is_control": True} for rank, text in enumerate(SPECIAL_TOKENS)
            ],
        }
    ).encode()


def text_encoder(
    hidden=TEXT_HIDDEN,
    layers=30,
    heads=2,
    kv_heads=1,
    intermediate=128,
    final_norm=False,
    dtype=torch.bfloat16,
    seed=SEED,
):
    """State dict of a Mistral 3 language model in ComfyUI's keys, with its tokenizer as the uint8 tensor
    `tekken_model`.
    """
    w = Weights(f"{seed}/text", dtype)
    w.uniform("model.embed_tokens.weight", (VOCABULARY, hidden), -1, 1)
    for index in range(layers):
        layer = f"model.layers.{index}"
        w.norm(f"{layer}.input_layernorm", hidden)
        for name, rows in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            w.linear(f"{layer}.self_attn.{name}_proj", rows * HEAD, hidden)
        w.linear(f"{layer}.self_attn.o_proj", hidden, heads * HEAD)
        w.norm(f"{layer}.post_attention_layernorm", hidden)
        w.linear(f"{layer}.mlp.gate_proj", intermediate, hidden)
        w.linear(f"{layer}.mlp.up_proj", intermediate, hidden)
        w.linear(f"{layer}.mlp.down_proj", hidden, intermediate)
    if final_norm:
        w.norm("model.norm", hidden)
    return {**w.tensors, "tekken_model": torch.frombuffer(bytearray(tekken()), dtype=torch.uint8)}


# --- VAE -------------------------------------------------------------------------------------------------------------


def vae(decoder_channels=32, dtype=torch.bfloat16, seed=SEED):
    """State dict of a FLUX.2 autoencoder in the original keys: 32 channels at 1/8, folded to 128 at 1/16.

    ComfyUI derives the decoder's width from the file but takes the encoder's as 128, so the encoder has its real size
    (68 MB in bf16).
    """
    w = Weights(f"{seed}/vae", dtype)
    _encoder(w, 128)
    _decoder(w, decoder_channels)
    w.uniform("bn.running_mean", (128,), -0.1, 0.1)
    w.uniform("bn.running_var", (128,), 0.5, 1.5)
    return {**w.tensors, "bn.num_batches_tracked": torch.tensor(1)}


def _encoder(w, ch):
    w.conv("encoder.conv_in", ch, 3, 3)
    before = ch
    for level, width in enumerate((ch, 2 * ch, 4 * ch, 4 * ch)):
        for block in range(2):
            _resnet(w, f"encoder.down.{level}.block.{block}", before if block == 0 else width, width)
        if level < 3:
            w.conv(f"encoder.down.{level}.downsample.conv", width, width, 3)
        before = width
    _middle(w, "encoder", before)
    w.conv("encoder.conv_out", 64, before, 3)
    w.conv("encoder.quant_conv", 64, 64, 1)


def _decoder(w, ch):
    w.conv("decoder.post_quant_conv", 32, 32, 1)
    before = 4 * ch
    w.conv("decoder.conv_in", before, 32, 3)
    for level, width in reversed(list(enumerate((ch, 2 * ch, 4 * ch, 4 * ch)))):
        for block in range(3):
            _resnet(w, f"decoder.up.{level}.block.{block}", before if block == 0 else width, width)
        if level > 0:
            w.conv(f"decoder.up.{level}.upsample.conv", width, width, 3)
        before = width
    _middle(w, "decoder", 4 * ch)
    w.group_norm("decoder.norm_out", ch)
    w.conv("decoder.conv_out", 3, ch, 3)


def _middle(w, side, width):
    for block in ("block_1", "block_2"):
        _resnet(w, f"{side}.mid.{block}", width, width)
    w.group_norm(f"{side}.mid.attn_1.norm", width)
    for name in ("q", "k", "v", "proj_out"):
        w.conv(f"{side}.mid.attn_1.{name}", width, width, 1)
    if side == "encoder":
        w.group_norm("encoder.norm_out", width)


def _resnet(w, block, inputs, outputs):
    w.group_norm(f"{block}.norm1", inputs)
    w.conv(f"{block}.conv1", outputs, inputs, 3)
    w.group_norm(f"{block}.norm2", outputs)
    w.conv(f"{block}.conv2", outputs, outputs, 3)
    if inputs != outputs:
        w.conv(f"{block}.nin_shortcut", outputs, inputs, 1)


# --- files -----------------------------------------------------------------------------------------------------------


def ensure(folder):
    """Write the three files under `folder` unless this version of them is there. Returns {"root", "model",
    "text_encoder", "vae"}: paths.
    """
    root = Path(folder)
    paths = {"root": root, **{name: root / file for name, file in FILES.items()}}
    if not _finished(root, paths):
        for name, make in (("model", diffusion_model), ("text_encoder", text_encoder), ("vae", vae)):
            write(paths[name], make())
        sizes = {name: paths[name].stat().st_size for name in FILES}
        _replace(root / MARKER, lambda path: path.write_text(json.dumps({"version": version(), "sizes": sizes})))
    return paths


def version():
    """Digest of this file: another generator makes other models."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]


def write(path, tensors, metadata=None):
    """Write a state dict as safetensors; whoever reads `path` sees the old file or the whole new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    _replace(path, lambda temporary: save_file(contiguous, temporary, metadata=metadata or {"format": "pt"}))
    return path


def _replace(path, write_to):
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write_to(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _finished(root, paths):
    try:
        marker = json.loads((root / MARKER).read_text())
        return marker["version"] == version() and all(
            paths[name].stat().st_size == size for name, size in marker["sizes"].items()
        )
    except (OSError, ValueError, KeyError):
        return False


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise SystemExit(__doc__)
    for kind, location in ensure(sys.argv[1]).items():
        print(f"{kind}: {location}")
