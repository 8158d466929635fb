"""Every backend on this machine: whether it can run here, why not, and what to type to get it. As data, and as text for
a bug report.

Asking imports the libraries of the backends that fit the hardware, once per process; nothing runs on the GPU until
`test_all` is called.
"""

import platform
import re

import torch

from .. import registry
from ..call import Hardware, cards
from ..device import PLATFORM_NAMES, describe

HERE, MISSING, ELSEWHERE = "runs here", "to install", "other hardware"
GROUPS = {HERE: "here", MISSING: "not installed", ELSEWHERE: "other hardware"}
PIP = re.compile(r": (\S.* -m pip install .+)$")
HEAD_DIM = 128  # of FLUX.2
SHORT_NAMES = {"nvidia": "NVIDIA", "amd": "AMD", "cpu": "CPU", "apple": "Apple", "intel": "Intel"}


def list_backends(device):
    """{"machine", "backends", "choices"} for a torch.device.

    backends: one dict per row of the registry (see `entry`), those that run here first. choices: one dict per entry of
    a backend combo, in the order in which to offer them: `auto`, `comfyui`, then the backends as above; each with
      backend       the slug, the combo's value
      group         "here", "not installed" or "other hardware": `auto` and `comfyui` are always "here"
      marks         what to say behind the slug, a list of "not installed", "needs NVIDIA", "needs MI350X or MI355X"
                    (or other hardware), "approximate" and "experimental" (no author of this pack has run it on its
                    hardware)
      label_suffix  the marks in one text, "" where there is nothing to say: "needs AMD \u00b7 approximate"
      reason        the first sentence why it cannot run here, or ""
    """
    about = describe(device)
    rows = sorted(
        (entry(slug, about) for slug in registry.ROWS),
        key=lambda row: (HERE, MISSING, ELSEWHERE).index(row["state"]),
    )
    always = [choice(slug, "here", [], "") for slug in (registry.AUTO, registry.COMFYUI)]
    choices = always + [choice(r["backend"], r["group"], r["marks"], "".join(r["reasons"][:1])) for r in rows]
    return {"machine": machine(device), "backends": rows, "choices": choices}


def choice(slug, group, marks, reason):
    return {
        "backend": slug,
        "group": group,
        "marks": marks,
        "label_suffix": " \u00b7 ".join(marks),
        "reason": reason,
    }


def marks_of(slug, state, device):
    """What a combo says behind a slug: why it does not run here, and what to know before choosing it."""
    row = registry.row(slug)
    found = ["not installed"] if state == MISSING else []
    found += [f"needs {needed(row.hardware, device)}"] if state == ELSEWHERE else []
    found += [] if row.exact else ["approximate"]
    return found + (["experimental"] if registry.experimental(slug) else [])


def needed(hardware, device):
    """The hardware that is missing, short: the platforms, or on the right platform the architectures."""
    if device.platform in hardware.archs:
        return " or ".join(cards(hardware.archs[device.platform]))
    return " or ".join(SHORT_NAMES.get(name, name) for name in hardware.archs)


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
        "cards": cards_text(row.hardware),
        "state": state,
        "group": GROUPS[state],
        "marks": marks_of(slug, state, device),
        "reasons": reasons,
        "version": "" if reasons else registry.adapter(slug, device).version(),
        "install": registry.how_to_get(slug, device) if state == MISSING else "",
        "command": pip_command(registry.how_to_get(slug, device)) if state == MISSING else "",
    }


def hardware_text(hardware):
    """ "NVIDIA sm8x, sm9x; AMD gfx942"; "any" for all platforms."""
    if hardware.anywhere:
        return "any"
    return "; ".join(
        " ".join([SHORT_NAMES.get(name, name), ", ".join(archs)]).strip() for name, archs in hardware.archs.items()
    )


def cards_text(hardware):
    """The same by the names of cards: "NVIDIA H100, H200; AMD MI300, MI325X"."""
    return hardware_text(
        Hardware({name: cards(archs) for name, archs in hardware.archs.items()}, "", hardware.anywhere)
    )


def pip_command(install):
    """The pip command of an install sentence (registry.how_to_get), ready to paste; "" where there is none."""
    found = PIP.search(install)
    return found[1] if found else ""


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
