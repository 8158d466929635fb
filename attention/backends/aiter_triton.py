"""AITER's Triton attention (AMD): mha in bf16 and fp16, and its two SageAttention kernels (int8 or MXFP4 query-key
product, fp8 values).

Read at ROCm/aiter e404860 (aiter/ops/triton/attention/) and in the amd-aiter 0.1.7.post2.dev18 wheel, where modules lie
flat in aiter/ops/triton/ and SageAttention is absent. Log-sum-exp float32 (B, H, Sq), natural logarithm.
"""

from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
import os
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
# "dao_ai": AITER's second implementation of mha, from Dao-AILab's Triton backend
DAO = "aiter.ops.triton._triton_kernels.flash_attn_triton_amd"
DAO_KERNEL, _ = part(f"{DAO}.fwd_prefill")
DAO_SETTINGS, _ = part(f"{DAO}.utils")
CONFIG_VARIABLE = "FLASH_ATTENTION_FWD_TRITON_AMD_CONFIG_JSON"

# The first implementation takes its tile from a file per architecture: named after it, in old builds after a card.
# Where there is none, newer builds have the second one with tiles of its own for these (CDNA_ARCHS, RDNA_ARCHS in its
# utils.py).
OLD_FILE_NAMES = {"gfx942": "MI300X", "gfx950": "MI350X"}
DAO_ARCHS = (
    *("gfx908", "gfx90a", "gfx940", "gfx941", "gfx942", "gfx950"),
    *("gfx1030", "gfx1100", "gfx1101", "gfx1102", "gfx1150", "gfx1151", "gfx1200", "gfx1201"),
)


@dataclass(frozen=True)
class Tile:
    """Queries and keys per program, and warps that share it, for one of the two implementations."""

    implementation: str
    queries: int
    keys: int
    warps: int

    def __str__(self):
        return f"{self.implementation} {self.queries}x{self.keys}, {self.warps} warps"

    def config(self):
        """As the first implementation's `config` and, but for one name, as the second's triton.Config takes it."""
        names = {"default": "PRELOAD_V", "dao_ai": "PRE_LOAD_V"}
        return {
            "BLOCK_M": self.queries,
            "BLOCK_N": self.keys,
            names[self.implementation]: False,
            "waves_per_eu": 2,
            "num_warps": self.warps,
            "num_stages": 1,
            **({"num_ctas": 1} if self.implementation == "default" else {}),
        }


def tiles(implementation, *sizes):
    return [Tile(implementation, *size) for size in sizes]


# Tiles that are tried beside AITER's own, which is one for all cards of an architecture. Chosen by compiling AITER's
# kernels for each architecture at head size 128: none of these spills registers, and two work groups fit beside each
# other (tests/test_aiter_kernels.py). On RDNA3 the first implementation spills with every tile worth trying.
RDNA3 = tiles("dao_ai", (128, 64, 8), (128, 32, 8), (64, 64, 4), (64, 32, 8), (64, 32, 4))
TILES = {
    **dict.fromkeys(("gfx1100", "gfx1101", "gfx1102", "gfx1150", "gfx1151"), RDNA3),
    **dict.fromkeys(("gfx1200", "gfx1201"), RDNA3 + tiles("default", (128, 64, 8), (64, 32, 4))),
    "gfx90a": tiles("dao_ai", (128, 64, 4), (64, 32, 4)) + tiles("default", (128, 64, 4), (64, 64, 4)),
}


@lru_cache(maxsize=None)
def has_tiles(arch):
    """True when this build has a tile file of its mha kernel for `arch`."""
    folder = next(p for p in Path(MHA.__file__).parents if p.name == "triton") / "configs"
    return any((folder / f"{name}-MHA-DEFAULT.json").is_file() for name in (arch, OLD_FILE_NAMES.get(arch)))


def has_dao(arch):
    """True when this build can be told to use its second implementation, and that knows the architecture."""
    return arch in DAO_ARCHS and hasattr(MHA, "mha_set_impl")


def users_tile():
    """The user's own tile as AITER read it from CONFIG_VARIABLE, or None: not set, not understood, or not read by this
    build."""
    return getattr(DAO_SETTINGS, "FWD_CONF_OVERRIDE", None)


class TritonMha(Adapter):
    """bf16 and fp16, exact; takes strides as they are.

    tile: a Tile, or None for the user's own (CONFIG_VARIABLE), which wins over all others, and else AITER's.
    """

    # strides are 64-bit in the first implementation (USE_INT64_STRIDES) ...
    limits = Limits(head_dim_max=256, lse=True, max_offset=None)
    dao_limits = Limits(head_dim_max=256, lse=True)  # ... and 32-bit in the second
    distribution = "amd-aiter"

    def __init__(self, tile=None):
        self.tile = tile

    def missing(self):
        absent = MHA_WHY or lacks(MHA, "AITER's Triton mha", "flash_attn_func")
        return absent or unbindable(
            MHA.flash_attn_func, "Triton flash_attn_func", None, None, None, **self.arguments(1.0, True)
        )

    def unsupported(self, call):
        reasons, arch = super().unsupported(call), call.device.arch
        if MHA is None or call.device.platform != "amd":
            return reasons
        if self.implementation(arch) == "dao_ai":
            return self.dao_limits.reasons(call)
        if not has_tiles(arch) and self.tile is None:
            reasons.append(f"This build of AITER has no tile sizes of its Triton attention for {arch}.")
        return reasons

    def variants(self, call):
        """{name: TritonMha}, this one first: the tiles that can be tried for an AttentionCall. Measured by `auto`'s
        tuner."""
        arch = call.device.arch
        tried = (
            []
            if self.tile or users_tile()
            else [TritonMha(tile) for tile in TILES.get(arch, ()) if takes_tile(tile, arch)]
        )
        return {"AITER's own tile": self, **{str(a.tile): a for a in tried if not a.unsupported(call)}}

    def kernel(self, q, k, v, mask=None):
        return f"AITER Triton mha ({self.implementation(describe(q.device).arch)}, {self.tile_name()})"

    def tile_name(self):
        if self.tile:
            return f"tile {self.tile.queries}x{self.tile.keys}, {self.tile.warps} warps, the fastest measured here"
        value = os.environ.get(CONFIG_VARIABLE)
        if not value:
            return "AITER's own tile"
        return (
            f"tile of {CONFIG_VARIABLE}: {value}" if users_tile() else f"{CONFIG_VARIABLE} is set and AITER ignores it"
        )

    def implementation(self, arch):
        """ "default" or "dao_ai": that of the tile; the one that reads the user's tile; else the one that has tiles for
        an architecture."""
        if self.tile:
            return self.tile.implementation
        return "dao_ai" if has_dao(arch) and (users_tile() or not has_tiles(arch)) else "default"

    def arguments(self, scale, need_lse):
        return {"dropout_p": 0.0, "softmax_scale": scale, "causal": False, "return_lse": need_lse}

    def run(self, q, k, v, mask, scale, need_lse):
        implementation = self.implementation(describe(q.device).arch)
        given = {"config": self.tile.config()} if self.tile and implementation == "default" else {}
        with chosen(implementation, self.tile):
            result = MHA.flash_attn_func(q, k, v, **self.arguments(scale, need_lse), **given)
        return (result[0], lse_bhs(result[1], q)) if need_lse else (result, None)


def takes_tile(tile, arch):
    """True when this build can be given a tile: as an argument, or as the one configuration of a tuned kernel."""
    if tile.implementation == "default":
        return takes(MHA.flash_attn_func, "config")
    return has_dao(arch) and hasattr(getattr(DAO_KERNEL, "attn_fwd", None), "configs")


_switch = threading.Lock()


@contextmanager
def chosen(implementation, tile):
    """Choose AITER's mha implementation, and the second one's tile, inside a with block.

    The library has one switch and one list of tiles for the whole process. They are put back, and one thread launches
    at a time: with two GPUs ComfyUI runs two threads, and the second would put back what the first had set.
    """
    with _switch:
        before = getattr(MHA, "_MHA_IMPL", "default")
        configs = None
        try:
            if implementation != before:
                MHA.mha_set_impl(implementation)
            if tile and implementation == "dao_ai":
                configs, DAO_KERNEL.attn_fwd.configs = DAO_KERNEL.attn_fwd.configs, [triton_config(tile)]
            yield
        finally:
            if configs is not None:
                DAO_KERNEL.attn_fwd.configs = configs
            if implementation != before:
                MHA.mha_set_impl(before)


@lru_cache(maxsize=None)
def triton_config(tile):
    """The triton.Config of a Tile: one alone, so that Triton's tuner has nothing to choose."""
    import triton

    settings = tile.config()
    launch = {name: settings.pop(name) for name in ("num_warps", "num_stages")}
    return triton.Config(settings, **launch)


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
        dtype, nothing else.
        """
        ratio = scale / default_scale(q.shape[-1])
        return q if ratio == 1 else (q.float() * ratio).to(q.dtype)


ADAPTERS = {"aiter-triton": TritonMha(), "aiter-sage": SageInt8(), "aiter-sage-mxfp4": SageMxfp4()}
