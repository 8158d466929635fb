"""What a torch device really is. `device.type == "cuda"` is also true on ROCm, so every question about vendors is asked
here.
"""

from dataclasses import dataclass
from functools import lru_cache
import platform

import torch

PLATFORM_NAMES = {
    "nvidia": "an NVIDIA GPU",
    "amd": "an AMD GPU",
    "cpu": "a CPU",
    "apple": "an Apple GPU",
    "intel": "an Intel GPU",
    "privateuseone": "DirectML",
    "npu": "an NPU",
    "mlu": "an MLU",
}


# What the makers call cards of an architecture, in the order of sm and gfx numbers: NVIDIA's table of compute
# capabilities (developer.nvidia.com/cuda-gpus), AMD's of ROCm's GPUs. Names of families, not every card.
PRODUCTS = {
    "sm75": ["RTX 20"],
    "sm80": ["A100"],
    "sm86": ["RTX 30"],
    "sm87": ["Jetson Orin"],
    "sm89": ["RTX 40", "L40S"],
    "sm90": ["H100", "H200"],
    "sm100": ["B200"],
    "sm103": ["B300"],
    "sm110": ["Jetson Thor"],
    "sm120": ["RTX 50"],
    "sm121": ["DGX Spark"],
    "gfx90a": ["MI210", "MI250"],
    "gfx942": ["MI300", "MI325X"],
    "gfx950": ["MI350X", "MI355X"],
    "gfx1100": ["RX 7900"],
    "gfx1101": ["RX 7700", "RX 7800"],
    "gfx1102": ["RX 7600"],
    "gfx1150": ["Radeon 890M"],
    "gfx1151": ["Radeon 8060S"],
    "gfx1200": ["RX 9060"],
    "gfx1201": ["RX 9070"],
}
PLATFORMS = {"mps": "apple", "xpu": "intel"}  # torch's device types by another name; CUDA and ROCm share one
FLOAT64 = ("cpu", "nvidia", "amd")  # ComfyUI's supports_fp64 says the same: Apple, Intel and DirectML have none


@dataclass(frozen=True)
class Device:
    """platform: nvidia, amd, cpu, apple, intel or torch's own device type; arch: sm90, gfx942, x86_64 ...; name: as the
    driver says it.
    """

    platform: str
    arch: str
    name: str

    def __str__(self):
        return self.name if self.name == self.arch else f"{self.name} ({self.arch})"


def is_rocm():
    return torch.version.hip is not None


@lru_cache(maxsize=None)
def _accelerator(index):
    properties = torch.cuda.get_device_properties(index)
    if is_rocm():
        # gcnArchName carries feature flags after a colon: "gfx942:sramecc+:xnack-"
        return Device("amd", properties.gcnArchName.split(":")[0], properties.name)
    return Device("nvidia", f"sm{properties.major}{properties.minor}", properties.name)


def describe(device):
    """Device facts for a torch.device (or its string). Asks the driver once per GPU and remembers."""
    device = torch.device(device)
    if device.type == "cuda":
        return _accelerator(torch.cuda.current_device() if device.index is None else device.index)
    known = PLATFORMS.get(device.type, device.type)
    if device.type not in ("cpu", "mps"):  # a device type that only some builds of PyTorch know
        return Device(known, device.type, device.type)
    return Device(known, platform.machine(), platform.processor() or platform.machine())


def as_float64(tensor):
    """A tensor in float64, on its own device where that is known to have the format, else on the CPU."""
    return tensor.double() if describe(tensor.device).platform in FLOAT64 else tensor.cpu().double()


def synchronise(device):
    """Wait until a torch.device has done its work; a CPU has when the call returns, and so does a device type whose
    module has no such function.
    """
    module = getattr(torch, torch.device(device).type, None)
    if hasattr(module, "synchronize") and torch.device(device).type != "cpu":
        module.synchronize()
