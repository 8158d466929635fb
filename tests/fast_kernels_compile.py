"""Compile every kernel of the fused blocks for one GPU architecture, as the blocks launch them, and run nothing. Prints
one JSON line.

python tests/fast_kernels_compile.py gfx942     (or gfx950, gfx1201, sm90)
"""

import json
import sys

import torch
import triton

import aiter_shim
import pack  # noqa: F401

ARCH = sys.argv[1]
FP8 = ARCH != "gfx942"  # MI300's fp8 is another format; ComfyUI has no fp8 products there


def launch_all():
    """Each wrapper with the dtypes and options that the blocks use; tensors are on the CPU and never read."""
    from flux2_pack.flux2.fused.kernels import qkv, norm, quantise, swiglu
    from flux2_pack.flux2.fused.kernels.formats import FP8_ROW, FP8_TENSOR, Format

    width, size, tokens, dtype = 256, 128, 6, torch.bfloat16
    x, both = torch.zeros(1, tokens, width, dtype=dtype), torch.zeros(1, tokens, 9 * width, dtype=dtype)
    shift, scale, gate = torch.zeros(1, 2, 3 * width, dtype=dtype).chunk(3, -1)
    weight, pe = torch.zeros(size, dtype=dtype), torch.zeros(1, 1, tokens, size // 2, 2, 2)
    formats = [None] + ([Format(FP8_TENSOR, torch.ones(())), Format(FP8_ROW)] if FP8 else [])
    for to in formats:
        for segment in ((0, 0), (2, 4)):
            norm.norm_modulate(x, shift, scale, segment=segment, to=to)
            norm.add_gated_norm_modulate(x, x, gate, shift, scale, segment=segment, to=to)
        swiglu.swiglu(both[..., 3 * width :], x, to=to)
        swiglu.swiglu(both[..., 3 * width :], to=to)
    norm.add_gated(x, x, gate)
    norm.add_gated(x.half(), x.half(), gate.half(), finite=True)
    norm.add_gated_norm_modulate(x.half(), x.half(), gate.half(), shift.half(), scale.half(), finite=True)
    for turns in (pe, None):
        qkv.single_qkv(both, 2, (weight, weight), turns)
        qkv.joint_qkv(both[:, :2, : 3 * width], both[:, 2:, : 3 * width], 2, (weight, weight), (weight, weight), turns)
    if FP8:
        quantise.quantise_rows(x)


def main():
    objects = aiter_shim.compile_only(ARCH)
    launch_all()
    print(
        json.dumps(
            {
                "arch": ARCH,
                "triton": triton.__version__,
                "kernels": [
                    {"name": name, "bytes": len(binary), "ok": aiter_shim.is_code_object(binary, ARCH)}
                    for name, binary in objects
                ],
            }
        )
    )


if __name__ == "__main__":
    main()
