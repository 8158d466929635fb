"""Fused elementwise kernels of FLUX.2's blocks, in Triton. The kernel files import triton: they are imported when a
fused block runs.

norm: gated residual, LayerNorm and modulation. qkv: q/k RMSNorm, RoPE and the joint q, k, v. swiglu: SwiGLU beside
the attention output. quantise: fp8 with a scale per row. formats: how a kernel writes the input of the matrix product
that follows. Every kernel computes in float32 and rounds once when it stores.
"""

from importlib.util import find_spec
import os


def unavailable(device):
    """Why the kernels cannot run on a torch device, as a sentence; None when they can."""
    if find_spec("triton") is None:
        return (
            "Triton is not installed. It comes with PyTorch for CUDA and ROCm on Linux; on Windows: pip install "
            "triton-windows."
        )
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the fused kernels run on NVIDIA and AMD GPUs, and this model computes on '{device.type}'."
    return None
