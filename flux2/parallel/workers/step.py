"""One forward pass on every rank: rank 0 sends what the network was called with, and the network is sharded
(flux2/parallel) while it runs.
"""

from contextlib import contextmanager
import inspect

from ..forward import sharded_forward
from . import dtypes
from .serialize import flatten, restore


class StepExchange:
    """The forward passes of a network over a mesh. fallback: an attention override for ring degrees above 1 where
    nobody chose a kernel.
    """

    def __init__(self, mesh, fallback):
        self.mesh, self.fallback = mesh, fallback

    @contextmanager
    def installed(self, network, failed=lambda error: None):
        """The network computes its part of the tokens inside the block. failed(error): see sharded_forward."""
        with sharded_forward(network, self.mesh, fallback=self.fallback, failed=failed):
            yield

    def send(self, tensors):
        """Rank 0: the tensors among the arguments, to every rank."""
        for tensor in tensors:
            self._broadcast(tensor.detach().to(self.mesh.device).contiguous())

    def receive(self, data, kinds):
        """The other ranks: the arguments, {name: value}."""
        return restore(
            data,
            [self._broadcast(dtypes.empty(kind, self.mesh.device)) for kind in kinds],
        )

    def _broadcast(self, tensor):
        if tensor.numel():
            self.mesh.broadcast(tensor)
        return tensor


def describe_inputs(inputs):
    """(JSON of the structure, [[dtype, shape], ...], tensors) of a network's arguments {name: value}. Raises
    Unsendable.
    """
    data, tensors = flatten(inputs)
    return data, [dtypes.kind_of(tensor) for tensor in tensors], tensors


def bound_arguments(network, args, kwargs):
    """({name: value} of what a network's forward pass was called with, transformer_options). None is left out: it is
    the default.
    """
    signature = inspect.signature(network._forward)
    bound = dict(signature.bind(*args, **kwargs).arguments)
    rest = next(
        (name for name, parameter in signature.parameters.items() if parameter.kind is parameter.VAR_KEYWORD), None
    )
    named = {**bound, **bound.pop(rest, {})} if rest else bound
    named.pop(rest, None)
    options = named.pop("transformer_options", {})
    return {name: value for name, value in named.items() if value is not None}, options
