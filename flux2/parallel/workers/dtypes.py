"""Names of the number formats that may cross a process boundary. A name that is not in this table is refused: nothing
that arrives is looked up in a module.
"""

import torch

NAMES = (
    *("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64"),
    *("complex64", "complex128", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"),
    *("float8_e8m0fnu", "float4_e2m1fn_x2", "uint16", "uint32", "uint64"),  # of newer PyTorch
)
DTYPES = {name: getattr(torch, name) for name in NAMES if hasattr(torch, name)}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def name_of(dtype):
    """The name of a torch.dtype; TypeError for one that is not sent."""
    if dtype not in _NAMES:
        raise TypeError(f"Tensors of {dtype} cannot be sent to another process.")
    return _NAMES[dtype]


def named(name):
    """The torch.dtype of a name; ValueError for one that is not in the table."""
    if not isinstance(name, str) or name not in DTYPES:
        raise ValueError(f"The number format {str(name)[:40]!r} is not one that can be received.")
    return DTYPES[name]


def empty(kind, device="cpu"):
    """A new tensor of a kind [dtype name, shape]; ValueError for anything else."""
    dtype, shape = kind
    if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < 2**48 for size in shape):
        raise ValueError(f"A tensor of the shape {str(shape)[:80]} cannot be received.")
    return torch.empty(shape, dtype=named(dtype), device=device)


def kind_of(tensor):
    """[dtype name, shape]."""
    return [name_of(tensor.dtype), list(tensor.shape)]
