"""The command lines (generate.py, demo.sh), the server's start and end, and the environment's self-check.

  bash scripts/test.sh -k test_scripts

generate.py runs as a child process against the session's server, and once with a server of its own; demo.sh runs end to
end. Not covered: the installation itself (minutes and gigabytes; CI does it by running test.sh), real weights, Ctrl-C
at a terminal.
"""

import asyncio
import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy
import numpy as np
import pytest
from PIL import Image

import api_workflow
import environment
from comfy_client import ComfyClient, ComfyError, TimedOut, refusal
from comfy_server import PACK, ROOT, ComfyServer, ServerFailed, fetch_json, free_port
from generate import INSTEAD, local_models, parse, settings_from
from picture import match
from server_fixture import SCRIPTS, run

SMALL = ["--width", "96", "--height", "64", "--num-inference-steps", "2", "--reference-megapixels", "0.01"]


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(numpy.arange(60 * 80 * 3, dtype=numpy.uint32).reshape(60, 80, 3).astype(numpy.uint8)).save(path)
    return path


def generate(*arguments, **environment_variables):
    """Runs generate.py; returns the finished process."""
    command = [sys.executable, SCRIPTS / "generate.py", "--prompt", "A red fox", *SMALL, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=600, env={**os.environ, **environment_variables}
    )


def on_server(server, model_files, *arguments):
    """generate.py on the session's server, with the small models given as local paths."""
    names = [str(model_files[folder][0]) for folder in ("diffusion_models", "text_encoders", "vae")]
    return generate(
        "--server", server.url, "--model-path", names[0], "--text-encoder", names[1], "--vae", names[2], *arguments
    )


def sentence(process):
    """The one line on stderr of a refused command, after the progress bar if there was one."""
    assert process.returncode != 0 and "Traceback" not in process.stderr and not process.stdout
    last = process.stderr.strip().splitlines()[-1].split("\r")[-1]
    assert last.startswith("generate: ")
    return last


# --- generate.py -----------------------------------------------------------------------------------------------------


def test_generate_draws_on_a_running_server(server, model_files, tmp_path):
    target = tmp_path / "fox.png"
    done = on_server(server, model_files, "--output-path", target, "--attention-backend", "sdpa-math")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["image"] == str(target) and summary["backend"] == "sdpa-math" and summary["calls"] == 12
    assert summary["seconds_per_step"] > 0 and "2/2" in done.stderr
    with Image.open(target) as image:
        assert (image.format, image.size) == ("PNG", (96, 64))


def test_generate_edits_two_references_into_a_folder_of_pictures(server, model_files, tmp_path, photo):
    done = on_server(
        server, model_files, "--image-path", photo, "--image-path", photo, "--output-path", tmp_path / "new"
    )
    assert done.returncode == 0, done.stderr
    (picture,) = (tmp_path / "new").glob("*.png")
    assert json.loads(done.stdout.splitlines()[-1])["image"] == str(picture)


def test_generate_converts_to_the_format_of_the_name(server, model_files, tmp_path):
    assert on_server(server, model_files, "--output-path", tmp_path / "fox.jpg").returncode == 0
    with Image.open(tmp_path / "fox.jpg") as image:
        assert image.format == "JPEG"


def inputs_of(*flags):
    """What these flags put into the loader nodes of the workflow: {folder: inputs}."""
    settings = settings_from(parse(["--prompt", "A red fox", *flags]))
    workflow = api_workflow.fill(settings)
    return {
        folder: api_workflow.nodes_of(workflow, node)[0]["inputs"] for folder, (node, _) in api_workflow.LOADERS.items()
    }


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", {}),
        (
            "--dit-cpu-offload True --text-encoder-cpu-offload --vae-cpu-offload false",
            {"diffusion_models": "CPU when idle", "text_encoders": "CPU when idle", "vae": "keep on GPU"},
        ),
        ("--dit-layerwise-offload True --dit-cpu-offload True", {"diffusion_models": "layer by layer"}),
        ("--dit-layerwise-offload False", {}),
        ("--dit-layerwise-offload False --dit-cpu-offload False", {"diffusion_models": "keep on GPU"}),
        ("--image-encoder-cpu-offload True", {"vae": "CPU when idle"}),
        ("--image-encoder-cpu-offload True --vae-cpu-offload False", {"vae": "keep on GPU"}),
    ],
)
def test_offload_flags_set_the_memory_of_the_loaders(flags, expected):
    assert {
        folder: inputs["memory"] for folder, inputs in inputs_of(*flags.split()).items() if "memory" in inputs
    } == expected


def test_vae_precision_and_a_wrong_truth():
    assert (
        inputs_of("--vae-precision", "bf16")["vae"]["precision"] == "bf16" and inputs_of()["vae"]["precision"] == "auto"
    )
    done = generate("--vae-cpu-offload", "maybe")
    assert done.returncode == 2 and "must be True or False, not 'maybe'" in done.stderr


def test_generate_draws_in_every_memory_mode(server, model_files, tmp_path):
    done = on_server(
        server,
        model_files,
        "--dit-layerwise-offload",
        "True",
        "--text-encoder-cpu-offload",
        "--vae-cpu-offload",
        "False",
        "--vae-precision",
        "fp32",
        "--output-path",
        tmp_path / "fox.png",
    )
    assert done.returncode == 0, done.stderr


def test_generate_starts_and_stops_a_server_of_its_own(model_files, tmp_path):
    flags = {"--model-path": "diffusion_models", "--text-encoder": "text_encoders", "--vae": "vae"}
    arguments = [word for flag, folder in flags.items() for word in (flag, model_files[folder][0])]
    done = generate(*arguments, "--output-path", tmp_path / "fox.png", TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "fox.png").is_file() and list(tmp_path.glob("flux2-comfyui-*")) == []


def test_generate_says_that_no_server_answers():
    said = sentence(generate("--server", f"http://127.0.0.1:{free_port()}"))
    assert "No ComfyUI server answers at http://127.0.0.1" in said


@pytest.fixture
def other_server():
    """A web server that is no ComfyUI."""

    class Quiet(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"hello")

        def log_message(self, *_):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()


def test_generate_says_that_the_server_is_not_comfyui(other_server):
    assert "not like a ComfyUI server" in sentence(generate("--server", other_server))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--width", "1000"], "The width must be a multiple of 16 from 16 to 16384, not 1000; the nearest is 992"),
        (["--height", "0"], "The height must be"),
        (["--num-inference-steps", "0"], "The number of steps must lie between 1 and 4096, not 0"),
        (["--seed", "-1"], "The seed must lie between 0"),
        (["--guidance-scale", "nan"], "The guidance scale must lie between 0 and 100, not nan"),
        (["--image-path", "nowhere.png"], "There is no reference image nowhere.png"),
        (["--image-path", __file__], "cannot be read as a picture"),
        (["--output-path", f"{__file__}/fox.png"], "cannot be written to"),
        (["--model-path", "nowhere.safetensors"], "There is no model file nowhere.safetensors"),
    ],
)
def test_generate_refuses_before_it_starts_anything(arguments, words, tmp_path):
    begun = time.monotonic()
    said = sentence(generate("--output-path", tmp_path, *arguments))
    assert words in said and "Starting" not in said and time.monotonic() - begun < 30
    assert list(tmp_path.iterdir()) == []


def test_generate_answers_flags_that_only_sglang_has_with_what_to_do(capsys):
    """Those of public commands; the page coming-from.md has the same rows."""
    with pytest.raises(SystemExit):
        parse("--prompt a --save-output --output-file-name x.png --tp-size=2 --lora-path b --promt c".split())
    said = capsys.readouterr().err
    for flag, words in (
        ("--save-output", "The image is always saved"),
        ("--output-file-name", "Name the file with --output-path"),
        ("--tp-size", "Use --num-gpus"),
        ("--lora-path", "Put the node Load FLUX.2 LoRA"),
        ("--promt", "--help lists all"),
    ):
        assert f"{flag} is not a flag of this program. {words}" in said
    page = (ROOT / "docs" / "coming-from.md").read_text().split("## SGLang")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`--[^|]+) \| - \|", page, re.M)
    named = {flag.split()[0] for row in rows for flag in re.findall(r"`(--[^`]+)`", row)}
    assert named and named <= set(INSTEAD), "what the page says is not here is answered"


def test_generate_has_help_for_every_flag(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = capsys.readouterr().out
    flags = set(re.findall(r"^  (--[\w-]+)", text, re.M))
    helped = set(re.findall(r"^  (--[\w-]+)[^\n]*(?:  [a-zA-Z].*|\n {20,}\S.*)$", text, re.M))
    assert len(flags) > 25 and flags == helped and "examples:" in text


def test_generate_lists_what_the_server_has(server):
    said = sentence(generate("--server", server.url, "--model-path", "other.safetensors"))
    assert "has no other.safetensors in models/diffusion_models" in said and "flux2-small.safetensors" in said


def test_generate_lists_the_backends(server, model_files):
    said = sentence(on_server(server, model_files, "--attention-backend", "flash9"))
    assert "Unknown attention backend 'flash9'" in said and "sdpa-math" in said


def test_generate_passes_on_why_a_backend_refuses(server, model_files, tmp_path):
    done = on_server(server, model_files, "--attention-backend", "flash4", "--output-path", tmp_path)
    assert done.returncode == 1 and not done.stdout and "Traceback" not in done.stderr
    assert (
        "generate: " in done.stderr
        and "flash4" in done.stderr.split("generate: ")[1]
        and list(tmp_path.iterdir()) == []
    )


def test_names_are_matched_by_base_name_unless_ambiguous():
    available = ["a.safetensors", "flux/b.safetensors", "old/c.safetensors", "new\\c.safetensors"]
    assert match("somewhere/b.safetensors", available, "vae", "URL") == "flux/b.safetensors"
    assert match("a.safetensors", available, "vae", "URL") == "a.safetensors"
    with pytest.raises(ComfyError, match="several places of models/vae at URL: old/c.safetensors, new"):
        match("c.safetensors", available, "vae", "URL")


def test_local_models_are_paths_model_folders_or_names_in_comfyui(tmp_path):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text("{}")
    for file in ("models/clip/mistral.safetensors", "vae.safetensors"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    wanted = {
        "diffusion_models": tmp_path / "transformer",
        "text_encoders": "mistral.safetensors",
        "vae": tmp_path / "vae.safetensors",
    }
    found = local_models(tmp_path, {folder: str(name) for folder, name in wanted.items()})
    assert [str(files[0].relative_to(tmp_path)) for files in found.values()] == [
        "transformer",
        "models/clip/mistral.safetensors",
        "vae.safetensors",
    ]


# --- the workflow filler and the client ------------------------------------------------------------------------------


def test_references_are_chained():
    workflow = api_workflow.fill(api_workflow.PictureSettings("x", references=("a.png", "b.png", "c.png")))
    conditioning, images = api_workflow.nodes_of(workflow, "BasicGuider")[0]["inputs"]["conditioning"], []
    while workflow[conditioning[0]]["class_type"] == "ReferenceLatent":
        use = workflow[conditioning[0]]["inputs"]
        scale = workflow[workflow[use["latent"][0]]["inputs"]["pixels"][0]]
        images.append(workflow[scale["inputs"]["image"][0]]["inputs"]["image"])
        conditioning = use["conditioning"]
    assert images == ["c.png", "b.png", "a.png"] and workflow[conditioning[0]]["class_type"] == "FluxGuidance"


def test_a_refusal_names_title_input_and_problem():
    problem = {
        "message": "Value not in list",
        "details": "backend: 'x' not in ['auto']",
        "extra_info": {"input_name": "backend"},
    }
    workflow = {"4": {"class_type": "Flux2SelectAttention", "_meta": {"title": "Select Attention"}}}
    text = refusal({"error": {"message": "failed"}, "node_errors": {"4": {"errors": [problem]}}}, workflow)
    assert text == (
        'ComfyUI refused the workflow. "Select Attention" (Flux2SelectAttention), input backend: '
        "Value not in list: backend: 'x' not in ['auto']"
    )


def test_a_job_that_takes_too_long_is_cancelled(server, model_files):
    names = {folder: files[0].name for folder, files in model_files.items()}
    workflow = api_workflow.fill(api_workflow.PictureSettings("slow", 256, 256, steps=2000, models=names))
    with pytest.raises(TimedOut, match="did not finish within 5 seconds"):
        run(server, workflow, seconds_to_run=5)
    deadline = time.monotonic() + 30
    while any((fetch_json(f"{server.url}/queue") or {"": "no answer"}).values()):
        assert time.monotonic() < deadline, "the job is still on the server"
        time.sleep(0.2)


def test_a_job_that_is_cancelled_while_the_server_takes_it_is_removed(monkeypatch):
    removed = []

    async def queue(self, workflow):
        await asyncio.sleep(0.3)
        return "the job"

    async def cancel(self, prompt_id):
        removed.append(prompt_id)

    monkeypatch.setattr(ComfyClient, "queue", queue)
    monkeypatch.setattr(ComfyClient, "cancel", cancel)
    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(asyncio.wait_for(ComfyClient("127.0.0.1:1")._queued({}), 0.05))
    assert removed == ["the job"]


# --- the server's start and end --------------------------------------------------------------------------------------


def gone(pid, seconds=60):
    """Whether the process ends within that time. A zombie has ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.1)
    return False


def test_a_server_that_crashes_is_reported_with_its_log(comfyui):
    server = ComfyServer(comfyui, arguments=["--cpu", "--no-such-option"])
    with pytest.raises(ServerFailed, match="ended with status 2 while starting(.|\n)*--no-such-option"), server:
        pass
    assert not server.base.exists()


def test_a_server_that_is_not_ready_in_time_is_stopped(comfyui):
    server = ComfyServer(comfyui, arguments=["--cpu"], seconds_to_start=1)
    with pytest.raises(ServerFailed, match="was not ready after 1 seconds"), server:
        pass
    assert server.process is None and not server.base.exists()


def test_two_models_of_one_name_are_refused(comfyui, tmp_path):
    files = [tmp_path / part / "same.safetensors" for part in "ab"]
    with (
        pytest.raises(ServerFailed, match="both called same.safetensors"),
        ComfyServer(comfyui, models={"vae": files}, arguments=["--cpu"]),
    ):
        pass


CHILD = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job, and all below it, starts with \
SIGINT ignored
sys.path.insert(0, sys.argv[1])
from comfy_server import ComfyServer
with ComfyServer(sys.argv[2], arguments=["--cpu"], base=sys.argv[3]) as server:
    print(server.process.pid, flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["interrupted", "killed"])
def test_the_server_ends_with_the_program_that_started_it(comfyui, tmp_path, how):
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, SCRIPTS, comfyui, tmp_path],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    pid = int(child.stdout.readline())
    child.send_signal(how)
    child.wait(timeout=120)
    child.stdout.close()
    assert gone(pid)


def test_the_server_writes_nothing_into_comfyui(server, model_files, comfyui):
    """Bytecode apart, which goes into our own copy and never into a ComfyUI of the user."""
    run(
        server,
        api_workflow.fill(
            api_workflow.PictureSettings("fox", 64, 64, steps=1, models={k: v[0].name for k, v in model_files.items()})
        ),
    )
    started = (server.base / "custom_nodes" / PACK).lstat().st_mtime
    written = [
        file
        for file in comfyui.rglob("*")
        if file.is_file() and file.stat().st_mtime > started and "__pycache__" not in (file.name, *file.parts)
    ]
    assert written == [] and (server.base / "user" / "comfyui.db").is_file()


# --- demo.sh ---------------------------------------------------------------------------------------------------------


def test_demo_runs_end_to_end(tmp_path, comfyui):
    command = ["bash", SCRIPTS / "demo.sh", "--output-path", tmp_path / "output", "--attention-backend", "sdpa"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=900, env={**os.environ, "TMPDIR": str(tmp_path)}
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["backend"] == "sdpa" and summary["calls"] == 2 * 20 * 6 and summary["seconds"] > 0
    assert [Path(image).name for image in summary["images"]] == ["flux2-text-to-image.png", "flux2-image-edit.png"]
    for image in summary["images"]:
        with Image.open(image) as picture:
            assert picture.size == (256, 256)
    drawn = np.asarray(Image.open(summary["images"][0]).convert("RGB")).astype(int)
    red, green, blue = (drawn[..., i] for i in range(3))
    star, circle = ((red > 150) & (green < 90) & (blue < 90)).nonzero(), ((blue > 150) & (red < 90)).nonzero()
    assert 300 < len(star[0]) < len(circle[0]) and star[0].mean() < circle[0].mean(), (
        "a small red star above a large blue circle"
    )
    assert "attention backend sdpa, 120 calls" in done.stdout and list(tmp_path.glob("flux2-comfyui-*")) == []


def test_demo_wants_all_three_real_files_or_none():
    done = subprocess.run(
        [sys.executable, SCRIPTS / "demo.py", "--model", "flux2.safetensors"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1 and "go together" in done.stderr and "Traceback" not in done.stderr


# --- environment.py --------------------------------------------------------------------------------------------------


@pytest.fixture
def venv(tmp_path):
    """A folder that looks like a finished environment with nothing to ask of it."""
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "python").symlink_to(sys.executable)
    marker(tmp_path / "venv", imports=["json"], packages={})
    return tmp_path / "venv"


def marker(venv, imports, packages):
    (venv / environment.MARKER).write_text(json.dumps({"imports": imports, "packages": packages}))


def test_a_sound_environment_has_no_problem(venv):
    assert environment.problem(venv) is None


def test_a_missing_or_unfinished_environment_is_seen(venv, tmp_path):
    assert environment.problem(tmp_path / "other") == "it is not there"
    (venv / environment.MARKER).unlink()
    assert environment.problem(venv) == "its installation was interrupted"


def test_a_lost_module_or_changed_package_is_seen(venv):
    marker(venv, imports=["json", "flux2_no_such_module"], packages={"flux2-no-such-package": "1.0"})
    assert environment.problem(venv) == "missing or changed: flux2_no_such_module, flux2-no-such-package 1.0"


def test_a_python_that_does_not_start_is_seen(venv):
    python = venv / "bin" / "python"
    python.unlink()
    assert "its python does not start" in environment.problem(venv)
    python.write_text("#!/bin/sh\necho broken >&2\nexit 1\n")
    python.chmod(0o755)
    assert "its python fails" in environment.problem(venv)


def test_a_half_unpacked_comfyui_is_unpacked_again(tmp_path, monkeypatch):
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    half = tmp_path / f"ComfyUI-{environment.COMFYUI_VERSION}-{environment.COMFYUI_SHA256[:8]}"
    (half / "leftover").mkdir(parents=True)
    unpacked = []
    monkeypatch.setattr(environment, "unpack_comfyui", lambda target: (unpacked.append(target), target.mkdir()))
    assert environment.comfyui(tmp_path) == environment.comfyui(tmp_path) == half
    assert unpacked == [half] and not (half / "leftover").exists()


def test_a_comfyui_path_that_is_none_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="is not a ComfyUI checkout: comfy/sd.py is missing"):
        environment.comfyui(tmp_path)


def test_an_old_python_is_refused(monkeypatch):
    monkeypatch.setattr(environment.sys, "version_info", (3, 9, 2))
    with pytest.raises(SystemExit, match="Python 3.10 or newer is needed"):
        environment.require_python()


def test_a_venv_folder_of_the_user_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    (tmp_path / ".venv").mkdir()
    with pytest.raises(SystemExit, match="is a folder of your own"):
        environment.link(tmp_path / "elsewhere")
    (tmp_path / ".venv").rmdir()
    environment.link(tmp_path / "elsewhere")
    assert (tmp_path / ".venv").readlink() == tmp_path / "elsewhere"


def test_an_unusable_python_of_the_user_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("FLUX2_PYTHON", str(tmp_path / "no-python"))
    monkeypatch.setattr(environment, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(environment, "comfyui", lambda cache: tmp_path)
    with pytest.raises(SystemExit, match="is not a program that can be run"):
        environment.prepare()
