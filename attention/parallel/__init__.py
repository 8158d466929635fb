"""One attention call over several ranks: Ulysses exchanges tokens for heads, ring passes keys and values round, unified
does both.

torch alone; the attention function is an argument and no backend is named. Layout as in ../call.py: q (B, Sq, H, D), k
and v (B, Sk, H, D), lse float32 (B, H, Sq), natural logarithm. Ranks hold different numbers of tokens and no token is
ever added to make them equal.
"""

from .mesh import Degrees, Interrupted, Mesh, RanksLost, degrees, make_mesh  # noqa: F401
