"""What every backend file provides: an Adapter per slug, in a dict called ADAPTERS."""

import importlib.metadata

import torch

from .call import Limits, default_scale


def installed_version(distribution):
    """ "name version" of an installed package; a source tree on the path has no version that can be asked for."""
    try:
        return f"{distribution} {importlib.metadata.version(distribution)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{distribution} (version unknown)"


class Adapter:
    """One way to compute attention.

    Subclasses set `limits`, `distribution` (the pip name whose version is reported) and implement `run`. `available`
    and `unsupported` answer in sentences; `attend` is what everybody calls.
    """

    limits = Limits()
    distribution = "torch"

    def version(self):
        """ "name version" of the library that computes."""
        return f"PyTorch {torch.__version__}" if self.distribution == "torch" else installed_version(self.distribution)

    def kernel(self, q, k, v, mask=None):
        """Name of the kernel that a call with these tensors runs, as far as it can be known; None when the library
        decides unseen.
        """
        return None

    def chosen_by(self):
        """What besides the tensors decides the answer of `kernel`, as something that can be compared."""
        return ()

    def missing(self):
        """Sentences about parts of the library that this backend needs and that are not there; empty means complete."""
        return []

    def unsupported(self, call):
        """Every reason why `call` (AttentionCall) cannot run; empty means it can."""
        return self.limits.reasons(call)

    def variants(self, call):
        """{name: Adapter}: ways to launch this kernel for `call` that differ in speed alone, this one first. With more
        than one, the fastest measured is used."""
        return {"": self}

    def attend(self, q, k, v, *, mask=None, scale=None, need_lse=False):
        """Attention.

        q (B, Sq, H, D), k and v (B, Sk, Hkv, D), any strides with a contiguous last axis; mask as in call.py; scale
        defaults to D**-0.5. Returns (out (B, Sq, H, D) in q's dtype, lse float32 (B, H, Sq) or None).
        """
        return self.run(q, k, v, mask, default_scale(q.shape[-1]) if scale is None else scale, need_lse)

    # set by backends whose library's own layout is (B, H, S, D), as ComfyUI's is: attend without turning the tensors
    # twice.
    # (q, k, v (B, H, S, D), mask, scale) -> out (B, H, Sq, D)
    attend_heads_first = None

    def run(self, q, k, v, mask, scale, need_lse):
        raise NotImplementedError(f"{type(self).__name__}.run")


def lse_bhs(lse, q):
    """Check that a kernel's log-sum-exp has the layout it promised, and crop padding: -> float32 (B, H, Sq).

    Accepts (B, H, Sq or more) and (B, H, Sq or more, 1). Anything else is a changed library: RuntimeError, never a
    guess.
    """
    b, s, h = q.shape[:3]
    flat = lse.squeeze(-1) if lse.ndim == 4 and lse.shape[-1] == 1 else lse
    if flat.ndim != 3 or flat.shape[:2] != (b, h) or flat.shape[2] < s:
        raise RuntimeError(
            f"The kernel returned a log-sum-exp of shape {tuple(lse.shape)}; expected (batch {b}, heads {h}, at "
            f"least {s} queries)."
        )
    return flat[..., :s].float()


def repeat_heads(t, heads, axis=2):
    """k or v, whose heads lie on `axis`, with each head repeated to `heads` heads; as it is when they are equal."""
    return t if t.shape[axis] == heads else t.repeat_interleave(heads // t.shape[axis], dim=axis)


def per_tensor_fp8(t, dtype):
    """t as fp8 with one scale for the whole tensor.

    Returns (values, descale): values in `dtype` with t's shape, descale float32 (1,), t ~ values * descale. The largest
    value becomes the largest of the format (448, or 240 for e4m3fnuz) but for a rounding of the division, which fp8
    rounds away: nothing has to be clamped.
    """
    low, high = t.aminmax()  # exact in any dtype, and without the temporary that abs() would make
    top = torch.finfo(dtype).max
    descale = (torch.maximum(-low, high).float() / top).clamp(min=torch.finfo(torch.float32).tiny).reshape(1)
    return (t.float() / descale).to(dtype), descale
