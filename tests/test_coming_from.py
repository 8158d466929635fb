"""docs/coming-from.md, row by row: every node, input, value, backend and flag exists, the flags run, and diffusers
knows what is said to be its own.

  bash scripts/test.sh tests/test_coming_from.py

Not covered: whether sglang and xdit still have the options in the first columns; they are not installed here.
"""

import json
import re
import shlex
import subprocess
import sys
import urllib.request

import pytest
from PIL import Image

import api_workflow
import generate
from flux2_pack.attention import registry
from pack import ROOT

PAGE = (ROOT / "docs" / "coming-from.md").read_text()
NOTHING = "-"
# what a small model on a CPU is told where the page leaves the value open
VALUES = {
    "--prompt": ["a red circle"],
    "--width": ["64"],
    "--height": ["64"],
    "--num-inference-steps": ["2"],
    "--guidance-scale": ["4.0"],
    "--seed": ["7"],
    "--attention-backend": ["sdpa"],
    "--num-gpus": ["1"],
    "--ulysses-degree": ["1"],
    "--ring-degree": ["1"],
    "--warmup": ["True"],
    "--warmup-steps": ["1"],
    "--warmup-resolutions": ["64x64"],
}
WANTS_A_GPU = "--fast-blocks"  # on a CPU its node refuses, in words
COMPILES = "--enable-torch-compile"  # for a minute on a CPU: tried by tests/test_speed_nodes.py


def tables():
    """[(header, [cells of a row])] of all tables of the page."""
    for block in re.findall(r"(?:^\|.*\n)+", PAGE, re.M):
        header, _, *rows = [
            [cell.strip() for cell in line.strip().strip("|").split("|")] for line in block.strip().split("\n")
        ]
        yield header, rows


def quoted(cell):
    return re.findall(r"`([^`]+)`", cell)


OPTIONS = [row for header, rows in tables() if "graph" in header for row in rows]
BACKENDS = [row for header, rows in tables() if "here" in header for row in rows]
FLAGS = [flag for _, command, *_ in OPTIONS for flag in quoted(command)]


@pytest.fixture(scope="module")
def nodes(server):
    """ComfyUI's /object_info with this pack."""
    with urllib.request.urlopen(f"{server.url}/object_info", timeout=60) as answer:
        return json.load(answer)


def named_inputs():
    """Every `Node.input` and `Node.input=value` of the page."""
    cells = [cell for row in (*OPTIONS, *BACKENDS) for cell in row[1:]]
    return sorted({text for cell in cells for text in quoted(cell) if re.fullmatch(r"[A-Z]\w+\.\w+(=.+)?", text)})


# --- tables ----------------------------------------------------------------------------------------------------------


def test_every_row_says_where_or_why_not():
    assert len(OPTIONS) > 80 and len(BACKENDS) > 30
    for theirs, command, graph, remark in OPTIONS:
        assert quoted(theirs), theirs
        for cell in (command, graph):
            assert cell == NOTHING or quoted(cell), theirs
        assert remark or (command, graph) != (NOTHING, NOTHING), f"{theirs}: nothing, and no reason"


def test_every_node_and_input_exists(nodes):
    for text in named_inputs():
        node, _, rest = text.partition(".")
        name, _, value = rest.partition("=")
        assert node in nodes, text
        inputs = {**nodes[node]["input"].get("required", {}), **nodes[node]["input"].get("optional", {})}
        assert name in inputs, text
        if value:
            kind, options = inputs[name]
            assert value in (kind if isinstance(kind, list) else options["options"]), text


def test_every_node_in_the_text_exists(nodes):
    assert set(re.findall(r"`(Flux2(?!Pipeline|Transformer)\w+)", PAGE)) <= set(nodes)


def test_every_backend_exists():
    for theirs, here, _ in BACKENDS:
        assert quoted(here) and set(quoted(here)) <= set(registry.SLUGS), theirs


def test_every_quantised_and_exact_backend_that_others_have_is_named():
    named = {slug for _, here, _ in BACKENDS for slug in quoted(here)}
    assert set(registry.ROWS) - named <= {
        "aiter-triton",
        "comfy-int8",
        "cudnn-fp8",
        "aiter-v4-mxfp8",
        "aiter-v4-f8f6",
        "aiter-v4-f6f6",
    }, "what only this pack has"


def test_diffusers_has_what_is_said_of_it():
    import inspect
    import diffusers
    from diffusers.models.attention_dispatch import AttentionBackendName

    names = [text for header, rows in tables() if header[0] == "diffusers" for row in rows for text in quoted(row[0])]
    assert len(names) > 30
    call, backends = (
        inspect.signature(diffusers.Flux2Pipeline.__call__).parameters,
        {backend.value for backend in AttentionBackendName},
    )
    for name in names:
        if argument := re.fullmatch(r"__call__\((\w+)=\)", name):
            assert argument[1] in call, name
        elif "." in name:
            owner, method = name.split(".")
            assert callable(getattr(getattr(diffusers, owner), method)), name
        else:
            assert name in backends, name


# --- flags -----------------------------------------------------------------------------------------------------------


def arguments(flags):
    """A command line with these flags, each once; the page's own value where it gives one."""
    line, seen = [], set()
    for flag in flags:
        name, *value = flag.split(" ")
        if name not in seen:
            seen.add(name)
            line += [name, *(value or VALUES.get(name, []))]
    return line


def test_every_flag_is_known(tmp_path):
    files = [
        "--model-path",
        "m",
        "--text-encoder",
        "t",
        "--vae",
        "v",
        "--image-path",
        "i.png",
        "--output-path",
        "o.png",
    ]
    rest = [flag for flag in FLAGS if flag.split(" ")[0] not in files]
    args = generate.parse([*arguments(rest), *files])
    assert args.prompt == "a red circle" and args.warmup_resolutions == ["64x64"]


def test_each_value_of_a_flag_is_taken():
    for flag in FLAGS:
        name, *value = flag.split(" ")
        if value:
            args = generate.parse(["--prompt", "x", name, *value])
            assert str(getattr(args, name[2:].replace("-", "_"))) == value[0]


def test_the_commands_of_the_pull_request_are_read():
    """Theirs needs only its own Hugging Face name replaced; ours is on the page."""
    commands = [shlex.split(text.replace("\\\n", " ")) for text in re.findall(r"```bash\n(.+?)```", PAGE, re.S)]
    theirs, ours = (command[command.index("--model-path") :] for command in commands)
    assert theirs[2:] == ours[2:], "the same flags with the same values"
    args = generate.parse(ours)
    assert (args.num_gpus, args.ulysses_degree, args.ring_degree, args.warmup_steps, args.vae_precision) == (
        8,
        8,
        1,
        2,
        "bf16",
    )
    assert args.enable_torch_compile and args.attention_backend == "aiter" and args.seed == 42


def draw(server, model_files, tmp_path, *flags):
    """Run generate.py on the session's server; returns the finished process."""
    photo = tmp_path / "photo.png"
    Image.linear_gradient("L").convert("RGB").resize((64, 64)).save(photo)
    files = {"--model-path": "diffusion_models", "--text-encoder": "text_encoders", "--vae": "vae"}
    chosen = [word for flag, folder in files.items() for word in (flag, model_files[folder][0].name)]
    command = [
        sys.executable,
        ROOT / "scripts" / "generate.py",
        *arguments(flags),
        *chosen,
        "--output-path",
        tmp_path / "out.png",
        "--server",
        server.url,
    ]
    command += [] if set(WARMS_UP) & set(flags) else ["--image-path", photo, "--reference-megapixels", "0.01"]
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=300)


GIVEN = ("--model-path", "--text-encoder", "--vae", "--image-path", "--output-path")
WARMS_UP = ("--warmup", "--warmup-steps", "--warmup-resolutions")


def test_all_flags_run_together(server, model_files, tmp_path):
    """Warming up is done apart: with a reference picture it would draw one of 1024 x 1024 on this CPU."""
    flags = [flag for flag in FLAGS if flag.split(" ")[0] not in (*GIVEN, *WARMS_UP, WANTS_A_GPU, COMPILES)]
    done = draw(server, model_files, tmp_path, *flags)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["backend"] == "sdpa" and summary["steps"] == 2 and summary["seed"] == 7
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.size == (64, 64)


def test_the_flags_that_warm_up_run(server, model_files, tmp_path):
    done = draw(server, model_files, tmp_path, "--prompt", "--width", "--height", "--num-inference-steps", *WARMS_UP)
    assert done.returncode == 0 and (tmp_path / "out.png").stat().st_size > 100, done.stderr


def test_a_flag_that_wants_a_gpu_runs_or_says_so(server, model_files, tmp_path):
    done = draw(server, model_files, tmp_path, "--prompt", "--width", "--height", "--num-inference-steps", WANTS_A_GPU)
    assert done.returncode == 0 or "cannot run here" in done.stderr, done.stderr


def test_the_flag_that_compiles_puts_its_node_into_the_graph():
    settings = generate.settings_from(generate.parse(["--prompt", "x", COMPILES]))
    assert "Flux2CompileBlocks" in {node["class_type"] for node in api_workflow.fill(settings).values()}
