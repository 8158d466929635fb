"""Which device the tests run on. conftest.py takes this module in as a plugin.

  pytest tests             the CPU, on every machine: GPUs are hidden from this process, and so from the servers and
                           workers that it starts. Tests marked gpu are skipped.
  pytest tests -m gpu      what only a GPU can show: the tests of tests/gpu, on the GPUs that are there; they are
                           skipped with the reason where there is none, or fewer than gpu(gpus=2) asks for.

One process is one of the two, because ComfyUI and PyTorch look at the machine once. FLUX2_GPU_TESTS_ON=cpu runs the
second set on a CPU, as far as it can run there: for whoever writes them (TRITON_INTERPRET=1 for the kernels).
"""

import itertools
import os
from pathlib import Path
import re
import sys

from _pytest.mark.expression import Expression
import pytest

MARKER, ON = "gpu", "FLUX2_GPU_TESTS_ON"
# no device: NVIDIA takes an empty list for that, AMD a number that no device has
HIDDEN = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "-1"}
ELSEWHERE = "it needs a GPU, which this run hides: pytest tests -m gpu"

# Largest relative error (Frobenius norm) against float32 that a number format earns in an operation like attention or a
# block: some of its roundings, whose unit is in the second column.
TOLERANCE = {
    "float32": 1e-5,  # 6e-8
    "float16": 2e-3,  # 5e-4
    "bfloat16": 1.6e-2,  # 4e-3
    "int8": 3e-2,  # one scale per block of rows: 1.4e-2 on normally distributed queries and keys (SageAttention 1)
    "fp8": 1e-1,  # 6e-2 with three bits of mantissa; 5.9e-2 by cuDNN with one scale per tensor
    "fp4": 3e-1,  # 2.5e-1 with one bit
}
# number format of the backends that are not exact and have run on a card of ours; of the others the coarsest is allowed
QUANTISED = {"sage1": "int8", "cudnn-fp8": "fp8"}


def quantised_tolerance(slug):
    """Largest relative error of an approximate backend on normally distributed q, k and v."""
    return TOLERANCE[QUANTISED.get(slug, "fp4")]


def gpu_asked(expression):
    """Whether what -m says selects only tests marked gpu."""
    if not re.search(rf"\b{MARKER}\b", expression):
        return False
    names = set(re.findall(r"[\w.]+", expression)) - {"and", "or", "not", MARKER}
    others = [dict(zip(names, marked)) for marked in itertools.product([True, False], repeat=len(names))]
    compiled = Expression.compile(expression)

    def selects(gpu, marks):
        return compiled.evaluate(lambda name, **_: gpu if name == MARKER else marks.get(name, False))

    return any(selects(True, marks) for marks in others) and not any(selects(False, marks) for marks in others)


def on_cpu():
    """Whether the tests of this process compute on the CPU."""
    return not _Run.gpu or os.environ.get(ON) == "cpu"


class _Run:
    gpu = False  # whether this process runs the tests marked gpu


def hide_gpus(environment=os.environ):
    """Let PyTorch see no GPU, here and in processes that inherit this environment. RuntimeError when it has looked."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        raise RuntimeError("PyTorch uses a GPU already, so the tests cannot be kept to the CPU.")
    for name, value in HIDDEN.items():
        if name.startswith("CUDA") or Path("/dev/kfd").exists():  # AMD's driver
            environment[name] = value


def gpus():
    """How many GPUs the tests can use."""
    import torch

    return 0 if on_cpu() else torch.cuda.device_count()


def lacking(marker):
    """Why a test marked gpu cannot run in this process, "" when it can."""
    wanted = marker.kwargs.get("gpus", 1)
    if not _Run.gpu:
        return ELSEWHERE
    if os.environ.get(ON) == "cpu":
        return "" if marker.kwargs.get("cpu", True) else "there is nothing to try of it on a CPU"
    found = gpus()
    if not found:
        return "no NVIDIA GPU: PyTorch sees none"
    return "" if found >= wanted else f"it needs {wanted} GPUs, and there is {found}"


def pytest_configure(config):
    config.addinivalue_line(
        "markers",
        "gpu(gpus=1, cpu=True): on real GPUs, so many of them; cpu: whether it can be tried on a CPU. Chosen by -m gpu",
    )
    _Run.gpu = gpu_asked(config.option.markexpr)
    if on_cpu():
        hide_gpus()
    if _Run.gpu:
        sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))  # tests make and measure as they do


def pytest_collection_modifyitems(items):
    for item in items:
        marker = item.get_closest_marker(MARKER)
        if marker is not None and (reason := lacking(marker)):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def device():
    """torch.device of a test marked gpu."""
    import torch

    return torch.device("cpu" if on_cpu() else "cuda")


@pytest.fixture(autouse=True)
def float32_is_float32(request):
    """Tests marked gpu compute without TF32, NVIDIA's float32 products of 10 bits of mantissa; servers and benchmarks
    that they start have the settings of their users.
    """
    if request.node.get_closest_marker(MARKER) is None:
        yield
        return
    import torch

    settings = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [one.allow_tf32 for one in settings]
    for one in settings:
        one.allow_tf32 = False
    yield
    for one, value in zip(settings, before):
        one.allow_tf32 = value
