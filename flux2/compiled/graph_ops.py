"""What a compiled block reaches outside its graph, by custom operators: attention, and layers whose weights a graph
cannot
hold.

An operator looks up what to call when it runs, in the block that is running. So one graph serves every block of its
kind: it names a layer by its place and holds no attention backend, no block number and no way of fetching weights. Any
attention override, quantised, offloaded or patched layer then does in a compiled block what it does in an eager one.
"""

from contextlib import ExitStack, contextmanager
from functools import lru_cache
import threading
from typing import Optional

import torch
from torch import Tensor

from comfy.ldm.flux import math as flux_math

from ..fused.linear import norm_weight
from ..module_forward import forward_as


class _Running(threading.local):
    """The block that this thread is running: core's transformer_options of the call, and {place: the layer's own
    function}.
    """

    options = None
    layers = None


_running = _Running()


@contextmanager
def inside(options, layers):
    """Around a call of a compiled block."""
    before = _running.options, _running.layers
    _running.options, _running.layers = options, layers
    try:
        yield
    finally:
        _running.options, _running.layers = before


# --- attention -------------------------------------------------------------------------------------------------------


@torch.library.custom_op("flux2_blocks::attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Optional[Tensor], heads: int, scale: Optional[float]) -> Tensor:
    extra = {} if scale is None else {"scale": scale}
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
    return norm_weight(_running.layers[place].__self__, x).clone()


@_norm_weight.register_fake
def _(x, place, size):
    return x.new_empty((size,))


def holdable(layer, like):
    """Whether a graph can hold a layer: its weight is a plain tensor on the device and in the format of `like`, and
    nothing changes it at call time.
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
        and not (getattr(layer, "weight_function", ()) or getattr(layer, "bias_function", ()))
    )


@contextmanager
def stand_ins(layers, like):
    """Stand-ins for the layers of a block that no graph can hold, for the time of a call; gives their number.

    layers: [(place, layer)]; like: the block's input. If one linear layer needs a stand-in then all get one, and so
    with norms: few ways of keeping weights, few graphs.
    """
    norms, others = [], []
    for place, layer in layers:
        (norms if isinstance(layer, torch.nn.RMSNorm) and "forward" not in vars(layer) else others).append(
            (place, layer)
        )
    outside = [
        found for group in (norms, others) if not all(holdable(layer, like) for _, layer in group) for found in group
    ]
    with ExitStack() as stack:
        for place, layer in outside:
            stack.enter_context(forward_as(layer, stand_in(place, layer)))
        yield len(outside)


def stand_in(place, layer):
    """What a graph calls in the place of a layer."""
    if isinstance(layer, torch.nn.RMSNorm) and "forward" not in vars(layer):
        return _norm(place, tuple(layer.normalized_shape), layer.eps)
    return (
        _linear(place, layer.out_features)
        if hasattr(layer, "out_features")
        else _linear(place, layer.normalized_shape[-1])
    )


@lru_cache(maxsize=None)  # one function for a place, so that the graph of one block is that of all
def _linear(place, features):
    return lambda x: _layer(x, place, features)


@lru_cache(maxsize=None)
def _norm(place, shape, eps):
    return lambda x: torch.nn.functional.rms_norm(x, shape, _norm_weight(x, place, shape[0]), eps)
