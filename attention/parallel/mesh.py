"""Which ranks there are, how they are arranged, and the collectives that everything else is made of.

What other modules use of a Mesh: rank, size, ulysses(_rank), ring(_rank), device, the process groups, `all_to_all`,
`rotate`, `gather`, `broadcast`, `abort`, `broken`, `stats`. A collective that is added goes through `_collective`,
which counts its time and bytes, asks `abort`, and turns a failure into RanksLost.

Ranks are numbered ring by ring: rank = ring_rank * ulysses + ulysses_rank, so a Ulysses group is a run of neighbours
(the GPUs of one host) and ring groups reach across them. torch.distributed must be initialised before `make_mesh`;
nothing here starts or ends a process.
"""

import threading
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from ..errors import Explained, UserError
from .timing import Stats


class RanksLost(Explained, RuntimeError):
    """A collective failed: another rank is gone, or did not answer in time. The groups are unusable afterwards."""

    topic = "several-gpus"


class Interrupted(RuntimeError):
    """Mesh.abort said stop, between two collectives or, on the CPU, during one. The groups are unusable afterwards: the
    others may be inside the next one.
    """


@dataclass(frozen=True)
class Degrees:
    """How many ranks share the heads (ulysses) and how many the keys (ring); their product is the number of GPUs.
    why: a sentence.
    """

    ulysses: int
    ring: int
    why: str = ""

    @property
    def size(self):
        return self.ulysses * self.ring

    def __str__(self):
        return f"Ulysses {self.ulysses} x ring {self.ring}"


def pairs(gpus, heads):
    """Every Degrees that works for so many GPUs and heads, the largest Ulysses degree first."""
    return [Degrees(u, gpus // u) for u in range(gpus, 0, -1) if gpus % u == 0 and heads % u == 0]


def degrees(gpus, heads, ulysses=0, ring=0):
    """Degrees for `gpus` GPUs and a model of `heads` attention heads; 0 lets this choose.

    ValueError, with the pairs that work, when the product is not `gpus` or the heads do not divide by `ulysses`.
    """
    possible = pairs(gpus, heads)
    fitting = [d for d in possible if ulysses in (0, d.ulysses) and ring in (0, d.ring)]
    if not fitting:
        raise UserError(
            f"{impossible(gpus, heads, ulysses, ring)} What works for {gpus} GPUs: {', '.join(map(str, possible))}.",
            "several-gpus",
        )
    return Degrees(fitting[0].ulysses, fitting[0].ring, reason(fitting[0], gpus, heads, ulysses, ring))


def impossible(gpus, heads, ulysses, ring):
    """Why these degrees cannot be had, a sentence."""
    if min(ulysses, ring) < 0:
        return f"Degrees are 0 (chosen automatically) or positive, not {ulysses} and {ring}."
    if ulysses and ring and ulysses * ring != gpus:
        return f"Ulysses {ulysses} x ring {ring} makes {ulysses * ring} GPUs, and {gpus} are used."
    for name, value in (("Ulysses", ulysses), ("Ring", ring)):
        if value and gpus % value:
            return f"{name} degree {value} does not divide {gpus} GPUs."
    return f"Ulysses degree {ulysses or gpus // ring} does not divide the {heads} attention heads of this model."


def reason(chosen, gpus, heads, ulysses, ring):
    """Why these degrees, a sentence."""
    if ulysses or ring:
        return f"{chosen} was asked for."
    if chosen.ring == 1:
        return f"Ulysses exchanges least, and {heads} heads divide by {gpus}."
    return (
        f"{heads} heads do not divide by {gpus}; {chosen.ulysses} is the largest degree that divides both, and "
        "ring does the rest."
    )


@dataclass
class Mesh:
    """One rank's view of all ranks.

    rank, size: this rank and their number. device: where tensors live. group, ulysses_group, ring_group: process
    groups; None where a group would have one member. overlap_chunks: into how many parts Ulysses cuts its heads so that
    one part is sent while another is computed; 1 does not overlap. abort: a callable asked before each collective, on
    the CPU also during it; True raises Interrupted. symmetric: a SymmetricMemory of the Ulysses group, or None: then
    its heads go through all_to_all. transport: which of the two, and why, a sentence. broken: the exception after which
    nothing is sent any more, else None. attention_calls: attention calls (usp.py) whose collectives are all done,
    failed ones included. stats: times (Stats).
    """

    rank: int = 0
    size: int = 1
    ulysses: int = 1
    ring: int = 1
    device: torch.device = torch.device("cpu")
    group: object = None
    ulysses_group: object = None
    ring_group: object = None
    overlap_chunks: int = 1
    abort: object = None
    symmetric: object = None
    transport: str = ""
    broken: BaseException | None = None
    attention_calls: int = 0
    stats: Stats = field(default=None, repr=False)

    def __post_init__(self):
        self.stats = self.stats or Stats(self.device)

    @property
    def ulysses_rank(self):
        return self.rank % self.ulysses

    @property
    def ring_rank(self):
        return self.rank // self.ulysses

    def ulysses_group_ranks(self, ring_rank=None):
        """Ranks of one Ulysses group, this rank's own by default, in the order in which their tokens follow one another
        after the all-to-all.
        """
        first = (self.ring_rank if ring_rank is None else ring_rank) * self.ulysses
        return range(first, first + self.ulysses)

    def all_to_all(self, out, rows, out_sizes, in_sizes, group, blocking=True):
        """Send rows (flat, cut by in_sizes) to the ranks of a group and receive into out (flat, cut by out_sizes), in
        elements. Returns a function that waits.

        blocking=False returns at once; out must not be read and neither tensor changed before the wait.
        """

        def start():
            asynchronous = not blocking or self._poll_abort
            work = dist.all_to_all_single(out, rows, out_sizes, in_sizes, group=group, async_op=asynchronous)
            return self._until_done(work) if blocking and work is not None else work

        return self._collective(start, (rows.numel() - in_sizes[group.rank()]) * rows.element_size())

    def write_to_peers(self, write, sent):
        """write() enqueues kernels that write into other ranks' memory; then every rank waits for all. sent: bytes."""

        def start():
            write()
            self.symmetric.barrier()

        self._collective(start, sent)

    def without_symmetric_memory(self, reason):
        """From now on heads go through all_to_all; every rank of the group says so at the same time."""
        self.symmetric, self.transport = None, transport_text(None, reason)

    def end(self):
        """From any thread: nothing waits any more, and nothing is sent. The groups are ended by whoever made them."""
        self.abort = lambda: True
        if self.symmetric is not None:
            self.symmetric.abort()

    def rotate(self, outgoing, incoming):
        """Start sending a flat tensor to the next rank of the ring while receiving one from the rank before. Returns a
        function that waits.
        """
        both = (("send", outgoing, 1), ("recv", incoming, -1))
        parts = [(name, tensor, (self.ring_rank + step) % self.ring) for name, tensor, step in both if tensor.numel()]
        if not parts:
            return no_wait
        return self._collective(lambda: self._point_to_point(parts), outgoing.numel() * outgoing.element_size())

    def _point_to_point(self, parts):
        """Works of sends and receives in the ring group. NCCL wants those of one rank together; batch_isend_irecv takes
        registered groups only.
        """
        group, together = self.ring_group, self.device.type == "cuda"
        if together:
            group._start_coalescing(self.device)
        works = [getattr(group, name)([tensor], peer, 0) for name, tensor, peer in parts]
        return [group._end_coalescing(self.device)] if together else works

    def broadcast(self, tensor):
        """Rank 0's tensor to all ranks, in place. Not counted: it is no part of a forward pass."""
        if self.size > 1:
            self._check()
            with self._losing_ranks():
                work = dist.broadcast(tensor, group=self.group, group_src=0, async_op=self._poll_abort)
                if work is not None:
                    self._until_done(work)

    def gather(self, rows, lengths):
        """The tokens of all ranks, in rank order: rows (B, lengths[rank], C) -> (B, sum(lengths), C), on every rank."""
        if self.size == 1:
            return rows
        batch, mine, width = rows.shape
        out = rows.new_empty((sum(lengths), batch, width))
        send = rows.transpose(0, 1).expand(self.size, mine, batch, width) if mine else rows.new_empty(0)
        self.all_to_all(
            out.view(-1), send.reshape(-1), [n * batch * width for n in lengths], [rows.numel()] * self.size, self.group
        )
        return out.transpose(0, 1)

    def _collective(self, start, sent):
        """Run start() -> the work or works to wait for, or None; returns a function that waits. sent: bytes that leave
        this rank.
        """
        self._check()
        with self.stats.collective(sent), self._losing_ranks():
            pending = start()
        return (lambda: self._wait(pending)) if pending is not None else no_wait

    def _wait(self, pending):
        works = pending if isinstance(pending, list) else [pending]
        with self.stats.collective(None), self._losing_ranks():
            for work in works:
                self._until_done(work)

    @property
    def _poll_abort(self):
        """Whether a wait has to ask `abort` itself. A wait for a GPU ends when its group is aborted; gloo, which has no
        abort, may wait for ever for a host that is gone.
        """
        return self.abort is not None and self.device.type == "cpu"

    def _until_done(self, work):
        """Wait for a collective. On the CPU in another thread, which is left behind when `abort` says stop."""
        if not self._poll_abort:
            work.wait()
            return
        ended = run_in_thread(work.wait)
        while not futures.wait([ended], 0.05).done:
            self._check()
        ended.result()

    def _check(self):
        if self.broken is not None:
            raise RanksLost(f"The GPUs cannot exchange anything any more: {self.broken}") from self.broken
        if self.abort is not None and self.abort():
            self.broken = Interrupted("The work of the GPUs was stopped.")
            raise self.broken

    @contextmanager
    def _losing_ranks(self):
        """Whatever a collective raises marks the mesh as broken; an error becomes RanksLost."""
        try:
            yield
        except BaseException as error:
            self.broken = self.broken or error
            if isinstance(error, Exception):
                raise RanksLost(
                    f"Rank {self.rank} of {self.size} could not exchange with the others: {error}"
                ) from error
            raise


def run_in_thread(function):
    """A Future of a function's result. The thread is a daemon: one that never comes back keeps nobody from quitting."""
    future = futures.Future()

    def run():
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="flux2 ranks: waiting for a collective", daemon=True).start()
    return future


def no_wait():
    pass


def make_mesh(ulysses, ring, device, *, rank=None, size=None, groups=None, stores=None, overlap_chunks=1):
    """The Mesh of this rank. Every rank calls this at the same time with the same arguments: the process groups are
    made here.

    groups(name, ranks) -> a torch.distributed ProcessGroup in which ranks are numbered as they are listed, or None for
    a rank that is not among them; called on every rank for every group, in the same order. By default they are made
    from torch.distributed's default group, which gives rank and size then. stores(name) -> a torch.distributed Store
    that the ranks share, under a name that is used once; without it no symmetric memory is tried. ValueError when
    ulysses * ring is not the number of ranks.
    """
    rank, size = dist.get_rank() if rank is None else rank, dist.get_world_size() if size is None else size
    if ulysses * ring != size:
        raise UserError(
            f"Ulysses {ulysses} x ring {ring} makes {ulysses * ring} ranks, and there are {size}.", "several-gpus"
        )
    groups = groups or default_groups
    everybody = groups("all", list(range(size))) if size > 1 else None
    rows = [list(range(r * ulysses, (r + 1) * ulysses)) for r in range(ring)]
    columns = [list(range(u, size, ulysses)) for u in range(ulysses)]
    parts = [partition("ulysses", rows, rank, groups, everybody), partition("ring", columns, rank, groups, everybody)]
    mesh = Mesh(rank, size, ulysses, ring, torch.device(device), everybody, *parts, overlap_chunks=overlap_chunks)
    if ulysses > 1:
        name, reason = f"symmetric memory {mesh.ring_rank}", "no store is shared."
        if stores is not None:
            from .symmetric_memory import connect

            mesh.symmetric, reason = connect(stores(name), mesh.ulysses_rank, ulysses, mesh.device)
        mesh.transport = transport_text(mesh.symmetric, reason)
    return mesh


def transport_text(symmetric, reason):
    """How heads reach the GPU that computes them, a sentence."""
    if symmetric is not None:
        return "Kernels write heads straight into the memory of the GPU that computes them (symmetric memory)."
    return f"Heads are exchanged by all-to-all; symmetric memory is not used: {reason}"


def partition(name, parts, rank, groups, everybody):
    """The group of this rank among parts that together hold every rank: that of all ranks if it is the only part, None
    where it would be alone.
    """
    if len(parts[0]) == 1:
        return None
    if len(parts) == 1:
        return everybody
    made = [groups(f"{name} {index}", members) for index, members in enumerate(parts)]
    return next(group for group, members in zip(made, parts) if rank in members)


def default_groups(name, ranks):
    """A group of torch.distributed's default group; see make_mesh."""
    if len(ranks) == dist.get_world_size():
        return dist.group.WORLD
    group = dist.new_group(ranks)
    return group if dist.get_rank() in ranks else None
