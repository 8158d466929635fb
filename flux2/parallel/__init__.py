"""Forward passes shared by several ranks, each with its own part of the tokens: see `shared` (one call) and `split` (a
MODEL).

What whoever starts the ranks must know:
- A failure is soft. Whatever is raised on one rank inside the forward pass (a cancel out of a linear layer, out of
  memory, a refused attention call), that rank takes part in the exchanges that are left, with zeros, and raises then;
  on a GPU that only enqueues them. The other ranks finish the pass and do not know: they return NaN in the failed
  rank's tokens. So after a cancel the groups are intact, unless mesh.broken is set: then they must be made anew.
- Every rank needs the same patches that change tokens (core's FluxKVCache: its own instance on each rank, cleaned up on
  each), the same rope_options, and an attention override of its own. Where the override slot is empty core's attention
  computes.
- Nothing here sends inputs or options from rank to rank.
"""

from .forward import shared, split, unsupported  # noqa: F401
