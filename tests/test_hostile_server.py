"""No text and no file ends the prompt worker of a server: after each hostile prompt the same server makes an image.

What is refused, and in which words, is tested in test_hostile_files.py and test_fuzz.py without a server. Here each
case is queued as a user would: the job must end, with a result or in a sentence, the server must answer meanwhile, and
the next job must work. Not covered: several GPUs.
"""

import json
import os
import struct
import threading
import time
import urllib.error
import urllib.request

import pytest
import torch

import small_models as maker
from api_workflow import PictureSettings, fill, nodes_of
from comfy_client import ExecutionFailed, PromptRefused
from comfy_server import fetch_json
from server_fixture import run
from test_server import alive

SECONDS = 60  # for one job, on a busy machine
SILENT = 10  # seconds for which the server may not answer


def image(model_files, prompt="A red fox", **models):
    names = {folder: files[0].name for folder, files in model_files.items()}
    return fill(PictureSettings(prompt, models=names | models, width=64, height=64, steps=1))


def with_prompt_node(workflow, class_type, **inputs):
    """The workflow with its CLIP Text Encode replaced."""
    (node,) = nodes_of(workflow, "CLIPTextEncode")
    node["class_type"], node["inputs"] = class_type, {"clip": node["inputs"]["clip"], **inputs}
    return workflow


class Silence:
    """The longest time in which the server did not answer /queue."""

    def __init__(self, server):
        self.url, self.longest, self.done = server.url, 0.0, threading.Event()
        self.thread = threading.Thread(target=self.ask)

    def ask(self):
        while not self.done.wait(0.2):
            start = time.monotonic()
            fetch_json(f"{self.url}/queue")
            self.longest = max(self.longest, time.monotonic() - start)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.done.set()
        self.thread.join()


def ends(server, workflow, words=None):
    """Queue a hostile workflow: it must end, the server answering meanwhile. words: what it must be refused with, None:
    any result or sentence.
    """
    with Silence(server) as silence:
        try:
            run(server, workflow, seconds_to_run=SECONDS)
            said = ""
        except (ExecutionFailed, PromptRefused) as error:
            said = str(error)
    assert words is None or words in said
    assert not said or said.rstrip().endswith((".", ")", "pack")), said[-500:]
    assert "Traceback" not in said and len(said) < 6000 and silence.longest < SILENT


@pytest.fixture(autouse=True)
def a_good_prompt_works_afterwards(server, model_files):
    """A worker that one prompt ended would answer no other."""
    yield
    again = image(model_files, "A good prompt")
    nodes_of(again, "RandomNoise")[0]["inputs"]["noise_seed"] = time.monotonic_ns() % 2**32  # not from ComfyUI's cache
    assert run(server, again, seconds_to_run=SECONDS).images() and alive(server)


# --- texts -----------------------------------------------------------------------------------------------------------

SPACES = "a" + " " * 12_000_000 + "a"
TEXTS = {
    "12 million spaces": SPACES,
    "spaces up to the limit": "a" + " " * 199_998 + "a",
    "control characters": "\0\x1b[31m\x7f\u202e" * 100,
    "half a character": "\ud800 a cat",
    "special tokens": "[IMG]</s>[INST]<unk>" * 500,
    "an embedding outside": "embedding:../../../etc/passwd",
}


def test_no_text_in_clip_text_encode_ends_the_worker(server, model_files):
    words = {"12 million spaces": "too long", "half a character": "half of a character in it (U+D800)"}
    for case, text in TEXTS.items():
        ends(server, image(model_files, text), words.get(case))


def test_no_text_in_encode_prompt_ends_the_worker(server, model_files):
    for case, text in TEXTS.items():
        workflow = with_prompt_node(image(model_files), "Flux2EncodePrompt", text=text)
        ends(server, workflow, "too long" if "million" in case else None)


def test_no_file_of_prompts_ends_the_worker(server, model_files):
    file = server.base / "input" / "hostile-prompts.txt"
    for content, words in ((SPACES.encode(), "too long"), (b"\xff\xfe\0" * 1000, "UTF-8"), (b"a\n" * 20_000, "20000")):
        file.write_bytes(content)
        workflow = with_prompt_node(image(model_files), "Flux2EncodePrompts", prompts="", file=file.name)
        ends(server, workflow, words)
    file.unlink()


# --- files -----------------------------------------------------------------------------------------------------------


def tokenizer(**config):
    """A text encoder's weights whose tokenizer has these values in its configuration."""
    content = json.loads(maker.tekken())
    content["config"] |= config
    data = torch.frombuffer(bytearray(json.dumps(content).encode()), dtype=torch.uint8)
    return maker.text_encoder() | {"tekken_model": data}


def header(path, content):
    content = json.dumps(content).encode()
    path.write_bytes(struct.pack("<Q", len(content)) + content)


def endless_pattern(path):
    maker.write(path, tokenizer(pattern="(a+)+$"))


def many_special_tokens(path):
    maker.write(path, tokenizer(default_num_special_tokens=10**9))


def many_sides(path):
    header(path, {"a": {"dtype": "F32", "shape": [2**62] * 100_000 + [0], "data_offsets": [0, 0]}})


def many_names(path):
    header(path, {f"t{number}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for number in range(300_000)})


def few_rows(path):
    weights = maker.text_encoder()
    name = next(name for name in weights if name.endswith("embed_tokens.weight"))
    maker.write(path, weights | {name: weights[name][:300]})


FILES = {
    "a pattern without end": (endless_pattern, "text_encoders", "cannot be read"),
    "a thousand million special tokens": (many_special_tokens, "text_encoders", "cannot be read"),
    "fewer rows than tokens": (few_rows, "text_encoders", None),
    "a shape of 100,000 sides": (many_sides, "diffusion_models", "damaged"),
    "300,000 names": (many_names, "diffusion_models", None),
    "a pipe": (os.mkfifo, "vae", ""),
}


@pytest.mark.parametrize("case", FILES)
def test_no_file_ends_the_worker(server, model_files, case):
    make, folder, words = FILES[case]
    path = server.base / "models" / folder / "hostile.safetensors"
    make(path)
    try:
        workflow = image(model_files, "a" * 36 + "b", **{folder: path.name})
        ends(server, workflow, words)
        info = {"class_type": "Flux2ModelInfo", "inputs": {"file_name": f"{folder}/{path.name}"}}
        ends(server, {"1": info})
    finally:
        path.unlink()


# --- values that another node gives ----------------------------------------------------------------------------------


def test_no_value_of_a_link_ends_the_worker(server, model_files):
    """A text that reaches Warm Up's sizes over a link, which no validator has seen."""
    workflow = fill(
        PictureSettings(
            "A red fox",
            models={folder: files[0].name for folder, files in model_files.items()},
            width=64,
            height=64,
            steps=1,
            warmup="64x64",
        )
    )
    nodes_of(workflow, "Flux2WarmUp")[0]["inputs"]["sizes"] = ["text", 0]
    for value in ("", "a" * 10**6, "9" * 5000 + "x16", "32x32," * 10_000):
        workflow["text"] = {"class_type": "PrimitiveString", "inputs": {"value": value}}
        ends(server, workflow, "size")


def test_a_number_that_is_none_is_said_by_name(server, model_files):
    """Core's switch gives what its branch gives: here a text where a whole number belongs."""
    workflow = image(model_files)
    workflow["text"] = {"class_type": "PrimitiveString", "inputs": {"value": "three"}}
    workflow["switch"] = {
        "class_type": "ComfySwitchNode",
        "inputs": {"switch": True, "on_true": ["text", 0], "on_false": ["text", 0]},
    }
    nodes_of(workflow, "Flux2SelectAttention")[0]["inputs"] |= {"edge_backend": "sdpa", "first_steps": ["switch", 0]}
    words = "the input \"second kernel: first steps\" takes a whole number from 0 to 1000. It was given 'three'."
    ends(server, workflow, words)


DEEP = 100_000  # more lists inside of one another than Python's JSON reader follows
GRAPHS = {
    "deep": "[" * DEEP + "]" * DEEP,
    "cut off": "{",
    "null": "null",
    "a list": "[]",
    "a text": '"a"',
    "a number for nodes": '{"nodes": 1, "links": {}}',
}


@pytest.mark.parametrize("graph", GRAPHS)
def test_no_graph_that_the_page_wants_converted_is_a_raw_error(server, graph):
    request = urllib.request.Request(f"{server.url}/flux2_attention/convert", GRAPHS[graph].encode(), method="POST")
    request.add_header("Content-Type", "application/json")
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=SECONDS) as answer:
            said = json.load(answer)["text"]
    except urllib.error.HTTPError as error:
        assert error.code == 400, error
        said = json.load(error)["error"]
    assert len(said) > 10, said
