"""What the ranks did in the last sampling, for the report node: {"ranks": [...], ...} and the same as text."""

from ....attention.parallel import Degrees
from . import session, install


def report(model):
    """(text, data) of a MODEL that a Sequence Parallel node worked on; (None, None) of another."""
    request = install.request_of(model)
    if request is None:
        return None, None
    data = as_data(request, session.existing(model.model))
    return as_text(data), data


def as_data(request, ranks):
    plan = request.plan
    data = {"ulysses": plan.ulysses, "ring": plan.ring, "parts": plan.tensor, "why": request.why, "ranks": []}
    data |= {"weights": "split" if plan.tensor > 1 else "on every GPU", "seconds_to_start": {}}
    if ranks is None or not ranks.last:
        return data
    names = {0: ranks.name, **{worker.rank: (worker.where, worker.device) for worker in ranks.pool.workers}}
    data["transport"] = ranks.connection.mesh.transport if ranks.connection else ""
    data["seconds_to_start"] = {name: round(seconds, 2) for name, seconds in ranks.seconds.items()}
    data["ranks"] = [
        row(rank, *names.get(rank, ("", "")), rank // plan.tensor, ranks.held.get(rank), **ranks.last[rank])
        for rank in sorted(ranks.last)
    ]
    return data


def row(rank, where, device, share, held, times, attention):
    """One rank. share: which share of the tokens it computes; held: bytes of its weights. tokens: of the image, the
    text and the references together, in its share; sent: bytes.
    """
    tokens = times.get("tokens") or ()
    return {
        "rank": rank,
        "where": where,
        "device": device,
        "tokens": tokens[share] if share < len(tokens) else None,
        "weights_bytes": held,
        "forwards": times.get("forwards", 0),
        "collective_seconds": round(times.get("collective_seconds", 0), 4),
        "compute_seconds": round(times.get("compute_seconds", 0), 4),
        "sent_bytes": times.get("sent", 0),
        "attention": attention,
    }


def as_text(data):
    lines = [
        f"Sequence parallel: {data['ulysses'] * data['ring'] * data['parts']} ranks, "
        f"{Degrees(data['ulysses'], data['ring'], tensor=data['parts'])}. {data['why']}".rstrip()
    ]
    if not data["ranks"]:
        return lines[0] + "\nNothing has been sampled with these ranks yet."
    for one in data["ranks"]:
        kernels = ", ".join(f"{calls} x {name}" for name, calls in one["attention"].items())
        lines.append(
            f"  rank {one['rank']} on {one['where']} ({one['device']}): {one['tokens']} tokens, {one['forwards']} "
            "passes, "
            f"{one['compute_seconds']:.2f} s computing, {one['collective_seconds']:.2f} s exchanging, "
            f"{one['sent_bytes'] / 1e6:.0f} MB sent"
            + (f", {one['weights_bytes'] / 1e9:.2f} GB of weights" if one["weights_bytes"] else "")
            + (f"; attention {kernels}" if kernels else "")
        )
    if data.get("transport"):
        lines.append(f"  {data['transport']}")
    ready = data["seconds_to_start"].get("ready")
    return "\n".join(lines + ([f"The other ranks were ready {ready:.1f} s after they were started."] if ready else []))
