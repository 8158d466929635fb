"""The kernels that write into other GPUs' memory, in Triton's interpreter: ranks are buffers of one process. Run by
test_symmetric_memory.py with TRITON_INTERPRET=1; barriers need real ranks (benchmarks/parallel.py --checks on GPUs).
"""

import pytest
import torch

import pack  # noqa: F401
from flux2_pack.attention import reference
from flux2_pack.attention.parallel import symmetric_kernels, usp
from flux2_pack.attention.parallel.mesh import Mesh
from flux2_pack.attention.parallel.symmetric_memory import SymmetricMemory, UlyssesBuffers


class Memory(SymmetricMemory):
    """A rank's memory among buffers of this process. Barriers are counted; nobody runs at the same time."""

    def __init__(self, rank, buffers):
        super().__init__(None, rank, len(buffers), "cpu")
        header = symmetric_kernels.HEADER.value
        self.data, self.barriers = buffers[rank][header:], 0
        self.peers = torch.tensor([buffer.data_ptr() for buffer in buffers], dtype=torch.int64)

    def barrier(self):
        self.barriers += 1


def ranks(like, lengths, kv_lengths):
    """UlyssesBuffers of every rank, with buffers that hold garbage."""
    size, shape = len(lengths), (like.shape[0], *like.shape[2:], like.dtype)
    needed = UlyssesBuffers(Memory(0, [torch.empty(4096, dtype=torch.uint8)] * size), *shape, lengths, kv_lengths).bytes
    held = [torch.full((needed + 4096,), 0x7F, dtype=torch.uint8) for _ in range(size)]
    return [UlyssesBuffers(Memory(rank, held), *shape, lengths, kv_lengths) for rank in range(size)]


CASES = {
    "two ranks": ([5, 5], None, 1, 4),
    "uneven": ([7, 2], None, 2, 6),
    "three ranks, one head each": ([3, 1, 4], None, 1, 3),
    "a rank without tokens": ([6, 0], None, 1, 2),
    "keys of references too": ([3, 4], [5, 6], 2, 2),
    "fewer keys": ([3, 4], [1, 2], 1, 4),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_attention_over_all_ranks_is_attention_over_all_tokens(case, dtype):
    lengths, kv_lengths, batch, heads = CASES[case]
    kv_lengths = kv_lengths or lengths
    torch.manual_seed(0)
    q = torch.randn(batch, sum(lengths), heads, 16).to(dtype)
    k, v = (torch.randn(batch, sum(kv_lengths), heads, 16).to(dtype) for _ in range(2))
    buffers = ranks(q, lengths, kv_lengths)
    # heads first in memory, as core hands them over: strides that are not those of a contiguous tensor
    heads_first = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    parts = [t.split(of, 1) for t, of in zip(heads_first, (lengths, kv_lengths, kv_lengths))]
    for rank, own in enumerate(buffers):
        own.scatter(*(part[rank] for part in parts))
    each = heads // len(lengths)
    outputs = []
    for rank, own in enumerate(buffers):
        mine = slice(rank * each, (rank + 1) * each)
        received = own.received()
        for got, whole in zip(received, (q, k, v)):
            assert torch.equal(got, whole[:, :, mine])
        outputs.append(reference.attend(*received)[0].to(dtype))
    for own, out in zip(buffers, outputs):
        own.gather(out)
    expected = reference.attend(q, k, v)[0].to(dtype)
    for rank, own in enumerate(buffers):
        assert torch.equal(own.result(), expected.split(lengths, 1)[rank])


def test_nothing_is_written_outside_of_a_call():
    """Guard bytes around what a call may write stay, and the barrier counters."""
    lengths, like = [4, 3], torch.zeros(1, 4, 2, 16)
    buffers = ranks(like, lengths, lengths)
    guard = buffers[0].memory.data[buffers[0].bytes :].clone()
    for rank, own in enumerate(buffers):
        own.scatter(*(torch.randn(1, lengths[rank], 2, 16) for _ in range(3)))
        own.gather(torch.randn(1, 7, 1, 16))
    for own in buffers:
        assert torch.equal(own.memory.data[own.bytes :], guard)


def test_a_result_outlives_the_next_call_and_a_borrowed_one_does_not():
    own = ranks(torch.zeros(1, 2, 2, 16), [2, 2], [2, 2])[0]
    own.memory.data.zero_()
    kept, borrowed = own.result(), own.result(borrow=True)
    own.memory.data.fill_(1)
    assert not kept.any() and borrowed.any()


def call(mesh, local, q, k, v):
    context = usp.CallContext(local, mesh, [q.shape[1]], [k.shape[1]], None, None, True, None)
    buffers = usp.symmetric_buffers(context, q.shape[0], *q.shape[2:], q.dtype)
    return usp.SymmetricUlysses(context, buffers, lambda: buffers.scatter(q, k, v))


def test_a_call_through_a_mesh():
    """A group of one rank that owns all heads, which needs no other process."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(1, 6, 2, 16) for _ in range(3))
    mesh = Mesh(0, 2, 1, 1, symmetric=Memory(0, [torch.empty(1 << 16, dtype=torch.uint8)]))
    begun = call(
        mesh, lambda q, k, v, *, mask, scale, need_lse: (reference.attend(q, k, v, scale=scale)[0], None), q, k, v
    )
    begun.compute()
    assert torch.allclose(begun.finish(), reference.attend(q, k, v)[0])
    assert mesh.stats.read().collectives == 2 and mesh.symmetric.barriers == 2 and mesh.attention_calls == 1


def test_a_kernel_that_fails_takes_part_and_raises_at_the_end():
    mesh = Mesh(0, 2, 1, 1, symmetric=Memory(0, [torch.empty(1 << 16, dtype=torch.uint8)]))

    def local(q, k, v, **kwargs):
        raise ValueError("no such kernel")

    begun = call(mesh, local, *(torch.randn(1, 6, 2, 16) for _ in range(3)))
    begun.compute()
    assert mesh.symmetric.barriers == 2, "the other ranks do not wait for one that failed"
    with pytest.raises(ValueError, match="no such kernel"):
        begun.finish()


@pytest.mark.parametrize("kind", ["single", "double"])
@pytest.mark.parametrize("lengths", [[5, 5], [6, 3]])
def test_the_qkv_kernel_writes_what_scatter_would(kind, lengths):
    """Normalised and rotated heads straight into the memory of the rank that computes them, v included."""
    from flux2_pack.flux2.fused.kernels.qkv import joint_qkv, single_qkv

    torch.manual_seed(2)
    batch, heads, size, text = 2, 6, 16, 2
    like = torch.empty(batch, 1, heads, size)
    direct, indirect = ranks(like, lengths, lengths), ranks(like, lengths, lengths)
    weights = [torch.rand(size) for _ in range(4)]
    for rank, tokens in enumerate(lengths):
        pe = torch.randn(1, 1, tokens, size // 2, 2, 2)
        if kind == "single":
            inputs = torch.randn(batch, tokens, 4 * heads * size), heads, weights[:2]
            kernel = single_qkv
        else:
            inputs = [torch.randn(batch, n, 3 * heads * size) for n in (text, tokens - text)]
            inputs = *inputs, heads, weights[:2], weights[2:]
            kernel = joint_qkv
        assert kernel(*inputs, pe, place=direct[rank]) is None
        indirect[rank].scatter(*kernel(*inputs, pe))
    for one, other in zip(direct, indirect):
        assert all(torch.equal(a, b) for a, b in zip(one.received(), other.received()))
