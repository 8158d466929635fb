"""Ring attention: queries stay, keys and values go round, and what each rank's keys give is merged (Liu et al. 2023,
Ring Attention, section 3).

While one rank's keys are computed with, the next rank's are on their way: two buffers, each as large as the largest
share.
"""

from ..errors import UserError
from .lse_merge import merge, start


def buffers(like, lengths, batch, heads):
    """Two buffers (max(lengths), B, 2, h, D) for keys and values on their way round, with the dtype, device and head
    size of `like`.
    """
    return [like.new_empty((max(lengths), batch, 2, heads, like.shape[-1])) for _ in range(2)]


def attend(local, q, k, v, lengths, mesh, pair, deferred, *, scale):
    """Attention of q over the keys of every rank of the ring.

    q (B, S, h, D); k and v (B, lengths[own ring rank], h, D); lengths: keys of each ring rank; pair: from `buffers`.
    local: see usp.begin; it is asked for the lse. Returns out (B, S, h, D) in q's dtype, or None after a failure
    that `deferred` holds. Every rotation takes place even then.
    """
    here, there = pair
    for index, tensor in enumerate((k, v)):
        here[: k.shape[1], :, index].copy_(tensor.transpose(0, 1))
    so_far = None
    for step in range(mesh.ring):
        length, coming = (lengths[(mesh.ring_rank - step - ahead) % mesh.ring] for ahead in (0, 1))
        arrived = mesh.rotate(here[:length].view(-1), there[:coming].view(-1)) if step < mesh.ring - 1 else None
        so_far = deferred(lambda: add(local, q, here[:length], so_far, scale), so_far)
        if arrived:
            arrived()
            here, there = there, here
    return deferred(lambda: so_far[0].to(q.dtype))


def add(local, q, chunk, so_far, scale):
    """(out, lse) with a chunk (n, B, 2, h, D) of keys and values added; so_far is None before the first."""
    if not len(chunk):
        return so_far
    k, v = (part.transpose(0, 1) for part in chunk.unbind(2))  # (B, n, h, D)
    part, lse = local(q, k, v, mask=None, scale=scale, need_lse=True)
    if lse is None:
        raise UserError(
            "Ring attention needs the log-sum-exp of each part, and this attention returned none. "
            "Use another backend, or a ring degree of 1.",
            "several-gpus",
        )
    return start(part, lse) if so_far is None else merge(*so_far, part, lse)
