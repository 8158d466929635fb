"""PyTorch that claims to be a ROCm build with GPUs of one architecture: torch.version.hip, device names, gcnArchName,
wave size, and the kernels that AMD builds lack. Tensors stay on the CPU and are called tensors of that GPU, so that
everything that decides by device can run here. No AMD code runs."""

from dataclasses import dataclass
import types

import torch

import pack  # noqa: F401
from flux2_pack.attention import call, device, registry

HIP = "7.2.53211-e1a6bc5663"
# name as the driver gives it, compute units, GiB: AMD's product pages
CARDS = {
    "gfx90a": ("AMD Instinct MI250X", 110, 64),
    "gfx942": ("AMD Instinct MI300X", 304, 192),
    "gfx950": ("AMD Instinct MI355X", 256, 288),
    "gfx1100": ("AMD Radeon RX 7900 XTX", 96, 24),
    "gfx1101": ("AMD Radeon RX 7800 XT", 60, 16),
    "gfx1151": ("AMD Radeon 8060S", 40, 96),
    "gfx1201": ("AMD Radeon RX 9070 XT", 64, 16),
}
INSTINCT = ("gfx90a", "gfx942", "gfx950")


def properties(arch):
    name, units, gigabytes = CARDS[arch]
    return types.SimpleNamespace(
        name=name,
        gcnArchName=f"{arch}:sramecc+:xnack-" if arch in INSTINCT else arch,
        warp_size=64 if arch in INSTINCT else 32,
        multi_processor_count=units,
        total_memory=gigabytes * 2**30,
        major=int(arch[3:-2]),
        minor=0,
    )


@dataclass
class Rocm:
    """The pretended machine. device: attention.device.Device of its GPUs."""

    arch: str
    gpus: int
    device: device.Device


def pretend(monkeypatch, arch, gpus=1):
    """Make torch claim this until the test ends. Returns a Rocm."""
    import torch._dynamo  # noqa: F401  it looks at operators that are replaced here, so it is imported before

    claimed = properties(arch)

    def no_cudnn(*args, **kwargs):
        raise RuntimeError("_scaled_dot_product_cudnn_attention: PyTorch was not compiled with cuDNN")

    for target, name, value in (
        (torch.version, "hip", HIP),
        (torch.version, "cuda", None),
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "device_count", lambda: gpus),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "get_device_properties", lambda index=None: claimed),
        (torch.cuda, "get_device_name", lambda index=None: claimed.name),
        (torch.cuda, "get_device_capability", lambda index=None: (claimed.major, claimed.minor)),
        (torch.cuda, "is_current_stream_capturing", lambda: False),
        (torch.cuda, "can_device_access_peer", lambda a, b: arch in INSTINCT),
        (torch.cuda.nccl, "version", lambda: (2, 27, 7)),
        (torch.ops.aten, "_scaled_dot_product_cudnn_attention", no_cudnn),
    ):
        monkeypatch.setattr(target, name, value)
    monkeypatch.setattr(device, "_accelerator", device._accelerator.__wrapped__)  # asks anew in every test
    monkeypatch.setattr(registry, "_modules", {})
    monkeypatch.setattr(registry, "_passed", set())
    card = device.describe("cuda")
    for module in (call, registry):
        monkeypatch.setattr(module, "describe", lambda _: card)
    return Rocm(arch, gpus, card)
