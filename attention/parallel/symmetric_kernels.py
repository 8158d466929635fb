"""Triton kernels that write into the memory of other GPUs of the same host, and the barrier between them.

PEERS is an int64 tensor on the device with the address of every rank's buffer as this GPU sees it. A buffer begins with
HEADER bytes of barrier counters, one int32 a rank; what follows is laid out by symmetric_memory.py. Imported when a
mesh uses symmetric memory: it needs Triton.
"""

import triton
import triton.language as tl

HEADER = tl.constexpr(1024)  # bytes; also keeps what follows aligned for 16-byte stores
POLLS = tl.constexpr(64)  # of a counter between two looks at the abort word, which lies in host memory


@triton.jit
def peer(PEERS, rank, ELEMENT: tl.constexpr):
    """Pointer to the data in a rank's buffer, behind its header."""
    address = tl.multiple_of(tl.load(PEERS + rank) + HEADER, 16)
    return address.to(tl.pointer_type(ELEMENT))


@triton.jit
def scatter_heads(
    Q, K, V, PEERS, tokens, first, total, at, q_b, q_s, q_h, k_b, k_s, k_h, v_b, v_s, v_h,
    EACH: tl.constexpr, PADDED: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Each head of up to three tensors (B, tokens, H, D) to the rank that computes it: program (token row, rank, which
    tensor) writes EACH heads into (B, total, EACH, D) of that rank, the tensors one behind the other from element `at`
    on, at token `first` onwards.
    """
    row, owner, which = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    batch, token = row // tokens, row % tokens
    head, lane = tl.arange(0, PADDED), tl.arange(0, D)
    inside = (head < EACH)[:, None] & (lane >= 0)[None, :]
    heads = (owner * EACH + head).to(tl.int64)[:, None]
    if which == 0:
        source = Q + batch * q_b + token * q_s + heads * q_h
    elif which == 1:
        source = K + batch * k_b + token * k_s + heads * k_h
    else:
        source = V + batch * v_b + token * v_s + heads * v_h
    values = tl.load(source + lane[None, :], mask=inside, other=0.0)
    batches = tl.num_programs(0) // tokens
    target = at + ((which * batches + batch) * total + first + token) * (EACH * D)
    out = peer(PEERS, owner, Q.dtype.element_ty) + tl.multiple_of(target, 8)
    tl.store(out + head[:, None] * D + lane[None, :], values, mask=inside)


@triton.jit
def gather_heads(
    OUT, PEERS, STARTS, tokens, at, rank, o_b, o_s, o_h,
    SIZE: tl.constexpr, EACH: tl.constexpr, PADDED: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """The attention (B, tokens of all ranks, EACH, D) of this rank's heads to the ranks whose tokens they are: program
    (token row) writes into (B, tokens of that rank, SIZE * EACH, D) from element `at` of its buffer on.

    STARTS: int32, the first token of each rank, and the number of all tokens behind them.
    """
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    owner = 0
    for other in tl.static_range(1, SIZE):
        owner += (token >= tl.load(STARTS + other)).to(tl.int32)
    start = tl.load(STARTS + owner).to(tl.int64)
    length = tl.load(STARTS + owner + 1).to(tl.int64) - start
    head, lane = tl.arange(0, PADDED), tl.arange(0, D)
    inside = (head < EACH)[:, None] & (lane >= 0)[None, :]
    source = OUT + batch * o_b + token * o_s + head.to(tl.int64)[:, None] * o_h + lane[None, :]
    values = tl.load(source, mask=inside, other=0.0)
    target = at + ((batch * length + token - start) * SIZE + rank) * (EACH * D)
    out = peer(PEERS, owner, OUT.dtype.element_ty) + tl.multiple_of(target, 8)
    tl.store(out + head[:, None] * D + lane[None, :], values, mask=inside)


@triton.jit
def barrier(PEERS, ABORT, epoch, rank, SIZE: tl.constexpr):
    """Wait until every rank has reached `epoch` (1, 2, ...), what they wrote before it included. One program.

    Returns early when the abort word, in pinned host memory, is not 0: a rank that is gone never arrives.
    """
    for peer in tl.static_range(0, SIZE):
        counters = tl.load(PEERS + peer).to(tl.pointer_type(tl.int32))
        tl.atomic_xchg(counters + rank, epoch, sem="release", scope="sys")
    own = tl.load(PEERS + rank).to(tl.pointer_type(tl.int32))
    for peer in tl.static_range(0, SIZE):
        seen = tl.atomic_add(own + peer, 0, sem="acquire", scope="sys")
        stop = 0
        while (seen < epoch) & (stop == 0):
            for _ in range(POLLS):
                seen = tl.atomic_add(own + peer, 0, sem="acquire", scope="sys")
            stop = tl.load(ABORT, volatile=True)
