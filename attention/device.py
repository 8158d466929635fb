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
}


@dataclass(frozen=True)
class Device:
    """platform: nvidia, amd, cpu, apple, intel or torch's own device type; arch: sm90, gfx942, x86_64 ...; name: as the
    driver says it.
    """

    platform: str
    arch: str
    name: str

    def __str__(self):
        return f"{self.name} ({self.arch})"


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
    kinds = {"mps": "apple", "xpu": "intel"}
    return Device(kinds.get(device.type, device.type), platform.machine(), platform.processor() or platform.machine())
