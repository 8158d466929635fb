#!/usr/bin/env python3
"""Check the aiter-triton and aiter-sage backends against float32 with AITER's own kernels, on a machine without an AMD
GPU.

  python3 benchmarks/aiter_check.py --aiter-source FOLDER                       on an NVIDIA GPU: output, log-sum-exp,
                                                                                odd lengths, strides, ring, time
  TRITON_INTERPRET=1 python3 benchmarks/aiter_check.py --aiter-source FOLDER    the same at small sizes in Triton's
                                                                                interpreter, on the CPU (fp16)
  python3 benchmarks/aiter_check.py --aiter-source FOLDER --compile gfx942      compile for an AMD GPU exactly what the
                                                                                backends launch, and run nothing
  python3 benchmarks/aiter_check.py --aiter-source FOLDER --compile gfx1100 --tiles
                                                                                the same for each tile that aiter-triton
                                                                                tries there, with registers and LDS
  python3 benchmarks/aiter_check.py --aiter-source FOLDER --list-files          which files of the source tree are
                                                                                needed (to copy them elsewhere)

FOLDER holds AITER's `aiter` package: a checkout of ROCm/aiter, or an unpacked wheel (which has no SageAttention).
Prints a table, then one JSON line; the exit code is 1 when a case fails. Not covered: AITER's assembly and Composable
Kernel paths, which exist as AMD machine code only.
"""

import argparse
import importlib
import json
import os
from pathlib import Path
import platform
import re
import sys
import time

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import aiter_shim  # noqa: E402
import pack  # noqa: E402, F401
from flux2_pack.attention.device import Device  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Bounds on the relative error of the output and the absolute error of the log-sum-exp, on gaussian data. Exact kernels
# have no entry: their bounds come from the data. aiter-sage: probabilities and values are fp8 e4m3, whose rounding
# error is 2**-4 / sqrt(3) / 1.4 = 0.026 rms of a value, 0.037 for a product of two, and the bound twice that; the
# interpreter truncates instead of rounding, which doubles it. The log-sum-exp sees int8 rounding only, 0.014 rms of a
# score and less in the sum; a shift of the keys that is not put back would be above 1.
QUANTISED = {"aiter-sage": (0.15 if INTERPRETED else 0.075, 0.02)}


def problem(
    torch, lengths, heads=(2, 2), head_dim=128, dtype=None, device="cpu", strides="contiguous", offset=0.0, batch=1
):
    """Gaussian q, k, v (B, S, H, D). strides: contiguous, "bhsd" memory, slices of one fused "qkv" tensor, or "far"
    apart in memory.
    """
    generator = torch.Generator().manual_seed(sum(lengths))
    make = {
        "contiguous": lambda s, h: torch.empty(batch, s, h, head_dim, dtype=dtype, device=device),
        "bhsd": lambda s, h: torch.empty(batch, h, s, head_dim, dtype=dtype, device=device).transpose(1, 2),
        "qkv": lambda s, h: torch.empty(batch, s, h, 3 * head_dim, dtype=dtype, device=device)[
            ..., head_dim : 2 * head_dim
        ],
        "far": lambda s, h: far(torch, s, h, head_dim, dtype, device),
    }[strides]
    tensors = [make(s, h) for s, h in zip((lengths[0], lengths[1], lengths[1]), (heads[0], heads[1], heads[1]))]
    for t in tensors:
        t.copy_(torch.randn(t.shape, generator=generator))
    tensors[1].add_(offset * torch.randn(head_dim, generator=generator).to(device, dtype))
    return tensors


def far(torch, s, h, d, dtype, device):
    """(1, s, h, d) whose rows lie so far apart that element offsets pass 2**31."""
    step = 2**31 // s + 2**20
    return torch.empty(step * (s - 1) + h * d, dtype=dtype, device=device).as_strided((1, s, h, d), (0, step, d, 1))


def cases(device):
    """name -> (lengths (Sq, Sk), keyword arguments of `problem`, softmax scale or None)."""
    big = device != "cpu"
    n, odd, heads = (4608, 4501, (48, 48)) if big else (160, 133, (2, 2))
    found = {
        "plain": ((n, n), {"heads": heads}, None),
        "odd length": ((odd, odd), {"heads": heads}, None),
        "more keys than queries": ((odd // 2, n), {"heads": heads}, None),
        "scale 0.05": ((odd, odd), {"heads": heads}, 0.05),
        "BHSD memory": ((odd, odd), {"heads": heads, "strides": "bhsd"}, None),
        "slices of fused qkv": ((odd, odd), {"heads": heads, "strides": "qkv"}, None),
        "grouped heads": ((odd, odd), {"heads": (heads[0], heads[0] // 2)}, None),
        "batch 2": ((odd, odd), {"heads": heads, "batch": 2}, None),
        "keys with a common offset": ((odd, odd), {"heads": heads, "offset": 3.0}, None),
    }
    if big:
        found["offsets beyond 2**31"] = ((512, 512), {"heads": (1, 1), "strides": "far"}, None)
    return found


def merged(torch, parts):
    """(out, lse) of attention over all keys from (out, lse) over parts of the keys, as a ring does it."""
    lse = torch.logsumexp(torch.stack([of_part for _, of_part in parts]), dim=0)  # (B, H, Sq)
    weigh = [(out.float() * (of_part - lse).exp().transpose(1, 2).unsqueeze(-1)) for out, of_part in parts]
    return sum(weigh), lse


def ring(torch, attend, q, k, v, scale):
    half = k.shape[1] // 2
    return merged(
        torch,
        [attend(q, k[:, keys], v[:, keys], scale=scale, need_lse=True) for keys in (slice(0, half), slice(half, None))],
    )


def bounds(torch, slug, q, k, v, scale, want_out, want_lse, reference):
    """Largest acceptable (output, log-sum-exp) error. Exact: twice PyTorch's own output error in the same dtype, and
    float32 rounding of the scores.
    """
    if slug in QUANTISED:
        return QUANTISED[slug]
    qt, kt, vt = (t.transpose(1, 2) for t in (q, k, v))
    sdpa = torch.nn.functional.scaled_dot_product_attention(
        qt, kt, vt, scale=scale, enable_gqa=q.shape[2] != k.shape[2]
    ).transpose(1, 2)
    own = reference.relative_error(sdpa, want_out)
    return 2 * max(own, torch.finfo(q.dtype).eps / 4), 64 * torch.finfo(torch.float32).eps * max(
        1.0, want_lse.abs().max().item()
    )


def measure(torch, slug, adapter, name, lengths, options, scale, args, reference):
    """Rows (dicts) of one case: as one call, and merged from two halves of the keys."""
    q, k, v = problem(torch, lengths, dtype=args.dtype, device=args.device, **options)
    refused = adapter.unsupported(call_of(q, k, v, need_lse=True))
    if refused:  # on an H200, dao_ai past 2**31 elements is an illegal memory access: the limit is there for a reason
        return [{"backend": slug, "case": name, "lengths": list(lengths), "refused": refused, "ok": True}]
    want_out, want_lse = reference.attend(q, k, v, scale=scale)
    limit_out, limit_lse = bounds(torch, slug, q, k, v, scale, want_out, want_lse, reference)
    rows = []
    for how, result in (
        ("one call", adapter.attend(q, k, v, scale=scale, need_lse=True)),
        ("two halves", ring(torch, adapter.attend, q, k, v, scale)),
    ):
        out_error = reference.relative_error(result[0], want_out)
        lse_error = (result[1] - want_lse).abs().max().item()
        ok = (
            out_error <= limit_out
            and lse_error <= limit_lse
            and tuple(result[1].shape) == (q.shape[0], q.shape[2], q.shape[1])
        )
        rows.append(
            {
                "backend": slug,
                "case": name,
                "how": how,
                "lengths": list(lengths),
                "rel_error": out_error,
                "rel_error_bound": limit_out,
                "lse_error": lse_error,
                "lse_error_bound": limit_lse,
                "ok": ok,
            }
        )
    plain, _ = adapter.attend(q, k, v, scale=scale)
    rows[0]["without_lse_rel_error"] = reference.relative_error(plain, want_out)
    rows[0]["ok"] &= rows[0]["without_lse_rel_error"] <= limit_out and plain.dtype == q.dtype
    if args.device != "cpu":
        rows[0]["ms"] = milliseconds(torch, lambda: adapter.attend(q, k, v, scale=scale))
        rows[0]["tflops"] = 4 * q.shape[0] * q.shape[2] * lengths[0] * lengths[1] * q.shape[3] / rows[0]["ms"] / 1e9
    return rows


def milliseconds(torch, call, warm=3, runs=10):
    """Median time of a call on the GPU."""
    times = []
    for i in range(warm + runs):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return sorted(times[warm:])[runs // 2]


def compiled(torch, adapters, arch, dtype):
    """Compile what each backend launches at FLUX.2's shape (1, 4608, 48, 128), with and without log-sum-exp. Rows of
    kernel, bytes, ok.
    """
    from torch._subclasses import FakeTensorMode

    objects, rows = aiter_shim.compile_only(arch), []
    # one for all: AITER remembers a tensor (the Hadamard matrix), and fake tensors of two modes do not mix
    with FakeTensorMode():
        tensors = [torch.empty(1, 4608, 48, 128, dtype=dtype, device="cuda") for _ in range(3)]
        for slug, need_lse in ((s, n) for s in adapters for n in (False, True)):
            objects.clear()
            adapters[slug].attend(*tensors, need_lse=need_lse)
            rows += [
                {
                    "backend": slug,
                    "arch": arch,
                    "dtype": str(dtype),
                    "need_lse": need_lse,
                    "kernel": kernel,
                    "bytes": len(binary),
                    "ok": aiter_shim.is_code_object(binary, arch),
                }
                for kernel, binary in objects
            ]
    return rows


# Of one SIMD: vector registers a lane can have, and the step they are given in (LLVM's AMDGPU backend,
# Utils/AMDGPUBaseInfo.cpp: getTotalNumVGPRs, getVGPRAllocGranule). LDS of a compute unit, and of RDNA's work group
# processor of two, in bytes: ISA documents on gpuopen.com.
RDNA = ("gfx1100", "gfx1101", "gfx1102", "gfx1150", "gfx1151", "gfx1200", "gfx1201")
REGISTERS = {"gfx90a": (512, 8), **dict.fromkeys(RDNA, (1536, 24)), "gfx1102": (1024, 16)}
LDS = {"gfx90a": 65536, **dict.fromkeys(RDNA, 131072)}
SIMDS = 4  # of a compute unit or work group processor


def resources(compiled):
    """What a compiled Triton kernel uses, from the metadata in its assembly (LLVM's AMDGPU code object v5): registers
    per lane, registers spilled, scratch bytes per lane, LDS bytes and warps per work group."""
    names = "vgpr_count|vgpr_spill_count|private_segment_fixed_size"
    found = dict(re.findall(rf"\.({names}):\s+(\d+)", compiled.asm["amdgcn"]))
    registers, spilled, scratch = (int(found[name]) for name in names.split("|"))
    lds, warps = compiled.metadata.shared, compiled.metadata.num_warps
    return {"registers": registers, "spilled": spilled, "scratch": scratch, "lds": lds, "warps": warps}


def groups_that_fit(used, arch):
    """How many work groups a compute unit (RDNA: a work group processor) holds at a time, by registers and by LDS."""
    total, step = REGISTERS[arch]
    waves = total // (-(-used["registers"] // step) * step) * SIMDS
    return min(waves // used["warps"], LDS[arch] // used["lds"])


def compiled_tiles(torch, module, arch, dtype):
    """compile_only for each tile that aiter-triton tries on an architecture. Rows as of `compiled`, with what each tile
    uses."""
    from torch._subclasses import FakeTensorMode

    kernels, rows = [], []
    aiter_shim.compile_only(arch, kernels.append)
    with FakeTensorMode():
        tensors = [torch.empty(1, 4608, 48, 128, dtype=dtype, device="cuda") for _ in range(3)]
        for tile in module.TILES[arch]:
            kernels.clear()
            module.TritonMha(tile).attend(*tensors)
            used = resources(kernels[-1])
            used["groups"] = groups_that_fit(used, arch)
            rows.append(
                {
                    "backend": "aiter-triton",
                    "tile": str(tile),
                    "arch": arch,
                    "dtype": str(dtype),
                    "need_lse": False,
                    "kernel": kernels[-1].metadata.name,
                    "bytes": len(kernels[-1].asm["hsaco"]),
                    **used,
                    "ok": aiter_shim.is_code_object(kernels[-1].asm["hsaco"], arch)
                    and used["spilled"] == used["scratch"] == 0
                    and used["groups"] >= 2,
                }
            )
    return rows


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--aiter-source", required=True, metavar="FOLDER", help="folder that holds AITER's `aiter` package"
    )
    parser.add_argument(
        "--backends",
        nargs="+",
        help=f"aiter-triton, aiter-sage, {DAO!r} (not in the interpreter), "
        "aiter-sage-mxfp4 (--compile gfx950 only). Default: all that can run",
    )
    parser.add_argument("--cases", nargs="+", help="names of the cases to run; all by default")
    parser.add_argument(
        "--compile", metavar="ARCH", choices=sorted(aiter_shim.MACH), help="compile only, for this architecture"
    )
    parser.add_argument("--tiles", action="store_true", help="with --compile: each tile that aiter-triton tries there")
    parser.add_argument("--json", help="file to write the result to as well")
    parser.add_argument("--list-files", action="store_true", help="print the needed files, relative to FOLDER")
    return parser.parse_args()


TRITON_BACKENDS = "flux2_pack.attention.backends.aiter_triton"
# the second implementation behind aiter-triton, which it uses where the first has no tiles (gfx90a, Radeon)
DAO = "aiter-triton (dao_ai)"


def dao(module):
    class Dao(module.TritonMha):
        """aiter-triton with its second implementation on every architecture."""

        def missing(self):
            return super().missing() or (
                [] if hasattr(module.MHA, "mha_set_impl") else ["This build has one implementation only."]
            )

        def implementation(self, arch):
            return "dao_ai"

        def unsupported(self, call):
            return self.dao_limits.reasons(call)

    return Dao()


def call_of(*tensors, need_lse):
    from flux2_pack.attention import call

    return call.call_of(*tensors, need_lse=need_lse)


def prepare(args):
    """Import the adapters over the shim. Returns (torch, slug -> adapter); backends that this source tree lacks are
    named and left out.
    """
    import torch

    args.device = "cuda" if torch.cuda.is_available() and not (INTERPRETED or args.compile) else "cpu"
    # bf16 is wrong in Triton's interpreter: it computes in numpy, which has none
    args.dtype = torch.float16 if INTERPRETED else torch.bfloat16
    if args.device == "cpu" and not (INTERPRETED or args.compile):
        raise SystemExit(
            "aiter_check: no GPU here. Set TRITON_INTERPRET=1 to run in Triton's interpreter, or use --compile."
        )
    fp8 = torch.float8_e4m3fnuz if args.compile == "gfx942" else torch.float8_e4m3fn
    # gfx942 and not gfx950 also elsewhere: only its tiles fit into the shared memory of other GPUs
    aiter_shim.install(args.aiter_source, args.compile or "gfx942", fp8)
    module = importlib.import_module(TRITON_BACKENDS)
    backends = {**module.ADAPTERS, DAO: dao(module)}
    if args.compile:
        device = Device("amd", args.compile, args.compile)
        module.describe = lambda _: device
    else:
        aiter_shim.replace_tiles(aiter_shim.TILES if args.device == "cuda" else None)
    # dao_ai asserts that its tensors are on a GPU
    able = [s for s in ("aiter-triton", DAO, "aiter-sage") if s != DAO or not INTERPRETED]
    wanted = {slug: backends[slug] for slug in args.backends or able}
    for slug in [s for s in wanted if wanted[s].missing()]:
        print(f"{slug}: left out. {' '.join(wanted.pop(slug).missing())}")
    return torch, wanted


def show(rows):
    for r in rows:
        if "kernel" in r:
            print(
                f"{'ok ' if r['ok'] else 'BAD'} {r['backend']:14} {r['arch']} lse={r['need_lse']!s:5} "
                f"{r['kernel'][:60]:60} {r['bytes']:>8} bytes"
                + (
                    f"  {r['tile']}: {r['registers']} registers, {r['spilled']} spilled, {r['lds']} bytes of LDS"
                    if "tile" in r
                    else ""
                )
            )
        elif "refused" in r:
            print(f"ok  {r['backend']:14} {r['case']:26} refused: {r['refused'][0]}", flush=True)
        else:
            speed = f"{r['ms']:8.3f} ms {r['tflops']:6.0f} TFLOP/s" if "ms" in r else ""
            print(
                f"{'ok ' if r['ok'] else 'BAD'} {r['backend']:14} {r['case']:26} {r['how']:10} out "
                f"{r['rel_error']:.1e} (<= {r['rel_error_bound']:.1e})  "
                f"lse {r['lse_error']:.1e} (<= {r['lse_error_bound']:.1e}) {speed}",
                flush=True,
            )


def main():
    args = arguments()
    if args.list_files:
        print("\n".join(aiter_shim.files(args.aiter_source)))
        return
    torch, adapters = prepare(args)
    from flux2_pack.attention import reference

    if args.tiles:
        rows = compiled_tiles(torch, sys.modules[TRITON_BACKENDS], args.compile, torch.bfloat16)
    else:
        rows = compiled(torch, adapters, args.compile, torch.bfloat16) if args.compile else []
    show(rows)
    for slug, adapter in ({} if args.compile else adapters).items():
        for name, (lengths, options, scale) in cases(args.device).items():
            if not args.cases or name in args.cases:
                found = measure(torch, slug, adapter, name, lengths, options, scale, args, reference)
                show(found)
                rows += found
    import triton

    machine = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()} CPU"
    result = {
        "machine": machine,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__},
        "command": "python benchmarks/aiter_check.py --aiter-source FOLDER " + " ".join(sys.argv[3:]),
        "ok": bool(rows) and all(r["ok"] for r in rows),
        "cases": rows,
    }
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    raise SystemExit(0 if rows and all(r["ok"] for r in rows) else 1)


if __name__ == "__main__":
    main()
