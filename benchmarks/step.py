"""One FLUX.2-dev step (a forward pass of the 32B model) in ComfyUI: core's own attention against chosen backends, same weights, same run.

  COMFYUI_PATH=... python benchmarks/step.py [--backends auto flash4 sdpa-cudnn] [--json FILE] [--cases bf16-1024 bf16-1024-ref1 bf16-2048]

Random weights at full size measure speed exactly and say nothing about pictures. Milliseconds are medians of CUDA events after warm-up. Output error: the
model's output with a backend against its output with core's attention, both bf16; the same between two of PyTorch's own kernels is printed beside it as
the size of rounding noise. Needs about 80 GB of GPU memory. Not covered: the sampler, the text encoder, the VAE.
"""
import argparse

import torch

from common import import_pack, summary, times_ms, write
from full_size import build, import_comfyui, step, step_inputs

import_pack()
import_comfyui()
from flux2_pack.attention.override import AttentionOverride  # noqa: E402
from flux2_pack.attention.selection import Selection  # noqa: E402
from flux2_pack.flux2 import patch  # noqa: E402

CASES = {"bf16-1024": (1024, 0, 10), "bf16-1024-ref1": (1024, 1, 8), "bf16-2048": (2048, 0, 5)}  # pixels, references, repetitions
CORE = "core"


def selected(patcher, backend):
    """(a clone with a backend selected as the node does it, its Selection); the model itself and None for core."""
    if backend == CORE:
        return patcher, None
    clone, selection = patcher.clone(), Selection(backend)
    patch.install(clone, AttentionOverride(selection, patch.occupant(clone)))
    return clone, selection


def measure(patcher, backend, inputs, repeat, expected):
    """One row: time of a step with a backend, and the distance of its output from core's."""
    model, selection = selected(patcher, backend)
    out = step(model, inputs)
    row = {"backend": backend, **summary(times_ms(lambda: step(model, inputs), repeat))}
    row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
    if expected is not None:
        row["error_to_core"] = ((out.float() - expected.float()).norm() / expected.float().norm()).item()
    if selection:
        row["ran"] = [{k: e[k] for k in ("backend", "kernel", "library", "calls")} for e in selection.log.current.as_data()["entries"]]
        row["auto"] = selection.log.current.as_data()["auto"]
    return row, out


def case(patcher, name, backends):
    pixels, references, repeat = CASES[name]
    inputs, expected, rows = step_inputs(patcher, pixels, references), None, []
    for backend in [CORE, *backends]:
        torch.cuda.reset_peak_memory_stats()
        row, out = measure(patcher, backend, inputs, repeat, expected)
        expected = out if expected is None else expected
        rows.append(row)
        print(f"{name:<16} {backend:<12} {row['ms']:9.2f} ms ({row['min_ms']:.1f} to {row['max_ms']:.1f})  peak {row['peak_gib']} GiB  "
              + (f"output differs from core's by {row['error_to_core']:.1e}  ran: {row['ran'][0]['backend']}" if "ran" in row else ""), flush=True)
    return {"name": name, "core_ms": rows[0]["ms"], "rows": rows}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backends", nargs="+", default=["auto", "flash4", "sdpa-cudnn", "sdpa-flash"], help="slugs to compare with core's own attention")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--json", help="file to write the result to")
    options = parser.parse_args()
    with torch.inference_mode():
        patcher = build()
        found = []
        for name in options.cases:
            found.append(case(patcher, name, options.backends))
            write({"model": "FLUX.2-dev, random weights", "cases": found}, options.json)  # after every case: a run that is cut keeps what it has


if __name__ == "__main__":
    main()
