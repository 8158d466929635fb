"""Which GPUs ranks can be put on, and in how many of them one image is to be split."""

from collections import Counter
from dataclasses import dataclass
import os

import torch

from ....attention.errors import UserError
from . import process_groups, launch
from .pool import ParallelPlan


@dataclass(frozen=True)
class DevicesFound:
    """Where ranks can run. device: "cuda" or "cpu"; places: index of each GPU, rank 0's first, or None for each rank on
    the CPU; text: what there is, a phrase.
    """

    device: str
    places: tuple
    text: str


def find_devices(device):
    """What this machine has beside the device that a model runs on. AMD GPUs are "cuda" to PyTorch."""
    device = torch.device(device)
    if device.type == "cuda":
        first = torch.cuda.current_device() if device.index is None else device.index
        others = [index for index in range(torch.cuda.device_count()) if index != first]
        return DevicesFound("cuda", (first, *others), names_of((first, *others)))
    ranks = os.environ.get(launch.CPU_RANKS, "")
    if device.type == "cpu" and ranks.isdigit() and int(ranks) > 0:
        return DevicesFound("cpu", (None,) * int(ranks), f"{ranks} ranks on the CPU ({launch.CPU_RANKS})")
    return DevicesFound(device.type, (0,), f"no GPU that several ranks can use: the model runs on {device}")


def names_of(gpus):
    names = Counter(torch.cuda.get_device_name(index) for index in gpus)
    return ", ".join(f"{count} x {name}" for name, count in names.items())


def plan_ranks(device, gpus, degrees):
    """(ParallelPlan, why). gpus: how many, 0 for all of this machine. degrees(number) chooses them: an object with
    ulysses, ring, tensor and why. ParallelPlan is None for one GPU.

    ValueError, in words, when there are fewer, or when these devices cannot exchange data.
    """
    here = find_devices(device)
    number = gpus or len(here.places)
    if number == 1:
        return None, f"One rank: {here.text}."
    elsewhere = max(0, number - len(here.places))
    if elsewhere and not os.environ.get(launch.LISTEN):
        raise UserError(
            f"{number} GPUs were asked for, and there is {here.text}. Set gpus to {len(here.places)} or less, or to 0 "
            f"for all of them. {hint(here)}",
            "several-gpus",
        )
    reason = process_groups.unavailable(here.device)
    if reason:
        raise UserError(reason, "several-gpus")
    chosen, places = degrees(number), here.places[:number]
    why = " ".join((chosen.why, *(slower(places) if here.device == "cuda" else ())))
    return ParallelPlan(chosen.ulysses, chosen.ring, here.device, places, elsewhere, tensor=chosen.tensor), why


def slower(gpus):
    """Sentences about what makes these GPUs gain less than their number says."""
    if len({torch.cuda.get_device_name(gpu) for gpu in gpus}) > 1:
        yield f"These GPUs are not alike ({names_of(gpus)}): a step takes as long as the slowest of them."
    apart = [(a, b) for a in gpus for b in gpus if a < b and not torch.cuda.can_device_access_peer(a, b)]
    if apart:
        (a, b), more = apart[0], f" and {len(apart) - 1} more pairs" if len(apart) > 1 else ""
        yield (
            f"cuda:{a} and cuda:{b}{more} cannot read each other's memory: what they exchange goes through host "
            "memory, and several GPUs gain less."
        )


def hint(here):
    if here.device == "cuda":
        return f"GPUs of other hosts can join when ComfyUI is started with {launch.LISTEN} (see docs/several-gpus.md)."
    return (
        f"Without GPUs it can only be tried out: start ComfyUI with {launch.CPU_RANKS}=2, and two processes share "
        "the CPU."
    )
