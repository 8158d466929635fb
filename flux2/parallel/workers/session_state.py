"""The state of a parallel session: one value, its legal changes, and what the other ranks are known to have."""

from dataclasses import dataclass, field
import enum


class State(enum.Enum):
    """What the other ranks of a session are doing."""

    STOPPED = "stopped"  # no process runs, or those that ran are ending
    STARTING = "starting"  # processes run or are being started, and have no model
    LOADING = "loading"  # they were told which model, and load it or are yet to be connected; no sampler waits
    READY = "ready"  # every rank has the model and is connected; nobody samples
    SAMPLING = "sampling"  # a sampler has them, from its begin to its end; what is missing is loaded for it
    DRAINING = "draining"  # the model is not needed any more: it is dropped, and the processes end after GRACE seconds


# A sampler keeps its session when the processes are lost: it hears of that in its next pass, and STOPPED comes later.
TRANSITIONS = {
    State.STOPPED: {State.STARTING, State.SAMPLING},  # a sampler is told of processes that end before it has them
    State.STARTING: {State.LOADING, State.SAMPLING, State.STOPPED},
    State.LOADING: {State.READY, State.SAMPLING, State.DRAINING, State.STOPPED},
    State.READY: {State.LOADING, State.SAMPLING, State.DRAINING, State.STOPPED},
    State.SAMPLING: {State.STARTING, State.LOADING, State.READY, State.STOPPED},
    State.DRAINING: {State.LOADING, State.SAMPLING, State.STOPPED},
}


@dataclass
class Transferred:
    """What every rank is known to have of the MODEL. options: specs of patch_transfer, None while unknown. tensors:
    numbers of the LoRA tensors that are there, None while unknown. numbers: {id(tensor): (number, tensor)}; the tensor
    is kept alive, so that its id stays its own. patches: uuid of the patcher's weight patches, None while unknown.
    """

    options: list | None = None
    tensors: set | None = field(default_factory=set)
    numbers: dict = field(default_factory=dict)
    patches: object = None

    def number_of(self, tensor):
        """The number that the ranks know a tensor by."""
        if id(tensor) not in self.numbers:
            self.numbers[id(tensor)] = (1 + max((number for number, _ in self.numbers.values()), default=0), tensor)
        return self.numbers[id(tensor)][0]
