"""One attention call as data, what a kernel can take as data, and the errors that carry both.

Layout legend: q is (B, Sq, H, D), k and v are (B, Sk, Hkv, D), mask broadcasts to (B, H, Sq, Sk); bool masks keep where
True, float masks are added to the scores. lse is float32 (B, H, Sq), natural logarithm.
"""

from dataclasses import dataclass

import torch

from .device import PLATFORM_NAMES, PRODUCTS, Device, describe
from .errors import Explained

CHOOSE_ANOTHER = "Choose another backend"
OFFSET_LIMIT = 2**31  # kernels that index with 32-bit integers read past this element offset from the wrong place


@dataclass(frozen=True)
class AttentionCall:
    """Everything a backend needs to know to accept or refuse a call. mask: "none", "keys" (the same keys for every
    query and head), "full".
    """

    batch: int
    q_len: int
    kv_len: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: Device
    mask: str = "none"
    need_lse: bool = False
    last_offset: int = 0
    unit_stride: bool = True

    def __str__(self):
        lengths = f"{self.q_len}" if self.q_len == self.kv_len else f"{self.q_len} queries x {self.kv_len} keys"
        heads = (
            f"{self.heads} heads" if self.heads == self.kv_heads else f"{self.heads} heads ({self.kv_heads} for k/v)"
        )
        extra = {"none": "", "keys": ", key-padding mask", "full": ", mask"}[self.mask]
        return f"batch {self.batch}, length {lengths}, {heads} of {self.head_dim}, {dtype_name(self.dtype)}{extra}"

    @property
    def flops(self):
        """Multiply-adds counted as two: the two products of B*H*Sq*Sk*D each."""
        return 4 * self.batch * self.heads * self.q_len * self.kv_len * self.head_dim


def dtype_name(dtype):
    return str(dtype).removeprefix("torch.")


def last_offset(tensor):
    """Element offset of a tensor's last element from its first."""
    return sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride()))


def call_of(q, k, v, mask_kind="none", need_lse=False):
    """The AttentionCall that describes these BSHD tensors."""
    return AttentionCall(
        batch=q.shape[0],
        q_len=q.shape[1],
        kv_len=k.shape[1],
        heads=q.shape[2],
        kv_heads=k.shape[2],
        head_dim=q.shape[3],
        dtype=q.dtype,
        device=describe(q.device),
        mask=mask_kind,
        need_lse=need_lse,
        last_offset=max(map(last_offset, (q, k, v))),
        unit_stride=all(t.stride(-1) == 1 for t in (q, k, v)),
    )


@dataclass(frozen=True)
class Hardware:
    """Where a backend can run: platform -> architectures (empty means any of that platform).

    anywhere: on every device that PyTorch knows, those that are not named too.
    """

    archs: dict
    why: str = ""
    anywhere: bool = False

    def reasons(self, device):
        """Sentences why this device cannot run it; empty means it can."""
        if self.anywhere:
            return []
        if device.platform not in self.archs:
            wanted = " or ".join(PLATFORM_NAMES.get(p, p) for p in self.archs)
            return [
                (
                    f"It needs {wanted}, and this model runs on {PLATFORM_NAMES.get(device.platform, device.platform)} "
                    f"({device.arch})."
                )
            ]
        allowed = self.archs[device.platform]
        if allowed and not arch_matches(device.arch, allowed):
            return [
                (
                    f"It needs one of the architectures {', '.join(allowed)} ({', '.join(cards(allowed))}), and this "
                    f"is {device.name} ({device.arch}).{' ' + self.why if self.why else ''}"
                )
            ]
        return []


def arch_matches(arch, allowed):
    """True when arch is one of allowed; "sm9x" and "gfx11xx" match any digit in place of x."""
    return any(len(arch) == len(a) and all(c in ("x", d) for c, d in zip(a, arch)) for a in allowed)


def cards(allowed):
    """Product names of architectures: ("sm9x",) gives ["H100", "H200"]. One without a known card stays as it is."""
    return [
        name
        for pattern in allowed
        for name in sum((names for arch, names in PRODUCTS.items() if arch_matches(arch, [pattern])), []) or [pattern]
    ]


@dataclass(frozen=True)
class Limits:
    """What a kernel accepts. Each field is one constraint and one sentence; None means no limit."""

    dtypes: tuple = (torch.bfloat16, torch.float16)
    head_dims: tuple | None = None  # exactly these
    head_dim_max: int | None = None
    head_dim_multiple: int = 1
    mask: bool = False  # takes any mask itself
    lse: bool = False
    grouped_heads: bool = True
    equal_lengths: bool = False
    min_length: int = 1
    length_multiple: int = 1
    max_offset: int | None = OFFSET_LIMIT

    def reasons(self, call):
        """Every reason as a sentence why this call is not accepted; empty means it is."""
        found = [
            self._dtype(call),
            self._head_dim(call),
            self._mask(call),
            self._lse(call),
            self._heads(call),
            *self._lengths(call),
            self._offset(call),
        ]
        return [sentence for sentence in found if sentence]

    def _dtype(self, call):
        if call.dtype not in self.dtypes:
            return f"It takes {', '.join(map(dtype_name, self.dtypes))}, and the tensors are {dtype_name(call.dtype)}."

    def _head_dim(self, call):
        d = call.head_dim
        if self.head_dims and d not in self.head_dims:
            return f"It takes head size {' or '.join(map(str, self.head_dims))}, and this model has {d}."
        if self.head_dim_max and d > self.head_dim_max:
            return f"It takes head sizes up to {self.head_dim_max}, and this model has {d}."
        if d % self.head_dim_multiple:
            return f"It takes head sizes divisible by {self.head_dim_multiple}, and this model has {d}."

    def _mask(self, call):
        if call.mask == "full" and not self.mask:
            return (
                "It takes no attention mask, and this call has one that differs between queries, heads or weights "
                "(a mask that only hides keys would work)."
            )

    def _lse(self, call):
        if call.need_lse and not self.lse:
            return "It cannot return the log-sum-exp, which ring attention needs."

    def _heads(self, call):
        if call.kv_heads != call.heads and not self.grouped_heads:
            return (
                f"It needs as many key/value heads as query heads, and this call has {call.kv_heads} and {call.heads}."
            )
        if call.heads % call.kv_heads:
            return f"Query heads ({call.heads}) must be a multiple of key/value heads ({call.kv_heads})."

    def _lengths(self, call):
        if self.equal_lengths and call.q_len != call.kv_len:
            yield f"It needs as many keys as queries, and this call has {call.kv_len} keys and {call.q_len} queries."
        shortest = min(call.q_len, call.kv_len)
        if shortest < self.min_length:
            yield f"It needs at least {self.min_length} tokens, and this call has {shortest}."
        if call.q_len % self.length_multiple or call.kv_len % self.length_multiple:
            yield (
                f"It needs lengths divisible by {self.length_multiple}, and this call has {call.q_len} queries and "
                f"{call.kv_len} keys."
            )

    def _offset(self, call):
        if self.max_offset and call.last_offset >= self.max_offset:
            return (
                f"It indexes with 32-bit integers, and these tensors span {call.last_offset + 1} elements "
                f"(limit {self.max_offset}). A smaller batch or image works."
            )


class AttentionRefused(Explained, ValueError):
    """A chosen backend cannot do this. Fields: backend (slug), reasons (list of sentences), hint (what to do), call
    (AttentionCall or None).

    The text is made from the fields, so that nodes, tests and reports read the same data.
    """

    def __init__(self, backend, reasons, hint="", call=None):
        self.backend, self.reasons, self.hint, self.call = backend, list(reasons), hint, call
        super().__init__(backend, self.reasons, hint, call)

    @property
    def topic(self):
        """The section about this refusal: about one call, about AITER, about approximate kernels, or about all."""
        if self.call and self.hint.startswith(CHOOSE_ANOTHER):
            return "refused-call"
        if self.backend.startswith("aiter"):
            return "aiter-on-rocm"
        return "quantised-backends" if self.backend.startswith(("sage", "comfy-int8")) else "backend-unavailable"

    def __str__(self):
        where = f" for this call ({self.call})" if self.call else " here"
        lines = [f"Attention backend '{self.backend}' cannot run{where}:", *(f"- {r}" for r in self.reasons)]
        return "\n".join(lines + ([self.hint] if self.hint else []))


def default_scale(head_dim):
    """1/sqrt(D), the scale of Vaswani et al. 2017, section 3.2.1."""
    return head_dim**-0.5
