"""Files and texts that were made to do harm: each gives a sentence, soon, and the process goes on.

Numbers that a header or a tokenizer claims, names by the ten thousand, pipes and devices in place of files, patterns
that no regular expression ends, marks of quantisation that lie. Time limits are ten times what an idle machine needs.
"""

import json
import os
import struct
import threading
import time
from pathlib import Path

import pytest
import torch

import small_models as maker
from flux2_pack.flux2.checkpoints import folders, header, identify
from flux2_pack.flux2.checkpoints.header import CheckpointError, open_checkpoint

SOON = 3.0  # seconds of computing; of silence where it is about others


@pytest.fixture(scope="module")
def load(comfy):
    from flux2_pack.flux2.loading import load

    return load


@pytest.fixture(scope="module")
def examine(comfy):
    from flux2_pack.flux2.loading import examine

    return examine


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture(autouse=True)
def soon():
    """Every test of this file is over soon."""
    start = time.perf_counter()
    yield
    assert time.perf_counter() - start < 10 * SOON


def raw(path, header, data=b""):
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(content)) + content + data)
    return path


def empty(shape=(0,)):
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [0, 0]}


class Ticks:
    """The longest time in which another thread did not run meanwhile."""

    def __enter__(self):
        self.gap, self.going = 0.0, True
        self.thread = threading.Thread(target=self.tick)
        self.thread.start()
        return self

    def tick(self):
        before = time.perf_counter()
        while self.going:
            time.sleep(0.005)
            now = time.perf_counter()
            self.gap, before = max(self.gap, now - before), now

    def __exit__(self, *error):
        self.going = False
        self.thread.join()


# --- numbers and names of a header -----------------------------------------------------------------------------------

CLAIMS = {
    "a shape of 100,000 large sides": {"a": empty([2**62] * 100_000 + [0])},
    "a shape of a million sides": {"a": empty([1] * 1_000_000 + [0])},
    "a million tensors": {f"t{number}": empty() for number in range(1_000_000)},
    "two million lists": {"a": empty([]), "b": [[]] * 2_000_000},
    "ten million numbers": b'{"a":[' + b"0," * 10_000_000 + b"0]}",
}


@pytest.mark.alone
@pytest.mark.parametrize("claim", CLAIMS)
def test_claims_of_a_header_are_bounded(examine, tmp_path, claim):
    path = raw(tmp_path / "x.safetensors", CLAIMS[claim])
    start = time.process_time()
    with Ticks() as others:
        text = examine.describe_path(str(path))
    assert "x.safetensors" in text and text.endswith(".")
    assert time.process_time() - start < SOON and others.gap < SOON


NAMED = {
    "foreign names": lambda number: f"some.tensor.{number}",
    "blocks of a FLUX.2": lambda number: f"double_blocks.{number}.img_attn.qkv.weight",
    "layers of a language model": lambda number: f"model.layers.{number}.self_attn.q_norm.weight",
}


@pytest.mark.alone
@pytest.mark.parametrize("kind", NAMED)
def test_a_file_of_many_names_is_identified_soon_and_others_go_on(examine, tmp_path, kind):
    names = [NAMED[kind](number) for number in range(header.MOST_TENSORS - 2)]
    tensors = {name: empty() for name in names} | {"double_stream_modulation_img.lin.weight": empty()}
    path = raw(tmp_path / "x.safetensors", tensors)
    start = time.process_time()
    with Ticks() as others:
        text = examine.describe_path(str(path))
    assert time.process_time() - start < SOON and others.gap < SOON
    assert "x.safetensors" in text


@pytest.mark.alone
def test_identification_costs_the_same_for_each_name(tmp_path):
    """Ten times the names, at most some twenty times the seconds: a rule does not look at names one by one."""

    def seconds(count):
        tensors = {f"some.tensor.{number}": None for number in range(count)}
        checkpoint = header.Checkpoint(Path("x.safetensors"), tensors)
        start = time.perf_counter()
        identify.identify(checkpoint)
        return time.perf_counter() - start

    few = min(seconds(100_000) for _ in range(3))
    assert min(seconds(1_000_000) for _ in range(2)) < max(20 * few, SOON)


@pytest.mark.parametrize("name", ["a\nb", "a\ud800b", "a\0b"])
def test_names_that_cannot_be_printed_are_refused(tmp_path, name):
    with pytest.raises(CheckpointError, match="malformed"):
        open_checkpoint(raw(tmp_path / "x.safetensors", {name: empty()}))


@pytest.mark.parametrize("number", ["²", "٣", "9" * 5000, "-1", ""])
def test_odd_layer_numbers_are_no_layers(examine, tmp_path, number):
    weights = maker.text_encoder()
    weights[f"model.layers.{number}.self_attn.q_proj.weight"] = torch.zeros(1)
    path = maker.write(tmp_path / "x.safetensors", weights)
    assert "Mistral 3 (30 layers" in examine.describe_path(str(path)) or len(number) == 5000


# --- what is no file -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("made", ["pipe", "link to a device", "circle of links"])
@pytest.mark.parametrize("place", ["model", "index", "config", "tokenizer", "prompt file"])
def test_pipes_and_devices_are_refused_at_once(examine, load, tmp_path, made, place):
    from flux2_pack.flux2.prompts import text

    folder = tmp_path / "folder"
    folder.mkdir()
    name = {
        "model": "model.safetensors",
        "index": "model.safetensors.index.json",
        "config": "config.json",
        "tokenizer": "tekken.json",
        "prompt file": "prompts.txt",
    }[place]
    path = folder / name
    {
        "pipe": os.mkfifo,
        "link to a device": lambda path: path.symlink_to("/dev/zero"),
        "circle of links": lambda path: path.symlink_to(path),
    }[made](path)
    if place == "prompt file":
        with pytest.raises(ValueError, match="prompts.txt"):
            text.read_file(path)
        return
    if place in ("config", "tokenizer"):
        weights = maker.text_encoder()
        del weights["tekken_model"]
        maker.write(folder / "model.safetensors", weights)
    if place == "tokenizer":
        (folder / "config.json").write_text('{"model_type": "mistral3"}')
    with pytest.raises(CheckpointError) as error:
        load.load_text_encoder(str(folder))
    assert "folder" in str(error.value) or name in str(error.value)
    if place == "model":
        assert "model.safetensors" in examine.describe_path(str(path)) and "does not exist" not in str(error.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "tekken.json"])
def test_files_beside_the_weights_are_bounded(load, tmp_path, name):
    weights = maker.text_encoder()
    del weights["tekken_model"]
    maker.write(tmp_path / "model.safetensors", weights)
    (tmp_path / "config.json").write_text('{"model_type": "mistral3"}')
    with open(tmp_path / name, "wb") as file:
        file.truncate(3 * 2**30)
    with pytest.raises(CheckpointError, match=f"{name} has 3072 MiB"):
        load.load_text_encoder(str(tmp_path))


@pytest.mark.parametrize("name", [".", "./", "", "a/C:x", "C:x", "x:stream", "n" * 300, "a/" * 3000, "\ud800", None, 3])
def test_names_that_are_no_files_are_said(tmp_path, name):
    with pytest.raises(CheckpointError, match="There is no"):
        folders.locate(name, [], [tmp_path], "vae")


@pytest.mark.parametrize("shard", ["s" * 5000 + ".safetensors", "C:x.safetensors", "x.safetensors:y"])
def test_shards_outside_the_folder_are_refused(tmp_path, shard):
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(CheckpointError, match="refused"):
        open_checkpoint(tmp_path)


# --- tokenizers and prompts ------------------------------------------------------------------------------------------


def tokenizer(**config):
    content = json.loads(maker.tekken())
    content["config"] |= config
    return json.dumps(content).encode()


TOKENIZERS = {
    "a thousand million special tokens": tokenizer(default_num_special_tokens=10**9),
    "a million special tokens": tokenizer(default_num_special_tokens=10**6),
    "a pattern without end": tokenizer(pattern="(a+)+$"),
    "an innocent pattern": tokenizer(pattern=r"\s*[\r\n]+"),
    "a long token": json.dumps(
        json.loads(maker.tekken()) | {"vocab": [{"rank": 0, "token_bytes": "YWFh" * 500_000}]}
    ).encode(),
    "ranks with a gap": json.dumps(
        json.loads(maker.tekken()) | {"vocab": [{"rank": 0, "token_bytes": "YQ=="}, {"rank": 2, "token_bytes": "Yg=="}]}
    ).encode(),
    "padding": json.dumps(
        {
            "padding": {"strategy": {"Fixed": 2**31}, "length": 2**31},
            "model": {"type": "BPE", "vocab": {}, "merges": []},
        }
    ).encode(),
    "growth": json.dumps(
        {
            "normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": "b" * 10**6},
            "model": {"type": "BPE", "vocab": {}, "merges": []},
        }
    ).encode(),
    "a regular expression in a tokenizer.json": json.dumps(
        {
            "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False},
            "model": {"type": "BPE", "vocab": {}, "merges": []},
        }
    ).encode(),
    "deep nesting": b'{"special_tokens":' + b"[" * 200_000,
}


def test_special_tokens_with_gaps_and_no_count_keep_the_ids_of_all_tokens(comfy):
    from flux2_pack.flux2.loading import tekken

    content = json.loads(maker.tekken())
    del content["config"]["default_num_special_tokens"], content["config"]["default_vocab_size"]
    content["special_tokens"] = [entry for entry in content["special_tokens"] if entry["rank"] not in (1, 4)]
    highest = max(entry["rank"] for entry in content["special_tokens"])
    ready = tekken.from_tekken(content)
    assert all(ready.token_to_id(entry["token_str"]) == entry["rank"] for entry in content["special_tokens"])
    assert ready.token_to_id("a") == highest + 1 + ord("a")


@pytest.mark.parametrize("case", TOKENIZERS)
def test_claims_of_a_tokenizer_are_bounded(load, tmp_path, case):
    data = torch.frombuffer(bytearray(TOKENIZERS[case]), dtype=torch.uint8)
    path = maker.write(tmp_path / "x.safetensors", maker.text_encoder() | {"tekken_model": data})
    start = time.process_time()
    with pytest.raises(CheckpointError, match="The tokenizer in x.safetensors cannot be read"):
        load.load_text_encoder(str(path))
    assert time.process_time() - start < SOON


def test_the_published_patterns_are_those_of_the_installed_transformers(comfy):
    """The pattern of tekken files, and the one that transformers' converter takes where it is told none."""
    import importlib
    import inspect

    from flux2_pack.flux2.loading import tekken

    # by name: the package also has a function that is called so
    convert_slow_tokenizer = importlib.import_module("transformers.convert_slow_tokenizer")
    assert maker.PATTERN in tekken.PATTERNS
    default = inspect.signature(convert_slow_tokenizer.TikTokenConverter.__init__).parameters["pattern"].default
    assert default in tekken.PATTERNS


@pytest.fixture(scope="module")
def clip(load, small_models):
    return load.load_text_encoder(str(small_models["text_encoder"]))


TEXTS = {
    "12 million spaces": "a" + " " * 12_000_000 + "a",
    "as many spaces as may be": "a" + " " * 199_998 + "a",
    "one long word": "x" * 200_000,
    "names of special tokens": "[INST]</s>" * 2_000,
}


@pytest.mark.parametrize("case", TEXTS)
@pytest.mark.parametrize("way", ["CLIP Text Encode", "Encode Prompt", "Encode Prompt List"])
def test_no_text_ends_the_worker(clip, case, way):
    """Through the tokenizer alone: what follows is bounded by the number of tokens."""
    from flux2_pack.flux2.prompts import text, tokens

    def run():
        if way == "CLIP Text Encode":
            return clip.tokenize(TEXTS[case])
        prompts = text.split(TEXTS[case], "each line") if way == "Encode Prompt List" else [TEXTS[case]]
        return [tokens.tokenize(clip, text.clean(prompt)[0]) for prompt in prompts]

    start = time.process_time()
    if "million" in case:
        with pytest.raises(ValueError, match="The prompt is too long: it has 12000002 letters"):
            run()
    else:
        assert run()
    assert time.process_time() - start < 2 * SOON


def test_a_panic_is_a_sentence_and_a_cancel_stays_one(comfy):
    from flux2_pack.flux2.loading.tekken import panics_as_sentences
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    slow = Tokenizer(models.BPE())
    slow.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), behavior="isolated")
    with pytest.raises(ValueError, match="The prompt cannot be read by the tokenizer .*retry-limit"):
        with panics_as_sentences("The prompt"):
            slow.encode("a" * 36 + "b")
    with pytest.raises(KeyboardInterrupt), panics_as_sentences("The prompt"):
        raise KeyboardInterrupt


def test_too_many_prompts_are_said():
    from flux2_pack.flux2.prompts import text

    with pytest.raises(ValueError, match="There are 20000 prompts, and at most 10000"):
        text.split("a\n" * 20_000, "each line")


def test_tokens_beyond_the_embedding_are_said(load, tmp_path):
    weights = maker.text_encoder()
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:300].clone()
    path = maker.write(tmp_path / "x.safetensors", weights)
    with pytest.raises(CheckpointError, match="an embedding of 300 tokens, and its tokenizer has 512"):
        load.load_text_encoder(str(path))


def test_a_prompt_with_tokens_beyond_the_embedding_is_refused(load, tmp_path):
    """Qwen's tokenizer is ComfyUI's, so only the prompt shows that the weights do not belong to it."""
    from test_loaders import small_qwen

    weights = small_qwen()
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:512].clone()
    clip = load.load_text_encoder(str(maker.write(tmp_path / "x.safetensors", weights)))
    with pytest.raises(CheckpointError, match="an embedding of 512 tokens, and this prompt has the token 1"):
        clip.encode_from_tokens(clip.tokenize("a cat"))


# --- marks of quantisation -------------------------------------------------------------------------------------------


def fp8(weights, layer):
    weight = weights[f"{layer}.weight"].float()
    scale = weight.abs().max() / 448
    weights[f"{layer}.weight"] = (weight / scale).to(torch.float8_e4m3fn)
    weights[f"{layer}.weight_scale"] = scale
    return weights


def metadata(**layers):
    return {
        "_quantization_metadata": json.dumps({"layers": {name.replace("__", "."): v for name, v in layers.items()}})
    }


LAYER = "single_blocks.0.linear1"
FP8 = {"format": "float8_e4m3fn"}


def with_mark(content):
    weights = fp8(maker.diffusion_model(), LAYER)
    weights[f"{LAYER}.comfy_quant"] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return weights, {}


def without_scale():
    weights = fp8(maker.diffusion_model(), LAYER)
    del weights[f"{LAYER}.weight_scale"]
    return weights, metadata(single_blocks__0__linear1=FP8)


def changed(name, value, **marks):
    weights = fp8(maker.diffusion_model(), LAYER)
    weights[name] = value(weights[name])
    return weights, metadata(single_blocks__0__linear1=FP8, **marks)


MARKS = {
    "no JSON": (lambda: with_mark(b"{"), "quantisation metadata cannot be read"),
    "a list": (lambda: with_mark(b"[]"), "quantisation metadata cannot be read"),
    "no format": (lambda: with_mark(b'{"convrot": true}'), "marked as quantised without a format"),
    "a format as a number": (lambda: with_mark(b'{"format": 3}'), "marked as quantised without a format"),
    "an unknown format": (lambda: with_mark(b'{"format": "bnb_nf4"}'), "quantised as bnb_nf4, which this version"),
    "a newer format": (lambda: with_mark(b'{"format": "awq_w4a16"}'), "awq_w4a16, .*ComfyUI 0.38 or newer"),
    "a huge mark": (lambda: with_mark(b'{"format": "' + b"x" * 10_000 + b'"}'), "where at most 4096 belong"),
    "no scale": (without_scale, "fp8 scaled .* without weight_scale"),
    "nvfp4 that is none": (
        lambda: changed(f"{LAYER}.weight", lambda w: w, single_blocks__1__linear1={"format": "nvfp4"}),
        "is no nvfp4 of the shape",
    ),
    "a layer that is not there": (
        lambda: changed(f"{LAYER}.weight", lambda w: w, nowhere=FP8),
        "names the layer nowhere, which is not in the file",
    ),
    "whole numbers where no mark is": (
        lambda: changed("img_in.weight", lambda w: w.to(torch.uint8)),
        "stores img_in.weight as U8",
    ),
    "another shape where no mark is": (
        lambda: changed("img_in.weight", lambda w: torch.cat([w, w], dim=1)),
        "stores img_in.weight as BF16 of shape",
    ),
    "another shape of a marked layer": (
        lambda: changed(f"{LAYER}.weight", lambda w: w[:-1].clone()),
        "is no fp8 scaled .* of the shape",
    ),
    "a scale for each row": (
        lambda: changed(f"{LAYER}.weight_scale", lambda s: s.expand(2304).clone()),
        "has 2304 numbers in F32 as weight_scale of its layer",
    ),
}


@pytest.mark.parametrize("case", MARKS)
def test_marks_that_lie_are_said(load, examine, tmp_path, case):
    make, message = MARKS[case]
    path = maker.write(tmp_path / "x.safetensors", *make())
    with pytest.raises(CheckpointError, match=message):
        load.load_model(str(path))
    assert "Load FLUX.2 Model refuses it: " in examine.describe_path(str(path))


def test_marks_that_lie_in_a_file_of_nobody_are_said(examine, tmp_path):
    """A file that no loader takes, found by the fuzz (seed 1, case 8300)."""
    path = maker.write(tmp_path / "x.safetensors", {"a.weight": torch.zeros(1)}, {"_quantization_metadata": "["})
    text = examine.describe_path(str(path))
    assert "something that this pack does not know" in text and "quantisation metadata cannot be read" in text


# --- VAEs and memory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (31, 32, 3, 3), (0, 32, 3, 3), (2**40, 32, 3, 0), (256, 32, 1, 1)])
def test_a_vae_with_impossible_sizes_is_said(load, tmp_path, shape):
    weights = maker.vae()
    count = 1
    for side in shape:
        count *= side
    name = "decoder.conv_in.weight"
    if count > 2**30 or 0 in shape:
        path = raw(
            tmp_path / "x.safetensors",
            {
                name: empty(shape),
                "encoder.conv_in.weight": empty((0, 3, 3, 3)),
                "bn.running_mean": bn(),
                "bn.running_var": bn(),
            },
            bytes(512),
        )
    else:
        path = maker.write(tmp_path / "x.safetensors", weights | {name: torch.zeros(shape)})
    with pytest.raises(CheckpointError, match="x.safetensors"):
        load.load_vae(str(path))


def bn():
    return {"dtype": "F32", "shape": [128], "data_offsets": [0, 512]}


def test_running_out_of_memory_is_no_fault_of_the_file(load, small_models, monkeypatch):
    import comfy.utils

    def refuse(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(comfy.utils, "load_torch_file", refuse)
    with pytest.raises(MemoryError):
        load.load_model(str(small_models["model"]))


def test_whatever_comfyui_raises_while_it_builds_is_a_sentence(load, small_models, monkeypatch):
    import comfy.sd

    def refuse(*args, **kwargs):
        raise AttributeError("'NoneType' object has no attribute 'clone'")

    monkeypatch.setattr(comfy.sd, "load_diffusion_model_state_dict", refuse)
    with pytest.raises(CheckpointError, match="cannot be loaded: ComfyUI cannot use its weights .AttributeError"):
        load.load_model(str(small_models["model"]))
