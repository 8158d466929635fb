"""What a rank is: versions that have to be equal on every rank, and the name of its device."""

import functools
import hashlib
import platform
from pathlib import Path
import time

import torch

from ....attention.errors import UserError

PACK = Path(__file__).resolve().parents[3]
IMPORTED = time.time()


def versions():
    """{what: version}: those that decide whether ranks can exchange data and compute the same."""
    found = {"PyTorch": torch.__version__, "ComfyUI": comfyui_version(), "Flux 2 Attention": running_digest()}
    if torch.cuda.is_available():
        found["RCCL" if torch.version.hip else "NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def pack_digest(pack=PACK):
    """Eight digits that change with the code that the ranks have to have in common: all that takes part in a forward
    pass.
    """
    code = hashlib.sha256()
    for file in files_that_compute(pack):
        code.update(file.relative_to(pack).as_posix().encode() + file.read_bytes())
    return code.hexdigest()[:8]


def files_that_compute(pack=PACK):
    return sorted(file for folder in ("attention", "flux2") for file in (pack / folder).rglob("*.py"))


@functools.cache
def running_digest():
    """pack_digest of the code that this process runs, taken when it is first asked for: files may be updated later, and
    a worker reads them when it starts. ValueError when they were updated before that, since this process read them.
    """
    changed = [file.relative_to(PACK).as_posix() for file in files_that_compute() if file.stat().st_mtime > IMPORTED]
    if changed:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise UserError(
            f"Files of Flux 2 Attention have changed since ComfyUI started ({changed[0]}{more}), and the other ranks "
            "would run the new ones. Restart ComfyUI.",
            "several-gpus",
        )
    return pack_digest()


def comfyui_version():
    try:
        import comfyui_version

        return comfyui_version.__version__
    except (ImportError, AttributeError):
        return "unknown"


def different(ours, theirs):
    """Sentences about versions that differ between rank 0 and another rank; empty when they may work together."""
    names = [*ours, *(name for name in theirs if name not in ours)]
    pairs = [(name, ours.get(name, "missing"), theirs.get(name, "missing")) for name in names]
    return [f"{name} is {here} on rank 0 and {there} there" for name, here, there in pairs if here != there]


def device_name(device):
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine() or "CPU"


def configuration():
    """What a worker needs to run ComfyUI as this process does: {"comfyui": its folder, "arguments", "fast"}. For rank
    0.
    """
    import comfy.sd
    from comfy.cli_args import args

    plain = {
        name: value
        for name, value in vars(args).items()
        if name != "fast" and isinstance(value, (bool, int, float, str, type(None)))
    }
    return {
        "comfyui": str(Path(comfy.sd.__file__).resolve().parents[1]),
        "arguments": plain,
        "fast": [feature.value for feature in args.fast],
    }
