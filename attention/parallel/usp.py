"""Attention over the tokens of all ranks: Ulysses inside each group of neighbours, ring between the groups (Fang and
Zhao 2024, USP, section 3).

  out = attend(local, q, k, v, mesh, lengths)           # one call

  call = begin(local, q, k, v, mesh, lengths)           # the same in three parts: q, k and v are being sent
  ...; call.compute()                                   # attention is done, its result is being sent back
  ...; out = call.finish()

A call either takes part in all of its collectives or, when its arguments are refused or memory is short before the
first, in none; a kernel that fails on one rank raises there only after the last collective. So the ranks never wait for
one that gave up in the middle of a call.
"""

from ..errors import UserError
from . import ring
from .deferred_error import DeferredError
from .ulysses import GatherHeads, ScatterHeads


def attend(local, q, k, v, mesh, lengths, **kwargs):
    """Attention of this rank's queries over the keys of all ranks: see `begin`. Returns (B, lengths[rank], H, D)."""
    call = begin(local, q, k, v, mesh, lengths, blocking=True, **kwargs)
    call.compute()
    return call.finish()


def begin(local, q, k, v, mesh, lengths, *, kv_lengths=None, mask=None, scale=None, blocking=False, convert=None):
    """Start a call; returns a PendingAttention. Between begin and finish no other call may begin.

    q (B, lengths[rank], H, D); k and v (B, kv_lengths[rank], H, D), any strides with a contiguous last axis. lengths,
    kv_lengths: tokens of each rank, the same on every rank; kv_lengths defaults to lengths. mask, without ring only: (B
    or 1, H or 1, Sq or 1, Sk) over the tokens of all ranks in rank order. local(q, k, v, *, mask, scale, need_lse) ->
    (out, lse or None) computes; scale is given to it as it is (None: its default). blocking: whether each collective is
    over before the next line runs. convert: applied to the result (B, lengths[rank], H, D) that finish() returns.
    Raises ValueError for shapes that do not fit, and RanksLost; finish raises what `local` raised.
    """
    kv_lengths = lengths if kv_lengths is None else kv_lengths
    check(q, k, v, mesh, lengths, kv_lengths, mask)
    context = CallContext(local, mesh, lengths, kv_lengths, mask, scale, blocking, convert)
    if mesh.size == 1:
        return SingleRank(context, q, k, v)
    if mesh.ulysses == 1:
        return RingAttention(context, q, k, v)
    buffers = symmetric_buffers(context, q.shape[0], q.shape[2], q.shape[3], q.dtype)
    if buffers is None:
        return UlyssesAttention(context, q, k, v)
    return SymmetricUlysses(context, buffers, lambda: buffers.scatter(q, k, v))


def begin_written(local, write, mesh, lengths, *, batch, heads, head_dim, dtype, scale=None, mask=None):
    """`begin` for q, k and v that a kernel writes straight to where they are computed, or None where the mesh has no
    symmetric memory for them: then nothing was sent.

    write(buffers): enqueues kernels that write what UlyssesBuffers.scatter would, and takes no memory. The result is a
    view that the next call overwrites.
    """
    if mesh.symmetric is None or heads % mesh.ulysses:
        return None
    context = CallContext(local, mesh, lengths, lengths, mask, scale, True, None)
    buffers = symmetric_buffers(context, batch, heads, head_dim, dtype)
    return buffers and SymmetricUlysses(context, buffers, lambda: write(buffers), borrow=True)


def symmetric_buffers(context, batch, heads, head_dim, dtype):
    """The UlyssesBuffers of a call, or None where its heads go through all_to_all. A collective when it needs more
    memory than the calls before.
    """
    mesh = context.mesh
    if mesh.symmetric is None:
        return None
    from .symmetric_memory import UlyssesBuffers

    shape = (batch, heads, head_dim, dtype)
    buffers = UlyssesBuffers(mesh.symmetric, *shape, context.lengths, context.kv_lengths)
    reason = mesh.symmetric.reserve(buffers.bytes)
    if reason is not None:
        mesh.without_symmetric_memory(reason)
        return None
    return buffers


def check(q, k, v, mesh, lengths, kv_lengths, mask):
    """ValueError unless the call can be computed. The same on every rank that was given the same lengths."""
    if q.shape[2] % mesh.ulysses:
        raise UserError(f"Ulysses degree {mesh.ulysses} does not divide {q.shape[2]} attention heads.", "several-gpus")
    if k.shape[2] != q.shape[2]:
        raise UserError(
            f"This model has {k.shape[2]} key/value heads for {q.shape[2]} query heads; over several GPUs they must be "
            "equal.",
            "several-gpus",
        )
    if mask is not None and mesh.ring > 1:
        raise UserError("Ring attention takes no attention mask. Use a ring degree of 1.", "several-gpus")
    expected = (lengths[mesh.rank], kv_lengths[mesh.rank])
    if (q.shape[1], k.shape[1]) != expected:
        raise UserError(
            f"Rank {mesh.process} should hold {expected[0]} queries and {expected[1]} keys, and has {q.shape[1]} and "
            f"{k.shape[1]}.",
            "several-gpus",
        )


class CallContext:
    """What all parts of a call need. lengths, kv_lengths: tokens of each rank of this Ulysses group; ring_lengths: keys
    of each Ulysses group.
    """

    def __init__(self, local, mesh, lengths, kv_lengths, mask, scale, blocking, convert):
        self.local, self.mesh, self.mask, self.scale = local, mesh, mask, scale
        self.blocking, self.convert, self.deferred = blocking, convert, DeferredError()
        self.lengths, self.kv_lengths = ([of[r] for r in mesh.ulysses_group_ranks()] for of in (lengths, kv_lengths))
        self.ring_lengths = [sum(kv_lengths[r] for r in mesh.ulysses_group_ranks(ring)) for ring in range(mesh.ring)]

    def attend(self, q, k, v, buffers, mask=None):
        """Attention over the keys of this Ulysses group, or of all groups of the ring. None after a failure."""
        if self.mesh.ring > 1:
            return ring.attend(
                self.local, q, k, v, self.ring_lengths, self.mesh, buffers, self.deferred, scale=self.scale
            )
        return self.deferred(lambda: self.local(q, k, v, mask=mask, scale=self.scale, need_lse=False)[0])

    def head_mask(self, heads=slice(None)):
        """The mask of the heads that this rank computes; heads: a slice of them."""
        mask, mesh = self.mask, self.mesh
        if mask is None or mask.shape[1] == 1:
            return mask
        return mask.unflatten(1, (mesh.ulysses, -1))[:, mesh.ulysses_rank][:, heads]


class PendingAttention:
    """A call whose tensors are being sent. Subclasses: _compute() and _finish() -> out, which take part in their
    collectives whatever error is deferred.
    """

    def __init__(self, context):
        self.context, self.computed, self.finished = context, False, False

    def compute(self):
        """Attention of this rank's heads; its result is being sent back afterwards."""
        self.computed = True
        self._compute()

    def finish(self):
        """The result (B, lengths[rank], H, D), converted. Raises what `local` raised on this rank."""
        out = self._finished()
        self.context.deferred.check()
        return self.context.convert(out) if self.context.convert else out

    def drain(self, error):
        """Take part in the collectives that are left, and compute nothing more."""
        self.context.deferred.error = self.context.deferred.error or error
        if not self.computed:
            self.compute()
        if not self.finished:
            self._finished()

    def _finished(self):
        self.finished = True
        out = self._finish()
        self.context.mesh.attention_calls += 1
        return out


class SingleRank(PendingAttention):
    """One rank: the kernel itself."""

    def __init__(self, context, q, k, v):
        super().__init__(context)
        self.tensors = q, k, v

    def _compute(self):
        self.out = self.context.attend(*self.tensors, None, mask=self.context.mask)

    def _finish(self):
        # a block may want their memory before the next call takes this one's place
        out, self.out, self.tensors = self.out, None, ()
        return out


class RingAttention(PendingAttention):
    """Heads stay: keys and values of this rank's own tokens are passed on."""

    def __init__(self, context, q, k, v):
        super().__init__(context)
        self.tensors, self.buffers = (q, k, v), ring.buffers(k, context.ring_lengths, k.shape[0], k.shape[2])

    def _compute(self):
        self.out = self.context.attend(*self.tensors, self.buffers)

    def _finish(self):
        out, self.out, self.tensors, self.buffers = self.out, None, (), None
        return out


class UlyssesAttention(PendingAttention):
    """Heads in chunks: while one is computed, the next one is being sent."""

    def __init__(self, context, q, k, v):
        super().__init__(context)
        mesh, each = context.mesh, q.shape[2] // context.mesh.ulysses
        # two communicators at work at the same time can wait for each other, so with a ring there is one chunk
        chunks = mesh.overlap_chunks if mesh.ring == 1 and each % mesh.overlap_chunks == 0 else 1
        slices = [slice(c * each // chunks, (c + 1) * each // chunks) for c in range(chunks)]
        self.groups = [HeadGroup(context, q, k, v, part, context.blocking and chunks == 1) for part in slices]
        self.groups[0].start()

    def _compute(self):
        for group, following in zip(self.groups, [*self.groups[1:], None]):
            if following:
                following.start()
            group.compute()

    def _finish(self):
        # (B, S, ranks, h, D) each
        returned = [(group.heads, group.gather.wait()) for group in self.groups]
        self.groups = ()
        return self.context.deferred(lambda: join_heads(returned))


class SymmetricUlysses(PendingAttention):
    """Heads are written straight into the memory of the GPU that computes them, and their result back: see
    symmetric_memory.py. No memory is taken but for the result, after the last barrier.
    """

    def __init__(self, context, buffers, write, borrow=False):
        super().__init__(context)
        mesh, self.buffers, self.borrow = context.mesh, buffers, borrow
        like, self.ring_buffers = buffers.received()[1], None
        if mesh.ring > 1:
            self.ring_buffers = ring.buffers(like, context.ring_lengths, buffers.batch, buffers.each)
        mesh.write_to_peers(write, buffers.scattered_bytes)

    def _compute(self):
        out = self.context.attend(*self.buffers.received(), self.ring_buffers, mask=self.context.head_mask())
        self.context.mesh.write_to_peers(lambda: self.buffers.gather(out), self.buffers.gathered_bytes)

    def _finish(self):
        return self.context.deferred(lambda: self.buffers.result(self.borrow))


def join_heads(returned):
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


class HeadGroup:
    """Some heads of a call: q, k and v to the rank that computes them, in one all-to-all when they are equally long,
    and its result back.
    """

    def __init__(self, context, q, k, v, heads, blocking):
        self.context, self.heads, self.blocking = context, heads, blocking
        mesh, together = context.mesh, context.lengths == context.kv_lengths
        parts = [((q, k, v), context.lengths)] if together else [((q,), context.lengths), ((k, v), context.kv_lengths)]
        self.scatters = [ScatterHeads(mesh, tensors, lengths, heads) for tensors, lengths in parts]
        like = self.scatters[0].received
        self.gather = GatherHeads(mesh, like, context.lengths)
        self.buffers = ring.buffers(k, context.ring_lengths, k.shape[0], like.shape[3]) if mesh.ring > 1 else None

    def start(self):
        for scatter in self.scatters:
            scatter.start(self.blocking)

    def compute(self):
        """Attend, and send back; after a failure what is sent back is memory at hand, for a call that will raise."""
        # (B, S of the group, h, D)
        q, k, v = (view for scatter in self.scatters for view in scatter.wait())
        out = self.context.attend(q, k, v, self.buffers, mask=self.context.head_mask(self.heads))
        rows = self.context.deferred(lambda: out.transpose(0, 1).contiguous())
        if rows is None:
            rows = self.scatters[0].received.view(-1)[: q.numel()]
        self.scatters = ()  # the memory of what was received is free while the result is sent
        self.gather.start(rows, self.blocking)
