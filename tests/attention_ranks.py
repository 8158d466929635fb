"""What the ranks of test_parallel_attention.py do: attention over all ranks against the float64 reference on the whole,
case by case.

A case is a row: lengths per rank, batch, mask and so on; every row runs on every arrangement of the ranks that can run
it.
"""

from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist

from flux2_pack.attention import reference
from flux2_pack.attention.parallel import make_mesh, usp
from flux2_pack.attention.parallel.mesh import pairs

HEADS, HEAD = 12, 16  # heads that 2, 3 and 4 ranks can share


@dataclass(frozen=True)
class Case:
    """tokens: per rank, taken from the front for smaller groups; more_keys: added to each rank's keys; mask: how to
    make one; rings: whether a ring can do it.
    """

    tokens: tuple = (16, 16, 16, 16)
    more_keys: int = 0
    batch: int = 1
    dtype: torch.dtype = torch.float32
    mask: str = ""
    scale: float | None = None
    overlap_chunks: int = 1
    rings: bool = True


UNEVEN = (19, 5, 13, 8)
CASES = {
    "equal lengths": Case(),
    "lengths that divide nothing": Case(UNEVEN),
    "a rank without tokens": Case((7, 0, 6, 5)),
    "batch 2": Case(UNEVEN, batch=2),
    "a scale": Case(UNEVEN, scale=0.4),
    "more keys than queries": Case(UNEVEN, more_keys=6, batch=2),
    "bfloat16": Case(UNEVEN, dtype=torch.bfloat16),
    "heads in 3 groups": Case(UNEVEN, batch=2, overlap_chunks=3),
    "heads in 2 groups, more keys": Case(UNEVEN, more_keys=3, overlap_chunks=2),
    "key mask": Case(UNEVEN, batch=2, mask="keys", rings=False),
    "full mask, one per head": Case(UNEVEN, mask="heads", rings=False),
    "added mask, heads in 3 groups": Case(UNEVEN, mask="added", overlap_chunks=3, rings=False),
}


def exact(q, k, v, *, mask, scale, need_lse):
    """The attention that is shared: by definition, in float64, as exact as the tensors are."""
    out, lse = reference.attend(q, k, v, mask=mask, scale=scale, dtype=torch.float64)
    return out.to(q.dtype), lse.float()


def plain(q, k, v, scale=None, lse_factor=1.0):
    out, lse = exact(q, k, v, mask=None, scale=scale, need_lse=True)
    return out, lse * lse_factor


def padded(tensor):
    return torch.nn.functional.pad(tensor, (0, 0, 0, 0, 0, 1))


FAULTS = {
    "scale off by a percent": lambda q, k, v: plain(q, k, v, 1.01 * HEAD**-0.5),
    "a token of padding attended": lambda q, k, v: plain(q, padded(k), padded(v)),
    "a token dropped": lambda q, k, v: plain(q, k[:, :-1], v[:, :-1]),
    "keys of another order than values": lambda q, k, v: plain(q, k.flip(1), v),
}
RING_FAULTS = {
    "lse of base 2": lambda q, k, v: plain(q, k, v, lse_factor=1.4427),
    "lse of zeros": lambda q, k, v: plain(q, k, v, lse_factor=0),
}


def whole(case, size):
    """(q, k, v, mask, lengths, kv_lengths): the tensors of all ranks, the same in each of them."""
    torch.manual_seed(7)
    lengths = case.tokens[:size]
    keys = tuple(n + case.more_keys for n in lengths)
    q, k, v = (
        torch.randn(case.batch, sum(n), HEADS, HEAD, dtype=torch.float64).to(case.dtype) for n in (lengths, keys, keys)
    )
    return q, k, v, make_mask(case, sum(lengths), sum(keys)), lengths, keys


def make_mask(case, queries, keys):
    shapes = {"keys": (case.batch, 1, 1, keys), "heads": (1, HEADS, queries, keys), "added": (1, HEADS, queries, keys)}
    if not case.mask:
        return None
    drawn = torch.rand(shapes[case.mask])
    if case.mask == "added":
        return drawn
    keep = drawn > 0.3
    keep[..., 0] = True
    return keep


def mine(tensor, lengths, rank):
    return tensor.split(list(lengths), dim=1)[rank]


def own(mesh, case, local=exact):
    """This rank's part of the output."""
    q, k, v, mask, lengths, keys = whole(case, mesh.size)
    mesh.overlap_chunks = case.overlap_chunks
    tensors = (mine(tensor, of, mesh.rank) for tensor, of in ((q, lengths), (k, keys), (v, keys)))
    return usp.attend(local, *tensors, mesh, lengths, kv_lengths=keys, mask=mask, scale=case.scale)


def error(mesh, case, local=exact):
    """Relative error of one case over all ranks, against the float64 reference on the whole."""
    q, k, v, mask, lengths, _ = whole(case, mesh.size)
    expected, _ = reference.attend(q, k, v, mask=mask, scale=case.scale, dtype=torch.float64)
    gathered = mesh.gather(own(mesh, case, local).flatten(2), lengths)
    return reference.relative_error(gathered.unflatten(2, (HEADS, HEAD)), expected)


def with_fault(fault):
    return lambda q, k, v, *, mask, scale, need_lse: fault(q, k, v)


def refusal(function):
    try:
        function()
        return ""
    except Exception as said:
        return f"{type(said).__name__}: {said}"


def refusals(mesh):
    """What is said about calls that cannot be computed; none of them may leave the ranks out of step."""
    q = torch.zeros(1, 4, HEADS, HEAD)
    lengths = (4,) * mesh.size
    kinds = {
        "length": lambda: usp.attend(exact, q[:, :3], q, q, mesh, lengths),
        "heads": lambda: usp.attend(exact, q[:, :, :1], q[:, :, :1], q[:, :, :1], mesh, lengths),
        "grouped heads": lambda: usp.attend(exact, q, q[:, :, :4], q[:, :, :4], mesh, lengths),
        "no lse": lambda: usp.attend(lambda *t, **_: (t[0], None), q, q, q, mesh, lengths),
        "mask": lambda: usp.attend(
            exact, q, q, q, mesh, lengths, mask=torch.ones(1, 1, 1, 4 * mesh.size, dtype=torch.bool)
        ),
    }
    return {name: refusal(call) for name, call in kinds.items()}


def failing(mesh):
    """One rank's kernel raises: there alone it is heard, and the next call is right."""

    def local(*tensors, **rest):
        if mesh.rank == mesh.size - 1:
            raise MemoryError("out of memory on this rank")
        return exact(*tensors, **rest)

    return refusal(lambda: own(mesh, Case(UNEVEN), local)), mesh.broken is None, error(mesh, Case(UNEVEN))


def stopped(mesh):
    mesh.abort = lambda: True
    said = refusal(lambda: error(mesh, Case())), refusal(lambda: error(mesh, Case()))
    mesh.abort, mesh.broken = None, None
    return said


def timed(mesh):
    mesh.stats.reset()
    with mesh.stats.forward():
        error(mesh, Case(UNEVEN))
    times = mesh.stats.read()
    return times.as_data()


def arranged(mesh):
    """Every case on one arrangement of the ranks."""
    ring = mesh.ring > 1
    faults = {**FAULTS, **(RING_FAULTS if ring else {})}
    return {
        "errors": {name: error(mesh, case) for name, case in CASES.items() if case.rings or not ring},
        "faults": {name: error(mesh, Case(UNEVEN), with_fault(fault)) for name, fault in faults.items()},
        "refusals": refusals(mesh),
        "failing": failing(mesh),
        "stopped": stopped(mesh),
        "times": timed(mesh),
        "place": [mesh.rank, mesh.ulysses_rank, mesh.ring_rank],
    }


def prepare():
    return None


def own_groups(prefix, name, ranks):
    """A process group that torch.distributed does not know of, as those are that can be ended while they wait."""
    if dist.get_rank() not in ranks:
        return None
    place, store = (
        (ranks.index(dist.get_rank()), len(ranks)),
        dist.PrefixStore(f"{prefix} {name}", dist.distributed_c10d._get_default_store()),
    )
    group, backend = dist.ProcessGroup(store, *place), dist.ProcessGroupGloo(store, *place, timedelta(seconds=30))
    group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
    group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, backend)
    return group


def from_rank_0(mesh):
    tensor = torch.full((3,), float(mesh.rank + 1))
    mesh.broadcast(tensor)
    return tensor.tolist()


def run(prepared, rank, size):
    meshes = {str(d): make_mesh(d.ulysses, d.ring, "cpu") for d in pairs(size, HEADS)}
    found = {name: arranged(mesh) for name, mesh in meshes.items()}
    own = [
        make_mesh(d.ulysses, d.ring, "cpu", rank=rank, size=size, groups=partial(own_groups, str(d)))
        for d in pairs(size, HEADS)
    ]
    found["own groups"] = [(error(mesh, Case(UNEVEN, batch=2)), from_rank_0(mesh)) for mesh in own]
    found["alone"] = error(make_mesh(1, 1, "cpu", rank=0, size=1), Case((20,)))
    if rank == 0:  # the others go now, and this one must notice
        mesh = meshes[str(pairs(size, HEADS)[0])]
        found["left alone"] = refusal(lambda: error(mesh, Case())), refusal(lambda: error(mesh, Case()))
    return found
