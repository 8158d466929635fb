"""One forward pass of FLUX.2 on several ranks, each with its own part of the tokens.

  shards.py     which tokens belong to which rank: numbers only
  forward.py    sharded_forward (one call of a network), shard (every pass of a MODEL), unsupported (why not)
  attention.py  the override that computes attention over the tokens of all ranks
  tensor_parallel.py  weights split over the ranks: which part of each a rank holds, and where sums are taken
  workers/      processes and replicas: who calls the network on the other GPUs

What whoever starts the ranks must know:
- A failure is soft. Whatever is raised on one rank inside the forward pass (a cancel out of a linear layer, out of
  memory, a refused attention call), that rank takes part in the collectives that are left, with zeros, and raises then;
  on a GPU that only enqueues them. The other ranks finish the pass and do not know: they return NaN in the failed
  rank's tokens. So after a cancel the groups are intact, unless mesh.broken is set: then they must be made anew.
- Every rank needs the same patches that change tokens (core's FluxKVCache: its own instance on each rank, cleaned up on
  each), the same rope_options, and an attention override of its own. Where the override slot is empty core's attention
  computes.
- Nothing here sends inputs or options from rank to rank.

Imports nothing: a worker comes through here before it knows where ComfyUI is.
"""
