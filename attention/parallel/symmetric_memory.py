"""Ulysses without a collective library: kernels write each head's tokens straight into the memory of the GPU that
computes that head, and its result back, with one barrier in each direction.

For the ranks of a Ulysses group on one host whose GPUs reach each other's memory (PyTorch's symmetric memory, CUDA
VMM handles). Nothing is packed or unpacked, and no NCCL call is made. `connect` decides on all ranks together; where it
says no, mesh.py's all-to-all stays, and the reason is kept for the report.

One buffer serves every call. Before a rank writes q, k and v of call i, it has passed the barrier behind call i - 1,
which every rank reaches after it has read call i - 1's q, k and v. Before it writes call i's result, it has passed the
barrier behind the scatter of call i, which a rank reaches after everything that it enqueued earlier, the reading of
call i - 1's result included. So two barriers a call make one buffer enough, as long as all calls run on one stream and
a result is read, or copied, before the next call begins: `UlyssesBuffers.result` copies unless its caller promises it.
"""

from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
import itertools
import os
from pathlib import Path
import tempfile

import torch

from ..errors import first_line
from ..tiles import next_power_of_2

RENDEZVOUS = timedelta(seconds=20)
ALIGNED = 256  # bytes
SWITCH = "FLUX2_SYMMETRIC_MEMORY"
# ranks see one GPU each, all of them their number 0; nothing here uses multicast, which some containers forbid
SETTINGS = {"TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}


def unavailable(device):
    """Why this rank cannot take part, a sentence, or None. device: torch.device of the tensors."""
    if device.type != "cuda":
        return f"it needs GPUs, and the model computes on '{device.type}'."
    if os.environ.get(SWITCH) != "1":
        # on AMD how stores to another GPU are ordered is unproven too
        where = "it has never been run on AMD GPUs" if torch.version.hip else "it is experimental"
        return f"{where}, and off unless ComfyUI is started with {SWITCH}=1."
    if find_spec("triton") is None:
        return "Triton is not installed."
    try:
        from torch._C._distributed_c10d import _SymmetricMemory
    except ImportError:
        return "this PyTorch has no symmetric memory."
    if not hasattr(_SymmetricMemory, "buffer_ptrs_dev"):
        return "this PyTorch's symmetric memory does not tell the addresses of the other GPUs' memory."
    return None


def connect(store, rank, size, device):
    """(SymmetricMemory, "") when all ranks of a group can write into each other's memory, or (None, why not).

    A collective: every rank of the group calls it, in the same order. store: a torch.distributed Store that they
    share, for this group alone. The answer, not the sentence, is the same on every rank.
    """
    memory = SymmetricMemory(store, rank, size, device)
    reason = memory.agree(unavailable(torch.device(device)))
    if reason is None:
        reason = memory.agree(memory.share_folder()) or memory.reserve(1)
    return (memory, "") if reason is None else (None, reason)


class SymmetricMemory:
    """One buffer of equal size on every rank of a group, written by all of them.

    data: this rank's buffer behind the header, uint8. peers: int64 (size,) on the device, every rank's buffer as this
    GPU sees it.
    """

    def __init__(self, store, rank, size, device):
        self.store, self.rank, self.size, self.device = store, rank, size, torch.device(device)
        self.data = self.peers = self._buffer = self._handle = self._abort = None
        self._exchanged = self._epoch = 0
        self._group = self._file = self._folder = None
        self._starts = {}

    def agree(self, reason):
        """A collective: None when every rank's reason is None, else a reason with the rank that gave it."""
        said = self._exchange(reason or "")
        return next((f"rank {rank} of the group: {text}" for rank, text in enumerate(said) if text), None)

    def _exchange(self, text):
        """A collective: the text of every rank."""
        self._exchanged += 1
        self.store.set(f"{self._exchanged}/{self.rank}", text.encode())
        return [bytes(self.store.get(f"{self._exchanged}/{rank}")).decode() for rank in range(self.size)]

    def share_folder(self):
        """The folder through which the ranks find one another, made by the first: why there is none, or None."""
        if self.rank == 0:
            self._folder = tempfile.TemporaryDirectory(prefix="flux2-")  # for this user alone
            self.store.set("file", str(Path(self._folder.name) / "rendezvous").encode())
        elif not Path(bytes(self.store.get("file")).decode()).parent.is_dir():
            return "it does not share this host's temporary folder: it is on another host, or in another container."
        return None

    def reserve(self, needed):
        """A collective: a buffer of at least so many bytes behind the header, the same number on every rank. Returns
        None, or why there is none; the buffer that was there is gone then.
        """
        if self.data is not None and self.data.numel() >= needed:
            return None
        from .symmetric_kernels import HEADER

        header = HEADER.value
        if self._buffer is not None:  # nobody frees what another rank's kernels may still write into
            torch.cuda.synchronize(self.device)
            self.agree(None)
        self.data = self.peers = self._buffer = self._handle = None
        buffer, reason = None, None
        try:
            with torch.cuda.device(self.device):
                buffer = Group.empty(self.device, (header + needed + ALIGNED - 1) // ALIGNED * ALIGNED)
                buffer.zero_()
                torch.cuda.synchronize(self.device)
        except Exception as error:  # out of memory too
            reason = first_line(error)
        reason = self.agree(reason)
        if reason is not None:
            return reason
        try:
            with settings(), torch.cuda.device(self.device):
                handle = self._rendezvous(buffer)
                peers = torch.tensor(list(handle.buffer_ptrs), dtype=torch.int64, device=self.device)
                self._abort = abort_word()
                torch.cuda.synchronize(self.device)
        except Exception as error:  # every rank hears of it below, and none waits for this one
            reason = first_line(error)
        reason = self.agree(reason)
        if reason is None:
            self._buffer, self._handle, self.peers, self.data = buffer, handle, peers, buffer[header:]
            self._epoch = 0
        return reason

    def _rendezvous(self, buffer):
        """PyTorch's collective that maps every rank's buffer here: its _SymmetricMemory.

        It holds Python's lock while it waits, so (a) its store is a file in a folder for this user alone, which no
        thread of another rank has to answer for, and (b) the first rank, which may answer the others' questions to
        `store`, enters last. The keys of that store count the calls of the process, so (c) ranks whose process made
        fewer, after a restart, make them up alone.
        """
        if self._group is None:
            self._file = torch.distributed.FileStore(bytes(self.store.get("file")).decode(), self.size)
            self._file.set_timeout(RENDEZVOUS)
            self._group = Group(self._file, self.rank, self.size)
        made = max(int(count) for count in self._exchange(str(Group.calls)))
        while Group.calls < made:
            alone = Group(torch.distributed.HashStore(), 0, 1)
            alone.rendezvous(alone.empty(buffer.device))
        arrived = [f"arrived/{made}/{rank}" for rank in range(1, self.size)]
        if self.rank:
            self._file.set(arrived[self.rank - 1], "1")
        elif arrived:
            self._file.wait(arrived, RENDEZVOUS)
        return self._group.rendezvous(buffer)

    def barrier(self):
        """Enqueue a wait for all ranks on the current stream, what they wrote before it included."""
        from .symmetric_kernels import barrier

        self._epoch += 1
        barrier[(1,)](self.peers, self._abort, self._epoch, self.rank, SIZE=self.size, num_warps=1)

    def abort(self):
        """End every wait of this rank, now and later, from any thread; what was to be received is garbage then."""
        if self._abort is not None:
            self._abort.fill_(1)

    def starts(self, lengths):
        """First token of each rank and the number of all, int32 on the device."""
        if tuple(lengths) not in self._starts:
            sums = [sum(lengths[:rank]) for rank in range(self.size + 1)]
            self._starts[tuple(lengths)] = torch.tensor(sums, dtype=torch.int32, device=self.device)
        return self._starts[tuple(lengths)]


class Group:
    """A group that PyTorch finds by its name, as its rendezvous wants it; one without a backend is enough. calls: of
    the rendezvous, in this process.
    """

    calls = 0
    _numbers = itertools.count()

    def __init__(self, store, rank, size):
        self.name = f"flux2 symmetric memory {next(Group._numbers)}"
        self.group = torch.distributed.ProcessGroup(store, rank, size)
        torch._C._distributed_c10d._register_process_group(self.name, self.group)

    def __del__(self):
        torch._C._distributed_c10d._unregister_process_group(self.name)

    @staticmethod
    def empty(device, numel=ALIGNED):
        """uint8 memory that other processes can map."""
        return torch._C._distributed_c10d._SymmetricMemory.empty_strided_p2p((numel,), (1,), torch.uint8, device)

    def rendezvous(self, buffer):
        Group.calls += 1
        return torch._C._distributed_c10d._SymmetricMemory.rendezvous(buffer, self.name)


class UlyssesBuffers:
    """Where q, k, v and the result of one call lie in every rank's buffer.

    lengths, kv_lengths: tokens of each rank of the group, of q and of k and v. In elements of dtype: keys_at, values_at
    and result_at, where they begin; each: heads that one rank computes.
    """

    def __init__(self, memory, batch, heads, head_dim, dtype, lengths, kv_lengths):
        self.memory, self.lengths, self.kv_lengths = memory, lengths, kv_lengths
        self.batch, self.heads, self.head_dim, self.dtype = batch, heads, head_dim, dtype
        self.each = heads // memory.size
        row, size = batch * self.each * head_dim, dtype.itemsize
        aligned = ALIGNED // size
        self.keys_at = -(-sum(lengths) * row // aligned) * aligned
        self.values_at = self.keys_at + sum(kv_lengths) * row
        self.result_at = self.keys_at + -(-2 * sum(kv_lengths) * row // aligned) * aligned
        self.bytes = (self.result_at + max(lengths) * memory.size * row) * size
        # what leaves this rank in each direction
        own, others = memory.rank, row * (memory.size - 1) * size
        self.scattered_bytes = (lengths[own] + 2 * kv_lengths[own]) * others
        self.gathered_bytes = (sum(lengths) - lengths[own]) * row * size

    def view(self, at, *shape):
        """A view of this rank's buffer as the call's number format, from element `at` on."""
        numel = 1
        for size in shape:
            numel *= size
        data = self.memory.data
        return data[: data.numel() // 16 * 16].view(self.dtype)[at : at + numel].view(shape)

    def scatter(self, q, k, v):
        """Write this rank's q (B, lengths[rank], H, D), k and v to the ranks that compute their heads."""
        q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
        self._scatter((q, q, q), 1, self.lengths, 0)
        self._scatter((k, v, v), 2, self.kv_lengths, self.keys_at)

    def _scatter(self, tensors, number, lengths, at):
        from .symmetric_kernels import scatter_heads

        memory, tokens = self.memory, lengths[self.memory.rank]
        if tokens:
            scatter_heads[(self.batch * tokens, memory.size, number)](
                *tensors, memory.peers, tokens, sum(lengths[: memory.rank]), sum(lengths), at,
                *(stride for tensor in tensors for stride in tensor.stride()[:3]),
                EACH=self.each, PADDED=next_power_of_2(self.each), D=self.head_dim,
            )  # fmt: skip

    def received(self):
        """q, k, v (B, tokens of all ranks, heads of this one, D), in rank order: views, until the next scatter."""
        queries, keys = sum(self.lengths), sum(self.kv_lengths)
        q = self.view(0, self.batch, queries, self.each, self.head_dim)
        k, v = self.view(self.keys_at, 2, self.batch, keys, self.each, self.head_dim)
        return q, k, v

    def gather(self, out):
        """Write the attention (B, tokens of all ranks, heads of this one, D) to the ranks whose tokens they are. out:
        None after a failure: nothing is written, and the others read what was there.
        """
        from .symmetric_kernels import gather_heads

        memory, tokens = self.memory, sum(self.lengths)
        if out is not None:
            gather_heads[(self.batch * tokens,)](
                out, memory.peers, memory.starts(self.lengths), tokens, self.result_at, memory.rank, *out.stride()[:3],
                SIZE=memory.size, EACH=self.each, PADDED=next_power_of_2(self.each), D=self.head_dim,
            )  # fmt: skip

    def result(self, borrow=False):
        """The result (B, lengths[rank], H, D) of this rank's tokens. borrow: a view that the next call overwrites."""
        tokens = self.lengths[self.memory.rank]
        out = self.view(self.result_at, self.batch, tokens, self.heads, self.head_dim)
        return out if borrow else out.clone()


def abort_word():
    """An int32 in host memory that GPUs read. Made in a forward pass and written by any thread, so no inference tensor:
    PyTorch lets nobody write to one outside inference mode.
    """
    with torch.inference_mode(False):
        return torch.zeros(1, dtype=torch.int32, pin_memory=torch.cuda.is_available())


@contextmanager
def settings():
    """PyTorch's settings of symmetric memory while the block runs; one that the user chose stays."""
    mine = {name: value for name, value in SETTINGS.items() if name not in os.environ}
    os.environ.update(mine)
    try:
        yield
    finally:
        for name in mine:
            os.environ.pop(name, None)
