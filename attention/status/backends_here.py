"""Every backend on this machine: whether it can run here, why not, and what to type to get it. As data, and as text for
a bug report.

Asking imports the libraries of the backends that fit the hardware, once per process; nothing runs on the GPU until
`test_all` is called.
"""

import platform
import re
import sys

import torch

from .. import registry
from ..device import PLATFORM_NAMES, describe

HERE, MISSING, ELSEWHERE = "runs here", "to install", "other hardware"
PIP = re.compile(r": pip install (.+)$")
HEAD_DIM = 128  # of FLUX.2
SHORT_NAMES = {"nvidia": "NVIDIA", "amd": "AMD", "cpu": "CPU", "apple": "Apple", "intel": "Intel"}


def list_backends(device):
    """{"machine", "backends"} for a torch.device. backends: one dict per row of the registry, those that run here
    first.
    """
    rows = [entry(slug, describe(device)) for slug in registry.ROWS]
    return {
        "machine": machine(device),
        "backends": sorted(rows, key=lambda row: (HERE, MISSING, ELSEWHERE).index(row["state"])),
    }


def machine(device):
    """What decides which backend can be installed: {name: text}, for people."""
    about = describe(device)
    built_for = (
        f"ROCm {torch.version.hip}"
        if torch.version.hip
        else f"CUDA {torch.version.cuda}"
        if torch.version.cuda
        else "CPU only"
    )
    name = (
        PLATFORM_NAMES.get(about.platform, about.platform).split(" ", 1)[-1] if about.name == about.arch else about.name
    )
    return {
        "device": f"{name} ({about.arch})",
        "PyTorch": f"{torch.__version__} ({built_for})",
        "Python": platform.python_version(),
        "system": platform.platform(),
    }


def entry(slug, device):
    """One backend on an attention.device.Device: slug, what it is, state, reasons (sentences), and how to get it where
    that would help.
    """
    row = registry.row(slug)
    unfit = row.hardware.reasons(device)
    reasons = unfit or registry.unavailable(slug, device)  # a library that could not run here is not imported either
    state = ELSEWHERE if unfit else MISSING if reasons else HERE
    return {
        "backend": slug,
        "library": row.library,
        "summary": row.summary,
        "exact": row.exact,
        "experimental": registry.experimental(slug),
        "hardware": hardware_text(row.hardware),
        "state": state,
        "reasons": reasons,
        "version": "" if reasons else registry.adapter(slug, device).version(),
        "install": row.install if state == MISSING else "",
        "command": pip_command(row.install) if state == MISSING else "",
    }


def hardware_text(hardware):
    """ "NVIDIA sm8x, sm9x; AMD gfx942"; "any" for all platforms."""
    if set(hardware.archs) >= set(PLATFORM_NAMES):
        return "any"
    return "; ".join(
        " ".join([SHORT_NAMES.get(name, name), ", ".join(archs)]).strip() for name, archs in hardware.archs.items()
    )


def pip_command(install):
    """The pip command of an install sentence for the Python that runs this, ready to paste; "" where there is none.

    A portable ComfyUI has a Python of its own, and a bare `pip` would install into another one.
    """
    found = PIP.search(install)
    python = f'"{sys.executable}"' if " " in sys.executable else sys.executable
    return f"{python} -m pip install {found[1]}" if found else ""


def test_all(device):
    """`list_backends` after one small call of each backend that runs here, against float32: {slug: reasons} under
    "tested". Takes seconds, or minutes where a library compiles its kernel first. Results are not remembered: a card
    that was busy is no verdict.
    """
    found = list_backends(device)
    dtype = torch.float32 if describe(device).platform == "cpu" else torch.bfloat16
    usable = [row["backend"] for row in found["backends"] if row["state"] == HERE]
    return {**found, "tested": {slug: registry.test_call(slug, device, dtype, HEAD_DIM) for slug in usable}}


def as_text(found):
    """The same for a bug report."""
    lines = [f"{name}: {value}" for name, value in found["machine"].items()] + [""]
    tested = found.get("tested", {})
    for row in found["backends"]:
        says = " ".join(row["reasons"] or tested.get(row["backend"], [])) or row["version"]
        says = f"{'experimental; ' if row['experimental'] else ''}{says}"
        passed = " (test call passed)" if row["backend"] in tested and not tested[row["backend"]] else ""
        lines.append(f"{row['backend']:<18}{row['state']:<16}{says}{passed}")
    return "\n".join(lines)
