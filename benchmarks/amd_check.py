"""Ten minutes on an AMD card: everything of this pack that can run there is tried, checked against float32 and timed.
No model and no ComfyUI needed. Writes amd-check.json, and amd-check.md to read and to attach to an issue.

  bash scripts/amd_check.sh [--out FOLDER] [--minutes 10] [--seq 4608] [--any-gpu]

Parts: the machine; every attention backend at FLUX.2-dev's shape (B 1, 48 heads of 128, bf16; S = 4608 is 1024 x 1024
pixels with 512 text tokens): error of the output and of the log-sum-exp, milliseconds; AITER's tiles; what `auto`
chooses; the fused kernels of Fast Blocks and its fp8 products; the exchange between GPUs where there are several. Each
part runs in a process of its own with a time limit, so a kernel that crashes or hangs costs its own row only. What
cannot run says why. --any-gpu: also on a GPU that is not AMD's, to try this out.
"""

import argparse
import json
import os
from pathlib import Path
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

from common import import_pack, machine, versions

import_pack()
from flux2_pack.attention import reference, registry  # noqa: E402
from flux2_pack.attention.autotune import Tuner  # noqa: E402
from flux2_pack.attention.call import call_of  # noqa: E402
from flux2_pack.attention.device import describe  # noqa: E402
from flux2_pack.attention.dispatch import AttentionDispatcher  # noqa: E402

FORMAT = 1  # of the JSON; rises when a field changes its meaning
HEAD_DIM, CHECKED_HEADS, CHECKED_ROWS = 128, 2, 64
WARM_UP, ROUNDS = 3, 10
PART_SECONDS = 150  # AITER compiles a kernel when it is first called, which takes minutes where it comes from source
SETTINGS = (  # environment variables that change what runs
    *("AITER_ENABLE_FMHA_OPUS", "ENABLE_CK", "FLASH_ATTENTION_FWD_TRITON_AMD_CONFIG_JSON"),
    *("FLASH_ATTENTION_TRITON_AMD_ENABLE", "GPU_ARCHS", "HSA_OVERRIDE_GFX_VERSION", "HIP_VISIBLE_DEVICES"),
    *("MIOPEN_FIND_MODE", "PYTORCH_ROCM_ARCH", "TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL"),
)


# --- parts: each returns data for the JSON, and runs in a process of its own -----------------------------------------


def tensors(seq, heads, device):
    """q, k, v (1, S, H, D) in bf16 as ComfyUI passes them: views of (1, H, S, D)."""
    generator = torch.Generator().manual_seed(seq)
    shape = (1, heads, seq, HEAD_DIM)
    return [torch.randn(shape, generator=generator).to(device, torch.bfloat16).transpose(1, 2) for _ in range(3)]


def milliseconds(work, device):
    """Median, on a GPU by events of its stream."""
    times = []
    for i in range(WARM_UP + ROUNDS):
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            work()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            start = time.perf_counter()
            work()
            times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[WARM_UP:])


def backend(slug, seq, heads, device):
    """One attention backend: {"reasons"} or its error, log-sum-exp error, milliseconds, kernel and library."""
    reasons = registry.test_call(slug, device, torch.bfloat16, HEAD_DIM)
    q, k, v = tensors(seq, heads, device)
    call = call_of(q, k, v)
    reasons = reasons or registry.unsupported(slug, call)
    if reasons:
        return {"reasons": reasons, "install": registry.row(slug).install}
    adapter = registry.adapter(slug, describe(device))
    some = slice(0, CHECKED_HEADS)
    exact, exact_lse = reference.attend(q[:, :, some], k[:, :, some], v[:, :, some])
    out, _ = adapter.attend(q, k, v)
    found = {
        "library": adapter.version(),
        "kernel": adapter.kernel(q, k, v),
        "exact": registry.row(slug).exact,
        "error": reference.relative_error(out[:, :, some], exact),
    }
    if adapter.limits.lse and not registry.unsupported(slug, call_of(q, k, v, need_lse=True)):
        out, lse = adapter.attend(q, k, v, need_lse=True)
        found["error_with_lse"] = reference.relative_error(out[:, :, some], exact)
        found["lse_error"] = (lse[:, some] - exact_lse).abs().max().item()
    found["ms"] = milliseconds(lambda: adapter.attend(q, k, v), device)
    found["tflops"] = call.flops / found["ms"] / 1e9
    return found


def tiles(seq, heads, device):
    """Every tile that aiter-triton tries on this card."""
    reasons = registry.unavailable("aiter-triton", describe(device))
    if reasons:
        return {"reasons": reasons}
    q, k, v = tensors(seq, heads, device)
    variants = registry.adapter("aiter-triton", describe(device)).variants(call_of(q, k, v))
    some, rows = slice(0, CHECKED_HEADS), []
    exact, _ = reference.attend(q[:, :, some], k[:, :, some], v[:, :, some])
    for name, adapter in variants.items():
        try:
            error = reference.relative_error(adapter.attend(q, k, v)[0][:, :, some], exact)
            ms = milliseconds(lambda adapter=adapter: adapter.attend(q, k, v), device)
            rows.append({"tile": name, "error": error, "ms": ms})
        except Exception as failure:  # this tile does not launch here: that is a result
            rows.append({"tile": name, "reasons": [f"{type(failure).__name__}: {failure}"]})
    return {"rows": rows}


def auto(seq, heads, device):
    """What `auto` measures and chooses."""
    dispatcher = AttentionDispatcher(registry.AUTO, tuner=Tuner())
    dispatcher.attend(*tensors(seq, heads, device))
    return {"text": dispatcher.log.current.as_text(), **dispatcher.log.current.as_data()["entries"][0]}


def kernels(seq, heads, device):
    """The fused kernels of Fast Blocks: error against PyTorch in float32, and milliseconds of both."""
    from flux2_pack.flux2.fused import kernels as fused

    reason = fused.unavailable(device)
    if reason:
        return {"reasons": [reason]}
    from flux2_pack.flux2.fused.kernels import norm, qkv, swiglu

    width, dtype = heads * HEAD_DIM, torch.float32 if device.type == "cpu" else torch.bfloat16
    generator = torch.Generator().manual_seed(0)

    def random(*shape, of=dtype):
        return torch.randn(shape, generator=generator).to(device, of)

    x, mlp, modulation = random(1, seq, width), random(1, seq, 6 * width), random(1, 1, 2 * width)
    shift, scale = modulation.chunk(2, dim=-1)
    heads_of, weights = random(1, seq, 3 * width), (random(HEAD_DIM), random(HEAD_DIM))
    turn = random(1, 1, seq, HEAD_DIM // 2, 2, 2, of=torch.float32)

    def plain_norm(x, shift, scale):
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift

    def plain_swiglu(mlp):
        gate, value = mlp.chunk(2, dim=-1)
        return F.silu(gate) * value

    def plain_q(heads_of, weight, turn):
        q = heads_of[..., :width].unflatten(-1, (heads, HEAD_DIM))
        q = (q * torch.rsqrt((q * q).mean(-1, keepdim=True) + 1e-6) * weight).unflatten(-1, (HEAD_DIM // 2, 2))
        by_token = turn[:, 0].unsqueeze(2)  # (1, S, 1, D/2, 2, 2): the same for all heads
        return (by_token[..., 0] * q[..., 0:1] + by_token[..., 1] * q[..., 1:2]).flatten(-2)

    return {
        "rows": [
            compared(name, ours, theirs, inputs, device)
            for name, ours, theirs, inputs in (
                ("norm_modulate", norm.norm_modulate, plain_norm, (x, shift, scale)),
                ("swiglu", swiglu.swiglu, plain_swiglu, (mlp,)),
                (
                    "q of single_qkv",
                    lambda h, w, t: qkv.single_qkv(h, heads, weights, t)[0],
                    plain_q,
                    (heads_of, weights[0], turn),
                ),
            )
        ]
    }


def compared(name, ours, theirs, inputs, device):
    try:
        exact = theirs(*(t.float() for t in inputs))
        row = {"kernel": name, "error": reference.relative_error(ours(*inputs), exact)}
        row["pytorch_error"] = reference.relative_error(theirs(*inputs), exact)
        row["ms"] = milliseconds(lambda: ours(*inputs), device)
        row["pytorch_ms"] = milliseconds(lambda: theirs(*inputs), device)
        return row
    except Exception as failure:  # a kernel that does not compile here is a result
        return {"kernel": name, "reasons": [f"{type(failure).__name__}: {failure}"]}


def products(seq, heads, device):
    """A block's largest kind of matrix product in bf16, and in both fp8 formats with a scale per row (Fast Blocks'
    `precision: fp8`): error against float32 over some rows, and milliseconds, quantising the input included.
    """
    from flux2_pack.flux2.fused import kernels as fused

    reason = fused.unavailable(device)
    if reason:
        return {"reasons": [reason]}
    from flux2_pack.flux2.fused.kernels.formats import FP8_ROW, Format
    from flux2_pack.flux2.fused.kernels.quantise import quantise_rows

    width, generator = heads * HEAD_DIM, torch.Generator().manual_seed(0)
    x = torch.randn(1, seq, width, generator=generator).to(device, torch.bfloat16)
    weight = (torch.randn(3 * width, width, generator=generator) / width**0.5).to(device, torch.bfloat16)
    exact = x[:, :CHECKED_ROWS].float() @ weight.float().t()
    flops = 2 * seq * width * 3 * width

    def fp8(dtype):
        to = Format(FP8_ROW, dtype=dtype)
        rows = quantise_rows(weight[None], to)
        matrix, scales = rows.data[0].t(), rows.scale[0].t().contiguous()

        def product():
            given = quantise_rows(x, to)
            scale = given.scale.flatten(0, 1)
            return torch._scaled_mm(given.data.flatten(0, 1), matrix, scale, scales, out_dtype=x.dtype)[None]

        return product

    rows = []
    for name, dtype in (("bf16", None), ("fp8 e4m3fn", torch.float8_e4m3fn), ("fp8 e4m3fnuz", torch.float8_e4m3fnuz)):
        try:
            work = fp8(dtype) if dtype else lambda: F.linear(x, weight)
            row = {"product": name, "error": reference.relative_error(work()[:, :CHECKED_ROWS], exact)}
            row["ms"] = milliseconds(work, device)
            rows.append({**row, "tflops": flops / row["ms"] / 1e9})
        except Exception as failure:  # each card has one of the two formats, or neither
            rows.append({"product": name, "reasons": [f"{type(failure).__name__}: {last_line(str(failure))}"]})
    return {"rows": rows}


def several_gpus(seq, heads, device):
    """The exchange of Sequence Parallel over all GPUs of this machine (benchmarks/exchange.py)."""
    count = torch.cuda.device_count()
    if count < 2:
        return {"reasons": [f"There {'is one GPU' if count == 1 else 'are no GPUs'} here."]}
    if heads % count:
        return {"reasons": [f"{heads} heads do not divide by {count} GPUs. Choose fewer with HIP_VISIBLE_DEVICES."]}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command += [str(Path(__file__).with_name("exchange.py")), "--seq", str(seq), "--backend", "sdpa"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"reasons": [f"It ended with {done.returncode}: {last_line(done.stderr)}"]}
    return {"gpus": count, "text": done.stdout[-4000:]}


PARTS = {"tiles": tiles, "auto": auto, "kernels": kernels, "products": products, "several GPUs": several_gpus}


# --- the whole check -------------------------------------------------------------------------------------------------


def refusal(any_gpu):
    """Why nothing can be tried on this machine, a sentence, or None."""
    built = (
        f"ROCm {torch.version.hip}"
        if torch.version.hip
        else f"CUDA {torch.version.cuda}"
        if torch.version.cuda
        else "the CPU"
    )
    if not torch.cuda.is_available():
        return f"There is no GPU that PyTorch can use: torch {torch.__version__} is built for {built} and sees none."
    if torch.version.hip is None and not any_gpu:
        name = torch.cuda.get_device_name(0)
        return f"This is no AMD GPU: torch {torch.__version__} is built for {built} and sees {name}."
    return None


def plan():
    """[(part, slug or None)] in the order in which they are tried: what matters most first."""
    slugs = [slug for slug, row in registry.ROWS.items() if "amd" in row.hardware.archs]
    exact_first = sorted(slugs, key=lambda slug: not registry.row(slug).exact)
    return [*(("backend", slug) for slug in exact_first), *((part, None) for part in PARTS)]


def check(args, run):
    """The result as data. run(part, slug, seconds) -> data of a part."""
    began, why, device = time.monotonic(), refusal(args.any_gpu), torch.device("cuda")
    parts = {"backends": {}}
    for part, slug in plan():
        left = args.minutes * 60 - (time.monotonic() - began)
        if why:
            found = {"reasons": [why]}
        elif slug and registry.row(slug).hardware.reasons(describe(device)):
            found = {"reasons": registry.row(slug).hardware.reasons(describe(device))}
        elif left <= 0:
            found = {"reasons": [f"Not tried: the {args.minutes:g} minutes were over. --minutes gives it more."]}
        else:
            print(f"amd_check: {part} {slug or ''}", file=sys.stderr, flush=True)
            found = run(part, slug, min(PART_SECONDS, left))
        if slug:
            parts["backends"][slug] = found
        else:
            parts[part] = found
    return {
        "kind": "flux2-attention amd_check",
        "format": FORMAT,
        "date": time.strftime("%Y-%m-%d"),
        "refused": why,
        "shape": {"seq": args.seq, "heads": args.heads, "head_dim": HEAD_DIM, "dtype": "bfloat16"},
        "machine": {**machine(), "system": os.uname().sysname if hasattr(os, "uname") else os.name},
        "versions": versions(),
        "settings": {name: os.environ[name] for name in SETTINGS if name in os.environ},
        "seconds": round(time.monotonic() - began, 1),
        **parts,
    }


def in_a_process(args):
    """run for `check`: each part in a process of its own, which may crash or hang."""

    def run(part, slug, seconds):
        command = [sys.executable, __file__, "--part", part, "--seq", str(args.seq), "--heads", str(args.heads)]
        try:
            done = subprocess.run(
                command + (["--backend", slug] if slug else []), capture_output=True, text=True, timeout=seconds
            )
        except subprocess.TimeoutExpired:
            return {"reasons": [f"It took longer than {seconds:.0f} seconds and was ended."]}
        try:
            return json.loads(done.stdout.strip().splitlines()[-1])
        except (IndexError, ValueError):
            ended = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
            return {"reasons": [f"Its process ended with {ended}: {last_line(done.stderr)}"]}

    return run


def last_line(text):
    return (text.strip().splitlines() or ["it said nothing"])[-1][:500]


# --- the page --------------------------------------------------------------------------------------------------------


def table(head, rows):
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return lines + [
        f"| {' | '.join(str(cell).replace('|', '/').replace(chr(10), ' ') for cell in row)} |" for row in rows
    ]


def figure(row, name, form):
    return format(row[name], form) if row.get(name) is not None else "-"


def page(result):
    """The result as Markdown."""
    made = result["machine"]
    lines = [f"# Attention on {made['device']}", ""]
    lines += [f"**Nothing could be tried.** {result['refused']}", ""] if result["refused"] else []
    facts = {**made, **result["versions"], **result["settings"], "seconds": result["seconds"]}
    lines += table(("what", "value"), facts.items())
    shape = result["shape"]
    lines += [
        "",
        f"## Backends: {shape['seq']} tokens, {shape['heads']} heads of {shape['head_dim']}, {shape['dtype']}",
        "",
    ]
    ran = sorted((item for item in result["backends"].items() if "ms" in item[1]), key=lambda item: item[1]["ms"])
    lines += table(
        ("backend", "ms", "TFLOP/s", "error", "log-sum-exp error", "kernel", "library"),
        [
            (
                f"`{slug}`",
                *(
                    figure(r, name, form)
                    for name, form in (("ms", ".3f"), ("tflops", ".0f"), ("error", ".1e"), ("lse_error", ".1e"))
                ),
                r["kernel"],
                r["library"],
            )
            for slug, r in ran
        ],
    )
    lines += ["", "Not run:", ""]
    lines += [f"- `{slug}`: {' '.join(r['reasons'])}" for slug, r in result["backends"].items() if "reasons" in r]
    for title, part, name in (
        ("Tiles of aiter-triton", "tiles", "tile"),
        ("Fused kernels", "kernels", "kernel"),
        ("Matrix products", "products", "product"),
    ):
        found = result[part]
        lines += ["", f"## {title}", ""]
        if "reasons" in found:
            lines.append(" ".join(found["reasons"]))
            continue
        rows = [
            (
                r[name],
                *(figure(r, n, f) for n, f in (("ms", ".3f"), ("error", ".1e"), ("pytorch_ms", ".3f"))),
                " ".join(r.get("reasons", [])),
            )
            for r in found["rows"]
        ]
        lines += table((name, "ms", "error", "PyTorch's ms", "why not"), rows)
    for title, part in (("auto", "auto"), ("Several GPUs", "several GPUs")):
        found = result[part]
        lines += ["", f"## {title}", ""]
        lines += [" ".join(found["reasons"])] if "reasons" in found else ["```", found["text"].strip(), "```"]
    return "\n".join(lines) + "\n"


def without_home(data):
    """The same text without the name of the user's folder: the files are made to be shown to others."""
    return data.replace(str(Path.home()), "~")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default=".", help="folder for amd-check.json and amd-check.md (default: here)")
    parser.add_argument("--minutes", type=float, default=10, help="after so many, the rest is not tried (default: 10)")
    parser.add_argument("--seq", type=int, default=4608, help="tokens (default: 4608, 1024 x 1024 pixels)")
    parser.add_argument("--heads", type=int, default=48, help="attention heads (default: 48, FLUX.2-dev)")
    parser.add_argument("--any-gpu", action="store_true", help="also on a GPU that is not AMD's")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--backend", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        shape = args.seq, args.heads, torch.device("cuda")
        print(
            json.dumps(
                backend(args.backend, *shape) if args.part == "backend" else PARTS[args.part](*shape), default=str
            )
        )
        return
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        result = check(args, in_a_process(args))
        (out / "amd-check.json").write_text(without_home(json.dumps(result, indent=1)) + "\n")
        (out / "amd-check.md").write_text(without_home(page(result)))
    except OSError as error:
        raise SystemExit(f"amd_check: the files could not be written to {out}: {error}. Choose a folder with --out.")
    print(without_home(page(result)))
    print(f"amd_check: amd-check.json and amd-check.md are in {out.resolve()}. Please attach both to an issue,")
    print("amd_check: 'A run on an AMD card'.")


if __name__ == "__main__":
    main()
