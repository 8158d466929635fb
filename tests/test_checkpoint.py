"""Bad and unexpected files: every one gives a CheckpointError whose text says which file, what it is and what to do.
Headers alone, no ComfyUI, except where the fuzzed files are loaded for real.
"""

import dataclasses
import json
import os
import random
import re
import struct
from pathlib import Path

import pack  # noqa: F401
import pytest
import torch
from safetensors.torch import save_file

import small_models as maker
from flux2_pack.flux2.checkpoints import validate, folders, identify, keys, variants
from flux2_pack.flux2.checkpoints.header import Checkpoint, CheckpointError, Tensor, open_checkpoint, read_header


def write_header(path, header, data=b"", length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(shape, dtype="F32", start=0, end=None):
    size = {"F32": 4, "BF16": 2}[dtype] if dtype in ("F32", "BF16") else 1
    for side in shape:
        size *= side
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, start + size if end is None else end]}


# --- one file --------------------------------------------------------------------------------------------------------


def test_header_is_read_without_the_weights(tmp_path):
    save_file(
        {"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)},
        tmp_path / "x.safetensors",
        metadata={"k": "v"},
    )
    tensors, metadata = read_header(tmp_path / "x.safetensors")
    assert (tensors["a"].shape, tensors["a"].dtype, tensors["a"].bytes) == ((2, 3), "F32", 24)
    assert tensors["b"].dtype == "BF16" and metadata == {"k": "v"}


BAD = {
    "missing file": (None, "does not exist"),
    "empty": (b"", "not a safetensors file"),
    "text file": (b"hello, I am a readme of a model\n" * 10, "not a safetensors file"),
    "web page": (b"<!DOCTYPE html><html>sign in</html>", "a web page"),
    "git lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "Git LFS pointer"),
    "zip pickle": (b"PK\x03\x04" + bytes(100), "Pickles can run code.*refused"),
    "bare pickle": (b"\x80\x04\x95" + bytes(100), "Pickles can run code.*refused"),
    "gguf": (b"GGUF\x03\x00\x00\x00" + bytes(100), "GGUF"),
    "header too large": (struct.pack("<Q", 2**40) + b"{}", "not a safetensors file"),
    "header cut off": (struct.pack("<Q", 1000) + b'{"a":', "incomplete.*cut off"),
    "not json": (struct.pack("<Q", 9) + b"{not json", "header is not JSON"),
    "not utf-8": (struct.pack("<Q", 4) + b'{"\xff\xfe', "header is not JSON"),
    "deep nesting": (struct.pack("<Q", 200_000) + b"[" * 200_000, "header is not JSON"),
    "a list": (struct.pack("<Q", 2) + b"[]", "not a table of tensors"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_safetensors_file_is_said(tmp_path, case):
    content, message = BAD[case]
    path = tmp_path / "model.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"model.safetensors.*{message}"):
        open_checkpoint(path)


HEADERS = {
    "entry is no table": ({"a": 3}, "malformed"),
    "no dtype": ({"a": {"shape": [1], "data_offsets": [0, 4]}}, "a type that is not known"),
    "unknown dtype": ({"a": entry([4], "F7")}, "a type that is not known"),
    "negative side": ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, "malformed"),
    "true as a side": ({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, "malformed"),
    "shape is text": ({"a": {"dtype": "F32", "shape": "4", "data_offsets": [0, 4]}}, "malformed"),
    "offsets reversed": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, "malformed"),
    "size does not match": ({"a": entry([2, 2], end=4)}, "cannot take 4 bytes"),
    "huge side": ({"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 4]}}, "cannot take"),
    "beyond the end": ({"a": entry([4])}, "incomplete: its tensors take 16 bytes and the file holds 4"),
    "overlap": ({"a": entry([1]), "b": entry([1])}, "overlap or leave a hole"),
    "hole": ({"a": entry([0]), "b": entry([1], start=0), "c": entry([1], start=8)}, "overlap or leave a hole"),
    "trailing bytes": ({"a": entry([0])}, "4 bytes follow the last tensor"),
    "metadata is a list": ({"__metadata__": [1], "a": entry([1])}, "metadata is not a table of strings"),
    "metadata holds a number": ({"__metadata__": {"k": 1}, "a": entry([1])}, "metadata is not a table of strings"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_lying_headers_are_said(tmp_path, case):
    header, message = HEADERS[case]
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(write_header(tmp_path / "x.safetensors", header, bytes(4)))


def test_truncated_file_is_said(tmp_path):
    path = maker.write(tmp_path / "x.safetensors", maker.text_encoder())
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(
        CheckpointError, match="x.safetensors is incomplete: its tensors take .* bytes.*download it again"
    ):
        open_checkpoint(path)


def test_safetensors_under_another_name_is_said(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "model.bin")
    with pytest.raises(CheckpointError, match="Rename it to model.safetensors"):
        open_checkpoint(tmp_path / "model.bin")


@pytest.mark.parametrize("length", [0x3C, 0x80])
def test_header_lengths_that_look_like_other_formats_are_accepted(tmp_path, length):
    """A header of 60 or 128 bytes begins like a web page or a pickle."""
    raw = json.dumps({"a": entry([1])}).encode()
    path = write_header(tmp_path / "x.safetensors", raw + b" " * (length - len(raw)), bytes(4))
    assert "a" in open_checkpoint(path).tensors


# --- folders ---------------------------------------------------------------------------------------------------------


def sharded(folder, places, files=("one.safetensors",)):
    folder.mkdir()
    for file in files:
        save_file({"a": torch.zeros(1)}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps(places) if isinstance(places, dict) else places)
    return folder


FOLDERS = {
    "points up": ({"weight_map": {"a": "../one.safetensors"}}, "outside its folder.*refused"),
    "points to a root": ({"weight_map": {"a": "/etc/passwd"}}, "outside its folder.*refused"),
    "points to windows": ({"weight_map": {"a": "..\\one.safetensors"}}, "outside its folder.*refused"),
    "points to itself": ({"weight_map": {"a": ".."}}, "outside its folder.*refused"),
    "missing shard": (
        {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}},
        "shard two.safetensors is missing from the folder .*m",
    ),
    "missing tensor": ({"weight_map": {"z": "one.safetensors"}}, "promises the tensor 'z' in one.safetensors"),
    "no table": ({}, "no table of weights"),
    "table of numbers": ({"weight_map": {"a": 1}}, "no table of weights"),
    "not json": ("{", "cannot be read as JSON"),
    "a list": ("[]", "is not a JSON object"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_bad_indexes_are_said(tmp_path, case):
    places, message = FOLDERS[case]
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(sharded(tmp_path / "m", places))


def test_folders_without_weights_or_index_are_said(tmp_path):
    with pytest.raises(CheckpointError, match="holds no .safetensors file"):
        open_checkpoint(tmp_path)
    for name in ("a", "b"):
        save_file({"a": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match="2 .safetensors files and no index"):
        open_checkpoint(tmp_path)


def test_config_that_lies_is_said(tmp_path):
    maker.write(
        tmp_path / "transformer" / "diffusion_pytorch_model.safetensors", maker.diffusion_model(double=1, single=1)
    )
    (tmp_path / "transformer" / "config.json").write_text(json.dumps({"num_layers": 8, "in_channels": 128}))
    checkpoint = open_checkpoint(tmp_path / "transformer")
    with pytest.raises(
        CheckpointError, match="config.json of .*transformer says num_layers is 8, but the weights beside it say 1"
    ):
        validate.check_model(checkpoint, identify.identify(checkpoint), "as stored")


def test_choices_show_a_model_folder_in_place_of_its_shards(tmp_path):
    (tmp_path / "dev" / "transformer").mkdir(parents=True)
    (tmp_path / "dev" / "transformer" / "config.json").write_text("{}")
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    (tmp_path / "dev" / "transformer" / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": shards[0], "b": shards[1]}})
    )
    files = [
        "a.safetensors",
        "dev/transformer/model-00001-of-00002.safetensors",
        "dev/transformer/model-00002-of-00002.safetensors",
        "sub/b.safetensors",
    ]
    assert folders.choices(files, [tmp_path / "elsewhere", tmp_path]) == [
        "a.safetensors",
        "dev/transformer",
        "sub/b.safetensors",
    ]
    assert folders.locate("dev/transformer", files, [tmp_path], "vae") == tmp_path / "dev" / "transformer"
    (tmp_path / "dev" / "model_index.json").write_text("{}")
    assert (
        folders.pipeline_parts([tmp_path], "transformer") == ["dev/transformer"]
        and folders.pipeline_parts([tmp_path], "vae") == []
    )


def test_a_folder_hides_only_the_files_that_it_is_made_of(tmp_path):
    """Two models beside one config.json stay two choices; a third file beside a folder's own weights stays one."""
    for folder, names in {"two": ["a", "b"], "one": ["model", "other"], "single": ["x"]}.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text("{}")
        for name in names:
            save_file({"a": torch.zeros(1)}, tmp_path / folder / f"{name}.safetensors")
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/*.safetensors"))
    assert folders.choices(files, [tmp_path]) == [
        "one",
        "one/other.safetensors",
        "single",
        "two/a.safetensors",
        "two/b.safetensors",
    ]


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/../../b", "c:\\x", "", "none.safetensors"])
def test_names_that_are_not_there_or_lead_outside_are_refused(tmp_path, name):
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="There is no .* in the model folder vae. There are: a.safetensors"):
        folders.locate(name, ["a.safetensors"], [root], "vae")


def test_a_link_to_nowhere_is_said(tmp_path):
    (tmp_path / "x.safetensors").symlink_to(tmp_path / "moved.safetensors")
    with pytest.raises(CheckpointError, match="'x.safetensors' in the model folder vae is a link that points nowhere"):
        folders.locate("x.safetensors", ["x.safetensors"], [tmp_path], "vae")


# --- what a file is --------------------------------------------------------------------------------------------------


def known(shapes, metadata=None, config=None):
    """A checkpoint that exists as names and shapes alone: {name: shape}."""
    tensors = {name: Tensor(shape, "BF16", 2, None) for name, shape in shapes.items()}
    return Checkpoint(Path("some.safetensors"), tensors, metadata or {}, config or {})


def published(variant):
    return known(keys.model_shapes(variant))


@pytest.mark.parametrize("variant", variants.VARIANTS, ids=lambda variant: variant.title)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_published_models_are_recognised(variant, prefix):
    original = identify.identify(known({prefix + name: shape for name, shape in keys.model_shapes(variant).items()}))
    assert (original.kind, original.variant, original.layout, original.prefix) == (
        identify.MODEL,
        variant,
        "original",
        prefix,
    )
    names = known(keys.diffusers_shapes(variant))
    diffusers = identify.identify(names)
    assert (diffusers.variant, diffusers.layout) == (variant, "diffusers")
    validate.check_model(names, diffusers, "bf16")
    validate.check_model(published(variant), identify.identify(published(variant)), "fp8")


MISTRAL = {
    "embed_tokens.weight": (131072, 5120),
    "layers.0.self_attn.q_proj.weight": (4096, 5120),
    "layers.39.mlp.up_proj.weight": (32768, 5120),
}
OTHERS = {
    "a LoRA": {
        "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": (4, 6144),
        "double_stream_modulation_img.lin.weight": (1, 1),
    },
    "a LoRA that also changes how FLUX.2 dev reads its guidance": {
        "time_guidance_embed.guidance_embedder.linear_1.lora_A.weight": (16, 256),
        "transformer_blocks.0.attn.to_q.lora_A.weight": (16, 6144),
    },
    "a TwinFlow LoRA for FLUX.2": {
        "transformer.time_guidance_embed.time_sign_embed.diff": (2, 6144),
        "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": (16, 6144),
    },
    "the decoder of a FLUX.2 VAE, with names": {
        "conv_in.weight": (384, 32, 3, 3),
        "mid.block_1.conv1.weight": (384, 384, 3, 3),
        "up.0.block.0.norm1.weight": (96,),
    },
    "a LoRA for FLUX.1": {"lora_unet_single_blocks_0_modulation_lin.lora_down.weight": (4, 3072)},
    "a LoRA (an addition": {"double_blocks.0.img_attn.qkv.diff": (9216, 3072)},
    "a model compressed by DFloat11": {
        "single_blocks.0.linear1.sign_mantissa": (9,),
        "double_stream_modulation_img.lin.weight": (1, 1),
    },
    "a FLUX.2 ControlNet": {
        "control_img_in.bias": (6144,),
        "control_transformer_blocks.0.after_proj.weight": (6144, 6144),
    },
    "a ControlNet of another model": {"controlnet_x_embedder.weight": (3072, 64), "transformer_blocks.0.a": (1,)},
    "a pi-Flow adapter": {
        "transformer.proj_out_logweights.bias": (64,),
        "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": (4, 4096),
    },
    "PuLID": {"id_former.latents": (1, 4, 4096), "pulid_ca_double.0.to_q.weight": (4096, 4096)},
    "taef2, the tiny": {"1.weight": (64, 32, 3, 3), "3.pool.0.weight": (256, 64, 1, 1)},
    "a FLUX.1 diffusion model": {"double_blocks.0.img_mod.lin.weight": (18432, 3072), "img_in.weight": (3072, 64)},
    "a VAE with 16 latent channels": {"decoder.conv_in.weight": (512, 16, 3, 3)},
    "the VAE of Stable Diffusion": {"decoder.conv_in.weight": (512, 4, 3, 3)},
    "a CLIP text encoder": {"text_model.encoder.layers.0.mlp.fc1.weight": (3072, 768)},
    "a T5 text encoder": {"encoder.block.0.layer.0.SelfAttention.k.weight": (4096, 4096)},
    "a language model of the Llama kind": {
        "model.embed_tokens.weight": (128256, 4096),
        "model.layers.0.self_attn.q_proj.weight": (4096, 4096),
    },
    "a language model in Mistral's own key format": {
        "tok_embeddings.weight": (131072, 5120),
        "layers.0.attention.wq.weight": (4096, 5120),
    },
    "a diffusion model of another": {
        "double_blocks.0.img_attn.qkv.weight": (1,),
        "distilled_guidance_layer.norms.0.scale": (1,),
    },
    "a diffusion model of another family": {"model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3)},
    "something that this pack does not know": {"a": (1,)},
    "Mistral 3 (2 layers, 5120 wide)": {f"model.{name}": shape for name, shape in MISTRAL.items()},
    "a FLUX.2 VAE with a small decoder (384 channels)": {
        "bn.running_mean": (128,),
        "decoder.conv_in.weight": (384, 32, 3, 3),
    },
    "Qwen3 4B (1 layers)": {
        "model.embed_tokens.weight": (151936, 2560),
        "model.layers.0.self_attn.q_norm.weight": (128,),
    },
    "Qwen3 8B (1 layers)": {
        "model.embed_tokens.weight": (151936, 4096),
        "model.layers.0.self_attn.q_norm.weight": (128,),
    },
}


@pytest.mark.parametrize("title", OTHERS)
def test_other_files_are_named_and_sent_to_their_place(title):
    checkpoint = known(OTHERS[title])
    found = identify.identify(checkpoint)
    assert found.title.startswith(title)
    for slot, place in identify.SLOTS.items():
        if slot != found.slot:
            with pytest.raises(CheckpointError) as error:
                identify.expect(checkpoint, slot)
            text = str(error.value)
            assert text.startswith("some.safetensors is ") and place.expects in text and text.endswith(".")


@pytest.mark.parametrize(
    "name, title",
    [
        ("Flux_2-Turbo-LoRA_comfyui.safetensors", "a LoRA named as one for few steps (Turbo)"),
        ("flux2-twinflow.safetensors", "a LoRA named as one for few steps (twinflow)"),
        ("turbocharged.safetensors", "a LoRA (an addition to a model, not a model)"),
    ],
)
def test_loras_for_few_steps_are_named_by_their_file_where_their_layers_say_nothing(name, title):
    checkpoint = dataclasses.replace(
        known({"diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight": (16, 6144)}), path=Path(name)
    )
    with pytest.raises(CheckpointError, match=re.escape(f"{name} is {title}")) as error:
        identify.expect(checkpoint, identify.MODEL)
    assert "load it with the node Load FLUX.2 LoRA" in str(error.value)
    assert ("as many steps as its page says" in str(error.value)) == ("few steps" in title)


def test_the_small_decoder_alone_is_sent_to_the_file_that_works():
    checkpoint = known(OTHERS["the decoder of a FLUX.2 VAE, with names"])
    with pytest.raises(CheckpointError, match="Use full_encoder_small_decoder.safetensors of the same page"):
        identify.expect(checkpoint, identify.VAE)


@pytest.mark.parametrize("prefix", ["model.", "language_model.model.", "model.language_model."])
def test_mistral_key_prefixes(prefix):
    names = {prefix + name: shape for name, shape in MISTRAL.items()} | {
        "vision_tower.patch_conv.weight": (1024, 3, 14, 14),
        "lm_head.weight": (1, 1),
    }
    found = identify.identify(known(names))
    assert (found.kind, found.prefix, found.width) == ("mistral3", prefix, 5120)
    mapped = [keys.encoder_name(name, found.prefix, 30) for name in names]
    assert mapped == ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", None, None, None]


@pytest.mark.parametrize(
    "ending, message",
    [("weight.absmax", "by bitsandbytes"), ("qweight", "by GPTQ"), ("weight_scale", "no ComfyUI metadata describes")],
)
def test_weights_quantised_by_other_libraries_are_refused(ending, message):
    shapes = keys.model_shapes(variants.VARIANTS[1]) | {f"single_blocks.0.linear1.{ending}": (1,)}
    with pytest.raises(CheckpointError, match=f"FLUX.2 klein 4B diffusion model, quantised .*{message}"):
        identify.expect(known(shapes), identify.MODEL)


def test_a_shard_is_not_a_model():
    shard = Checkpoint(Path("model-00001-of-00003.safetensors"), published(variants.VARIANTS[0]).tensors)
    with pytest.raises(CheckpointError, match="one of 3 shards of a model. Choose the folder"):
        identify.expect(shard, identify.MODEL)


FORMATS = {
    "bf16": ({"a.weight": "BF16"}, {}),
    "fp8 (e4m3)": ({"a.weight": "F8_E4M3"}, {}),
    "mixed precision: fp8 scaled (e4m3) in 1 layers, else bf16": (
        {"a.weight": "F8_E4M3", "b.weight": "BF16"},
        {"_quantization_metadata": json.dumps({"layers": {"a": {"format": "float8_e4m3fn"}}})},
    ),
    "mixed precision: fp8 scaled (e4m3) in 1 layers, else fp16": (
        {"scaled_fp8": "F8_E4M3", "a.weight": "F8_E4M3", "a.scale_weight": "F16"},
        {},
    ),
}


@pytest.mark.parametrize("words", FORMATS)
def test_number_formats_in_words(words):
    dtypes, metadata = FORMATS[words]
    checkpoint = Checkpoint(None, {name: Tensor((1,), dtype, 2, None) for name, dtype in dtypes.items()}, metadata)
    assert identify.number_format(checkpoint) == (words, "mixed" in words)


@pytest.mark.parametrize("metadata", ["{", "[]", '{"layers": 3}', '{"layers": {"a": 1}}'])
def test_damaged_quantisation_metadata_is_said(metadata):
    checkpoint = known({"a.weight": (1,)}, {"_quantization_metadata": metadata})
    with pytest.raises(CheckpointError, match="quantisation metadata cannot be read"):
        identify.number_format(checkpoint)


# --- wrong and fuzzed files through the loaders
# ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def load(comfy):
    from flux2_pack.flux2.loading import load

    return load


@pytest.mark.parametrize("given", ["model", "text_encoder", "vae"])
@pytest.mark.parametrize("slot", ["model", "text_encoder", "vae"])
def test_wrong_model_in_a_slot(load, small_models, slot, given):
    if slot == given:
        return
    places = {"model": "Load FLUX.2 Model", "text_encoder": "Load FLUX.2 Text Encoder", "vae": "Load FLUX.2 VAE"}
    with pytest.raises(CheckpointError) as error:
        getattr(load, f"load_{slot}")(small_models[given])
    text = str(error.value)
    assert (
        text.startswith(small_models[given].name)
        and f"{places[slot]} expects" in text
        and f"belongs in the node {places[given]}" in text
    )


def test_incomplete_models_are_said(load, tmp_path):
    weights = maker.diffusion_model()
    del weights["single_blocks.2.linear2.weight"]
    with pytest.raises(
        CheckpointError,
        match=(
            "model.safetensors is incomplete: it is a FLUX.2 .* 1 of .* missing, such as single_blocks.2.linear2.weight"
        ),
    ):
        load.load_model(maker.write(tmp_path / "model.safetensors", weights))
    weights = maker.text_encoder()
    del weights["model.layers.3.mlp.up_proj.weight"]
    with pytest.raises(CheckpointError, match="missing, such as model.layers.3.mlp.up_proj.weight"):
        load.load_text_encoder(maker.write(tmp_path / "text.safetensors", weights))
    weights = maker.vae()
    del weights["encoder.mid.attn_1.q.weight"]
    with pytest.raises(CheckpointError, match="missing, such as encoder.mid.attn_1.q.weight"):
        load.load_vae(maker.write(tmp_path / "vae.safetensors", weights))


def test_text_encoder_too_short_or_without_tokenizer_is_said(load, tmp_path):
    with pytest.raises(CheckpointError, match="hidden state after layer 30, which it does not have"):
        load.load_text_encoder(maker.write(tmp_path / "short.safetensors", maker.text_encoder(layers=20)))
    weights = maker.text_encoder()
    del weights["tekken_model"]
    weights["vision_tower.patch_conv.weight"] = torch.zeros(1)
    with pytest.raises(
        CheckpointError, match="Mistral 3 without its tokenizer.*mistral_3_small_flux2_bf16.safetensors"
    ):
        load.load_text_encoder(maker.write(tmp_path / "silent.safetensors", weights))
    weights["tekken_model"] = torch.frombuffer(bytearray(b"{}nonsense"), dtype=torch.uint8)
    with pytest.raises(CheckpointError, match="The tokenizer in broken.safetensors cannot be read"):
        load.load_text_encoder(maker.write(tmp_path / "broken.safetensors", weights))


def test_sizes_that_do_not_fit_together_are_said(load, tmp_path):
    weights = maker.diffusion_model()
    weights["double_blocks.0.img_mlp.0.weight"] = weights["double_blocks.0.img_mlp.0.weight"][:100]
    with pytest.raises(
        CheckpointError, match=r"stores double_blocks.0.img_mlp.0.weight as BF16 of shape \[100, 256\], where"
    ):
        load.load_model(maker.write(tmp_path / "model.safetensors", weights))
    weights = maker.text_encoder()
    weights["model.layers.3.mlp.up_proj.weight"] = weights["model.layers.3.mlp.up_proj.weight"][:100]
    with pytest.raises(CheckpointError, match=r"stores model.layers.3.mlp.up_proj.weight as BF16 of shape \[100, 64\]"):
        load.load_text_encoder(maker.write(tmp_path / "text.safetensors", weights))
    weights = maker.vae()
    weights["decoder.conv_out.weight"] = weights["decoder.conv_out.weight"][:, :3]
    with pytest.raises(CheckpointError, match="sizes do not fit together"):
        load.load_vae(maker.write(tmp_path / "vae.safetensors", weights))


def test_whole_numbers_in_place_of_weights_are_said(load, tmp_path):
    weights = {name: value.view(torch.int16) for name, value in maker.diffusion_model().items()}
    with pytest.raises(CheckpointError, match="stores img_in.weight as I16"):
        load.load_model(maker.write(tmp_path / "model.safetensors", weights))


def mutated(raw, rng):
    """A safetensors file with its header damaged in one of several ways; the length prefix follows the header or is
    damaged itself.
    """
    length = struct.unpack("<Q", raw[:8])[0]
    header, data = bytearray(raw[8 : 8 + length]), raw[8 + length :]
    kind = rng.randrange(6)
    if kind == 0:  # flip bytes
        for _ in range(rng.randint(1, 8)):
            header[rng.randrange(len(header))] = rng.randrange(256)
    elif kind == 1:  # change digits: shapes and offsets
        digits = [place for place, value in enumerate(header) if chr(value).isdigit()]
        for place in rng.sample(digits, 3):
            header[place] = ord(rng.choice("0123456789"))
    elif kind == 2:  # drop a piece
        start = rng.randrange(len(header))
        del header[start : start + rng.randint(1, 200)]
    elif kind == 3:  # swap two tensors' types or names
        words = rng.choice(
            [
                (b"BF16", b"F8_E4M3"),
                (b"BF16", b"I16"),
                (b"double_blocks", b"single_blocks"),
                (b".weight", b".bias"),
                (b"F32", b"\\u0000"),
            ]
        )
        header = bytearray(header.replace(*words))
    elif kind == 4:  # truncate the file
        return raw[: rng.randrange(len(raw))]
    else:  # lie about the header's length
        return (
            struct.pack("<Q", rng.choice([0, 1, length - 1, length + 1, 2**63, rng.randrange(2**20)]))
            + bytes(header)
            + data
        )
    return struct.pack("<Q", len(header)) + bytes(header) + data


def test_fuzzed_files_give_our_error_or_load(load, tmp_path):
    """200 damaged copies each of a small model and text encoder: CheckpointError, or a model; nothing else, and no
    hang.
    """
    makers = {
        "load_model": maker.diffusion_model(hidden=128, double=1, single=1),
        "load_text_encoder": maker.text_encoder(hidden=32, intermediate=32),
    }
    outcomes = {"error": 0, "loaded": 0}
    for function, weights in makers.items():
        raw = maker.write(tmp_path / "whole.safetensors", weights).read_bytes()
        rng = random.Random(7)
        for number in range(200):
            path = tmp_path / "fuzzed.safetensors"
            path.write_bytes(mutated(raw, rng))
            try:
                getattr(load, function)(path)
                outcomes["loaded"] += 1
            except CheckpointError as error:
                outcomes["error"] += 1
                assert str(error).endswith(".") and "fuzzed.safetensors" in str(error), (number, str(error))
    assert outcomes["error"] >= 300 and sum(outcomes.values()) == 400, outcomes
