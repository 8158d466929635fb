"""`auto` on several ranks: rank 0 chooses, and every other rank takes the same kernel.

Ranks that measured for themselves could take different ones, whose rounding differs, and each would measure again in
every process. A worker that comes to a call of a new shape asks rank 0, which comes to the same call; it waits as long
as rank 0 measures. A kernel that rank 0 took and this rank cannot run is refused by name, as one that was chosen by
hand.
"""

import time

from ....attention import autotune, dispatch
from ....attention.registry import AUTO

PATIENCE = 300  # seconds that rank 0 may take to measure: compiling kernels is part of it
POLL = 0.02


class FollowingTuner:
    """In the place of an attention.autotune.Tuner on every rank but 0. ask(request) -> rank 0's answer, see
    `answer_of_rank_0`; it raises when the pass is given up meanwhile.
    """

    def __init__(self, ask):
        self.ask = ask

    def choose(self, call, *tensors):
        """(slug, AutoChoice) as Tuner.choose."""
        slug = self._taken(AUTO, call)
        return slug, autotune.AutoChoice(str(call), str(call.device), slug, "as on rank 0", [])

    def variant(self, slug, adapter, call, *tensors):
        """The Adapter as Tuner.variant."""
        variants = adapter.variants(call)
        if len(variants) < 2 or not autotune.can_time(call.device.type):
            return adapter
        name = self._taken(slug, call)
        if name not in variants:
            raise RuntimeError(f"Rank 0 computes with {slug}'s variant {name}, which this rank does not have.")
        return variants[name]

    def _taken(self, what, call):
        lengths = [call.q_len, call.kv_len]
        name = self.ask({"kernel": what, "signature": list(autotune.signature(call)), "lengths": lengths})
        if name is None:
            raise RuntimeError("Rank 0 did not say which kernel it computes with.")
        return name


def answer_of_rank_0(request, tolerance, given_up):
    """The name that rank 0 takes for a worker's call, waiting until it has come to that call; None when it does not
    within PATIENCE or when given_up() says that nobody waits any more. tolerance: tokens by which the shares of ranks
    differ.
    """
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and not given_up():
        asked = request["kernel"], request["signature"], request["lengths"], tolerance
        name = dispatch.default_tuner().taken(*asked)
        if name is not None:
            return name
        time.sleep(POLL)
    return None
