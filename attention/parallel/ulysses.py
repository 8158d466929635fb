"""Ulysses: each rank trades its tokens of all heads for all tokens of its heads (Jacobs et al. 2023, DeepSpeed-Ulysses,
section 3).

What travels is laid out by token, (S, B, n, h, D), so the pieces of the ranks simply follow one another and uneven
lengths need no padding; the kernel reads q, k and v as strided views of what arrived.
"""


class Trade:
    """n tensors of equal length on their way to the ranks that compute their heads. All memory is taken at once, so
    that
    nothing fails half-way.

    tensors: n of (B, lengths[own rank], H, D). lengths: tokens of each rank of the Ulysses group. heads: slice of each
    rank's H / ranks heads that goes along.
    """

    def __init__(self, mesh, tensors, lengths, heads):
        self.mesh, self.tensors, self.lengths, self.heads = mesh, tensors, lengths, heads
        batch, tokens, all_heads, head_dim = tensors[0].shape
        each = len(range(all_heads // mesh.ulysses)[heads])
        self.sent = tensors[0].new_empty((mesh.ulysses, tokens, batch, len(tensors), each, head_dim))
        self.received = tensors[0].new_empty((sum(lengths), batch, len(tensors), each, head_dim))

    def depart(self, wait):
        """Start the exchange; wait=False leaves it to `arrive` to wait for it."""
        for index, tensor in enumerate(self.tensors):
            by_rank = tensor.unflatten(2, (self.mesh.ulysses, -1))[:, :, :, self.heads]  # (B, S, ranks, h, D)
            self.sent[:, :, :, index].copy_(by_rank.permute(2, 1, 0, 3, 4))
        row = self.sent[0, 0].numel() if self.sent.shape[1] else self.received[0].numel()
        sizes = [n * row for n in self.lengths]
        self._finish = self.mesh.all_to_all(
            self.received.view(-1),
            self.sent.view(-1),
            sizes,
            [self.sent[0].numel()] * self.mesh.ulysses,
            self.mesh.ulysses_group,
            wait,
        )

    def arrive(self):
        """n views (B, sum(lengths), h, D)."""
        self._finish()
        self.sent = self.tensors = None
        return tuple(part.transpose(0, 1) for part in self.received.unbind(2))


class Return:
    """The attention of a rank's heads on its way back to the ranks whose tokens they are."""

    def __init__(self, mesh, like, lengths):
        """like: a Trade's received, (sum(lengths), B, n, h, D)."""
        self.mesh, self.lengths, self.rows = mesh, lengths, None
        _, batch, _, each, head_dim = like.shape
        self.row = batch * each * head_dim
        self.received = like.new_empty((mesh.ulysses, lengths[mesh.ulysses_rank], batch, each, head_dim))

    def depart(self, rows, wait):
        """rows: (sum(lengths), B, h, D), contiguous. Kept until they have left."""
        self.rows = rows
        self._finish = self.mesh.all_to_all(
            self.received.view(-1),
            rows.view(-1),
            [self.received[0].numel()] * self.mesh.ulysses,
            [n * self.row for n in self.lengths],
            self.mesh.ulysses_group,
            wait,
        )

    def arrive(self):
        """(B, S, ranks, h, D), a view."""
        self._finish()
        self.rows = None
        return self.received.permute(2, 1, 0, 3, 4)
