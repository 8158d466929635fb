"""Ulysses: two all-to-alls around an attention call (Jacobs et al. 2023, DeepSpeed-Ulysses, section 3). Before it each
rank gives up its tokens of all heads for all tokens of its heads, after it the other way.

Buffers are laid out by token, (S, B, n, h, D), so the pieces of the ranks simply follow one another and uneven lengths
need no padding; the kernel reads q, k and v as strided views of what was received. All memory is taken in __init__, so
that nothing fails between two collectives.
"""


class ScatterHeads:
    """n tensors of equal length to the ranks that compute their heads.

    tensors: n of (B, lengths[own rank], H, D). lengths: tokens of each rank of the Ulysses group. heads: slice of each
    rank's H / ranks heads that is sent.
    """

    def __init__(self, mesh, tensors, lengths, heads):
        self.mesh, self.tensors, self.lengths, self.heads = mesh, tensors, lengths, heads
        batch, tokens, all_heads, head_dim = tensors[0].shape
        each = len(range(all_heads // mesh.ulysses)[heads])
        self.sent = tensors[0].new_empty((mesh.ulysses, tokens, batch, len(tensors), each, head_dim))
        self.received = tensors[0].new_empty((sum(lengths), batch, len(tensors), each, head_dim))

    def start(self, blocking):
        """Pack and start the all-to-all; blocking=False leaves it to `wait` to wait for it."""
        for index, tensor in enumerate(self.tensors):
            by_rank = tensor.unflatten(2, (self.mesh.ulysses, -1))[:, :, :, self.heads]  # (B, S, ranks, h, D)
            self.sent[:, :, :, index].copy_(by_rank.permute(2, 1, 0, 3, 4))
        token = self.received[0].numel()
        out_sizes = [length * token for length in self.lengths]
        in_sizes = [self.sent[0].numel()] * self.mesh.ulysses
        group = self.mesh.ulysses_group
        flat = self.received.view(-1), self.sent.view(-1)
        self._wait = self.mesh.all_to_all(*flat, out_sizes, in_sizes, group, blocking)

    def wait(self):
        """n views (B, sum(lengths), h, D)."""
        self._wait()
        self.sent = self.tensors = None
        return tuple(part.transpose(0, 1) for part in self.received.unbind(2))


class GatherHeads:
    """The attention of a rank's heads back to the ranks whose tokens they are. like: a ScatterHeads' `received`."""

    def __init__(self, mesh, like, lengths):
        self.mesh, self.lengths, self.rows = mesh, lengths, None
        _, batch, _, each, head_dim = like.shape
        self.token = batch * each * head_dim
        self.received = like.new_empty((mesh.ulysses, lengths[mesh.ulysses_rank], batch, each, head_dim))

    def start(self, rows, blocking):
        """rows: (sum(lengths), B, h, D), contiguous. Kept until they are sent."""
        self.rows = rows
        out_sizes = [self.received[0].numel()] * self.mesh.ulysses
        in_sizes = [length * self.token for length in self.lengths]
        group = self.mesh.ulysses_group
        self._wait = self.mesh.all_to_all(self.received.view(-1), rows.view(-1), out_sizes, in_sizes, group, blocking)

    def wait(self):
        """(B, S, ranks, h, D), a view."""
        self._wait()
        self.rows = None
        return self.received.permute(2, 1, 0, 3, 4)
