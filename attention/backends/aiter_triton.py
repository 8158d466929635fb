"""AITER's Triton attention (AMD): mha in bf16 and fp16, and its two SageAttention kernels (int8 or MXFP4 query-key
product, fp8 values).

Read at ROCm/aiter e404860 (aiter/ops/triton/attention/) and in the amd-aiter 0.1.7.post2.dev18 wheel, where modules lie
flat in aiter/ops/triton/ and SageAttention is absent. Log-sum-exp float32 (B, H, Sq), natural logarithm.
"""

from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
import threading

import torch

import aiter

from ..adapter import Adapter, lse_bhs, repeat_heads
from ..call import Limits, default_scale
from ..device import describe
from ..library_checks import lacks, part, takes, unbindable

ATTENTION = "aiter.ops.triton.attention"
MHA, MHA_WHY = part(f"{ATTENTION}.mha", "aiter.ops.triton.mha")
SAGE, SAGE_WHY = part(f"{ATTENTION}.fav3_sage")
MXFP4, MXFP4_WHY = part(f"{ATTENTION}.fav3_sage_attention_mxfp4_wrapper")

# Tile sizes come from a file per architecture: named after it, in old builds after a card. Where there is none, newer
# builds have a second
# implementation ("dao_ai", from Dao-AILab's Triton backend) with tiles of its own for these (CDNA_ARCHS, RDNA_ARCHS in
# its utils.py).
OLD_FILE_NAMES = {"gfx942": "MI300X", "gfx950": "MI350X"}
DAO_ARCHS = (
    "gfx908",
    "gfx90a",
    "gfx940",
    "gfx941",
    "gfx942",
    "gfx950",
    "gfx1030",
    "gfx1100",
    "gfx1101",
    "gfx1102",
    "gfx1150",
    "gfx1151",
    "gfx1200",
    "gfx1201",
)


@lru_cache(maxsize=None)
def has_tiles(arch):
    """True when this build has a tile file of its mha kernel for `arch`."""
    folder = next(p for p in Path(MHA.__file__).parents if p.name == "triton") / "configs"
    return any((folder / f"{name}-MHA-DEFAULT.json").is_file() for name in (arch, OLD_FILE_NAMES.get(arch)))


class TritonMha(Adapter):
    """bf16 and fp16, exact; takes strides as they are."""

    # strides are 64-bit in the kernel (USE_INT64_STRIDES) ...
    limits = Limits(head_dim_max=256, lse=True, max_offset=None)
    dao_limits = Limits(head_dim_max=256, lse=True)  # ... and 32-bit in the second implementation
    distribution = "amd-aiter"

    def missing(self):
        absent = MHA_WHY or lacks(MHA, "AITER's Triton mha", "flash_attn_func")
        return absent or unbindable(
            MHA.flash_attn_func, "Triton flash_attn_func", None, None, None, **self.arguments(1.0, True)
        )

    def unsupported(self, call):
        reasons, arch = super().unsupported(call), call.device.arch
        if MHA is None or call.device.platform != "amd" or has_tiles(arch):
            return reasons
        if arch not in DAO_ARCHS or not hasattr(MHA, "mha_set_impl"):
            return reasons + [f"This build of AITER has no tile sizes of its Triton attention for {arch}."]
        return self.dao_limits.reasons(call)

    def kernel(self, q, k, v, mask=None):
        return f"AITER Triton mha ({self.implementation(q.device)})"

    def implementation(self, device):
        """ "dao_ai" on an architecture that only that one is tuned for, else "default"."""
        arch = describe(device).arch
        return "dao_ai" if arch in DAO_ARCHS and not has_tiles(arch) else "default"

    def arguments(self, scale, need_lse):
        return {"dropout_p": 0.0, "softmax_scale": scale, "causal": False, "return_lse": need_lse}

    def run(self, q, k, v, mask, scale, need_lse):
        with chosen(self.implementation(q.device)):
            result = MHA.flash_attn_func(q, k, v, **self.arguments(scale, need_lse))
        return (result[0], lse_bhs(result[1], q)) if need_lse else (result, None)


_switch = threading.Lock()


@contextmanager
def chosen(name):
    """Choose AITER's mha implementation inside a with block.

    The library has one switch for the whole process. It is put back, and one thread launches at a time: with two
    GPUs ComfyUI runs two threads, and the second would put back what the first had set.
    """
    with _switch:
        before = getattr(MHA, "_MHA_IMPL", "default")
        if name == before:
            yield
            return
        MHA.mha_set_impl(name)
        try:
            yield
        finally:
            MHA.mha_set_impl(before)


def one_layout(*tensors):
    """BSHD tensors as AITER's SageAttention can take them: all contiguous in one layout.

    Its quantiser writes through the strides of its input into new tensors, and reads v with the strides of k
    (sage_quant_kernel): a slice of a fused qkv tensor would make it write out of bounds. BHSD memory, which is what
    ComfyUI has, is passed as it is. Returns (layout, tensors).
    """
    turned = [t.transpose(1, 2) for t in tensors]  # (B, H, S, D)
    if all(t.is_contiguous() for t in turned):
        return "bhsd", turned
    return "bshd", [t.contiguous() for t in tensors]


def centred(q, k, scale):
    """k without its mean over the keys, and what that takes off the log-sum-exp.

    softmax does not see a shift that is the same for all keys, and centred keys have fewer outliers to quantise
    ("smoothing" in SageAttention, arXiv 2410.02367, section 4.2). q (B, Sq, H, D), k (B, Sk, Hkv, D). Returns (k like
    k, shift float32 (B, H, Sq)).
    """
    mean = k.float().mean(dim=1, keepdim=True)  # (B, 1, Hkv, D)
    shift = torch.einsum("bqhd,bhd->bhq", q.float(), repeat_heads(mean, q.shape[2])[:, 0])
    return (k.float() - mean).to(k.dtype), shift * scale


class Sage(Adapter):
    """What both SageAttention kernels share. Subclasses say which function, and what it is called with.

    AITER centres the keys itself (smooth_k), but until aiter #3334 its log-sum-exp was that of the centred keys: images
    look right on one GPU and wrong in a ring. So where the log-sum-exp is needed, the keys are centred here and the
    shift is added here: right in every version.
    """

    distribution = "amd-aiter"
    module, why, name = None, [], ""

    def __init__(self):
        self.function = getattr(self.module, self.name, None)
        self.limits = Limits(head_dims=self.head_dims, lse=takes(self.function, "return_lse"))
        self.with_lse = {"return_lse": True, **({"smooth_k": False} if takes(self.function, "smooth_k") else {})}

    def missing(self):
        absent = self.why or lacks(self.module, "AITER", self.name)
        # AITER_TRITON_ONLY=1: the kernels are there, the name of the fp8 format is not
        dtypes = lacks(aiter, "AITER", "dtypes")
        return absent + dtypes or unbindable(
            self.function, self.name, None, None, None, layout="bshd", **self.arguments(1.0)
        )

    def kernel(self, q, k, v, mask=None):
        return f"AITER Triton {self.name}"

    def run(self, q, k, v, mask, scale, need_lse):
        if need_lse:
            k, shift = centred(q, k, scale)
        layout, tensors = one_layout(self.scaled(q, scale), k, v)
        result = self.function(*tensors, layout=layout, **self.arguments(scale), **(self.with_lse if need_lse else {}))
        out, lse = result if need_lse else (result, None)
        # bf16 whatever came in (AITER's docstring says float32)
        out = (out.transpose(1, 2) if layout == "bhsd" else out).to(q.dtype)
        return out, lse_bhs(lse, q) + shift if need_lse else None

    def scaled(self, q, scale):
        return q


class SageInt8(Sage):
    """int8 query-key product with one scale per block, fp8 values with one scale per channel."""

    module, why, name = SAGE, SAGE_WHY, "fav3_sage_wrapper_func"
    head_dims = (64, 128)  # the quantiser indexes with arange(D): powers of two

    def arguments(self, scale):
        return {"softmax_scale": scale, "causal": False}


class SageMxfp4(Sage):
    """MXFP4 query-key product after a Hadamard rotation, fp8 values. gfx950 only."""

    module, why, name = MXFP4, MXFP4_WHY, "fav3_sage_mxfp4_wrapper"
    head_dims = (128,)  # the rotation works on blocks of 128

    def arguments(self, scale):
        return {"causal": False, "hadamard_rotation": True}  # it asserts on the default of its own wrapper, False

    def scaled(self, q, scale):
        """The wrapper has no scale argument and uses D**-0.5, so any other scale goes into q: one rounding to q's
        dtype,
        nothing else.
        """
        ratio = scale / default_scale(q.shape[-1])
        return q if ratio == 1 else (q.float() * ratio).to(q.dtype)


ADAPTERS = {"aiter-triton": TritonMha(), "aiter-sage": SageInt8(), "aiter-sage-mxfp4": SageMxfp4()}
