"""Compile every kernel of the fused blocks for GPU architectures, as the blocks of FLUX.2-dev launch them, and run
nothing. Prints a JSON line for each: of each kernel whether it is an object for that architecture, and on AMD the
registers that the object says it takes and the LDS that it has or is launched with.

python tests/fast_kernels_compile.py gfx942 sm90     (and gfx90a, gfx950, gfx1100, gfx1151, gfx1201)
"""

import json
import sys

import torch
import triton

import aiter_shim
import pack  # noqa: F401

# where ComfyUI or `precision: fp8` has fp8 products, and in which format
FP8 = {
    "gfx942": torch.float8_e4m3fnuz,
    "gfx950": torch.float8_e4m3fn,
    "gfx1201": torch.float8_e4m3fn,
    "sm90": torch.float8_e4m3fn,
}


def launch_all(arch):
    """Each wrapper with the dtypes and options that the blocks use; tensors are on the CPU and never read."""
    from flux2_pack.flux2.fused.kernels import dequantise, norm, qkv, quantise, swiglu
    from flux2_pack.flux2.fused.kernels.formats import FP8_ROW, FP8_TENSOR, INT8_ROW, Format

    width, size, tokens, dtype = 6144, 128, 4, torch.bfloat16
    heads = width // size
    x, both = torch.zeros(1, tokens, width, dtype=dtype), torch.zeros(1, tokens, 9 * width, dtype=dtype)
    shift, scale, gate = torch.zeros(1, 2, 3 * width, dtype=dtype).chunk(3, -1)
    weight, pe = torch.zeros(size, dtype=dtype), torch.zeros(1, 1, tokens, size // 2, 2, 2)
    formats = [None, Format(INT8_ROW), Format(INT8_ROW, group=256)]
    if arch in FP8:
        formats += [Format(FP8_TENSOR, torch.ones(()), dtype=FP8[arch]), Format(FP8_ROW, dtype=FP8[arch])]
    for to in formats:
        for segment in ((0, 0), (2, 4)):
            norm.norm_modulate(x, shift, scale, segment=segment, to=to)
            norm.add_gated_norm_modulate(x, x, gate, shift, scale, segment=segment, to=to)
        swiglu.swiglu(both[..., 3 * width :], x, to=to)
        swiglu.swiglu(both[..., 3 * width :], to=to)
        if to is not None and to.kind != FP8_TENSOR:
            quantise.quantise_rows(x, to)
    norm.add_gated(x, x, gate)
    norm.add_gated(x.half(), x.half(), gate.half(), finite=True)
    norm.add_gated_norm_modulate(x.half(), x.half(), gate.half(), shift.half(), scale.half(), finite=True)
    weights = weight, weight
    for rotation in (pe, None):
        qkv.single_qkv(both, heads, weights, rotation)
        qkv.joint_qkv(both[:, :2, : 3 * width], both[:, 2:, : 3 * width], heads, weights, weights, rotation)
    sums, one = torch.zeros(tokens, width, dtype=torch.int32), torch.ones(tokens, 1)
    dequantise.dequantise(sums, one, torch.ones(width), None, dtype)


def compile_for(arch):
    shared = []
    objects = aiter_shim.compile_only(arch, keep=lambda compiled: shared.append(compiled.metadata.shared))
    launch_all(arch)
    print(
        json.dumps(
            {
                "arch": arch,
                "triton": triton.__version__,
                "kernels": [
                    {
                        "name": name,
                        "bytes": len(binary),
                        "ok": aiter_shim.is_code_object(binary, arch),
                        "shared": lds,
                        **({} if arch.startswith("sm") else aiter_shim.resources(binary)),
                    }
                    for (name, binary), lds in zip(objects, shared)
                ],
            }
        )
    )


if __name__ == "__main__":
    raise SystemExit(aiter_shim.each_in_a_fork(sys.argv[1:], compile_for))
