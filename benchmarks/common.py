"""What every benchmark shares: the pack as flux2_pack, the machine's stamp, medians, and a table with one JSON line
last.

Times are CUDA (or HIP) events around the work, after warm-up, medians over repetitions with minimum and maximum beside
them.
"""

import importlib.metadata
import json
from pathlib import Path
import platform
import statistics
import sys
import types

import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "triton",
    "flash-attn",
    "flash-attn-3",
    "flash-attn-4",
    "sageattention",
    "sageattn3",
    "nvidia-cudnn-frontend",
    "xformers",
    "comfy-kitchen",
    "amd-aiter",
    "flydsl",
    "diffusers",
)


def import_pack():
    """Make `flux2_pack` importable: an empty module whose path is the checkout (see tests/pack.py for why)."""
    if "flux2_pack" not in sys.modules:
        module = types.ModuleType("flux2_pack")
        module.__path__ = [str(ROOT)]
        sys.modules["flux2_pack"] = module


def machine():
    """The device and driver side of a result."""
    if not torch.cuda.is_available():
        return {"device": platform.processor() or platform.machine(), "gpus": 0}
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "gpus": torch.cuda.device_count(),
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "arch": getattr(properties, "gcnArchName", f"sm{properties.major}{properties.minor}"),
    }


def versions():
    """Everything whose version can change a figure; packages that are not installed are left out."""
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cudnn": torch.backends.cudnn.version(),
    }
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {name: version for name, version in found.items() if version}


def times_ms(work, repeat, warm_up=2):
    """Milliseconds of each of `repeat` runs of `work` on the current stream."""
    for _ in range(warm_up):
        work()
    torch.cuda.synchronize()
    found = []
    for _ in range(repeat):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end))
    return found


def times_in_rounds(runners, repeat, warm_up=2):
    """{name: milliseconds of each run} of several works. Rounds go around all of them, so that a drift of the clocks is
    everybody's.
    """
    for work in runners.values():
        for _ in range(warm_up):
            work()
    found = {name: [] for name in runners}
    for _ in range(repeat):
        for name, work in runners.items():
            found[name] += times_ms(work, 1, warm_up=0)
    return found


def summary(values):
    """{"ms": median, "min_ms", "max_ms"}, rounded to a microsecond."""
    return {"ms": round(statistics.median(values), 3), "min_ms": round(min(values), 3), "max_ms": round(max(values), 3)}


def command():
    """The command line to repeat this, without the path that its result was written to."""
    words = [f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]
    return "python " + " ".join("FILE" if i and words[i - 1] == "--json" else word for i, word in enumerate(words))


def save(result, path):
    """Write a result as JSON when a path is given; returns it with the machine, the versions and the command in
    front.
    """
    result = {"machine": machine(), "versions": versions(), "command": command(), **result}
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(result, indent=1) + "\n")
    return result


def write(result, path):
    """Write a result as JSON when a path is given, and print it as the last line."""
    print(json.dumps(save(result, path)))
