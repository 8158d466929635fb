"""Whether this machine can compile for torch.compile, and where what it compiled is kept. Looks for tools, compiles
nothing.
"""

import logging
import os
import shutil
import sysconfig
import tempfile

import torch

from ...attention.errors import first_line

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
log = logging.getLogger(__name__)


def unavailable(device):
    """Why torch.compile cannot work on a torch.device, as a sentence; None when it can."""
    if not hasattr(torch, "compile"):
        return "this PyTorch has no torch.compile."
    reasons = _no_triton(device) if device.type != "cpu" else _no_cpp()
    return reasons or _no_headers()


def _no_triton(device):
    from torch.utils._triton import has_triton, has_triton_package

    if not has_triton_package():
        return (
            "Triton is not installed, and torch.compile writes its GPU kernels in it. Install it: pip install "
            "triton (triton-windows on Windows)."
        )
    if not has_triton():
        return f"this Triton does not support the device {device} ({_name(device)})."
    if os.name != "nt" and not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return (
            "there is no C compiler, and Triton needs one to start its kernels. "
            "Install gcc (Debian, Ubuntu: apt install build-essential), or name one in CC."
        )
    return None


def _name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _no_cpp():
    from torch._inductor import cpp_builder

    try:
        cpp_builder.get_cpp_compiler()
    except Exception as error:  # torch has a class of its own for this, and other names for it in other versions
        return (
            f"there is no C++ compiler that torch.compile can use on a CPU ({first_line(error)}). Install g++, or name "
            "one in CXX."
        )
    return None


def _no_headers():
    """Both compilers include Python.h."""
    folder = sysconfig.get_paths()["include"]
    if os.name == "nt" or os.path.isfile(os.path.join(folder, "Python.h")):
        return None
    return (
        f"Python's headers are not installed ({folder} has no Python.h). Install them (Debian, Ubuntu: apt install "
        "python3-dev)."
    )


def keep_on_disk(folder):
    """Let torch keep what it compiles in `folder`, unless the user chose a place or it cannot be written; returns the
    place. Concerns all compiling in this process.
    """
    from torch._inductor.runtime import cache_dir_utils

    chosen = os.environ.get(CACHE_VARIABLE)
    # torch writes its default, a temporary folder, into the variable too
    if not chosen or chosen == cache_dir_utils.default_cache_dir():
        try:
            os.makedirs(folder, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                os.environ[CACHE_VARIABLE] = str(folder)
        except OSError as error:
            log.warning("Compiled code is not kept: %s cannot be written (%s).", folder, error)
    return place()


def place():
    """The folder in which torch keeps what it compiles, as far as it has been decided."""
    return os.environ.get(CACHE_VARIABLE) or "torch's temporary folder"
