"""Compile the kernels of the VAE's fused blocks for GPU architectures and run nothing. Prints a JSON line for each.

python tests/vae_kernels_compile.py gfx942 sm90     (and gfx1100, gfx1201)
"""

import json
import sys

import torch

import aiter_shim
import pack  # noqa: F401


def compile_for(arch):
    objects = aiter_shim.compile_only(arch)
    from flux2_pack.flux2.vae import kernels

    for dtype in (torch.bfloat16, torch.float32):
        for channels in (96, 128, 512):
            x = torch.zeros(1, channels, 8, 8, dtype=dtype).contiguous(memory_format=torch.channels_last)
            bias = torch.zeros(channels, dtype=dtype)
            kernels.statistics(x, bias, store=True)
            _, mean, rstd = kernels.statistics(x, bias, x, bias)
            kernels.normalise(x, mean, rstd, bias, bias, bias)
    found = [{"name": name, "bytes": len(b), "ok": aiter_shim.is_code_object(b, arch)} for name, b in objects]
    print(json.dumps({"arch": arch, "kernels": found}))


if __name__ == "__main__":
    raise SystemExit(aiter_shim.each_in_a_fork(sys.argv[1:], compile_for))
