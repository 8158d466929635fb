"""Every backend by its slug: what it is, where it can run, whether it can here, and why not.

A slug in a saved workflow is a contract: rows are added, never renamed. Backend files are imported here, on first use,
and nowhere else; whatever an import raises becomes a sentence. A new backend is one file under backends/ and one row
below.
"""

from dataclasses import dataclass
import importlib
import re
import sys
import threading

import torch

from . import reference
from .call import CHOOSE_ANOTHER, AttentionRefused, Hardware, call_of, dtype_name
from .device import describe
from .errors import UserError, first_line

ANY = Hardware({"nvidia": (), "amd": (), "cpu": (), "apple": (), "intel": ()}, anywhere=True)  # PyTorch itself
GPU = Hardware({"nvidia": (), "amd": ()})
NVIDIA = Hardware({"nvidia": ()})


@dataclass(frozen=True)
class BackendRow:
    """One backend: file under backends/, library, hardware, exact or quantised, how to install, what it is.

    proven: platforms that this pack has run it on, its error measured against float32: an NVIDIA H200
    (benchmarks/results/attention-h200.json), a CPU (tests/). docs/amd.md says what proves the others, and how far.
    """

    module: str
    library: str
    hardware: Hardware
    exact: bool
    install: str
    summary: str
    proven: tuple = ()


BUILT_IN = "It is part of PyTorch; nothing has to be installed."
AITER_INSTALL = (
    "Install AITER for your ROCm version from AMD's wheel index or from source (github.com/ROCm/aiter); "
    "the wheel on PyPI (pip install amd-aiter) is old and has the bf16 and Triton paths only."
)
FLYDSL_INSTALL = AITER_INSTALL + " Install FlyDSL as well (pip install flydsl)."
NO_FLYDSL = "AITER has FlyDSL attention in bf16 for gfx1201 and gfx1250, in fp8 for gfx950 and gfx1201."
ROWS = {
    "sdpa": BackendRow(
        "sdpa", "PyTorch", ANY, True, BUILT_IN, "PyTorch's own choice of kernel", ("nvidia sm90", "cpu")
    ),
    "sdpa-flash": BackendRow(
        "sdpa",
        "PyTorch",
        Hardware({"nvidia": (), "amd": (), "cpu": ()}),
        True,
        BUILT_IN,
        "PyTorch's FlashAttention kernel (on a CPU: its blocked kernel)",
        ("nvidia sm90", "cpu"),
    ),
    "sdpa-cudnn": BackendRow(
        "sdpa",
        "PyTorch",
        Hardware({"nvidia": ("sm8x", "sm9x", "sm10x", "sm11x", "sm12x")}),
        True,
        BUILT_IN,
        "cuDNN's fused kernel through PyTorch; fast on Hopper and Blackwell",
        ("nvidia sm90",),
    ),
    "sdpa-efficient": BackendRow(
        "sdpa",
        "PyTorch",
        GPU,
        True,
        BUILT_IN,
        "PyTorch's memory-efficient kernel, float32 included",
        ("nvidia sm90",),
    ),
    "sdpa-math": BackendRow(
        "sdpa",
        "PyTorch",
        ANY,
        True,
        BUILT_IN,
        "matrix products and a softmax; slow, for comparison",
        ("nvidia sm90", "cpu"),
    ),
    "flash2": BackendRow(
        "flash2",
        "FlashAttention-2",
        Hardware(
            {
                "nvidia": ("sm8x", "sm9x", "sm10x", "sm11x", "sm12x"),
                "amd": ("gfx90a", "gfx942", "gfx950", "gfx11xx", "gfx12xx"),
            }
        ),
        True,
        "Install it with: pip install flash-attn --no-build-isolation",
        "Dao-AILab FlashAttention-2; on AMD its Composable Kernel or Triton build",
    ),
    "flash3": BackendRow(
        "flash3",
        "FlashAttention-3",
        Hardware({"nvidia": ("sm8x", "sm9x")}),
        True,
        "Install FlashAttention-3 from source (github.com/Dao-AILab/flash-attention, folder hopper).",
        "Dao-AILab FlashAttention-3 for Hopper",
    ),
    "flash4": BackendRow(
        "flash4",
        "FlashAttention-4",
        Hardware({"nvidia": ("sm8x", "sm9x", "sm10x", "sm11x", "sm12x")}),
        True,
        "Install it with: pip install --pre flash-attn-4",
        "Dao-AILab FlashAttention-4 (CuTe DSL) for Hopper and Blackwell",
        ("nvidia sm90",),
    ),
    "aiter": BackendRow(
        "aiter",
        "AITER",
        Hardware({"amd": ("gfx90a", "gfx942", "gfx950")}),
        True,
        AITER_INSTALL,
        "AMD's assembly and Composable Kernel attention for Instinct",
    ),
    "aiter-triton": BackendRow(
        "aiter_triton",
        "AITER",
        Hardware({"amd": ("gfx90a", "gfx942", "gfx950", "gfx11xx", "gfx12xx")}),
        True,
        AITER_INSTALL,
        "AITER's Triton kernel, Instinct and Radeon",
    ),
    "aiter-flydsl": BackendRow(
        "aiter_flydsl",
        "AITER",
        Hardware({"amd": ("gfx1201", "gfx1250")}, NO_FLYDSL),
        True,
        FLYDSL_INSTALL,
        "AITER's FlyDSL kernel for RDNA4 and gfx1250",
    ),
    "aiter-flydsl-fp8": BackendRow(
        "aiter_flydsl",
        "AITER",
        Hardware({"amd": ("gfx950", "gfx1201")}, NO_FLYDSL),
        False,
        FLYDSL_INSTALL,
        "AITER's FlyDSL kernel with fp8 inputs, one scale per tensor",
    ),
    "aiter-fp8": BackendRow(
        "aiter",
        "AITER",
        Hardware({"amd": ("gfx942", "gfx950")}),
        False,
        AITER_INSTALL,
        "AITER with fp8 inputs, one scale per tensor",
    ),
    "aiter-sage": BackendRow(
        "aiter_triton",
        "AITER",
        Hardware({"amd": ("gfx942", "gfx950")}),
        False,
        AITER_INSTALL,
        "AITER's SageAttention: int8 query-key, fp8 values",
    ),
    "aiter-sage-mxfp4": BackendRow(
        "aiter_triton",
        "AITER",
        Hardware({"amd": ("gfx950",)}),
        False,
        AITER_INSTALL,
        "AITER's SageAttention with MXFP4 query-key",
    ),
    **{
        f"aiter-v4-{name}": BackendRow(
            "aiter_v4", "AITER", Hardware({"amd": archs}), name == "bf16", AITER_INSTALL, f"AITER MHA v4: {formats}"
        )
        for name, archs, formats in (
            ("bf16", ("gfx950",), "bf16"),
            ("bf16fp8", ("gfx950",), "bf16 query-key, fp8 values"),
            ("i8fp8", ("gfx942", "gfx950"), "int8 query-key, fp8 values"),
            ("fp8", ("gfx950",), "fp8"),
            ("mxfp8", ("gfx950",), "MXFP8 query-key, fp8 values"),
            ("f8f6", ("gfx950",), "fp8 query-key, MXFP6 values"),
            ("mxfp6", ("gfx950",), "MXFP6 query-key, fp8 values"),
            ("f6f6", ("gfx950",), "MXFP6"),
            ("f6f4", ("gfx950",), "MXFP6 query-key, MXFP4 values"),
            ("mxfp4", ("gfx950",), "MXFP4 query-key, fp8 values"),
            ("f4f4", ("gfx950",), "MXFP4"),
        )
    },
    "sage1": BackendRow(
        "sage",
        "SageAttention",
        Hardware(
            {
                "nvidia": ("sm8x", "sm9x", "sm10x", "sm11x", "sm12x"),
                "amd": ("gfx90a", "gfx942", "gfx950", "gfx11xx", "gfx12xx"),
            }
        ),
        False,
        "Install it with: pip install sageattention==1.0.6",
        "SageAttention 1 (Triton): int8 query-key",
        ("nvidia sm90",),
    ),
    "sage2": BackendRow(
        "sage",
        "SageAttention",
        Hardware({"nvidia": ("sm8x", "sm9x", "sm10x", "sm12x")}),
        False,
        "Install SageAttention 2 from source (github.com/thu-ml/SageAttention).",
        "SageAttention 2 (CUDA): int8 query-key, fp8 values",
    ),
    "sage3": BackendRow(
        "sage3",
        "SageAttention",
        Hardware({"nvidia": ("sm100", "sm103", "sm120", "sm121")}),
        False,
        "Install sageattn3 from source (github.com/thu-ml/SageAttention, folder sageattention3_blackwell).",
        "SageAttention 3 (FP4) for Blackwell",
    ),
    "cudnn-fp8": BackendRow(
        "cudnn_fp8",
        "cuDNN's Python front end",
        Hardware({"nvidia": ("sm9x", "sm10x", "sm11x", "sm12x")}),
        False,
        "Install it with: pip install nvidia-cudnn-frontend",
        "cuDNN's fp8 kernel: fp8 queries, keys and values",
    ),
    "comfy-int8": BackendRow(
        "comfy_int8",
        "comfy-kitchen",
        Hardware({"nvidia": ("sm75", "sm8x", "sm9x", "sm10x", "sm11x", "sm12x"), "amd": ("gfx11xx", "gfx12xx")}),
        False,
        "Install a newer comfy-kitchen: pip install -U comfy-kitchen",
        "the INT8 kernel of ComfyUI's own library",
    ),
    "xformers": BackendRow(
        "xformers",
        "xFormers",
        GPU,
        True,
        "Install it with: pip install xformers",
        "xFormers memory-efficient attention",
    ),
}
AUTO = "auto"  # the fastest exact backend, measured
COMFYUI = "comfyui"  # ComfyUI's own attention, counted and timed: the baseline
SLUGS = [AUTO, COMFYUI, *ROWS]
# Tried in this order where nothing can be timed, and reported in it. PyTorch's own choice comes first: it runs
# everywhere.
AUTO_ORDER = [
    "sdpa",
    "aiter",
    "aiter-v4-bf16",
    "sdpa-cudnn",
    "flash4",
    "flash3",
    "aiter-flydsl",
    "aiter-triton",
    "flash2",
    "sdpa-flash",
    "xformers",
    "sdpa-efficient",
]

_lock = threading.Lock()
_modules = {}  # module name -> (module or None, error sentence)
_passed = set()  # (slug, device, dtype, head size) of test calls that were right


def row(slug):
    """The BackendRow of a slug. ValueError with the valid slugs for an unknown one."""
    if slug not in ROWS:
        raise UserError(
            f"There is no attention backend '{str(slug)[:40]}'. The backends are: {', '.join(SLUGS)}.",
            "unknown-backend",
        )
    return ROWS[slug]


def experimental(slug, device=None):
    """True for a backend that this pack has never run on hardware of its own; with a device (attention.device.Device),
    on none of that platform.
    """
    platforms = {place.split()[0] for place in row(slug).proven}
    return not platforms if device is None else device.platform not in platforms


def _module(name):
    with _lock:
        if name not in _modules:
            try:
                _modules[name] = importlib.import_module(f".backends.{name}", __package__), None
            # AITER without ROCm raises RuntimeError, broken wheels OSError: all of it is a reason, none a crash
            except Exception as error:
                _modules[name] = None, f"{type(error).__name__}: {str(error).strip() or 'no message'}"
        return _modules[name]


def unavailable(slug, device):
    """Every reason, as sentences, why this backend cannot run on `device` (attention.device.Device); empty means it can
    be tried.
    """
    entry = row(slug)
    reasons = entry.hardware.reasons(device)
    if reasons:  # a library that could not run here is not imported: some end the process on a wrong card
        return reasons
    module, error = _module(entry.module)
    if error:
        return [f"{entry.library} cannot be imported ({error})."]
    try:
        return module.ADAPTERS[slug].missing()
    except Exception as failure:  # a name that is gone, a library that cannot load its own: a reason, and no crash
        said = f"{type(failure).__name__}: {first_line(failure)}"
        return [f"{entry.library} cannot be asked whether it runs here ({said})."]


def how_to_get(slug, device):
    """What to type to get a backend, for the Python that runs this; "" where installing would not help.

    A portable ComfyUI has a Python of its own, and a bare `pip` would install into another one.
    """
    if row(slug).hardware.reasons(device):
        return ""
    python = f'"{sys.executable}"' if " " in sys.executable else sys.executable
    return re.sub(r"(?<=: )pip install", lambda _: f"{python} -m pip install", row(slug).install)


def what_to_do(slug, device):
    """The last line of a refusal: how to get the backend, or where that would not help, to take another one."""
    return how_to_get(slug, device) or f"{CHOOSE_ANOTHER}: auto finds one that runs here."


def adapter(slug, device):
    """The Adapter of a slug that can run on `device`. AttentionRefused with every reason and the install hint
    otherwise.
    """
    reasons = unavailable(slug, device)
    if reasons:
        raise AttentionRefused(slug, reasons, what_to_do(slug, device))
    return _module(row(slug).module)[0].ADAPTERS[slug]


def unsupported(slug, call):
    """Every reason why this backend cannot compute this AttentionCall; availability included."""
    return unavailable(slug, call.device) or _module(row(slug).module)[0].ADAPTERS[slug].unsupported(call)


def probe(slug, device, dtype, head_dim):
    """Run a backend once on a small problem on the real device and compare with float32.

    device: torch.device. Returns reasons why it cannot be used for this dtype and head size; empty means it ran and was
    right. Only that is remembered: a failure may pass (memory that another job held, say).
    """
    key = (slug, str(device), dtype, head_dim)
    if key in _passed:
        return []
    reasons = test_call(slug, device, dtype, head_dim)
    if not reasons:
        _passed.add(key)
    return reasons


# longer than any kernel's special case for short sequences, such as AITER's assembly (more than 128)
PROBE_TOKENS = 256
PROBE_ERROR = 0.2  # quantised kernels stay under 0.1 on gaussian data; a wrong layout or scale is above 0.5


def test_call(slug, device, dtype, head_dim):
    """What `probe` runs, asked anew and not remembered. Arguments and result are those of `probe`."""
    device = torch.device(device)
    reasons = unavailable(slug, describe(device))
    if reasons:
        return reasons
    generator = torch.Generator(device="cpu").manual_seed(0)
    q, k, v = (torch.randn(1, PROBE_TOKENS, 2, head_dim, generator=generator).to(device, dtype) for _ in range(3))
    chosen = adapter(slug, describe(device))
    refused = chosen.unsupported(call_of(q, k, v))
    if refused:
        return refused
    try:
        out, _ = chosen.attend(q, k, v)
        error = reference.relative_error(out, reference.attend(q, k, v)[0])
    except Exception as failure:  # a kernel that does not launch here is a reason to refuse, whatever it raises
        return [
            (
                f"A test call on {describe(device)} with {dtype_name(dtype)} and head size {head_dim} failed: "
                f"{type(failure).__name__}: {failure}"
            )
        ]
    return (
        []
        if error < PROBE_ERROR
        else [f"A test call on {describe(device)} gave a wrong result (relative error {error:.2g})."]
    )
