"""Time every attention backend on the tensors of a call that a model really made. torch only.

A row per backend: Timing, TFLOP/s, error against float32, or the reasons why it has none. Calls go through
an AttentionDispatcher, as they do in the model.
"""

from . import statistics
from .. import registry
from ..call import AttentionRefused, call_of
from .results import BenchmarkRow
from .accuracy_probe import call_error
from ..dispatch import AttentionDispatcher
from ..override import name_of

REPEAT, WARM_UP = 9, 3
# of a GPU's work per timed run: calls are queued back to back, as in a model, so that the host's part does not count
LEAST_MS = 5


def missing(device):
    """{slug: reasons} of the backends that cannot run on a torch.device at all."""
    found = {slug: registry.unavailable(slug, registry.describe(device)) for slug in registry.ROWS}
    return {slug: reasons for slug, reasons in found.items() if reasons}


def available(device, wanted=()):
    """Slugs that can be tried on a torch.device, in the registry's order; only those in `wanted` if there are any.
    ValueError for unknown ones.
    """
    for slug in wanted:
        registry.row(slug)
    absent = missing(device)
    return [slug for slug in registry.ROWS if slug not in absent and (not wanted or slug in wanted)]


def math_bytes(elements):
    """Memory that sdpa-math needs for a score matrix of so many elements: scores, their softmax and a copy, in
    float32.
    """
    return 3 * 4 * elements


def bench_backend(size, call, slug, repeat=REPEAT, tick=lambda: None, free_bytes=float("inf"), own=None):
    """The row (BenchmarkRow) of a backend on one captured call: an object with q, k, v (B, H, S, D), mask, scale and
    text. own: ComfyUI's own attention function, which computes where slug is "comfyui".
    """
    heads_first = call.q, call.k, call.v
    q, k, v = (t.transpose(1, 2) for t in heads_first)  # (B, S, H, D)
    dispatcher = AttentionDispatcher(slug)
    row = BenchmarkRow(size, slug, call.text, exact=slug == registry.COMFYUI or registry.row(slug).exact)

    if slug == "sdpa-math" and math_bytes(q.shape[0] * q.shape[2] * q.shape[1] * k.shape[1]) > free_bytes:
        row.reason = (
            "Its score matrix could take more than half of the memory that is free, so it was not tried on a "
            "single call."
        )
        return row

    def work():
        if slug == registry.COMFYUI:
            scale = {} if call.scale is None else {"scale": call.scale}
            out = own(*heads_first, call.q.shape[1], mask=call.mask, skip_reshape=True, **scale)
            return out.unflatten(-1, (call.q.shape[1], -1))
        return dispatcher.attend(q, k, v, mask=call.mask, scale=call.scale, heads_first=heads_first)[0]

    try:
        out = work()
        row.error = call_error(q, k, v, out, call.mask, call.scale).total
        row.timing = statistics.timed(work, q.device, repeat, WARM_UP, tick, least_ms=LEAST_MS if q.is_cuda else 0)
    except AttentionRefused as refusal:
        row.reason = " ".join(refusal.reasons)
    except Exception as error:  # out of memory, a kernel that does not launch: this row has a reason, the others go on
        row.reason = f"{type(error).__name__}: {error}"
    row.tflops = call_of(q, k, v).flops / row.timing.ms / 1e9 if row.timing else None
    if slug == registry.COMFYUI:
        row.library, row.kernel = "ComfyUI", name_of(own)
        return row
    ran = dispatcher.log.current.kinds() if dispatcher.log.current else []
    row.library, row.kernel = (ran[0].library, ran[0].kernel or "") if ran else ("", "")
    return row
