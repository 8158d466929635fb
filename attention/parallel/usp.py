"""Attention over the tokens of all ranks: Ulysses inside each group of neighbours, ring between the groups (Fang and
Zhao
2024, USP, section 3).

`attend` is one call. `begin`, `compute` and `finish` are its three parts, for a caller with something else to compute
while tokens travel: after `begin` q, k and v are on their way, after `compute` the result is on its way back.

A call either takes part in all of its exchanges or, when its arguments are refused or memory is short before the first,
in none; a kernel that fails on one rank raises there only after the last exchange. So the ranks never wait for one that
gave up in the middle of a call.
"""

from . import ring
from .deferred_error import Guard
from .ulysses import Return, Trade


def attend(local, q, k, v, mesh, lengths, **kwargs):
    """Attention of this rank's queries over the keys of all ranks: see `begin`. Returns (B, lengths[rank], H, D)."""
    call = begin(local, q, k, v, mesh, lengths, wait=True, **kwargs)
    call.compute()
    return call.finish()


def begin(local, q, k, v, mesh, lengths, *, kv_lengths=None, mask=None, scale=None, wait=False):
    """Start a call; returns an object with compute() and then finish() -> (B, lengths[rank], H, D). Between begin and
    finish no other call may begin.

    q (B, lengths[rank], H, D); k and v (B, kv_lengths[rank], H, D), any strides with a contiguous last axis. lengths,
    kv_lengths: tokens of each rank, the same on every rank; kv_lengths defaults to lengths. mask, without ring only: (B
    or 1, H or 1, Sq or 1, Sk) over the tokens of all ranks in rank order. local(q, k, v, *, mask, scale, need_lse) ->
    (out, lse or None) computes; scale goes to it as it is (None: its default). wait: whether each exchange is over
    before the next line runs. Raises ValueError for shapes that do not fit, and RanksLost; finish raises what `local`
    raised.
    """
    kv_lengths = lengths if kv_lengths is None else kv_lengths
    check(q, k, v, mesh, lengths, kv_lengths, mask)
    kind = Alone if mesh.size == 1 else RingCall if mesh.ulysses == 1 else UlyssesCall
    return kind(Common(local, mesh, lengths, kv_lengths, mask, scale, wait), q, k, v)


def check(q, k, v, mesh, lengths, kv_lengths, mask):
    """ValueError unless the call can be computed. The same on every rank as long as they were given the same
    lengths.
    """
    if q.shape[2] % mesh.ulysses:
        raise ValueError(f"Ulysses degree {mesh.ulysses} does not divide {q.shape[2]} attention heads.")
    if k.shape[2] != q.shape[2]:
        raise ValueError(
            (
                f"This model has {k.shape[2]} key/value heads for {q.shape[2]} query heads; over several GPUs they "
                "must "
                "be equal."
            )
        )
    if mask is not None and mesh.ring > 1:
        raise ValueError("Ring attention takes no attention mask. Use a ring degree of 1.")
    expected = (lengths[mesh.rank], kv_lengths[mesh.rank])
    if (q.shape[1], k.shape[1]) != expected:
        raise ValueError(
            (
                f"Rank {mesh.rank} should hold {expected[0]} queries and {expected[1]} keys, and has {q.shape[1]} and "
                f"{k.shape[1]}."
            )
        )


class Common:
    """What all parts of a call need. lengths, kv_lengths: of this Ulysses group; ring_lengths: keys of each Ulysses
    group.
    """

    def __init__(self, local, mesh, lengths, kv_lengths, mask, scale, wait):
        self.local, self.mesh, self.mask, self.scale, self.wait, self.guard = local, mesh, mask, scale, wait, Guard()
        self.lengths, self.kv_lengths = ([of[rank] for rank in mesh.neighbours()] for of in (lengths, kv_lengths))
        self.ring_lengths = [sum(kv_lengths[rank] for rank in mesh.neighbours(r)) for r in range(mesh.ring)]


class Begun:
    """A call on its way. Subclasses: _compute() and _finish() -> out, which take part in their exchanges whatever the
    guard holds.
    """

    def __init__(self, common):
        self.common, self.computed, self.finished = common, False, False

    def compute(self):
        self.computed = True
        self._compute()

    def finish(self):
        self.finished = True
        out = self._finish()
        self.common.mesh.attended += 1
        self.common.guard.check()
        return out

    def give_up(self, error):
        """Take part in the exchanges that are left, and compute nothing more."""
        self.common.guard.error = self.common.guard.error or error
        if not self.computed:
            self.compute()
        if not self.finished:
            self.finished = True
            self._finish()
            self.common.mesh.attended += 1


class Alone(Begun):
    """One rank: the kernel itself."""

    def __init__(self, common, q, k, v):
        super().__init__(common)
        self.tensors = q, k, v

    def _compute(self):
        common = self.common
        self.out = common.guard(
            lambda: common.local(*self.tensors, mask=common.mask, scale=common.scale, need_lse=False)[0]
        )

    def _finish(self):
        # a block may want their memory before the next call takes this one's place
        out, self.out, self.tensors = self.out, None, ()
        return out


class RingCall(Begun):
    """No exchange of heads: keys and values of this rank's own tokens go round."""

    def __init__(self, common, q, k, v):
        super().__init__(common)
        self.tensors, self.pair = (q, k, v), ring.buffers(k, common.ring_lengths, k.shape[0], k.shape[2])

    def _compute(self):
        common = self.common
        self.out = ring.attend(
            common.local, *self.tensors, common.ring_lengths, common.mesh, self.pair, common.guard, scale=common.scale
        )

    def _finish(self):
        out, self.out, self.tensors, self.pair = self.out, None, (), None
        return out


class UlyssesCall(Begun):
    """Heads in groups: while one is computed, the next one is on its way."""

    def __init__(self, common, q, k, v):
        super().__init__(common)
        mesh, each = common.mesh, q.shape[2] // common.mesh.ulysses
        # two communicators at work at the same time can wait for each other, so with a ring there is one group
        groups = mesh.head_groups if mesh.ring == 1 and each % mesh.head_groups == 0 else 1
        parts = [slice(g * each // groups, (g + 1) * each // groups) for g in range(groups)]
        self.trips = [Trip(common, q, k, v, part, wait=common.wait and groups == 1) for part in parts]
        self.trips[0].depart()

    def _compute(self):
        for trip, following in zip(self.trips, [*self.trips[1:], None]):
            if following:
                following.depart()
            trip.compute()

    def _finish(self):
        # (B, S, ranks, h, D) each
        returned = [(trip.heads, trip.returned.arrive()) for trip in self.trips]
        self.trips = ()
        return self.common.guard(lambda: joined(returned))


def joined(returned):
    """(B, S, H, D) of all ranks' heads in the model's order, from [(slice of each rank's heads, (B, S, ranks, h,
    D))].
    """
    if len(returned) == 1:
        return returned[0][1].flatten(2, 3)
    like = returned[0][1]
    out = like.new_empty((*like.shape[:3], sum(rows.shape[3] for _, rows in returned), like.shape[4]))
    for heads, rows in returned:
        out[:, :, :, heads].copy_(rows)
    return out.flatten(2, 3)


class Trip:
    """Some heads of a call: q, k and v to the rank that computes them, in one exchange when they are equally long, and
    its
    result back.
    """

    def __init__(self, common, q, k, v, heads, wait):
        self.common, self.heads, self.wait = common, heads, wait
        mesh, together = common.mesh, common.lengths == common.kv_lengths
        split = [((q, k, v), common.lengths)] if together else [((q,), common.lengths), ((k, v), common.kv_lengths)]
        self.trades = [Trade(mesh, tensors, lengths, heads) for tensors, lengths in split]
        self.returned = Return(mesh, self.trades[0].received, common.lengths)
        self.pair = (
            ring.buffers(k, common.ring_lengths, k.shape[0], self.trades[0].received.shape[3])
            if mesh.ring > 1
            else None
        )

    def depart(self):
        for trade in self.trades:
            trade.depart(self.wait)

    def compute(self):
        """Attend, and send back; after a failure what is sent back is memory at hand, for a call that will raise."""
        # (B, S of the group, h, D)
        q, k, v = (view for trade in self.trades for view in trade.arrive())
        out = self._attend(q, k, v)
        rows = self.common.guard(lambda: out.transpose(0, 1).contiguous())
        if rows is None:
            rows = self.trades[0].received.view(-1)[: q.numel()]
        self.trades = ()  # the memory of what arrived is free while the result travels
        self.returned.depart(rows, self.wait)

    def _attend(self, q, k, v):
        common = self.common
        if common.mesh.ring > 1:
            return ring.attend(
                common.local, q, k, v, common.ring_lengths, common.mesh, self.pair, common.guard, scale=common.scale
            )
        return common.guard(lambda: common.local(q, k, v, mask=self._mask(), scale=common.scale, need_lse=False)[0])

    def _mask(self):
        """The mask of the heads that this rank computes."""
        mask, mesh = self.common.mask, self.common.mesh
        if mask is None or mask.shape[1] == 1:
            return mask
        return mask.unflatten(1, (mesh.ulysses, -1))[:, mesh.ulysses_rank][:, self.heads]
