"""What a FLUX.2 step on many GPUs should cost, on paper, from parts that were measured: for machines that are not at
hand.

  python benchmarks/parallel_model.py --one-gpu-ms 400 --attention-ms 52
      the defaults are FLUX.2-dev at 1024 x 1024 on H200
  python benchmarks/parallel_model.py --attention-ms 52 --two-gpus benchmarks/results/parallel-h200.json --json FILE
      four and eight GPUs from the two-GPU case of that file, and what it measured of them, if it did

The model. With S tokens of width W in b bytes, P = U x R GPUs and s = S / P tokens on each:
  compute    fixed + (one_gpu - fixed) / P; fixed is what every GPU does again (modulation, launches), fitted to
             measured cases when there are any
  Ulysses    per attention call each GPU sends 3 s W b (U-1)/U and gets its result back for s W b (U-1)/U
             (DeepSpeed-Ulysses, section 3.2), each taking a latency; what leaves the host travels at the same time as
             what stays, and the slower one counts
  ring       R-1 rotations of keys and values, 2 (S/R) (W/U) b each, hidden behind the attention of one part (attention
             / P / R); what is longer than that counts, and the merges, which read and write the output in float32
  gather     the result, s C b to each GPU, once per step
  weights    split over T GPUs each, P = U x R x T: in a double block the products of attention's and of the
             feed-forward part's last layer are added over those GPUs, in a single block that of its one last layer; an
             all-reduce of S / U / R tokens of width W sends 2 (T-1)/T of them (Patarasu and Yuan 2009), each taking a
             latency (a double block adds image and text apart). What every GPU does again then, norms and residuals,
             is part of fixed: fit it to a measured case
  waiting    ranks that wait for one another: what a measured two-GPU step takes beyond its parts; 0 on paper
Bandwidths are what a GPU can send, in GB/s of payload; measure them with benchmarks/exchange.py. Overlap of the Ulysses
exchange with other work is a share that is given (0 by default). Not in the model: clocks that fall, hosts that launch
kernels more slowly than the GPUs run them, other traffic on the network.
"""

import argparse
from dataclasses import dataclass, replace
import json
from pathlib import Path


@dataclass(frozen=True)
class Work:
    """One forward pass. one_gpu_ms, attention_ms: on one GPU, attention being part of it; fixed_ms: what does not
    become less with more GPUs; waiting_ms: what ranks wait for one another, on two GPUs or more.
    """

    one_gpu_ms: float
    attention_ms: float
    fixed_ms: float = 0.0
    waiting_ms: float = 0.0
    tokens: int = 4608
    width: int = 6144
    heads: int = 48
    blocks: int = 56
    double_blocks: int = 8
    out_width: int = 128
    item_bytes: int = 2


@dataclass(frozen=True)
class Links:
    """host_gbs, network_gbs: payload that one GPU sends within its host and to other hosts; host_us, network_us:
    latency per exchange, within a host and across; memory_gbs: of the GPU's own memory, for merges; hidden: share of
    the Ulysses exchange that other work covers, 0 to 1.
    """

    host_gbs: float = 330.0
    network_gbs: float = 45.0
    host_us: float = 25.0
    network_us: float = 40.0
    memory_gbs: float = 4000.0
    hidden: float = 0.0


@dataclass(frozen=True)
class Layout:
    """gpus per Ulysses group and number of groups, over hosts of so many GPUs; parts: GPUs that share the weights, each
    of the former being so many.
    """

    ulysses: int
    ring: int
    hosts: int = 1
    parts: int = 1

    @property
    def gpus(self):
        return self.ulysses * self.ring * self.parts

    @property
    def per_host(self):
        return self.gpus // self.hosts

    def __str__(self):
        return (
            f"{self.gpus} GPU{'s' * (self.gpus > 1)}, {self.hosts} host{'s' * (self.hosts > 1)}, Ulysses "
            f"{self.ulysses} x ring {self.ring}" + f", weights over {self.parts}" * (self.parts > 1)
        )


def impossible(work, layout):
    """Why a layout cannot be had, a sentence; empty when it can."""
    if work.heads % (layout.ulysses * layout.parts):
        return f"Ulysses {layout.ulysses} x {layout.parts} parts does not divide {work.heads} heads"
    return f"{layout.gpus} GPUs do not divide into {layout.hosts} hosts" if layout.gpus % layout.hosts else ""


def ulysses_bytes(work, layout):
    """(bytes one GPU sends in a step, of those to other hosts) for all attention calls: q, k and v there and the result
    back.
    """
    peers, near = layout.ulysses - 1, min(layout.ulysses, max(1, layout.per_host // layout.parts)) - 1
    to_each = 4 * work.tokens * work.width * work.item_bytes / layout.gpus / layout.ulysses
    return work.blocks * to_each * peers, work.blocks * to_each * (peers - near)


def ulysses_ms(work, layout, links):
    if layout.ulysses == 1:
        return 0.0
    total, far = ulysses_bytes(work, layout)
    moving = max((total - far) / links.host_gbs, far / links.network_gbs) / 1e6
    return (moving + 2 * work.blocks * (links.network_us if far else links.host_us) / 1e3) * (1 - links.hidden)


def ring_bytes(work, layout):
    """Bytes one GPU sends in a step, passing keys and values on."""
    return work.blocks * (layout.ring - 1) * 2 * work.tokens * work.width * work.item_bytes / layout.gpus


def ring_ms(work, layout, links):
    """What the rotations take beyond the attention that they hide behind, and the merges."""
    if layout.ring == 1:
        return 0.0
    far = layout.hosts > 1
    rotations = work.blocks * (layout.ring - 1)
    gbs, latency_us = (links.network_gbs, links.network_us) if far else (links.host_gbs, links.host_us)
    one = ring_bytes(work, layout) / rotations / gbs / 1e6 + latency_us / 1e3
    behind = work.attention_ms / work.blocks / layout.gpus / layout.ring
    # merge (attention/parallel/lse_merge.py): zeros where there were no keys, conversion, weighted mean: 22 bytes per
    # element for 2-byte results
    merging = 22 * work.tokens * work.width / layout.gpus / links.memory_gbs / 1e6
    return rotations * (max(0.0, one - behind) + merging)


def addition_bytes(work, layout):
    """Bytes one GPU sends in a step to add the products of split weights."""
    each = work.tokens / layout.ulysses / layout.ring * work.width * work.item_bytes
    return (work.blocks + work.double_blocks) * 2 * (layout.parts - 1) / layout.parts * each


def addition_ms(work, layout, links):
    """The parts of the weights are on one host."""
    if layout.parts == 1:
        return 0.0
    calls = work.blocks - work.double_blocks + 4 * work.double_blocks
    return addition_bytes(work, layout) / links.host_gbs / 1e6 + calls * links.host_us / 1e3


def gather_ms(work, layout, links):
    shares = layout.ulysses * layout.ring
    if shares == 1:
        return 0.0
    each = work.tokens / shares * work.out_width * work.item_bytes
    here = max(1, layout.per_host // layout.parts)
    near, far = here - 1, shares - here
    return (
        max(each * near / links.host_gbs, each * far / links.network_gbs) / 1e6
        + (links.network_us if far else links.host_us) / 1e3
    )


def predict(work, layout, links):
    """{"compute_ms", "ulysses_ms", "ring_ms", "gather_ms", "weights_ms", "waiting_ms", "ms", "speedup"} of one step;
    speedup against one_gpu_ms.
    """
    parts = {
        "compute_ms": work.fixed_ms + (work.one_gpu_ms - work.fixed_ms) / layout.gpus,
        "ulysses_ms": ulysses_ms(work, layout, links),
        "ring_ms": ring_ms(work, layout, links),
        "gather_ms": gather_ms(work, layout, links),
        "weights_ms": addition_ms(work, layout, links),
        "waiting_ms": work.waiting_ms * (layout.gpus > 1),
    }
    total = sum(parts.values())
    return {**parts, "ms": total, "speedup": work.one_gpu_ms / total}


def fitted(work, links, measured):
    """The Work whose fixed_ms is the least-squares fit to measured [(Layout, ms)] of more than one GPU; never below
    zero.
    """
    rows = [
        (1 - 1 / layout.gpus, ms - predict(replace(work, fixed_ms=0.0), layout, links)["ms"])
        for layout, ms in measured
        if layout.gpus > 1
    ]
    weight = sum(share * share for share, _ in rows)
    return replace(work, fixed_ms=max(0.0, sum(share * rest for share, rest in rows) / weight)) if rows else work


def from_two_gpus(work, links, case):
    """(Work, Links) of which the parts are those of a two-GPU Ulysses case of benchmarks/parallel.py.

    The fixed part follows from its compute time, the payload per second from its exchange time (packing included), and
    what is left of the step is waiting. Raises ValueError for a case that does not say these times.
    """
    missing = [name for name in ("one_gpu_ms", "compute_ms", "exchange_ms", "sent_mb", "ms") if name not in case]
    if missing or (case["gpus"], case["ulysses"]) != (2, 2):
        raise ValueError(
            f"A case of two GPUs with Ulysses 2 is needed, with {', '.join(missing) or 'its times'}; {case} is not one."
        )
    latency_ms = 2 * work.blocks * links.host_us / 1e3
    work = replace(
        work,
        one_gpu_ms=case["one_gpu_ms"],
        fixed_ms=max(0.0, 2 * case["compute_ms"] - case["one_gpu_ms"]),
        tokens=sum(case["tokens"]),
        waiting_ms=max(0.0, case["ms"] - case["compute_ms"] - case["exchange_ms"]),
    )
    return work, replace(links, host_gbs=case["sent_mb"] / (case["exchange_ms"] - latency_ms))


def layouts(work, per_host=8):
    """Those worth a look: Ulysses alone on 1, 2, 4 and 8 GPUs of a host, ring alone and both on a whole host, and two
    hosts.
    """
    sizes = [n for n in (1, 2, 4, 8) if n <= per_host]
    made = [Layout(n, 1) for n in sizes] + [Layout(per_host // 2, 2), Layout(1, per_host)]
    made += [Layout(1, 1, parts=n) for n in sizes if n > 1] + [Layout(2, 1, parts=2)] * (per_host >= 4)
    made += [
        Layout(2 * per_host, 1, 2),
        Layout(per_host, 2, 2),
        Layout(per_host // 2, 4, 2),
        Layout(1, 2 * per_host, 2),
    ]
    return [layout for layout in made if not impossible(work, layout)]


def read_measured(path, name):
    """[(Layout, ms)] of the cases of benchmarks/results/parallel-*.json with this name."""
    cases = json.loads(Path(path).read_text())["cases"]
    return [
        (Layout(case["ulysses"], case["ring"]), case["ms"])
        for case in cases
        if case["name"] == name and "ms" in case and case.get("weights") != "split"
    ]


def options():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--one-gpu-ms", type=float, help="a step on one GPU; --two-gpus knows it")
    parser.add_argument("--attention-ms", type=float, required=True, help="of that, attention")
    parser.add_argument(
        "--fixed-ms", type=float, default=0.0, help="what every GPU does again; fitted when --measured is given"
    )
    for name in ("tokens", "width", "heads", "blocks"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Work, name))
    for name, field in Links.__dataclass_fields__.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=field.default)
    parser.add_argument("--measured", help="file of benchmarks/parallel.py, to fit the fixed part and to compare with")
    parser.add_argument("--two-gpus", help="file of benchmarks/parallel.py: every part comes from its two-GPU case")
    parser.add_argument("--case", default="bf16-1024", help="which cases of that file")
    parser.add_argument("--json", help="file to write the result to; other cases in it stay")
    given = parser.parse_args()
    if given.one_gpu_ms is None and not given.two_gpus:
        parser.error("--one-gpu-ms or --two-gpus is needed: what a step takes on one GPU.")
    return given


def main():
    given = options()
    work = Work(
        given.one_gpu_ms,
        given.attention_ms,
        given.fixed_ms,
        tokens=given.tokens,
        width=given.width,
        heads=given.heads,
        blocks=given.blocks,
    )
    links = Links(**{name: getattr(given, name) for name in Links.__dataclass_fields__})
    path = given.two_gpus or given.measured
    measured = read_measured(path, given.case) if path else []
    if given.two_gpus:
        cases = json.loads(Path(given.two_gpus).read_text())["cases"]
        two = [case for case in cases if case["name"] == given.case and (case["gpus"], case["ulysses"]) == (2, 2)]
        if not two:
            raise SystemExit(f"{given.two_gpus} has no case {given.case} of two GPUs with Ulysses 2.")
        work, links = from_two_gpus(work, links, two[0])
    else:
        work = fitted(work, links, measured)
    known = dict(measured)
    print(
        f"{work.tokens} tokens, one GPU {work.one_gpu_ms:g} ms, of that attention {work.attention_ms:g}; not "
        f"divided {work.fixed_ms:.1f} ms"
    )
    columns = ("compute", "ulysses", "ring", "gather", "weights", "waiting", "ms", "speedup")
    print(f"{'':46s}{''.join(f'{name:>9}' for name in columns)}{'measured':>10}")
    rows = []
    for layout in dict.fromkeys([*known, *layouts(work)]):
        found = predict(work, layout, links)
        rows.append(
            {
                **vars(layout),
                **{name: round(value, 3) for name, value in found.items()},
                "measured_ms": known.get(layout),
            }
        )
        cells = [f"{found.get(f'{name}_ms', found.get(name)):9.2f}" for name in columns]
        print(f"{str(layout):46s}{''.join(cells)}{known.get(layout, ''):>10}")
    result = {"case": given.case, "from": path, "work": vars(work), "links": vars(links), "rows": rows}
    if given.json:
        file = Path(given.json)
        others = json.loads(file.read_text())["cases"] if file.exists() else []
        cases = [case for case in others if case["case"] != given.case] + [result]
        file.write_text(json.dumps({"cases": cases}, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
