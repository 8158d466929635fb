"""What a compiled block reaches outside its graph, by custom operators: attention, and layers whose weights a graph
cannot hold.

An operator looks up what to call when it runs, in the block that is running. So one graph serves every block of its
kind: it names a layer by its place and holds no attention backend, no block number and no way of fetching weights. Any
attention override, quantised, offloaded or patched layer then does in a compiled block what it does in an eager one.
"""

from contextlib import contextmanager
from functools import lru_cache
import threading
from typing import Optional

import torch
from torch import Tensor

from comfy.ldm.flux import math as flux_math

from ..fused.linear import norm_weight


class _Running(threading.local):
    """The block that this thread is running: core's transformer_options of the call, {place: layer}, and the block's
    own choice of attention (fused.blocks.own_choice).
    """

    options = None
    layers = None
    own = {}


_running = _Running()


@contextmanager
def inside(options, layers, own):
    """Around a call of a compiled block."""
    before = _running.options, _running.layers, _running.own
    _running.options, _running.layers, _running.own = options, layers, own
    try:
        yield
    finally:
        _running.options, _running.layers, _running.own = before


# --- attention -------------------------------------------------------------------------------------------------------


@torch.library.custom_op("flux2_blocks::attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Optional[Tensor], heads: int, scale: Optional[float]) -> Tensor:
    extra = _running.own if scale is None else {"scale": scale, **_running.own}
    out = flux_math.optimized_attention(
        q, k, v, heads, mask=mask, skip_reshape=True, transformer_options=_running.options, **extra
    )
    return out.contiguous()


@_attention.register_fake
def _(q, k, v, mask, heads, scale):
    return q.new_empty((q.shape[0], q.shape[2], heads * v.shape[-1]))


def attention(
    func, q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, **kwargs
):
    """An attention override for the time of tracing: q, k, v (B, H, S, D) -> (B, S, H*D), one node of the graph."""
    unknown = sorted(set(kwargs) - {"transformer_options", "_inside_attn_wrapper", "scale"})
    if unknown or not skip_reshape or skip_output_reshape:
        raise NotImplementedError(
            f"this block calls attention in a way that is not known here ({', '.join(unknown) or 'another layout'})"
        )
    return _attention(q, k, v, mask, heads, kwargs.get("scale"))


# --- layers ----------------------------------------------------------------------------------------------------------


@torch.library.custom_op("flux2_blocks::layer", mutates_args=())
def _layer(x: Tensor, place: str, features: int) -> Tensor:
    return _running.layers[place](x).contiguous()


@_layer.register_fake
def _(x, place, features):
    return x.new_empty((*x.shape[:-1], features))


@torch.library.custom_op("flux2_blocks::norm_weight", mutates_args=())
def _norm_weight(x: Tensor, place: str, size: int) -> Tensor:
    # a copy: the graph may write into what an operator returns
    return norm_weight(_running.layers[place], x).clone()


@_norm_weight.register_fake
def _(x, place, size):
    return x.new_empty((size,))


class OutsideLayer(torch.nn.Module):
    """What a graph sees in the place of a layer: an operator that calls the layer when the graph runs."""

    def __init__(self, place, features):
        super().__init__()
        self.place, self.features = place, features

    def forward(self, x):
        return _layer(x, self.place, self.features)


class OutsideNorm(torch.nn.Module):
    """What a graph sees in the place of an RMSNorm: the norm, with a weight that is fetched when the graph runs."""

    def __init__(self, place, shape, eps):
        super().__init__()
        self.place, self.shape, self.eps = place, shape, eps

    def forward(self, x):
        return torch.nn.functional.rms_norm(x, self.shape, _norm_weight(x, self.place, self.shape[0]), self.eps)


@lru_cache(maxsize=None)  # one for a place, so that the graph of one block is that of all, and of all loads
def outside(kind, *arguments):
    return kind(*arguments)


def stand_in(place, layer):
    """The OutsideLayer or OutsideNorm of a layer."""
    if is_norm(layer):
        return outside(OutsideNorm, place, tuple(layer.normalized_shape), layer.eps)
    return outside(
        OutsideLayer, place, layer.out_features if hasattr(layer, "out_features") else layer.normalized_shape[-1]
    )


def is_norm(layer):
    return isinstance(layer, torch.nn.RMSNorm) and "forward" not in vars(layer)


def holdable(layer, like):
    """Whether a graph can hold a layer: its weight is a plain tensor on the device and in the format of `like`, nothing
    changes it at call time, and its class outlives the model. A graph is guarded by the classes of what is in it, and
    ComfyUI makes a class of Linear for each load of a quantised model.
    """
    weight = layer.weight
    plain = (
        type(weight) is torch.nn.Parameter
        and weight.device == like.device
        and weight.dtype == like.dtype
        and not hasattr(layer, "_v")
    )
    return (
        plain
        and "forward" not in vars(layer)
        and "<locals>" not in type(layer).__qualname__
        and not (getattr(layer, "weight_function", ()) or getattr(layer, "bias_function", ()))
    )


@contextmanager
def stand_ins(block, layers, like):
    """Stand-ins for the layers of a block that no graph can hold, in their places for the time of a call; gives their
    number.

    layers: [(place, layer)]; like: the block's input. If one linear layer needs a stand-in then all get one, and so
    with norms: few ways of keeping weights, few graphs.
    """
    groups = [[found for found in layers if is_norm(found[1]) == norms] for norms in (True, False)]
    left_out = [found for group in groups if not all(holdable(layer, like) for _, layer in group) for found in group]
    parents = []
    try:
        for place, layer in left_out:
            parent, _, name = place.rpartition(".")
            children = block.get_submodule(parent)._modules
            parents.append((children, name, layer))
            children[name] = stand_in(place, layer)
        yield len(left_out)
    finally:
        for children, name, layer in parents:
            children[name] = layer
