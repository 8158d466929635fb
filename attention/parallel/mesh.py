"""Which ranks there are, how they are arranged, and the collectives that everything else is made of.

What other modules use of a Mesh: its fields, ulysses_rank, ring_rank, `process`, `ulysses_group_ranks`, `all_to_all`,
`write_to_peers`, `without_symmetric_memory`, `rotate`, `gather`, `add`, `broadcast`, `end`. A collective that is added
goes through `_collective`, which counts its time and bytes, asks `abort`, and turns a failure into RanksLost.

Ranks are numbered ring by ring: rank = ring_rank * ulysses + ulysses_rank, so a Ulysses group is a run of neighbours
(the GPUs of one host) and ring groups reach across them. Where weights are split too, each of these is a run of
`tensor` processes that hold the parts of the weights and compute the same tokens: process = rank * tensor +
tensor_rank. torch.distributed must be initialised before `make_mesh`;
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
    """How many ranks share the heads (ulysses), how many the keys (ring) and how many the weights (tensor); their
    product is the number of GPUs. why: a sentence.
    """

    ulysses: int
    ring: int
    why: str = ""
    tensor: int = 1

    @property
    def size(self):
        return self.ulysses * self.ring * self.tensor

    def __str__(self):
        weights = f" x weights split over {self.tensor}" if self.tensor > 1 else ""
        return f"Ulysses {self.ulysses} x ring {self.ring}{weights}"


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


def tensor_degrees(gpus, heads, ulysses=0, ring=0):
    """Degrees for a model whose weights are split: over all GPUs, or over those that `ulysses` and `ring` leave.

    ValueError, with the numbers that work, when that leaves one GPU, or when the heads do not divide.
    """
    rest, over = divmod(gpus, max(1, ulysses) * max(1, ring))
    if min(ulysses, ring) < 0 or over or rest < 2 or heads % (rest * max(1, ulysses)):
        fitting = [number for number in range(2, 65) if heads % number == 0]
        raise UserError(
            f"Weights cannot be split over {gpus} GPUs with Ulysses {ulysses or 'automatic'} and ring "
            f"{ring or 'automatic'}: GPUs = Ulysses x ring x parts of the weights, with at least two parts, and "
            f"Ulysses times parts has to divide the {heads} attention heads of this model. With Ulysses and ring "
            f"automatic, these numbers of GPUs work: {', '.join(map(str, fitting))}.",
            "several-gpus",
        )
    why = f"Each GPU holds 1/{rest} of the weights of the blocks; {heads} heads divide by {rest * max(1, ulysses)}."
    return Degrees(max(1, ulysses), max(1, ring), why, rest)


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

    rank, size: this rank and their number, of those that share the tokens. tensor, tensor_rank: parts that the weights
    are split into, and this process's; tensor_group: the processes that hold them. device: where tensors live.
    everybody: the process group of all processes; group, ulysses_group, ring_group: those of the ranks, of their
    Ulysses group and their ring; None where a group would have one member. overlap_chunks: into how many parts Ulysses
    cuts its heads so that one part is sent while another is computed; 1 does not overlap. abort: a callable asked
    before each collective, on the CPU also during it; True raises Interrupted. symmetric: a SymmetricMemory of the
    Ulysses group, or None: then its heads go through all_to_all. transport: which of the two, and why, a sentence.
    broken: the exception after which nothing is sent any more, else None. attention_calls: attention calls (usp.py)
    whose collectives are all done, failed ones included; additions: calls of `add` that are done. stats: times (Stats).
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
    tensor: int = 1
    tensor_rank: int = 0
    tensor_group: object = None
    everybody: object = None
    additions: int = 0
    stats: Stats = field(default=None, repr=False)

    def __post_init__(self):
        self.stats = self.stats or Stats(self.device)

    @property
    def process(self):
        """This process's number among all of them: what reports and errors call its rank."""
        return self.rank * self.tensor + self.tensor_rank

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

    def add(self, tensor):
        """The sum of a contiguous tensor over the processes that hold parts of the same weights, in place. Its bits are
        the same on all of them.
        """

        def start():
            work = dist.all_reduce(tensor, group=self.tensor_group, async_op=self._poll_abort)
            if work is not None:
                self._until_done(work)

        # as a ring sends it: all but its own part away, and all sums but one on
        sent = 2 * (self.tensor - 1) * tensor.numel() * tensor.element_size() // self.tensor
        self._collective(start, sent)
        self.additions += 1

    def broadcast(self, tensor):
        """Process 0's tensor to all, in place. Not counted: it is no part of a forward pass."""
        if self.everybody is not None:
            self._check()
            with self._losing_ranks():
                work = dist.broadcast(tensor, group=self.everybody, group_src=0, async_op=self._poll_abort)
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
                    f"Rank {self.process} of {self.size * self.tensor} could not exchange with the others: {error}"
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


def make_mesh(ulysses, ring, device, *, tensor=1, rank=None, size=None, groups=None, stores=None, overlap_chunks=1):
    """The Mesh of this process. Every process calls this at the same time with the same arguments: the process groups
    are made here.

    rank, size: of this process, and how many there are. groups(name, ranks) -> a torch.distributed ProcessGroup in
    which processes are numbered as they are listed, or None for one that is not among them; called in every process for
    every group, in the same order. By default they are made from torch.distributed's default group, which gives rank
    and size then. stores(name) -> a torch.distributed Store that the processes share, under a name that is used once;
    without it no symmetric memory is tried. ValueError when ulysses * ring * tensor is not the number of processes.
    """
    rank, size = dist.get_rank() if rank is None else rank, dist.get_world_size() if size is None else size
    if ulysses * ring * tensor != size:
        made = str(Degrees(ulysses, ring, tensor=tensor))
        raise UserError(f"{made} makes {ulysses * ring * tensor} ranks, and there are {size}.", "several-gpus")
    groups = groups or default_groups
    everybody = groups("all", list(range(size))) if size > 1 else None
    tokens = size // tensor
    # of the processes with the same part of the weights: those whose tokens belong together
    same = [list(range(part, size, tensor)) for part in range(tensor)]
    rows = [those[r * ulysses : (r + 1) * ulysses] for those in same for r in range(ring)]
    columns = [those[u::ulysses] for those in same for u in range(ulysses)]
    parts = [list(range(first * tensor, (first + 1) * tensor)) for first in range(tokens)]
    made = [
        partition(name, members, rank, groups, everybody)
        for name, members in (("same part", same), ("ulysses", rows), ("ring", columns), ("tensor", parts))
    ]
    mesh = Mesh(
        rank // tensor,
        tokens,
        ulysses,
        ring,
        torch.device(device),
        *made[:3],
        overlap_chunks=overlap_chunks,
        tensor=tensor,
        tensor_rank=rank % tensor,
        tensor_group=made[3],
        everybody=everybody,
    )
    if ulysses > 1:
        name, reason = f"symmetric memory {mesh.ring_rank}", "no store is shared."
        if tensor > 1:
            reason = "it is not used where weights are split over the GPUs."
        elif stores is not None:
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
