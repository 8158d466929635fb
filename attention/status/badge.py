"""A run in one short line, for the badge of a node: what was chosen, what computed instead or for it, how long a
step takes.
"""

from collections import Counter

RUNNING, RAN, OTHER, NOTHING, FAILED, CANCELLED = "running", "ran", "other", "nothing", "failed", "cancelled"
AUTO = "auto"
ARROW, DOT = " → ", " · "
CANCEL = "InterruptProcessingException"  # what ComfyUI raises through a sampling that the user stops
REFUSAL = "AttentionRefused"


def badge_of(run, chosen, also=None):
    """What to show of a run_log.Run. chosen, also: the slugs of the main and the second backend of its dispatcher.

    Returns {"state", "text"}. state: RUNNING; RAN as chosen; OTHER when something that was not chosen computed calls
    too; NOTHING when the model asked for no attention; FAILED; CANCELLED.
    """
    counts = Counter()
    for entry in run.kinds():
        counts[entry.backend] += entry.calls
    return {"state": state(run, counts, chosen, also), "text": text(run, counts, chosen)}


def state(run, counts, chosen, also):
    if run.error:
        return CANCELLED if run.error.startswith(CANCEL) else FAILED
    if run.seconds is None:
        return RUNNING
    if not counts:
        return NOTHING
    return RAN if chosen == AUTO or set(counts) <= {chosen, also} else OTHER


def text(run, counts, chosen):
    if run.error and not run.error.startswith(CANCEL):
        return f"{chosen} {short_error(run.error)}"
    name = named(counts, chosen)
    if run.error:
        return f"{name}{DOT}cancelled"
    if run.seconds is None:
        return f"{name}{DOT}running"
    if not counts:
        return f"{chosen}{DOT}not asked by this model"
    if run.steps and run.seconds:
        return f"{name}{DOT}{run.seconds / run.steps:.3g} s/step ({run.steps} step{'' if run.steps == 1 else 's'})"
    return f"{name}{DOT}{calls(counts.total())}"


def named(counts, chosen):
    """ "flash4", "auto → flash4", or "auto → flash4 480 + sdpa 80"."""
    if set(counts) <= {chosen}:
        return chosen
    if len(counts) == 1:
        return chosen + ARROW + next(iter(counts))
    return chosen + ARROW + " + ".join(f"{backend} {n}" for backend, n in counts.most_common())


def calls(n):
    return f"{n} call" if n == 1 else f"{n} calls"


def short_error(error):
    """A run's error, "Name: text", as a few words: a refusal's first reason, another error's first line."""
    name, _, said = error.partition(": ")
    lines = said.splitlines()
    reasons = [line.removeprefix("- ") for line in lines if line.startswith("- ")]
    if name == REFUSAL and reasons:
        return f"refused: {reasons[0]}"
    return f"stopped: {lines[0] if lines and lines[0] else name}"
