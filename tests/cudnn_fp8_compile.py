"""Compile the kernels of backend cudnn-fp8 for one GPU architecture and run nothing. Prints one JSON line.

python tests/cudnn_fp8_compile.py sm90     (or sm100)
"""

import json
import sys

import torch

import aiter_shim
import cudnn_fake
import pack  # noqa: F401


def main():
    arch = sys.argv[1]
    objects = aiter_shim.compile_only(arch)
    sys.modules["cudnn"] = cudnn_fake.module()
    from flux2_pack.attention.backends import cudnn_fp8

    for dtype in (torch.bfloat16, torch.float16):
        q = torch.zeros(1, 3, 2, 128, dtype=dtype)
        q8, _, _, scales, means = cudnn_fp8.quantise(q, q, q)
        tile = {"D": 128, "TOKENS": cudnn_fp8.TOKENS, "num_warps": cudnn_fp8.WARPS}
        cudnn_fp8._restore[(1, 2)](q8, means, scales[2:3], q, 3, 2, **tile)
    found = [{"name": name, "bytes": len(b), "ok": aiter_shim.is_code_object(b, arch)} for name, b in objects]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
