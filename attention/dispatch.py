"""What one "Select Attention" node decided for a model, and the decisions that follow from it call by call."""

from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
import threading
import weakref

from . import registry
from .call import CHOOSE_ANOTHER, AttentionCall, AttentionRefused, call_of, default_scale
from .errors import UserError
from .masks import MaskMemory, attend_kept, normalise
from .run_log import RunLog

REFUSE, USE_SDPA = "error", "use SDPA and report"
DELEGATED = "delegated"
SCHEDULE_TOPIC = "first-and-last-steps-and-blocks"


@dataclass(frozen=True)
class Schedule:
    """Where another backend is used: the first and last steps of a sampling, the first and last blocks of the model.
    Counts, 0 for none.

    blocks: block kinds in the order in which the model runs them with their numbers, (("double", 8), ("single", 48))
    for FLUX.2-dev.
    """

    backend: str
    first_steps: int = 0
    last_steps: int = 0
    first_blocks: int = 0
    last_blocks: int = 0
    blocks: tuple = ()

    def __post_init__(self):
        if min(self.first_steps, self.last_steps, self.first_blocks, self.last_blocks) < 0:
            raise UserError("First and last steps and blocks are counts and cannot be negative.", SCHEDULE_TOPIC)
        if (self.first_blocks or self.last_blocks) and not self.blocks:
            raise UserError(
                "This model does not say how many blocks it has, so first and last blocks cannot be chosen. Set both "
                "to 0.",
                SCHEDULE_TOPIC,
            )

    def at_edge(self, step, steps, block):
        """True where `backend` replaces the main one. step and block count from 0; step is None outside a sampling."""
        total = sum(n for _, n in self.blocks)
        by_step = step is not None and (step < self.first_steps or step >= steps - self.last_steps)
        by_block = block is not None and (block < self.first_blocks or block >= total - self.last_blocks)
        return by_step or by_block

    def block_number(self, kind, index):
        """Number of a block from 0 over all kinds, None for a kind that the model did not declare."""
        before = 0
        for name, size in self.blocks:
            if name == kind:
                return before + index
            before += size
        return None


@dataclass
class Decision:
    """How calls of one kind are computed, and why. adapter is None when they are delegated to the override that was
    there before.
    """

    backend: str
    adapter: object
    library: str
    kernel: str | None
    call: AttentionCall
    why: str
    table: object = None
    key: tuple = field(default=(), repr=False)
    chosen_by: tuple = field(default=(), repr=False)  # Adapter.chosen_by when this was decided


class _Progress(threading.local):
    """Where the current thread is: step, number of steps, and how many attention calls this forward pass has made."""

    step = None
    steps = 0
    calls = 0


class _Current(threading.local):
    """The dispatcher whose model the current thread is running, set around each forward pass."""

    dispatcher = None


_current = _Current()
_numbers = count(1)
_by_number = weakref.WeakValueDictionary()  # compiled graphs hold a number, not an object


class AttentionDispatcher:
    """A backend for a model, with its schedule, its policy for calls it cannot run, and the log of what ran.

    backend: slug or "auto". unsupported: REFUSE raises AttentionRefused, USE_SDPA computes with PyTorch and reports it.
    tuner: for auto. options: backend-specific settings such as {"aiter_rounding": "toward zero"}, handed to adapters
    that know them.
    """

    def __init__(self, backend, *, unsupported=REFUSE, schedule=None, tuner=None, options=None):
        for slug in (backend, *([schedule.backend] if schedule else [])):
            if slug not in (registry.AUTO, registry.COMFYUI):
                registry.row(slug)
        if unsupported not in (REFUSE, USE_SDPA):
            raise UserError(
                f"unsupported calls can be '{REFUSE}' or '{USE_SDPA}', not '{unsupported}'.", "unknown-backend"
            )
        self.backend, self.unsupported, self.schedule, self.tuner, self.options = (
            backend,
            unsupported,
            schedule,
            tuner,
            options or {},
        )
        self.log = RunLog()
        self.previous_name = None
        self.hooked = False  # True once a sampler's hook has told it of a forward pass
        self.number = next(_numbers)
        _by_number[self.number] = self
        self._decisions, self._masks, self._progress = {}, MaskMemory(), _Progress()

    # --- told by the sampler's hooks

    def begin_run(self, steps):
        return self.log.begin(self.describe(), self.previous_name, steps)

    @contextmanager
    def forward(self, step, steps):
        """Around one forward pass of the model, at a step (from 0, or None outside a sampling) of `steps`."""
        self.hooked = True
        self.log.forward()
        self._masks.forget()
        self._progress.step, self._progress.steps, self._progress.calls = step, steps, 0
        before, _current.dispatcher = _current.dispatcher, self
        try:
            yield
        finally:
            _current.dispatcher = before

    def describe(self):
        if not self.schedule:
            return self.backend
        s = self.schedule
        return (
            f"{self.backend}, and {s.backend} in the first {s.first_steps} and last {s.last_steps} steps "
            f"and the first {s.first_blocks} and last {s.last_blocks} blocks"
        )

    # --- one call

    def attend(
        self,
        q,
        k,
        v,
        *,
        mask=None,
        scale=None,
        need_lse=False,
        block=None,
        full_precision=False,
        heads_first=None,
        in_graph=False,
    ):
        """Compute one call of BSHD tensors as chosen, and count it once it is computed.

        heads_first: the same q, k, v as (B, H, S, D), if the caller has them so: some libraries want that. block:
        (kind, index) of the model block that calls, if known. full_precision: the model asks for no quantised kernel
        here. in_graph: a compiled graph calls, which cannot delegate.

        Returns (out, lse), or the Decision when the call is delegated: whoever computes it then calls `count`.
        AttentionRefused when the backend cannot and the policy is REFUSE.
        """
        kept = self._masks(mask, q.shape[1])[0] if mask is not None else None
        if kept is not None and kept.everything:
            mask = kept = None
        decision = self.decide(
            q, k, v, mask, kept, scale, need_lse, self._slug(block), full_precision, can_delegate=not in_graph
        )
        if decision.adapter is None:
            return decision
        scale = default_scale(q.shape[-1]) if scale is None else scale
        result = self._compute(decision.adapter, q, k, v, mask, kept, scale, need_lse, heads_first)
        self.count(decision)
        return result

    @staticmethod
    def _compute(adapter, q, k, v, mask, kept, scale, need_lse, heads_first):
        if kept is not None and not adapter.limits.mask:
            return attend_kept(adapter.attend, q, k, v, kept, scale=scale, need_lse=need_lse)
        mask = None if mask is None else normalise(mask, q.shape[1])
        if heads_first and adapter.attend_heads_first and not need_lse:
            return adapter.attend_heads_first(*heads_first, mask, scale).transpose(1, 2), None
        return adapter.attend(q, k, v, mask=mask, scale=scale, need_lse=need_lse)

    def count(self, decision, computed_by=None):
        """Note a call that has been computed. computed_by: the name of what computed a delegated one."""
        self.log.running(self.describe(), self.previous_name).count(decision, computed_by)

    def _slug(self, block):
        if self.schedule is None or block is not None:
            return self.slug_of(block)
        # a compiled graph cannot pass its block number, so there the calls of this forward pass are counted: one
        # attention per block
        p = self._progress
        p.calls += 1
        return self.schedule.backend if self.schedule.at_edge(p.step, p.steps, p.calls - 1) else self.backend

    def slug_of(self, block):
        """The backend chosen for a block (kind, index) in the step that this thread is in."""
        if self.schedule is None:
            return self.backend
        p, number = self._progress, self.schedule.block_number(*block)
        return self.schedule.backend if self.schedule.at_edge(p.step, p.steps, number) else self.backend

    def decide(self, q, k, v, mask, kept, scale, need_lse, slug, full_precision, can_delegate=True):
        """The Decision for a call; the same one for calls that cannot differ in anything that it depends on."""
        kind = "none" if mask is None else "full" if kept is None else "keys"
        key = (
            slug,
            *((t.shape, t.stride(), t.dtype, t.requires_grad) for t in (q, k, v)),
            q.device,
            kind,
            None if mask is None else (mask.shape, mask.stride(), mask.dtype, mask.requires_grad),
            need_lse,
            full_precision,
            can_delegate,
        )
        decision = self._decisions.get(key)
        state = decision.adapter.chosen_by() if decision is not None and decision.adapter else ()
        if decision is None or state != decision.chosen_by:
            call = call_of(q, k, v, kind, need_lse)
            decision = self._decide(q, k, v, mask, kept, scale, call, slug, full_precision, can_delegate)
            decision.chosen_by = decision.adapter.chosen_by() if decision.adapter else ()
            decision.key = (*key, decision.chosen_by)
            self._decisions[key] = decision
        return decision

    def _decide(self, q, k, v, mask, kept, scale, call, slug, full_precision, can_delegate):
        """Delegate, choose, refuse or replace: the first of these that applies."""
        delegates = self._delegates(slug, full_precision)
        if delegates and call.need_lse and self.unsupported == REFUSE:
            reason = f"A ring over several GPUs needs the log-sum-exp, which cannot be had here: {delegates}."
            raise AttentionRefused(slug, [reason], f"{CHOOSE_ANOTHER} (auto finds one), or a ring degree of 1.", call)
        if delegates and can_delegate and not call.need_lse:
            return Decision(slug if slug == registry.COMFYUI else DELEGATED, None, "ComfyUI", None, call, delegates)
        table, why = None, f"{slug} was chosen"
        if delegates:
            slug, why = "sdpa", f"{delegates}; such a call cannot be delegated here, so PyTorch computes it"
        elif slug == registry.AUTO:
            normal = None if mask is None else normalise(mask, q.shape[1])
            slug, table = (self.tuner or default_tuner()).choose(call, q, k, v, normal, kept, scale)
            why = f"auto on {call.device}: {table.why}"
        reasons = registry.unsupported(slug, call)
        if reasons and self.unsupported == REFUSE:
            raise AttentionRefused(slug, reasons, hint_for(slug, call), call)
        if reasons:
            slug, why = "sdpa", f"{slug} could not ({' '.join(reasons)}), and '{USE_SDPA}' is set"
        return self._computed_by(slug, call, why, table, q, k, v, mask, kept)

    @staticmethod
    def _delegates(slug, full_precision):
        """Why a call goes to the override that was there before, or to core's own function; "" when it does not."""
        if slug == registry.COMFYUI:
            return "ComfyUI's own attention was chosen"
        if full_precision and slug != registry.AUTO and not registry.row(slug).exact:
            return f"the model asks for full precision here and {slug} is quantised"
        return ""

    def _computed_by(self, slug, call, why, table, q, k, v, mask, kept):
        adapter = registry.adapter(slug, call.device)
        if hasattr(adapter, "with_options"):
            adapter = adapter.with_options(**self.options)
        if len(adapter.variants(call)) > 1:
            normal = None if mask is None else normalise(mask, q.shape[1])
            adapter = (self.tuner or default_tuner()).variant(slug, adapter, call, q, k, v, normal, kept)
        if kept is not None and not adapter.limits.mask:
            why += "; the mask only hides keys, so they are left out: exact"
        kernel = adapter.kernel(q, k, v, None if mask is None else normalise(mask, q.shape[1]))
        return Decision(slug, adapter, adapter.version(), kernel, call, why, table)


def hint_for(slug, call):
    """What to do about a refusal: install what is missing, or choose another backend or policy."""
    if registry.unavailable(slug, call.device):
        return registry.what_to_do(slug, call.device)
    return f"{CHOOSE_ANOTHER} (auto finds one), or set 'if the kernel cannot do it' to '{USE_SDPA}'."


def sdpa_attention(q, k, v, mask, scale, need_lse=False):
    """(out, lse) by PyTorch's own choice of kernel: for a call of a compiled graph that no dispatcher computes."""
    adapter = registry.adapter("sdpa", call_of(q, k, v).device)
    return adapter.attend(
        q, k, v, mask=None if mask is None else normalise(mask, q.shape[1]), scale=scale, need_lse=need_lse
    )


def in_graph(number):
    """The AttentionDispatcher that computes a call of a compiled graph, or None for PyTorch's own.

    The dispatcher of the running model, not the one that the graph was traced with: core's compile node drops the
    guards that would tell two dispatchers apart, so a graph outlives the dispatcher whose number it holds. That number
    counts only where nobody hooks forward passes.
    """
    traced = _by_number.get(number)
    return _current.dispatcher or (traced if traced is not None and not traced.hooked else None)


_default_tuner = None


def default_tuner():
    """The tuner of this process; set_default_tuner gives it a file."""
    global _default_tuner
    if _default_tuner is None:
        set_default_tuner(None)
    return _default_tuner


def use_tuner(tuner):
    """Let every dispatcher without a tuner of its own ask this one."""
    global _default_tuner
    _default_tuner = tuner


def set_default_tuner(file):
    """Keep auto's measurements in `file` (None: in this process only)."""
    global _default_tuner
    from .autotune import Tuner

    _default_tuner = Tuner(file)
