"""Python values <-> JSON and a list of tensors, for what has to be equal on every rank: arguments of a forward pass,
LoRA patches, options.

  data, tensors = flatten({"x": tensor, "strength": 0.5, "adapter": LoRAAdapter(...)})
  value = restore(data, tensors)

Taken are None, numbers, strings, tensors, dtypes, tuples, lists, sets of strings, dicts with string keys, ComfyUI's
weight adapters and the functions named here. Anything else is Unsendable: only this list crosses a process boundary, so
nothing that arrives can be more than data.
"""

import math

import comfy.utils
import comfy.weight_adapter
import torch

from ...lora.dora import Decomposed
from . import dtypes

ADAPTERS = {adapter.__name__: adapter for adapter in (*comfy.weight_adapter.adapters, Decomposed)}
# what LoRA key maps of core name
FUNCTIONS = {name: getattr(comfy.utils, name) for name in ("swap_scale_shift",) if hasattr(comfy.utils, name)}
TAG = "$"  # a JSON object with this one key is not a dict but what the tag says


class Unsendable(TypeError):
    """A value that has no plain form. The text names its type."""


def flatten(value):
    """(JSON data, tensors). Raises Unsendable."""
    tensors = []
    return _flat(value, tensors), tensors


def _flat(value, tensors):
    if isinstance(value, float) and not math.isfinite(value):
        return {TAG: ["float", repr(value)]}
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, torch.Tensor) and type(value) in (torch.Tensor, torch.nn.Parameter):
        tensors.append(value)
        return {TAG: ["tensor", len(tensors) - 1]}
    if isinstance(value, torch.dtype):
        return {TAG: ["dtype", dtypes.name_of(value)]}
    if isinstance(value, list):
        return [_flat(item, tensors) for item in value]
    if isinstance(value, (tuple, set, frozenset)) and type(value) in (tuple, torch.Size, set, frozenset):
        kind = "set" if isinstance(value, (set, frozenset)) else "tuple"
        return {TAG: [kind, [_flat(item, tensors) for item in (sorted(value) if kind == "set" else value)]]}
    if isinstance(value, dict) and all(isinstance(key, str) and key != TAG for key in value):
        return {key: _flat(item, tensors) for key, item in value.items()}
    return {TAG: _object(value, tensors)}


def _object(value, tensors):
    for name, adapter in ADAPTERS.items():
        if type(value) is adapter:
            return ["adapter", name, _flat(value.loaded_keys, tensors), _flat(value.weights, tensors)]
    for name, function in FUNCTIONS.items():
        if value is function:
            return ["function", name]
    raise Unsendable(f"a value of type {type(value).__module__}.{type(value).__qualname__}")


def restore(data, tensors):
    """The value that `flatten` made this of."""
    if isinstance(data, list):
        return [restore(item, tensors) for item in data]
    if not isinstance(data, dict):
        return data
    if TAG not in data:
        return {key: restore(item, tensors) for key, item in data.items()}
    kind, content, *more = data[TAG]
    return RESTORE[kind](content, more, tensors)


RESTORE = {
    "float": lambda content, more, tensors: float(content),
    "tensor": lambda content, more, tensors: tensors[content],
    "dtype": lambda content, more, tensors: dtypes.named(content),
    "tuple": lambda content, more, tensors: tuple(restore(content, tensors)),
    "set": lambda content, more, tensors: set(restore(content, tensors)),
    "function": lambda content, more, tensors: FUNCTIONS[content],
    "adapter": lambda content, more, tensors: ADAPTERS[content](*(restore(part, tensors) for part in more)),
}
