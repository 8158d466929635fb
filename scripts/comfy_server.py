"""Run one headless ComfyUI with this pack, for as long as a `with` block lasts.

  with ComfyServer(comfyui, models={"vae": [file]}) as server:
      ... server.url, server.base / "output", server.log_tail()

The server gets a folder of its own (models as links, input, output, user, database, log), so neither the ComfyUI
checkout nor the user's own ComfyUI data is read or written, and no other custom node is loaded. It listens on a free
port of the loopback address. It is stopped when the block ends, also by an exception or Ctrl-C, and dies with this
process if that is killed (Linux only). Standard library alone. Not covered: Windows; and start it from a thread that
lives as long as the server (Linux ties it to that thread).
"""

import contextlib
import ctypes
import functools
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import environment

ROOT = Path(__file__).resolve().parent.parent
PACK = "flux2-attention"
MODEL_FOLDERS = ("diffusion_models", "text_encoders", "vae")
READY_NODE = "Flux2SelectAttention"  # the pack is loaded when the server knows this node
SECONDS_TO_START, SECONDS_TO_STOP = 300, 10
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
PR_SET_PDEATHSIG = 1
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy must not see loopback addresses


class ServerFailed(Exception):
    """ComfyUI did not start; the text says why and ends with the last lines of its log."""


class ComfyServer:
    """One ComfyUI process and its folder. Use as a context manager.

    comfyui: the ComfyUI folder. models: {folder under models/: [files]}, linked by their base names. arguments: further
    options of ComfyUI's main.py. base: an empty folder to use and keep; by default a temporary one that is removed.
    """

    def __init__(
        self, comfyui, *, python=sys.executable, models=None, arguments=(), base=None, seconds_to_start=SECONDS_TO_START
    ):
        self.comfyui, self.python, self.models = Path(comfyui), str(python), models or {}
        self.arguments, self.seconds_to_start = list(arguments), seconds_to_start
        self.keep, self.base = base is not None, Path(base).resolve() if base else None
        self.process = self.url = None

    def __enter__(self):
        try:
            self.base = self.base or Path(tempfile.mkdtemp(prefix="flux2-comfyui-"))
            lay_out(self.base, self.models)
            self._start()
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_):
        self.stop()

    @property
    def log(self):
        return self.base / "comfyui.log"

    def log_tail(self, lines=25):
        if not self.log.is_file():
            return ""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def _start(self):
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                self._command(port),
                cwd=self.base,
                env=child_environment(self.comfyui),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )

    def _command(self, port):
        """cwd is the base folder because ComfyUI writes comfyui_detail.log where it is started."""
        processor = [] if has_gpu(self.python) or "--cpu" in self.arguments else ["--cpu"]
        return [
            self.python,
            str(self.comfyui / "main.py"),
            "--listen",
            "127.0.0.1",
            "--port",
            str(port),
            "--base-directory",
            str(self.base),
            "--database-url",
            f"sqlite:///{self.base / 'user' / 'comfyui.db'}",
            "--disable-auto-launch",
            "--disable-api-nodes",
            "--disable-all-custom-nodes",
            "--whitelist-custom-nodes",
            PACK,
            *processor,
            *self.arguments,
        ]

    def _wait_until_ready(self):
        deadline = time.monotonic() + self.seconds_to_start
        while (nodes := fetch_json(f"{self.url}/object_info/{READY_NODE}")) is None:
            if self.process.poll() is not None:
                raise ServerFailed(
                    f"ComfyUI ended with status {self.process.returncode} while starting. The end of its "
                    f"log:\n{self.log_tail()}"
                )
            if time.monotonic() > deadline:
                raise ServerFailed(
                    f"ComfyUI was not ready after {self.seconds_to_start} seconds. The end of its "
                    f"log:\n{self.log_tail()}"
                )
            time.sleep(0.2)
        if READY_NODE not in nodes:
            raise ServerFailed(
                f"ComfyUI started but did not load the pack (no node {READY_NODE}). The end of its "
                f"log:\n{self.log_tail(60)}"
            )

    def stop(self):
        """Terminate, then kill, the server and everything it started; remove the temporary folder. Safe to call
        twice.
        """
        if self.process:
            end(self.process)
            self.process = None
        if self.base and not self.keep:
            shutil.rmtree(self.base, ignore_errors=True)


def end(process):
    """The process is the leader of its own group, so the group holds whatever it started."""
    try:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(SECONDS_TO_STOP)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def lay_out(base, models):
    """The folders of a ComfyUI, the pack and the model files as links."""
    for name in (
        "custom_nodes",
        "input",
        "output",
        "user",
        *(f"models/{folder}" for folder in (*MODEL_FOLDERS, *models)),
    ):
        (base / name).mkdir(parents=True, exist_ok=True)
    link(base / "custom_nodes" / PACK, ROOT)
    for folder, files in models.items():
        for file in files:
            link(base / "models" / folder / Path(file).name, Path(file).resolve())


def link(name, target):
    if name.is_symlink() and name.resolve() != target:
        raise ServerFailed(f"two model files are both called {name.name}; rename one of them.")
    if not name.is_symlink():
        name.symlink_to(target)


def child_environment(comfyui):
    """A ComfyUI that is not in our own cache belongs to the user: not even bytecode is written there.

    Threads that wait sleep instead of spinning: on two busy cores that halves the time of the demo (23 s against 41 s).
    """
    own = (comfyui / environment.MARKER).is_file()
    return {
        "OMP_WAIT_POLICY": "PASSIVE",
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        **({} if own else {"PYTHONDONTWRITEBYTECODE": "1"}),
    }


def die_with_parent():
    if LIBC:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def free_port():
    """A port that nobody listens on, outside those that systems give to outgoing connections: ComfyUI takes it seconds
    later.
    """
    for port in random.sample(range(20000, 32000), 200):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise ServerFailed("No free port was found between 20000 and 32000.")


def fetch_json(url):
    """The JSON answer, or None as long as nothing answers there."""
    try:
        with DIRECT.open(url, timeout=10) as answer:
            return json.load(answer)
    except (OSError, ValueError):  # URLError is an OSError
        return None


@functools.cache
def has_gpu(python):
    """Whether that python's torch sees a GPU (CUDA or ROCm). Asked in a child because torch may be missing or broken
    here.
    """
    probe = subprocess.run(
        [python, "-c", "import torch; print(torch.cuda.is_available())"], capture_output=True, text=True
    )
    if probe.returncode:
        raise ServerFailed(f"{python} cannot import torch: {(probe.stderr.strip().splitlines() or ['no message'])[-1]}")
    return probe.stdout.strip() == "True"


def drawing_models():
    """The small FLUX.2 that was trained to draw coloured shapes (docs/small-model.md). Returns {folder under models/:
    [file]}.
    """
    folder = ROOT / "tests" / "data" / "small_flux2"
    if not folder.is_dir():
        raise ServerFailed(
            "the small drawing model is not in this copy of the pack: the archive of the Comfy Registry leaves it out. "
            "Run this in a git clone of the repository, or name real weights."
        )
    names = {"diffusion_models": "flux2-small", "text_encoders": "mistral3-flux2-small", "vae": "flux2-vae-small"}
    return {kind: [folder / f"{name}.safetensors"] for kind, name in names.items()}


def small_models(comfyui, python=sys.executable):
    """The small FLUX.2 models, made once per version of the script that makes them and shared by all checkouts.

    Returns {folder under models/: [file]}.
    """
    script = ROOT / "tests" / "small_models.py"
    folder = environment.cache_folder() / f"small-models-{hashlib.sha256(script.read_bytes()).hexdigest()[:12]}"
    made = subprocess.run(
        [python, script, folder], stdout=subprocess.DEVNULL, env={**os.environ, "COMFYUI_PATH": str(comfyui)}
    )
    if made.returncode:
        raise ServerFailed("making the small models failed; the lines above say why.")
    return {kind: sorted((folder / kind).glob("*.safetensors")) for kind in MODEL_FOLDERS}
