"""The fused blocks on a GPU: are they exact, how near is each kernel to the copy bandwidth, which matrix product is
fastest, where does a step's time go.

  COMFYUI_PATH=... python benchmarks/fast_check.py [--parts kernels exact products steps] [--json FILE]

Full-size FLUX.2-dev with random weights (about 80 GB). exact: one double and one single block in bf16, fused and
core's, against the same block in float32 with the same weights; the error is the relative Frobenius norm of what the
block adds. kernels: GB/s of the least traffic the kernel can do.
"""

import argparse
from contextlib import contextmanager

import torch

from common import import_pack, summary, times_in_rounds, write
from full_size import build, import_comfyui, step, step_inputs

import_pack()
import_comfyui()
from flux2_pack.attention.dispatch import AttentionDispatcher  # noqa: E402
from flux2_pack.flux2.fused import blocks as fused_blocks, fp8_rowwise  # noqa: E402
from flux2_pack.flux2 import attention_slot  # noqa: E402
from flux2_pack.flux2.fused.kernels import qkv, norm, swiglu  # noqa: E402
from flux2_pack.flux2.fused.kernels.formats import FP8_TENSOR, INT8_ROW, Format  # noqa: E402
from flux2_pack.flux2.fused.linear import Products  # noqa: E402

H, D, N = 48, 128, 6144
LENGTHS = (4608, 16896)
# the settings that `kernels` tries
NORM = [(norm, {"ROWS": r, "WARPS": w}) for r, w in ((1, 4), (1, 8), (2, 8), (2, 16), (4, 16), (4, 32))]
HEADS = [(qkv, {"GROUP": g, "WARPS": w}) for g, w in ((8, 1), (16, 1), (8, 2), (16, 2), (16, 4), (32, 4))]


def randn(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, device="cuda", dtype=dtype)


@contextmanager
def setting(module, **values):
    before = {name: getattr(module, name) for name in values}
    for name, value in values.items():
        setattr(module, name, value)
    yield
    for name, value in before.items():
        setattr(module, name, value)


def launchable(option):
    """Whether a program of so many warps has no more threads than a GPU runs in one, 1024: AMD Instinct's warps have
    64.
    """
    return option[1].get("WARPS", 1) * torch.cuda.get_device_properties(0).warp_size <= 1024


def kernels():
    """[{kernel, length, options, ms, gb_per_s}]: every kernel with every option, and a plain copy of the same size
    beside it.
    """
    rows = []
    for length in LENGTHS:
        x, delta, both = randn(1, length, N), randn(1, length, N), randn(1, length, 9 * N)
        mod = randn(1, 1, 3 * N).chunk(3, -1)
        qw, pe = (
            torch.ones(D, device="cuda", dtype=torch.bfloat16),
            randn(1, 1, length, D // 2, 2, 2, dtype=torch.float32),
        )
        attn, size = randn(1, length, N), 2 * length * N
        fp8 = Format(FP8_TENSOR, torch.ones((), device="cuda"))
        int8, convrot = Format(INT8_ROW), Format(INT8_ROW, group=256)
        txt, img = both[:, :512, : 3 * N].contiguous(), both[:, 512:, : 3 * N].contiguous()
        target = torch.empty_like(both)
        works = {
            "copy": (2 * 9 * size, lambda: target.copy_(both), [(None, {})]),
            "norm_modulate": (2 * size, lambda: norm.norm_modulate(x, mod[0], mod[1]), NORM),
            "norm_modulate fp8": (
                1.5 * size,
                lambda: norm.norm_modulate(x, mod[0], mod[1], to=fp8),
                [(norm, {})],
            ),
            "add_gated": (3 * size, lambda: norm.add_gated(x, delta, mod[2]), NORM),
            "add_gated_norm_modulate": (
                4 * size,
                lambda: norm.add_gated_norm_modulate(x, delta, mod[2], mod[0], mod[1]),
                NORM,
            ),
            "single_qkv": (4 * size, lambda: qkv.single_qkv(both, H, (qw, qw), pe), HEADS),
            "joint_qkv": (6 * size, lambda: qkv.joint_qkv(txt, img, H, (qw, qw), (qw, qw), pe), HEADS),
            "swiglu beside attention": (
                11 * size,
                lambda: swiglu.swiglu(both[..., 3 * N :], attn),
                [(swiglu, {"LARGEST": b, "ELEMENTS": e}) for b in (2048,) for e in (8, 16, 32)],
            ),
            "norm_modulate int8": (1.5 * size, lambda: norm.norm_modulate(x, mod[0], mod[1], to=int8), NORM),
            "norm_modulate int8 convrot": (1.5 * size, lambda: norm.norm_modulate(x, mod[0], mod[1], to=convrot), NORM),
            "swiglu int8": (9 * size, lambda: swiglu.swiglu(both[..., 3 * N :], attn, to=int8), [(swiglu, {})]),
            "swiglu int8 convrot": (
                9 * size,
                lambda: swiglu.swiglu(both[..., 3 * N :], attn, to=convrot),
                [(swiglu, {})],
            ),
            "swiglu": (9 * size, lambda: swiglu.swiglu(both[..., 3 * N :]), [(swiglu, {})]),
            "swiglu fp8": (9.5 * size, lambda: swiglu.swiglu(both[..., 3 * N :], attn, to=fp8), [(swiglu, {})]),
        }
        for name, (traffic, work, options) in works.items():
            for module, values in filter(launchable, options):
                with setting(module, **values):
                    ms = summary(times_in_rounds({"": work}, 15, 3)[""])["ms"]
                rows.append(
                    {
                        "kernel": name,
                        "length": length,
                        "options": values,
                        "ms": ms,
                        "gb_per_s": round(traffic / ms / 1e6),
                    }
                )
                print(
                    f"{name:<26} S={length:<6} {str(values):<32} {ms * 1000:8.1f} us {rows[-1]['gb_per_s']:6d} GB/s",
                    flush=True,
                )
    return rows


def float32_of(block):
    import copy

    wide = copy.deepcopy(block)
    for parameter in wide.parameters():
        parameter.data = parameter.data.float()
    return wide


def block_call(kind, length):
    """(arguments of core's block, the replacement's args) on random hidden states of one modulation."""
    from comfy.ldm.flux.layers import EmbedND, ModulationOut

    g = torch.Generator("cuda").manual_seed(3)

    def noise(*shape):
        return torch.randn(shape, generator=g, device="cuda")

    ids = torch.zeros(1, length, 4, device="cuda")
    ids[..., 1] = torch.arange(length, device="cuda") % 64
    ids[..., 3] = torch.arange(length, device="cuda") // 64
    pe = EmbedND(128, 2000, [32] * 4)(ids)

    def modulation():
        return ModulationOut(noise(1, 1, N) * 0.1, noise(1, 1, N) * 0.1, noise(1, 1, N) * 0.3)

    if kind == "double":
        vec = ((modulation(), modulation()), (modulation(), modulation()))
        return {"img": noise(1, length - 512, N), "txt": noise(1, 512, N), "vec": vec, "pe": pe}
    return {"img": noise(1, length, N), "vec": modulation(), "pe": pe}


def cast(value, dtype):
    if isinstance(value, tuple):
        return tuple(cast(v, dtype) for v in value)
    if hasattr(value, "shift"):
        return type(value)(*(getattr(value, n).to(dtype) for n in ("shift", "scale", "gate")))
    return value.to(dtype, copy=True)


def exact(patcher):
    """Errors of fused and core's blocks in bf16 against float32, with PyTorch's exact attention for all; and that two
    runs are bit-identical.
    """
    inner, rows = patcher.model.diffusion_model, []
    for kind, block, fused in (
        ("double", inner.double_blocks[1], fused_blocks.double_block),
        ("single", inner.single_blocks[5], fused_blocks.single_block),
    ):
        given = block_call(kind, 2560)

        def run(which, dtype):
            args = {name: cast(v, dtype) if name != "pe" else v for name, v in given.items()}
            args |= {"x": args.pop("img")} if kind == "single" else {}
            if which is fused:
                out = fused(block, Products(), **args, attn_mask=None, segment=(0, 0), options={})
            else:
                out = which(**args)
            return [t.double() for t in (out if isinstance(out, tuple) else (out,))]

        wide = run(float32_of(block), torch.float32)
        base = [given[n].double() for n in ("img", "txt") if n in given]
        core, ours, again = run(block, torch.bfloat16), run(fused, torch.bfloat16), run(fused, torch.bfloat16)

        def error(out):
            return max(((o - w).norm() / (w - b).norm()).item() for o, w, b in zip(out, wide, base))

        rows.append(
            {
                "block": kind,
                "core_error": error(core),
                "fused_error": error(ours),
                "ratio": error(ours) / error(core),
                "bit_identical": all(torch.equal(a, b) for a, b in zip(ours, again)),
            }
        )
        print(rows[-1], flush=True)
    return rows


def fp8_rounding():
    """Whether the kernels' fp8 is what PyTorch makes of the same bf16 tensor: the share of equal bytes."""
    x, one = randn(1, 512, 2 * N) * 30, torch.tensor(0.37, device="cuda")
    ours = swiglu.swiglu(x, to=Format(FP8_TENSOR, one)).data.view(torch.uint8)
    plain = (swiglu.swiglu(x).float() / one).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    return (ours == plain).float().mean().item()


def products():
    """TFLOP/s of bf16 and fp8 products of the model's shapes by cuBLAS, cuBLASLt, quack and torch._scaled_mm."""
    rows = []
    shapes = [
        (m, k, n) for m in LENGTHS for k, n in ((N, 9 * N), (4 * N, N), (N, 3 * N), (N, 6 * N), (3 * N, N), (N, N))
    ]
    for m, k, n in shapes:
        a, w = randn(m, k), randn(n, k) * k**-0.5

        def by(library):
            def work():
                torch.backends.cuda.preferred_blas_library(library)
                return torch.nn.functional.linear(a, w)

            return work

        runners = {"cublas": by("cublas"), "cublaslt": by("cublaslt")}
        qa, qw = a.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn)
        one, ra, rw = torch.ones((), device="cuda"), torch.ones(m, 1, device="cuda"), torch.ones(1, n, device="cuda")
        runners["fp8 tensor"] = lambda: torch._scaled_mm(qa, qw.t(), one, one, out_dtype=torch.bfloat16)
        runners["fp8 tensor fast"] = lambda: torch._scaled_mm(
            qa, qw.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True
        )
        runners["fp8 rows fast"] = lambda: torch._scaled_mm(
            qa, qw.t(), ra, rw, out_dtype=torch.bfloat16, use_fast_accum=True
        )
        try:
            from quack.gemm_interface import gemm

            gemm(a, w.t(), tuned=False)
            runners["quack"] = lambda: gemm(a, w.t(), tuned=False)
        except Exception as error:
            print("quack:", str(error)[:300], flush=True)
        row = {"m": m, "k": k, "n": n}
        for name in list(runners):
            try:
                runners[name]()
            except Exception as error:
                print(name, str(error)[:200], flush=True)
                del runners[name]
        for name, times in times_in_rounds(runners, 8, 2).items():
            row[name] = round(2 * m * k * n / summary(times)["ms"] / 1e9)
        torch.backends.cuda.preferred_blas_library("default")
        rows.append(row)
        print(row, flush=True)
    return rows


def kitchen():
    """comfy-kitchen's adaln and rms_rope, which core's requirements install, beside our kernels: error against float32,
    milliseconds, and GB/s of the traffic that the work needs.

    adaln has no gated residual in front, no fp8 or int8 behind and no second modulation; rms_rope reads q and k of one
    tensor each, so text and image of a double block are joined before it (`cat` of the three outputs counts there).
    """
    import comfy_kitchen

    rows = []
    for length in LENGTHS:
        x, both = randn(1, length, N), randn(1, length, 9 * N)
        mod = randn(1, 1, 3 * N).chunk(3, -1)
        weight = torch.ones(D, device="cuda", dtype=torch.bfloat16)
        ids = torch.zeros(1, length, 4, device="cuda")
        ids[..., 1], ids[..., 3] = torch.arange(length, device="cuda") % 64, torch.arange(length, device="cuda") // 64
        pe = embedding(ids)
        txt, img, size = both[:, :512, : 3 * N].contiguous(), both[:, 512:, : 3 * N].contiguous(), 2 * length * N

        def heads(qkv):
            return [t.unflatten(-1, (H, D)).transpose(1, 2) for t in qkv[..., : 3 * N].split(N, -1)]

        def theirs_single():
            q, k, _ = heads(both)
            return comfy_kitchen.rms_rope(q, k, pe, weight, weight, qkv.RMS_EPS)

        def theirs_joint():
            q, k, v = (torch.cat(pair, 2) for pair in zip(heads(txt), heads(img)))
            return (*comfy_kitchen.rms_rope(q, k, pe, weight, weight, qkv.RMS_EPS), v)

        def wide_heads():
            q, k, _ = (t.float() for t in heads(both))
            norm_, rope = torch.nn.functional.rms_norm, comfy_kitchen.apply_rope
            with comfy_kitchen.use_backend("eager"):
                return rope(norm_(q, (D,), None, qkv.RMS_EPS), norm_(k, (D,), None, qkv.RMS_EPS), pe)

        def wide_norm():
            return torch.nn.functional.layer_norm(x.float(), (N,), eps=1e-6) * (1 + mod[1].float()) + mod[0].float()

        def flat(tensors):
            return [t.transpose(1, 2) if t.shape[1] == H else t for t in tensors]

        works = {
            "norm and modulation": (
                2 * size,
                lambda: [norm.norm_modulate(x, mod[0], mod[1])],
                lambda: [comfy_kitchen.adaln(x, mod[1], mod[0], 1e-6)],
                [wide_norm()],
            ),
            "q, k of a single block": (
                4 * size,
                lambda: qkv.single_qkv(both, H, (weight, weight), pe)[:2],
                theirs_single,
                wide_heads(),
            ),
            "q, k, v of a double block": (
                6 * size,
                lambda: qkv.joint_qkv(txt, img, H, (weight, weight), (weight, weight), pe),
                theirs_joint,
                None,
            ),
        }
        for name, (traffic, ours, theirs, exact) in works.items():
            times = {
                who: summary(t)["ms"] for who, t in times_in_rounds({"ours": ours, "theirs": theirs}, 15, 3).items()
            }
            errors = {
                who: max(
                    ((out.float() - want).norm() / want.norm()).item() for out, want in zip(flat(work()), flat(exact))
                )
                for who, work in (("ours", ours), ("theirs", theirs))
                if exact
            }
            rates = {who: round(traffic / ms / 1e6) for who, ms in times.items()}
            rows.append({"work": name, "length": length, "ms": times, "gb_per_s": rates, "error": errors})
            print(rows[-1], flush=True)
    return rows


def embedding(ids):
    from comfy.ldm.flux.layers import EmbedND

    return EmbedND(128, 2000, [32] * 4)(ids)


def int8_products():
    """TFLOP/s of int8 products of the model's shapes: comfy-kitchen's int8_linear, which quantises its input itself,
    with and without ConvRot; torch._int_mm with int32 sums; and bf16.
    """
    import comfy_kitchen
    from flux2_pack.flux2.fused.kernels.dequantise import dequantise

    rows = []
    shapes = [
        (m, k, n) for m in LENGTHS for k, n in ((N, 9 * N), (4 * N, N), (N, 3 * N), (N, 6 * N), (3 * N, N), (N, N))
    ]
    for m, k, n in shapes:
        a, w = randn(m, k), randn(n, k) * k**-0.5
        w8 = torch.randint(-127, 128, (n, k), device="cuda", dtype=torch.int8)
        a8 = torch.randint(-127, 128, (m, k), device="cuda", dtype=torch.int8)
        scale, rows_scale = torch.full((n, 1), 1e-3, device="cuda"), torch.full((m, 1), 1e-3, device="cuda")
        runners = {
            "bf16": lambda: torch.nn.functional.linear(a, w),
            "int8_linear": lambda: comfy_kitchen.int8_linear(a, w8, scale, None, torch.bfloat16),
            "int8_linear convrot": lambda: comfy_kitchen.int8_linear(a, w8, scale, None, torch.bfloat16, True, 256),
            "int_mm": lambda: torch._int_mm(a8, w8.t()),
            "int_mm, scaled": lambda: dequantise(
                torch._int_mm(a8, w8.t()), rows_scale, scale.flatten(), None, torch.bfloat16
            ),
        }
        try:
            from comfy_kitchen.backends.cuda import _int4_linear_via_int8_values as values

            runners["kitchen, quantised input"] = lambda: values(a8, w8, rows_scale, scale, None, torch.bfloat16)
        except ImportError as error:
            print("kitchen:", error, flush=True)
        row = {"m": m, "k": k, "n": n}
        for name, times in times_in_rounds(runners, 8, 2).items():
            row[name] = round(2 * m * k * n / summary(times)["ms"] / 1e9)
        rows.append(row)
        print(row, flush=True)
    return rows


def sustained():
    """TFLOP/s of bf16 products over a second each, when the card has reached its power limit: cuBLAS against quack's
    own choice and its tuned one.
    """
    from quack.gemm_interface import gemm

    rows = []
    for m, k, n in ((4608, N, 9 * N), (4608, 4 * N, N), (16896, 4 * N, N)):
        a, w = randn(m, k), randn(n, k) * k**-0.5
        runners = {
            "cublas": lambda: torch.nn.functional.linear(a, w),
            "quack": lambda: gemm(a, w.t(), tuned=False),
            "quack tuned": lambda: gemm(a, w.t(), tuned=True),
        }
        row = {"m": m, "k": k, "n": n}
        for turn in range(2):
            for name, work in runners.items():
                work()
                torch.cuda.synchronize()
                start, end, count = (
                    torch.cuda.Event(enable_timing=True),
                    torch.cuda.Event(enable_timing=True),
                    int(500 / (2 * m * k * n / 6.8e11)) + 1,
                )
                start.record()
                for _ in range(count):
                    work()
                end.record()
                end.synchronize()
                row[f"{name} {turn}"] = round(2 * m * k * n * count / start.elapsed_time(end) / 1e9)
        rows.append(row)
        print(row, flush=True)
    return rows


def steps(patcher, cases=((1024, 0, 6), (1024, 1, 4), (2048, 0, 3))):
    """Whole steps: core, core with the fastest attention, fused blocks with it; in rounds."""
    rows = []

    def with_attention(model, backend="auto"):
        clone = model.clone()
        attention_slot.select(clone, AttentionDispatcher(backend))
        return clone

    auto = with_attention(patcher)
    fused = auto.clone()
    fused_blocks.install(fused)
    eight, fp8 = auto.clone(), fp8_rowwise.RowwiseFp8()
    fp8.install(eight)
    fused_blocks.install(eight, fp8)
    log, log8 = fused_blocks.log_of(fused), fused_blocks.log_of(eight)
    for pixels, references, repeat in cases:
        inputs = step_inputs(patcher, pixels, references)
        models = {"core": patcher, "auto": auto, "fused": fused, "fp8": eight}
        peaks = {}
        for name, model in models.items():
            step(model, inputs)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            step(model, inputs)
            peaks[name] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        times = times_in_rounds({name: (lambda m=model: step(m, inputs)) for name, model in models.items()}, repeat, 1)
        a, b, c = (step(m, inputs).float() for m in (auto, fused, eight))
        row = {
            "pixels": pixels,
            "references": references,
            **{name: summary(t)["ms"] for name, t in times.items()},
            "peak_gib": peaks,
            "difference": ((a - b).norm() / a.norm()).item(),
            "again": bool(torch.equal(step(fused, inputs).float(), b)),
            "log": log.as_data(),
            "fp8_difference": ((a - c).norm() / a.norm()).item(),
            "fp8": log8.as_text(),
        }
        rows.append(row)
        print(row, flush=True)
    for model in (fused, eight):
        print(profile(model, step_inputs(patcher, 1024)), flush=True)
    return rows


def profile(model, inputs):
    """Kernels of one step by total time."""
    from torch.profiler import ProfilerActivity, profile as record

    step(model, inputs)
    with record(activities=[ProfilerActivity.CUDA]) as found:
        step(model, inputs)
        torch.cuda.synchronize()
    events = sorted(found.key_averages(), key=lambda e: -e.self_device_time_total)[:25]
    total = sum(e.self_device_time_total for e in found.key_averages()) / 1000
    return f"{total:.1f} ms in {sum(e.count for e in found.key_averages())} kernels\n" + "\n".join(
        (
            f"{e.self_device_time_total / 1000:9.2f} ms {e.count:5d} x {e.self_device_time_total / e.count:8.1f} us  "
            f"{e.key[:110]}"
        )
        for e in events
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", nargs="+", default=["kernels", "exact", "products", "steps"])
    parser.add_argument("--json", help="file to write the result to")
    options = parser.parse_args()
    result, patcher = {}, None
    with torch.inference_mode():
        for part in options.parts:
            if part == "kernels":
                result["fp8_equal"] = fp8_rounding()
                print("fp8 bytes equal:", result["fp8_equal"])
                result[part] = kernels()
            elif part in ("products", "sustained", "kitchen", "int8_products"):
                result[part] = globals()[part]()
            else:
                patcher = patcher or build()
                result[part] = (exact if part == "exact" else steps)(patcher)
            write(result, options.json)


if __name__ == "__main__":
    main()
