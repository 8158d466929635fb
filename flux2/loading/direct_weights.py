"""Layers that use their weights as they are, where ComfyUI would ask at each call whether they must be cast."""

import torch


class DirectWeights:
    """Inside a with block, the layers of a network whose weights lie on the device in the calculation's format use them
    as they are.

    ComfyUI's casting asks every layer at every call whether its weight must be fetched or changed: three quarters of a
    token's time when Mistral writes on an H200 (benchmarks/results/upsample-h200.json). Layers that are offloaded,
    quantised or patched at call time keep it. Nothing is loaded or moved meanwhile: ComfyUI does that between nodes.
    """

    def __init__(self, network, device, dtype):
        self.modules = [module for module in network.modules() if needs_no_cast(module, device, dtype)]

    def __enter__(self):
        for module in self.modules:
            module.comfy_cast_weights = False

    def __exit__(self, *error):
        for module in self.modules:
            module.comfy_cast_weights = True


def needs_no_cast(module, device, dtype):
    """True for a layer of ComfyUI's that casts, and whose weights need none."""
    if (
        not getattr(module, "comfy_cast_weights", False)
        or hasattr(module, "layout_type")
        or hasattr(module, "_v")
        or isinstance(module, torch.nn.Embedding)
    ):
        return False
    weights = [w for w in (getattr(module, "weight", None), getattr(module, "bias", None)) if w is not None]
    return not (module.weight_function or module.bias_function) and all(
        w.device == device and w.dtype == dtype for w in weights
    )
