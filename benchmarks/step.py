"""One FLUX.2-dev step (a forward pass of the 32B model): ComfyUI's core, its core with the best attention and compiled,
diffusers, and this pack.

  COMFYUI_PATH=... python benchmarks/step.py [--cases bf16-1024 ...] [--peers core ours ...] [--json FILE]

All peers of a case share one set of weights (random, seeded, at full size: right for speed, noise for pictures), run in
one process, and are timed in rounds that go around all of them, so that a drift of the card's clocks is everybody's.
Milliseconds are CUDA events around one step, medians over rounds, first runs (compiling, tuning) apart. The file is
written anew after every round: a run that is cut keeps what it has. diffusers: see benchmarks/twins.py for how to get
it; its blocks are compiled one by one (compile_repeated_blocks, fullgraph, free lengths, as ours), and of its attention
backends the fastest on this card is taken.

Work of a step in floating point operations, S tokens of which I are image, h = 6144: 2 * 13 h^2 S in each block for its
products, 4 S^2 h for its attention, and 2 h (128 I + text width * text + 128 I) for in- and output. Products of
modulations are left out (0.01 %). Ceiling: what torch.mm (bf16), torch._scaled_mm (fp8, e4m3) or torch._int_mm and
comfy-kitchen (int8) reach at best on the two large products of a single block at this length, in the same run; that of
fp8 for fp8 weights and for ours-fp8, whose attention stays bf16. ours-cudnn-fp8 is ours with backend cudnn-fp8, and
ours-cudnn-fp8-fused the same with FLUX2_FP8_QKV=1. Peak: PyTorch's allocator; the model's weights, what the peer keeps
beside them, and what a step takes. Needs about 100 GB of GPU memory. --small tries every path in seconds, on a CPU too.
Not covered: sampler, text encoder and VAE (benchmarks/klein.py).
"""

import argparse
import gc
import json
import os
import tempfile
import time

import torch

from common import import_pack, save, summary
from full_size import DEV, SMALL, TEXT_TOKENS, build, build_fp8, build_int8, import_comfyui, step_inputs

import_pack()
import peers  # noqa: E402

CASES = {  # weights, pixels, references, rounds
    "bf16-1024": ("bf16", 1024, 0, 6),
    "bf16-1024-ref1": ("bf16", 1024, 1, 4),
    "bf16-2048": ("bf16", 2048, 0, 3),
    "fp8-1024": ("fp8", 1024, 0, 6),
    "fp8-2048": ("fp8", 2048, 0, 3),
    "int8-1024": ("int8", 1024, 0, 6),
    "int8-2048": ("int8", 2048, 0, 3),
}
COLUMNS = {
    "core_ms": ("core",),
    "core_attention_ms": ("core-attention",),
    "core_compiled_ms": ("core-compiled",),
    "diffusers_ms": peers.DIFFUSERS,
    "diffusers_eager_ms": ("diffusers",),
    "diffusers_compiled_ms": ("diffusers-compiled",),
    "ours_ms": ("ours",),
    "ours_fp8_ms": ("ours-fp8",),
    "ours_cudnn_fp8_ms": ("ours-cudnn-fp8",),
    "ours_cudnn_fp8_fused_ms": ("ours-cudnn-fp8-fused",),
}
# --small: how many times smaller pictures are, and text tokens: Triton's interpreter takes a second for ten tokens
SMALLER, SMALL_TEXT = 32, 8


# --- time, work and ceilings -----------------------------------------------------------------------------------------


def synchronise():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def time_ms(work):
    """Milliseconds of one run of `work`: of the GPU where there is one."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        work()
        return (time.perf_counter() - start) * 1e3
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def flops(sizes, image, text):
    """Floating point operations of one step; image and text: tokens, references counted as image."""
    h, tokens, blocks = sizes["hidden_size"], image + text, sizes["depth"] + sizes["depth_single_blocks"]
    return blocks * (2 * 13 * h * h * tokens + 4 * tokens**2 * h) + 2 * h * (
        256 * image + sizes["context_in_dim"] * text
    )


class Ceiling:
    """The two products of a single block in one number format, timed beside the peers. Nothing is timed where this
    device has none in that format.
    """

    def __init__(self, sizes, tokens, weights, device):
        h, self.tokens = sizes["hidden_size"], tokens
        self.shapes, self.times = ((h, 9 * h), (4 * h, h)), {}
        try:
            self.works = {
                (shape, number): work
                for shape in self.shapes
                for number, work in enumerate(products(weights, tokens, *shape, device))
            }
            for work in self.works.values():
                work()
        except RuntimeError as error:
            self.works = {}
            print(f"no ceiling for {weights}: {str(error).strip().splitlines()[0]}", flush=True)

    def round(self):
        for key, work in self.works.items():
            work()
            self.times.setdefault(key, []).extend(time_ms(work) for _ in range(3))

    @property
    def tflops(self):
        """TFLOP/s over both products, each at the fastest run of its fastest variant; None if nothing was timed."""
        if not self.times:
            return None
        best = [min(min(times) for (of, _), times in self.times.items() if of == shape) for shape in self.shapes]
        return sum(2 * self.tokens * inner * outer for inner, outer in self.shapes) / sum(best) / 1e9

    def share(self, tflops):
        """tflops over the ceiling. None where nothing was timed, and where a step was faster than its own products
        alone: those ran at lower clocks then, and are no ceiling.
        """
        return round(tflops / self.tflops, 3) if self.tflops and tflops <= self.tflops else None


def products(weights, rows, inner, outer, device):
    """[function that multiplies (rows, inner) by (inner, outer) once]: in fp8 with and without fast accumulation, which
    goes either way.
    """
    a, b = (torch.randn(shape, device=device).to(torch.bfloat16) for shape in ((rows, inner), (outer, inner)))
    if weights == "int8":
        from flux2_pack.flux2.fused import int8_rowwise

        a, b = (tensor.mul(30).to(torch.int8) for tensor in (a, b))
        one = torch.ones(rows, 1, device=device), torch.ones(outer, device=device)
        with_scales = int8_rowwise.kitchens()
        scaled = [lambda: with_scales(a, b, *one, None, torch.bfloat16)] if with_scales else []
        return [lambda: torch._int_mm(a, b.t()), *scaled]
    if weights == "bf16":
        return [lambda: a @ b.t()]
    one = torch.ones((), device=device)
    a, b = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
    options = {"scale_a": one, "scale_b": one, "out_dtype": torch.bfloat16}
    return [lambda fast=fast: torch._scaled_mm(a, b.t(), **options, use_fast_accum=fast) for fast in (True, False)]


def kernels_of(work):
    """(how many GPU kernels one run starts, copies and fills not counted, or None without a GPU; what it returned)."""
    if not torch.cuda.is_available():
        return None, work()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        out = work()
        synchronise()
    kernels = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not event.name.startswith(("Memcpy", "Memset")) for event in kernels), out


def allocated():
    """Bytes that PyTorch holds for tensors on the GPU."""
    synchronise()
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def working_bytes(work):
    """(bytes that PyTorch allocated at most while `work` ran, above what it held before; what it returned)."""
    before = allocated()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    out = work()
    synchronise()
    return torch.cuda.max_memory_allocated() - before if torch.cuda.is_available() else 0, out


def gib(size):
    return round(size / 2**30, 2) if torch.cuda.is_available() else None


# --- one case --------------------------------------------------------------------------------------------------------


class Case:
    """A case as it is measured: its peers' functions and rows."""

    def __init__(self, name, setting, names, inputs, made):
        self.name, self.works, self.rows, self.times = name, {}, [], {}
        self.image = sum(t.shape[2] * t.shape[3] for t in (inputs["x"], *inputs.get("ref_latents", ())))
        self.tokens = self.image + inputs["c_crossattn"].shape[1]
        self.flops, self.diffusers_attention = (
            flops(setting.sizes, self.image, self.tokens - self.image),
            setting.diffusers_attention,
        )
        self.ceilings = {
            kind: Ceiling(setting.sizes, self.tokens, kind, inputs["x"].device) for kind in ("bf16", "fp8", "int8")
        }
        self.expected = None
        for peer in names:
            self.add(peer, setting, inputs, made)

    def add(self, peer, setting, inputs, made):
        """Run a peer for the first times: compiling, its error, peak memory and kernels. What it raises is the row's
        reason.
        """
        row = {"peer": peer, "weights": "fp8" if peer == "ours-fp8" else setting.weights}
        self.rows.append(row)
        try:
            start, before = time.perf_counter(), allocated()
            prepare, held = made.get(peer) or (peers.make(peer, setting), None)
            work = prepare(inputs)
            work()
            synchronise()
            row["first_s"] = round(time.perf_counter() - start, 2)
            made[peer] = prepare, allocated() - before if held is None else held
            working, (row["kernels"], out) = working_bytes(lambda: kernels_of(work))
            row["peak_gib"] = gib(setting.weight_bytes + made[peer][1] + working)
            self.expected = out if peer == "core" else self.expected
            row["error_to_core"] = None if self.expected is None else peers.error_between(out, self.expected)
            row["attention"] = peers.ran(work)
            self.works[peer], self.times[peer] = work, []
        except Exception as error:
            row["reason"] = (
                f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
            )
            torch.cuda.empty_cache()
        said = (
            f"not run. {row['reason']}"
            if "reason" in row
            else (
                f"first {row['first_s']:.1f} s, peak {row['peak_gib']} GiB, {row['kernels']} kernels, error to core "
                f"{row['error_to_core'] or 0:.1e}"
            )
        )
        print(f"{self.name:<16} {peer:<20} {said}", flush=True)

    def round(self):
        """Time every peer once."""
        for peer, work in self.works.items():
            self.times[peer].append(time_ms(work))
        for limit in self.ceilings.values():
            limit.round()
        for row in self.rows:
            if self.times.get(row["peer"]):
                row |= summary(self.times[row["peer"]]) | {"rounds": len(self.times[row["peer"]])}
                row["tflops"] = round(self.flops / row["ms"] / 1e9, 1)
                row["share_of_ceiling"] = self.ceilings[row["weights"]].share(row["tflops"])

    def as_data(self):
        times = {row["peer"]: row["ms"] for row in self.rows if "ms" in row}
        columns = {
            column: min((times[peer] for peer in of if peer in times), default=None) for column, of in COLUMNS.items()
        }
        return {
            "name": self.name,
            **columns,
            "diffusers_attention": self.diffusers_attention,
            "tokens": self.tokens,
            "tflop": round(self.flops / 1e12, 2),
            "ceiling_tflops": {kind: limit.tflops and round(limit.tflops, 1) for kind, limit in self.ceilings.items()},
            "rows": self.rows,
        }


def table(cases):
    """The cases as text."""
    lines = [
        f"{'case':<16}{'peer':<20}{'ms':>9}{'spread':>18}{'TFLOP/s':>9}{'of ceiling':>11}{'peak GiB':>9}"
        f"{'kernels':>8}{'error':>9}"
    ]
    for case in cases:
        for row in case["rows"]:
            if "ms" not in row:
                lines.append(f"{case['name']:<16}{row['peer']:<20}  {row.get('reason', 'not reached')}")
                continue
            spread, share = (
                f"{row['min_ms']:.1f} to {row['max_ms']:.1f}",
                f"{100 * row['share_of_ceiling']:.0f} %" if row["share_of_ceiling"] else "",
            )
            lines.append(
                f"{case['name']:<16}{row['peer']:<20}{row['ms']:>9.1f}{spread:>18}{row['tflops']:>9.0f}{share:>11}"
                f"{row['peak_gib'] or '':>9}{row['kernels'] or '':>8}{row['error_to_core'] or 0:>9.1e}"
            )
    return "\n".join(lines)


# --- the run ---------------------------------------------------------------------------------------------------------


class Run:
    """A run over cases: the model in memory, what was found so far, and the time that is left."""

    def __init__(self, options):
        self.options, self.found, self.began = options, [], time.perf_counter()
        self.sizes = SMALL if options.small else DEV
        self.setting, self.made = None, {}

    @property
    def late(self):
        return time.perf_counter() - self.began > self.options.seconds

    def setting_for(self, weights, inputs_for):
        """The Setting of a model with these weights; the one before is freed first."""
        if self.setting is None or self.setting.weights != weights:
            self.setting, self.made = None, {}
            gc.collect()
            torch.cuda.empty_cache()
            small_bf16, before = torch.bfloat16 if torch.cuda.is_available() else torch.float32, allocated()
            patcher = {
                "bf16": lambda: build(self.sizes, small_bf16),
                "fp8": lambda: build_fp8(self.sizes),
                "int8": lambda: build_int8(self.sizes),
            }[weights]()
            self.setting = peers.Setting(
                patcher, self.sizes, weights, self.options.attention, self.options.compiler, allocated() - before
            )
            if weights == "bf16" and set(self.options.peers) & set(peers.DIFFUSERS):
                times, self.setting.diffusers_attention = peers.fastest_attention(
                    self.setting, inputs_for(patcher), median_of_two
                )
                tried = ", ".join(f"{name} {ms:.1f} ms" for name, ms in times.items())
                print(f"diffusers' attention: {self.setting.diffusers_attention} of {tried}", flush=True)
        return self.setting

    def case(self, name):
        weights, pixels, references, rounds = CASES[name]
        small, text = (SMALLER, SMALL_TEXT) if self.options.small else (1, TEXT_TOKENS)

        def inputs_for(patcher):
            return step_inputs(patcher, pixels // small, references, reference_pixels=1024 // small, text_tokens=text)

        setting = self.setting_for(weights, inputs_for)
        case = Case(name, setting, self.options.peers, inputs_for(setting.patcher), self.made)
        self.found.append(case.as_data())
        self.save()
        for number in range(self.options.rounds or rounds):
            if self.late and number >= 2:
                break
            case.round()
            self.found[-1] = case.as_data()
            self.save()

    def save(self):
        model = "a small FLUX.2" if self.options.small else "FLUX.2-dev, random weights"
        return save({"model": model, "attention": self.options.attention, "cases": self.found}, self.options.json)


def median_of_two(work):
    work()
    return min(time_ms(work) for _ in range(2))


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument(
        "--peers",
        nargs="+",
        default=list(peers.ALL),
        help=f"of {', '.join(peers.ALL)}, or core+SLUG for core's blocks with one more attention backend",
    )
    parser.add_argument(
        "--attention", default="auto", help="what core-attention, core-compiled and ours select (default auto)"
    )
    parser.add_argument("--compiler", default="inductor", help="torch.compile backend (default inductor)")
    parser.add_argument("--rounds", type=int, help="timed steps of each peer (default depends on the case)")
    parser.add_argument(
        "--seconds", type=float, default=1e9, help="after so many, a case gets two rounds and no case is begun"
    )
    parser.add_argument(
        "--small", action="store_true", help="a small model and small pictures: to try all paths, not to measure"
    )
    parser.add_argument("--json", help="file to write the result to")
    return parser.parse_args(arguments)


def main():
    options = parse()
    import_comfyui()
    import folder_paths

    run = Run(options)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        folder_paths.set_user_directory(folder)  # auto's measurements are made anew
        for name in options.cases:
            if run.late:
                print(f"{name}: not reached in {options.seconds:.0f} s", flush=True)
                continue
            run.case(name)
    result = run.save()
    print(table(result["cases"]))
    print(json.dumps(result), flush=True)
    # freeing 64 GB tensor by tensor takes seconds of a card that is paid for
    os._exit(0) if torch.cuda.is_available() else None


if __name__ == "__main__":
    main()
