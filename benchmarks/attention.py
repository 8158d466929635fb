"""Every attention backend that runs on this card, on FLUX.2-dev's own shapes: milliseconds, TFLOP/s, error against
float32.

  python benchmarks/attention.py [--seq 4608 8704 16896] [--heads 48] [--json FILE]

S = 4608 is a 1024 x 1024 picture with 512 text tokens, 8704 the same with one reference, 16896 is 2048 x 2048. Gaussian
q, k, v in bf16, passed as ComfyUI passes them (views of (B, H, S, D)), all backends in rounds, medians. Error: the
first two heads, all rows, against float32. `auto` is timed through the selector, with the table of its first call.
Overhead: microseconds of CPU time per call through the override, above the library's own function on the same tensors
(64 tokens, so that the host is what is measured). Not covered: masks, other models' shapes.
"""

import argparse
import time

import torch
import torch.nn.functional as F

from common import import_pack, summary, times_in_rounds, write

import_pack()
from flux2_pack.attention import reference, registry  # noqa: E402
from flux2_pack.attention.call import call_of  # noqa: E402
from flux2_pack.attention.device import describe  # noqa: E402
from flux2_pack.attention.override import AttentionOverride  # noqa: E402
from flux2_pack.attention.dispatch import AttentionDispatcher  # noqa: E402
from flux2_pack.attention.autotune import Tuner  # noqa: E402

DEVICE = torch.device("cuda")
HEAD_DIM = 128
ERROR_HEADS, ROUNDS = 2, 20


def tensors(seq, heads):
    """q, k, v as (B, S, H, D) views of (B, H, S, D) tensors, bf16."""
    generator = torch.Generator(DEVICE).manual_seed(seq)
    return [
        torch.randn(1, heads, seq, HEAD_DIM, generator=generator, device=DEVICE, dtype=torch.bfloat16).transpose(1, 2)
        for _ in range(3)
    ]


def error_of(out, exact):
    return reference.relative_error(out[:, :, :ERROR_HEADS], exact)


def refused(slug, seq, qkv):
    """The row of a backend that cannot run this, with the reasons; None when it can."""
    reasons = registry.probe(slug, DEVICE, torch.bfloat16, HEAD_DIM) or registry.unsupported(slug, call_of(*qkv))
    return {"backend": slug, "seq": seq, "reasons": reasons} if reasons else None


def direct(slug, qkv):
    """(function that makes the call, what is known of it) of a backend by itself."""
    adapter = registry.adapter(slug, describe(DEVICE))
    return lambda: adapter.attend(*qkv)[0], {
        "kernel": adapter.kernel(*qkv),
        "library": adapter.version(),
        "exact": registry.row(slug).exact,
    }


def through_auto(qkv, tuner):
    """The same for `auto`: the whole path of the override, after its first call has measured. Prints what it
    measured.
    """
    dispatcher, heads = AttentionDispatcher("auto", tuner=tuner), qkv[0].shape[2]
    override, inputs = AttentionOverride(dispatcher), [t.transpose(1, 2) for t in qkv]

    def work():
        return override(None, *inputs, heads, skip_reshape=True).unflatten(-1, (heads, HEAD_DIM))

    work()
    data = dispatcher.log.current.as_data()
    print(dispatcher.log.current.as_text(), flush=True)
    entry = data["entries"][0]
    return work, {
        "kernel": f"{entry['backend']}: {entry['kernel']}",
        "library": entry["library"],
        "exact": True,
        "table": data["auto"],
    }


def cases(seq, heads, tuner):
    """One row per backend at one length. All of them are timed in the same rounds."""
    qkv = tensors(seq, heads)
    exact, _ = reference.attend(*(t[:, :, :ERROR_HEADS] for t in qkv))
    # its score matrix would fill the card
    listed = [slug for slug in registry.ROWS if slug != "sdpa-math" or seq <= 4608]
    rows = {slug: refused(slug, seq, qkv) for slug in listed}
    works = {slug: direct(slug, qkv) for slug, row in rows.items() if row is None} | {"auto": through_auto(qkv, tuner)}
    times = times_in_rounds({slug: work for slug, (work, _) in works.items()}, ROUNDS)
    sdpa_error = error_of(works["sdpa"][0](), exact)
    for slug in [*listed, "auto"]:
        yield rows.get(slug) or measured(slug, seq, *works[slug], times[slug], exact, sdpa_error, call_of(*qkv))


def measured(slug, seq, work, known, times, exact, sdpa_error, call):
    figures = summary(times)
    return {
        "backend": slug,
        "seq": seq,
        **known,
        **figures,
        "tflops": round(call.flops / figures["ms"] / 1e9, 1),
        "rel_error": error_of(work(), exact),
        "sdpa_rel_error": sdpa_error,
    }


# --- what our path costs on the host


def library_call(slug, q, k, v):
    """The library's own function on BSHD tensors, without our adapter: the baseline of the overhead. None where it is
    not listed.
    """
    qt, kt, vt = (t.transpose(1, 2) for t in (q, k, v))
    if slug == "sdpa":
        return lambda: F.scaled_dot_product_attention(qt, kt, vt)
    if slug == "sdpa-flash":
        return lambda: torch.ops.aten._scaled_dot_product_flash_attention(qt, kt, vt)
    if slug == "sdpa-cudnn":
        return lambda: torch.ops.aten._scaled_dot_product_cudnn_attention(qt, kt, vt, None, False)
    if slug == "flash4":
        from flash_attn.cute import flash_attn_func

        return lambda: flash_attn_func(q, k, v)
    return None


def host_us(work, calls=400, rounds=7):
    """Median microseconds of host time per call, the GPU kept idle enough not to be waited for."""
    found = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            work()
        found.append((time.perf_counter() - start) / calls * 1e6)
        torch.cuda.synchronize()
    return sorted(found)[rounds // 2]


def overhead(slug):
    """{"backend", "library_us", "ours_us", "overhead_us"} for one call of 64 tokens, or None."""
    q, k, v = (t[:, :64].contiguous() for t in tensors(128, 8))
    bare = library_call(slug, q, k, v)
    if bare is None or registry.probe(slug, DEVICE, torch.bfloat16, HEAD_DIM):
        return None
    override, inputs = AttentionOverride(AttentionDispatcher(slug)), [t.transpose(1, 2) for t in (q, k, v)]
    library_us, ours_us = (
        host_us(bare),
        host_us(
            lambda: override(
                None, *inputs, 8, skip_reshape=True, transformer_options={"block_type": "double", "block_index": 0}
            )
        ),
    )
    return {
        "backend": slug,
        "library_us": round(library_us, 1),
        "ours_us": round(ours_us, 1),
        "overhead_us": round(ours_us - library_us, 1),
    }


def print_case(row):
    if "ms" in row:
        print(
            (
                f"S={row['seq']:<6} {row['backend']:<15} {row['ms']:8.3f} ms {row['tflops']:7.1f} TFLOP/s  error "
                f"{row['rel_error']:.2e} (sdpa {row['sdpa_rel_error']:.2e})  {row['kernel']}"
            ),
            flush=True,
        )
    else:
        print(f"S={row['seq']:<6} {row['backend']:<15} not here: {row['reasons'][0]}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seq", type=int, nargs="+", default=[4608, 8704, 16896], help="sequence lengths in tokens")
    parser.add_argument("--heads", type=int, default=48, help="attention heads of 128; FLUX.2-dev has 48")
    parser.add_argument("--json", help="file to write the result to")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/attention.py times GPU kernels, and torch sees no GPU here.")
    tuner, rows = Tuner(), []
    with torch.inference_mode():
        for seq in options.seq:
            for row in cases(seq, options.heads, tuner):
                print_case(row)
                rows.append(row)
        costs = [c for c in map(overhead, registry.ROWS) if c]
    for cost in costs:
        print(
            f"host time per call: {cost['backend']:<12} library {cost['library_us']} us, through the selector "
            f"{cost['ours_us']} us, more by {cost['overhead_us']} us"
        )
    write({"cases": rows, "overhead": costs}, options.json)


if __name__ == "__main__":
    main()
