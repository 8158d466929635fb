"""AITER's FlyDSL attention for gfx1201, compiled to an AMD code object on a machine without AMD: no ROCm, no GPU.

  python tests/flydsl_compile.py AITER_SOURCE bf16|f16

FlyDSL (pip install flydsl) brings its compiler and wants ROCm's linker; Triton's is given to it in its place. Runs
nothing; prints one JSON line with what the code object uses. Reads the kernel as it lies in ROCm/aiter e404860; the
later one (kernels/fmha_gfx1201/) is built alike but takes more arguments.
"""

import importlib
import json
import os
from pathlib import Path
import sys
import tempfile

import torch

import aiter_shim

ARCH, HEADS, HEAD_DIM, TOKENS = "gfx1201", 48, 128, 4608
KERNEL = "aiter.ops.flydsl.kernels.flash_attn_func_gfx1201"
LINKER = """#!{python}
import sys
from triton._C.libtriton import amd
out = sys.argv.index("-o") + 1
inputs = [a for i, a in enumerate(sys.argv) if i and i != out and not a.startswith("-")]
amd.link_hsaco(inputs[0], sys.argv[out])
open({kept!r}, "wb").write(open(sys.argv[out], "rb").read())
"""


def with_linker(folder, kept):
    """A folder that FlyDSL takes for ROCm's: nothing in it but a linker, which also writes what it made to `kept`."""
    linker = Path(folder, "llvm", "bin", "ld.lld")
    linker.parent.mkdir(parents=True)
    linker.write_text(LINKER.format(python=sys.executable, kept=str(kept)))
    linker.chmod(0o755)
    return folder


def number(binary, name):
    """A number of the code object's metadata, which is MessagePack (msgpack.org, format of integers)."""
    at = binary.index(name.encode()) + len(name)
    size = {0xCC: 1, 0xCD: 2, 0xCE: 4}.get(binary[at], 0)
    return int.from_bytes(binary[at + 1 : at + 1 + size], "big") if size else binary[at]


def main():
    source, dtype = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder, "kernel.hsaco")
        os.environ.update(
            COMPILE_ONLY="1",
            FLYDSL_GPU_ARCH=ARCH,
            FLYDSL_RUNTIME_CACHE_DIR=str(Path(folder, "cache")),
            ROCM_PATH=str(with_linker(Path(folder, "rocm"), kept)),
        )
        for name in ("aiter", "aiter.ops", "aiter.ops.flydsl"):
            aiter_shim.module(name, __path__=[str(Path(source, *name.split(".")))])
        build = importlib.import_module(KERNEL).build_flash_attn_func_module
        launch = build(num_heads=HEADS, head_dim=HEAD_DIM, causal=False, dtype_str=dtype, waves_per_eu=2, daz=True)
        flat = torch.zeros(TOKENS * HEADS * HEAD_DIM, dtype={"bf16": torch.bfloat16, "f16": torch.float16}[dtype])
        launch(flat, flat.clone(), flat.clone(), flat.clone(), 1, TOKENS, stream=None)
        binary = kept.read_bytes()
    names = (
        "vgpr_count",
        "vgpr_spill_count",
        "private_segment_fixed_size",
        "group_segment_fixed_size",
        "wavefront_size",
    )
    print(
        json.dumps(
            {
                "arch": ARCH,
                "code_object": aiter_shim.is_code_object(binary, ARCH),
                "dtype": dtype,
                **{name: number(binary, f".{name}") for name in names},
            }
        )
    )


if __name__ == "__main__":
    main()
