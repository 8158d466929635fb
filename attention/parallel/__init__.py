"""One attention call over several ranks: Ulysses exchanges tokens for heads, ring passes keys on, USP does both.

  mesh.py            which ranks there are, their process groups, and every collective that attention uses
  usp.py             attend(...), and begin(...) for a caller that computes something else meanwhile
  symmetric_memory.py  heads written straight into other GPUs' memory; symmetric_kernels.py: the Triton kernels of that
  ulysses.py         the two all-to-alls around a call;   ring.py, lse_merge.py: attention over keys that go round
  deferred_error.py  an exception on one rank waits until the collectives of the call are done;   timing.py: seconds

torch alone; the attention function is an argument and no backend is named. Layout as in ../call.py: q (B, Sq, H, D), k
and v (B, Sk, H, D), lse float32 (B, H, Sq), natural logarithm. Ranks hold different numbers of tokens and no token is
ever added to make them equal.
"""

from .mesh import Degrees, Interrupted, Mesh, RanksLost, degrees, make_mesh, tensor_degrees  # noqa: F401
