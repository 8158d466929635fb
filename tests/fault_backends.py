"""Attention backends with known faults, and exact ones that round in another way: what a comparison must tell apart.
Registered by a test, as a library's file would be: `with registered(): ...` adds a row per entry of FAKES to the
registry, the slug being "fake-" and the name.
"""

import contextlib
import types

import pytest
import torch
import torch.nn.functional as F

from flux2_pack.attention import registry
from flux2_pack.attention.adapter import Adapter
from flux2_pack.attention.call import Limits

TEXT = 512  # tokens in front of the picture's


def exact(q, k, v, scale):
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def by_definition(q, k, v, scale):
    return torch.softmax((q * scale) @ k.transpose(-1, -2), -1) @ v


def by_blocks_of_keys(q, k, v, scale):
    """The running softmax of FlashAttention over 96 keys at a time, summed in float32."""
    high = q.new_full((*q.shape[:-1], 1), -1e30, dtype=torch.float32)
    total, out = torch.zeros_like(high), torch.zeros_like(q, dtype=torch.float32)
    for start in range(0, k.shape[2], 96):
        scores = (q @ k[:, :, start : start + 96].transpose(-1, -2)).float() * scale
        highest = torch.maximum(high, scores.amax(-1, True))
        weights, keep = torch.exp(scores - highest), torch.exp(high - highest)
        total, out, high = (
            total * keep + weights.sum(-1, True),
            out * keep + (weights.to(q.dtype) @ v[:, :, start : start + 96]).float(),
            highest,
        )
    return (out / total).to(q.dtype)


def scale_off_by_a_percent(q, k, v, scale):
    return exact(q, k, v, scale * 1.01)


def head_dropped(q, k, v, scale):
    out = exact(q, k, v, scale).clone()
    out[:, 0] = 0
    return out


def rows_swapped(q, k, v, scale):
    out = exact(q, k, v, scale)
    return torch.cat([out[:, :, TEXT:], out[:, :, :TEXT]], dim=2) if out.shape[2] > TEXT else out.flip(2)


def padding_attended(q, k, v, scale):
    missing = -k.shape[2] % 128 or 128
    return exact(q, F.pad(k, (0, 0, 0, missing)), F.pad(v, (0, 0, 0, missing)), scale)


def one_key_of_padding(q, k, v, scale):
    return exact(q, F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1)), scale)


def fp8_values_unscaled(q, k, v, scale):
    return exact(q, k, v.to(torch.float8_e4m3fn).to(q.dtype), scale)


def fp8_values_scale_forgotten(q, k, v, scale):
    return exact(q, k, (v / (v.abs().amax() / 448)).to(torch.float8_e4m3fn).to(q.dtype), scale)


def nan(q, k, v, scale):
    out = exact(q, k, v, scale).clone()
    out[0, 0, 3] = float("nan")
    return out


def raises(q, k, v, scale):
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


FAITHFUL = (by_definition, by_blocks_of_keys)
FAULTS = (
    scale_off_by_a_percent,
    one_key_of_padding,
    padding_attended,
    fp8_values_unscaled,
    head_dropped,
    rows_swapped,
    fp8_values_scale_forgotten,
)
GROSS = (head_dropped, rows_swapped, fp8_values_scale_forgotten)
FAKES = {function.__name__.replace("_", "-"): function for function in (*FAITHFUL, *FAULTS, nan, raises)}


class Fake(Adapter):
    """A backend made of a function of (B, H, S, D) tensors."""

    limits = Limits(dtypes=(torch.float32, torch.bfloat16, torch.float16), max_offset=None)

    def __init__(self, function):
        self.function = function

    def run(self, q, k, v, mask, scale, need_lse):
        return self.function(*(t.transpose(1, 2) for t in (q, k, v)), scale).transpose(1, 2), None


def slug(function):
    return "fake-" + function.__name__.replace("_", "-")


@contextlib.contextmanager
def registered(probed=False):
    """The fakes in the registry. probed: whether the selector's test call may refuse them, which catches gross faults
    before anything is sampled.
    """
    with pytest.MonkeyPatch.context() as patch:
        module = types.SimpleNamespace(ADAPTERS={f"fake-{name}": Fake(function) for name, function in FAKES.items()})
        patch.setitem(registry._modules, "fake", (module, None))
        for name in module.ADAPTERS:
            patch.setitem(
                registry.ROWS,
                name,
                registry.BackendRow("fake", "a test", registry.ANY, True, "It cannot be installed.", "a fake"),
            )
        if not probed:
            patch.setattr(registry, "probe", lambda *_: [])
        yield
