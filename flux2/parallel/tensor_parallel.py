"""Weights split over the GPUs (tensor parallel): each process holds a part of every large weight of the blocks.

As in Megatron-LM (Shoeybi et al. 2019, section 3): a layer that makes heads or feed-forward columns is cut by its
outputs, the layer that reads them by its inputs, and the products of the latter are added over the processes. Layers
that hold several things side by side (q, k and v; the two halves of SwiGLU; attention and feed-forward of a single
block) have each of them cut, so that every part is a smaller block of the same form: core's block and Fast Blocks
compute it as they are, with fewer heads. Embedders, modulation, norms and the last layer are on every process.

  reasons = unsupported(network, 2)                 # sentences, empty where the weights can be split
  parallel = TensorParallel(network, rank, 2)       # makes the network's blocks smaller, and leaves its weights alone
  parallel.part(key, weight)                        # this process's part of a weight; see workers/replica.py
  with parallel.over(mesh): network(...)            # sums are taken over mesh.tensor_group

Not torch's DTensor: ComfyUI's casting, patching (LoRA) and quantised tensors, which are a tensor class of their own,
do not know it, and its plans cut a weight in equal runs, which q, k, v and the halves of SwiGLU in one weight are not.
"""

from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from ...attention.errors import UserError

ATTRIBUTE = "tensor_parallel"  # of a network, where its TensorParallel is
PREFIX = "diffusion_model."  # of a network's weights among those of ComfyUI's model
ADD = "add_over_processes"  # of a layer that is cut by its inputs: for kernels that compute it without calling it
# formats whose numbers stand for themselves: one scale for the weight, or one for each output
FORMATS = {"TensorCoreFP8E4M3Layout": "fp8", "TensorCoreFP8E5M2Layout": "fp8", "TensorWiseINT8Layout": "int8"}
OUTPUTS, INPUTS = 0, 1  # dimensions of a weight (out, in)


@dataclass(frozen=True)
class Cut:
    """How a weight is cut. dimension: OUTPUTS or INPUTS; runs: lengths of what lies side by side along it, each of
    which every process gets an equal part of.
    """

    dimension: int
    runs: tuple

    def ranges(self, rank, size):
        """[(first, length)] of a process's part along the dimension."""
        starts = [sum(self.runs[:index]) for index in range(len(self.runs))]
        return [(start + rank * (run // size), run // size) for start, run in zip(starts, self.runs)]

    def of(self, tensor, rank, size, dimension=None):
        """A process's part of a tensor, a copy. dimension: that of the tensor, where it is another."""
        dimension = self.dimension if dimension is None else dimension
        # by bytes: not every device joins fp8
        raw = tensor.view(torch.uint8) if tensor.itemsize == 1 else tensor
        return torch.cat([raw.narrow(dimension, *at) for at in self.ranges(rank, size)], dimension).view(tensor.dtype)


def cuts_of(network):
    """{name of a layer: its Cut}, of every layer of a whole FLUX.2 network that is cut."""
    hidden, found = network.hidden_size, {}
    for index, block in enumerate(network.double_blocks):
        for stream in ("img", "txt"):
            layers, columns = f"double_blocks.{index}.{stream}", getattr(block, f"{stream}_mlp")[2].in_features
            found[f"{layers}_attn.qkv"] = Cut(OUTPUTS, (hidden,) * 3)
            found[f"{layers}_attn.proj"] = Cut(INPUTS, (hidden,))
            found[f"{layers}_mlp.0"] = Cut(OUTPUTS, (columns,) * 2)
            found[f"{layers}_mlp.2"] = Cut(INPUTS, (columns,))
    for index, block in enumerate(network.single_blocks):
        layers, columns = f"single_blocks.{index}", block.mlp_hidden_dim
        found[f"{layers}.linear1"] = Cut(OUTPUTS, (hidden,) * 3 + (columns,) * 2)
        found[f"{layers}.linear2"] = Cut(INPUTS, (hidden, columns))
    return found


def unsupported(network, size):
    """Sentences why the weights of a network cannot be split over `size` processes; empty means they can."""
    blocks = [*getattr(network, "double_blocks", ()), *getattr(network, "single_blocks", ())]
    if not blocks or not all(flux2_block(block) for block in blocks):
        return [f"Weights can be split for FLUX.2 models, and this is another one ({type(network).__name__})."]
    if network.num_heads % size:
        return [f"The weights cannot be split over {size} GPUs: the model has {network.num_heads} attention heads."]
    cuts, found = cuts_of(network), []
    for name, cut in cuts.items():
        layer = network.get_submodule(name)
        reason = "it has a bias, which FLUX.2 has not" if getattr(layer, "bias", None) is not None else None
        reason = reason or cannot_cut(layer, cut, size)
        if reason:
            found.append(f"The weights cannot be split over {size} GPUs: {name}: {reason}.")
    return found[:1]  # the others say the same


def flux2_block(block):
    """Whether a block is core's with FLUX.2's SwiGLU."""
    if type(block).__module__ != "comfy.ldm.flux.layers":
        return False
    activation = block.mlp_act if hasattr(block, "mlp_act") else block.img_mlp[1] if len(block.img_mlp) == 3 else None
    return type(activation).__name__ == "SiLUActivation"


def cannot_cut(layer, cut, size):
    """Why the weight of a layer cannot be cut, a phrase; None when it can."""
    if any(run % size for run in cut.runs):
        return f"its {' + '.join(map(str, cut.runs))} numbers do not divide"
    weight = layer.weight
    layout = getattr(weight, "_layout_cls", None)
    if layout is None:
        plain = type(weight) in (torch.Tensor, torch.nn.Parameter) and weight.is_floating_point() and weight.ndim == 2
        return None if plain else f"its format ({type(weight).__name__}) is not one whose parts are known"
    if layout not in FORMATS:
        return (
            f"its format ({getattr(layer, 'quant_format', None) or layout}) has scales for blocks of numbers. Use a "
            "bf16, fp8 or int8 file, or weights on every GPU"
        )
    if getattr(layer, "pre_quant_scale", None) is not None:
        return "its file has scales for the layer's inputs. Use a file without them, or weights on every GPU"
    group = weight._params.convrot_groupsize if getattr(weight._params, "convrot", False) else 1
    if cut.dimension == INPUTS and any(run // size % group for run in cut.runs):
        return f"its int8 numbers are rotated in groups of {group}, and a part would end inside of one"
    if getattr(weight._params, "transposed", False):
        return "its weight is kept transposed"
    return None


class TensorParallel:
    """The part of a network that this process computes. size, rank: how many parts there are, and which this is; mesh:
    whose tensor_group sums are taken over, while a pass runs.
    """

    def __init__(self, network, rank, size):
        reasons = unsupported(network, size)
        if reasons:
            raise UserError(" ".join(reasons), "several-gpus")
        self.rank, self.size, self.mesh = rank, size, None
        cuts = cuts_of(network)
        self.cuts = {f"{PREFIX}{name}.weight": cut for name, cut in cuts.items()}
        setattr(network, ATTRIBUTE, self)
        for block in network.double_blocks:
            block.num_heads //= size
        for block in network.single_blocks:
            block.num_heads //= size
            block.hidden_size //= size  # what its forward cuts linear1's output by
            block.mlp_hidden_dim //= size
            block.mlp_hidden_dim_first //= size
        for name, cut in cuts.items():
            layer = network.get_submodule(name)
            if cut.dimension == OUTPUTS:
                layer.out_features //= size
            else:
                layer.in_features //= size
                layer.register_forward_hook(lambda layer, given, out: self.add(out))
                setattr(layer, ADD, self.add)
            if hasattr(layer, "_orig_shape"):  # of ComfyUI's quantised layers
                layer._orig_shape = layer.out_features, layer.in_features

    def part(self, key, weight):
        """This process's part of a weight of ComfyUI's model, a copy; the weight itself where it is not cut."""
        cut = self.cuts.get(key)
        if cut is None:
            return weight
        stored = getattr(weight, "_qdata", None)
        if stored is None:
            return cut.of(weight.data, self.rank, self.size)
        data, scale = cut.of(stored, self.rank, self.size), weight._params.scale
        if scale.numel() > 1 and cut.dimension == OUTPUTS:  # one for each output, along whichever dimension
            scale = cut.of(scale, self.rank, self.size, tuple(scale.shape).index(sum(cut.runs)))
        params = replace(weight._params, scale=scale.clone(), orig_shape=tuple(data.shape))
        return type(weight)(data, weight._layout_cls, params)

    def add(self, out):
        """A product of this process's inputs, with those of the other processes added."""
        if self.mesh is None:
            raise UserError(
                "This model holds a part of its weights on each GPU, and was called without the others: the Sequence "
                "Parallel that made it is not on it any more. Put the node that removed it before Sequence Parallel.",
                "several-gpus",
            )
        out = out.contiguous()
        self.mesh.add(out)
        return out

    @contextmanager
    def over(self, mesh):
        """Sums are taken over the processes of a mesh inside the block."""
        self.mesh = mesh
        try:
            yield
        finally:
            self.mesh = None


def of(network):
    """The TensorParallel of a network, or None where it is whole."""
    return getattr(network, ATTRIBUTE, None)
