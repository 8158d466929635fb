"""Another `forward` for a module, for the time of a call: how Fast Blocks and Compile Blocks reach core's blocks."""

from contextlib import contextmanager


@contextmanager
def forward_as(module, function):
    """A module whose forward is `function`, and as it was afterwards."""
    before = vars(module).get("forward")
    module.forward = function
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
