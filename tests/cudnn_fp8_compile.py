"""Compile the kernels of backend cudnn-fp8 for one GPU architecture and run nothing. Prints one JSON line.

python tests/cudnn_fp8_compile.py sm90     (or sm100)
"""

import json
import sys

import torch

import aiter_shim
import cudnn_fake
import pack  # noqa: F401


def launch_written(cudnn_fp8, dtype, scales, means):
    """The kernels of flux2/fused that write q, k, v in fp8 and read attention's output, as FLUX.2-dev's blocks do."""
    from flux2_pack.flux2.fused.kernels.attention_output import attention_output
    from flux2_pack.flux2.fused.kernels.formats import FP8_TENSOR, Format
    from flux2_pack.flux2.fused.kernels.qkv import joint_qkv, single_qkv
    from flux2_pack.flux2.fused.kernels.swiglu import swiglu

    heads, size, width = 2, 128, 256
    kept = cudnn_fp8.Kept(scales, means, dtype)
    weight = torch.zeros(size, dtype=dtype)
    both, pe = torch.zeros(1, 64, 9 * width, dtype=dtype), torch.zeros(1, 1, 64, size // 2, 2, 2)
    weights = weight, weight
    single_qkv(both, heads, weights, pe, fp8=kept)
    for text in (32, 1):
        txt, img = both[:, :text, : 3 * width], both[:, text:, : 3 * width]
        q8, *_ = joint_qkv(txt, img, heads, weights, weights, pe, fp8=kept)
    for data in (q8, q8.to(dtype)):
        raw = cudnn_fp8.Raw(data, scales[2:3], means, dtype)
        for to in (None, Format(FP8_TENSOR, torch.ones(()))):
            attention_output(raw, 4, to=to)
            swiglu(both[..., 3 * width :], raw, to=to)


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
        launch_written(cudnn_fp8, dtype, scales, means)
    found = [{"name": name, "bytes": len(b), "ok": aiter_shim.is_code_object(b, arch)} for name, b in objects]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
