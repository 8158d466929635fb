"""Attention of one rank during a sharded forward pass: the collectives around whatever computes attention on this
MODEL.

Is in the override slot for the length of a forward pass, in front of the override that it finds there (a Select
Attention node's, another pack's, or none: then core's own function). That one sees what one rank computes: the tokens
of all ranks and a share of the heads.
"""

import torch

from ...attention.errors import UserError
from ...attention.dispatch import AttentionDispatcher
from ...attention.override import AttentionOverride, core_function
from ...attention.parallel import usp
from ..attention_slot import dispatcher_behind


def ring_fallback():
    """The override that computes a ring's parts where nobody chose a kernel: ring attention needs a log-sum-exp, which
    ComfyUI's own attention does not give, so `auto` does.
    """
    return AttentionOverride(AttentionDispatcher("auto"))


class ShardedAttention:
    """The override during one forward pass. state: the ForwardState it belongs to; inner: the override that was there,
    or None; fallback: an AttentionOverride for rings where there is none.
    """

    def __init__(self, state, inner, fallback):
        self.state, self.inner, self.fallback = state, inner, fallback
        self._masks = {}

    def __call__(self, func, q, k, v, heads, **kwargs):
        call = self.begin(func, q, k, v, heads, blocking=True, **kwargs)
        call.compute()
        return call.finish()

    def begin(
        self,
        func,
        q,
        k,
        v,
        heads,
        mask=None,
        attn_precision=None,
        skip_reshape=False,
        skip_output_reshape=False,
        blocking=False,
        **kwargs,
    ):
        """The same call as core makes, in three parts: returns an attention.parallel.usp.PendingAttention, whose
        finish() gives what a call returns. q, k, v: (B, S, H*D), or (B, H, S, D) with skip_reshape; S: this rank's
        tokens.

        For blocks with something else to compute, their feed-forward part say: after `begin` q, k and v are being sent
        to the other ranks, after `compute` the result is being sent back. Between begin and finish no other attention
        call may begin. ValueError for a mask that does not fit the sequence.
        """
        shards, mesh = self.state.shards, self.state.mesh
        if skip_reshape:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        else:
            q, k, v = (t.unflatten(-1, (heads, -1)) for t in (q, k, v))
        lengths, keys = shards.lengths(), shards.lengths(references=True)
        keys = keys if k.shape[1] == keys[mesh.rank] else lengths
        self.state.pending = usp.begin(
            self._local(func, attn_precision, kwargs),
            q,
            k,
            v,
            mesh,
            lengths,
            kv_lengths=keys,
            mask=self._in_rank_order(mask, lengths, keys),
            scale=kwargs.get("scale"),
            blocking=blocking,
            convert=(lambda out: out.transpose(1, 2)) if skip_output_reshape else (lambda out: out.flatten(2)),
        )
        return self.state.pending

    def attend_written(self, write, func, batch, tokens, heads, head_dim, dtype, mask=None, **kwargs):
        """The same call for q, k and v (B, tokens, H, D) that a kernel can write to where they are computed: the result
        (B, tokens, H*D), which the next call overwrites, or None where they have to be given to this object instead.

        write(place): enqueues that kernel; see usp.begin_written.
        """
        shards, mesh = self.state.shards, self.state.mesh
        lengths, keys = shards.lengths(), shards.lengths(references=True)
        if tokens != lengths[mesh.rank] or (keys != lengths and tokens == keys[mesh.rank]):
            return None
        call = usp.begin_written(
            self._local(func, None, kwargs),
            write,
            mesh,
            lengths,
            batch=batch,
            heads=heads,
            head_dim=head_dim,
            dtype=dtype,
            mask=self._in_rank_order(mask, lengths, lengths),
            scale=kwargs.get("scale"),
        )
        if call is None:
            return None
        self.state.pending = call
        call.compute()
        return call.finish().flatten(2)

    def _local(self, func, attn_precision, kwargs):
        """(q, k, v, *, mask, scale, need_lse) -> (out, lse) in (B, S, H, D), computed by the override behind this."""
        # img_slice counts tokens of another sequence
        options = {key: value for key, value in (kwargs.get("transformer_options") or {}).items() if key != "img_slice"}
        rest = dict(kwargs, attn_precision=attn_precision, transformer_options=options)

        def local(q, k, v, *, mask, scale, need_lse):
            try:
                if need_lse:
                    return self._with_lse(q, k, v, mask, scale, rest)
                heads_first = (t.transpose(1, 2) for t in (q, k, v))
                if self.inner:
                    out = self.inner(func, *heads_first, q.shape[2], mask=mask, skip_reshape=True, **rest)
                else:
                    computing = core_function(func, rest)
                    out = computing(*heads_first, q.shape[2], mask=mask, skip_reshape=True, **rest)
                return out.unflatten(-1, (q.shape[2], -1)), None
            except BaseException as error:  # it raises after the collectives: another rank may wait for this one before
                self.state.sharded.failed(error)
                raise

        return local

    def _with_lse(self, q, k, v, mask, scale, rest):
        dispatcher = dispatcher_behind(self.inner or self.fallback)
        if dispatcher is None:
            raise UserError(
                "A ring degree above 1 needs an attention backend that returns the log-sum-exp, and ComfyUI's own "
                "does not. Put Select Attention on this model, or use a ring degree of 1.",
                "several-gpus",
            )
        options = rest["transformer_options"]
        known = "block_type" in options and "block_index" in options
        block = (options["block_type"], options["block_index"]) if known else None
        precise = rest.get("low_precision_attention", True) is False
        return dispatcher.attend(q, k, v, mask=mask, scale=scale, need_lse=True, block=block, full_precision=precise)

    def _in_rank_order(self, mask, queries, keys):
        """A mask over the whole sequence with its rows and columns in the order in which the ranks hold the tokens; (B
        or 1, H or 1, Sq or 1, Sk).
        """
        if mask is None:
            return None
        if id(mask) not in self._masks:  # the same tensor for every block: kept, so that its id stays its own
            self._masks[id(mask)] = (mask, self._reordered(mask, sum(queries), sum(keys)))
        return self._masks[id(mask)][1]

    def _reordered(self, mask, queries, keys):
        if mask.shape[-1] != keys or mask.shape[-2] not in (1, queries):
            raise UserError(
                f"The attention mask is for {tuple(mask.shape[-2:])} queries and keys, and the sequence has {queries} "
                f"and {keys}. Such a mask cannot be shared by several GPUs.",
                "several-gpus",
            )
        mask = mask[(None,) * (4 - mask.ndim)] if mask.ndim < 3 else mask.unsqueeze(1) if mask.ndim == 3 else mask
        rows, columns = (
            torch.tensor(self.state.shards.order(with_references), device=mask.device)
            for with_references in (None, keys == sum(self.state.shards.lengths(references=True)))
        )
        mask = mask.index_select(3, columns)
        return mask if mask.shape[2] == 1 else mask.index_select(2, rows)
