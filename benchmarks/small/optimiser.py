"""Muon for the matrices of transformer blocks (momentum made orthogonal, matrices of one shape together), Adam for
everything else.

Muon: Keller Jordan 2024; the scale by the longer side, which makes one learning rate serve both halves, is that of Liu
et al. 2025 (Moonlight).
"""

import torch

STEPS = ((3.4445, -4.7750, 2.0315),) * 5  # Newton-Schulz coefficients


def orthogonal(matrices):
    """(K, R, C) -> the nearest matrices with all singular values near 1, by five Newton-Schulz steps in bfloat16."""
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for a, b, c in STEPS:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).float()


class Muon:
    """One momentum per shape. `rate` is the learning rate in Adam's scale."""

    def __init__(self, parameters, momentum=0.95):
        self.momentum, self.groups = momentum, {}
        for parameter in parameters:
            # a convolution is a matrix of its patches
            self.groups.setdefault(tuple(parameter.flatten(1).shape), []).append(parameter)
        self.memory = {
            shape: torch.zeros(len(group), *shape, device=group[0].device) for shape, group in self.groups.items()
        }

    @torch.no_grad()
    def step(self, rate):
        for shape, group in self.groups.items():
            gradient = torch.stack([parameter.grad.flatten(1) for parameter in group]).float()
            memory = self.memory[shape].lerp_(gradient, 1 - self.momentum)
            update = orthogonal(gradient.lerp(memory, self.momentum))
            torch._foreach_add_(
                group,
                [part.view_as(parameter) for part, parameter in zip(update, group)],
                alpha=-rate * 0.2 * max(shape) ** 0.5,
            )


def halves(models):
    """(matrices inside blocks and layers, all other parameters) of {kind: model}."""
    named = {f"{kind}.{name}": value for kind, model in models.items() for name, value in model.named_parameters()}
    inner = [name for name, value in named.items() if value.ndim == 2 and ("_blocks." in name or ".layers." in name)]
    return [named[name] for name in inner], [value for name, value in named.items() if name not in set(inner)]


class Optimiser:
    """Both halves. `matrices` go to Muon, `others` to Adam; `rates` are theirs at full speed."""

    def __init__(self, matrices, others, rates):
        self.others, self.rates = list(others), rates
        self.muon = Muon(list(matrices))
        self.adam = torch.optim.Adam(self.others, lr=rates[1], betas=(0.9, 0.98), fused=self.others[0].is_cuda)

    def step(self, share):
        """One step at `share` of the full learning rates; clears the gradients."""
        torch.nn.utils.clip_grad_norm_(self.others, 1.0)
        for group in self.adam.param_groups:
            group["lr"] = self.rates[1] * share
        self.adam.step()
        self.muon.step(self.rates[0] * share)
        for parameter in (*self.others, *(parameter for group in self.muon.groups.values() for parameter in group)):
            parameter.grad = None
