"""One FLUX.2-dev step on several GPUs against our own step on one, through the code that the node Sequence Parallel
runs;
and, with --rounds, kills and cancels.

  COMFYUI_PATH=... python benchmarks/parallel.py [--gpus 4 2] [--cases bf16-1024 bf16-2048 fp8-1024] [--backend flash4]
  [--fast] [--json FILE] COMFYUI_PATH=... python benchmarks/parallel.py --gpus 2 --rounds 50 COMFYUI_PATH=... python
  benchmarks/parallel.py --gpus 2 4 --checks
  COMFYUI_PATH=... python benchmarks/parallel.py --gpus 2 --weights split --fast --folder /large/disk --json FILE

Random weights at full size, made on every GPU from the same seed: right for speed, noise for pictures. The other ranks
are processes as the node starts them; this one is rank 0. Milliseconds: CUDA events around whole steps on rank 0,
medians after warm-up; the one-GPU step of the same case is measured in the same run, before. Error: the output against
the one-GPU output, and beside it how far two of PyTorch's exact kernels are apart on one GPU. Exchange: the mean of
all ranks per step, waiting included, and the bytes that left a rank in that time. Ready: seconds from the start of the
processes until they had their weights and were connected (random weights are made faster than a file is read). The
rounds sample a small model of the same shape, kill or cancel at random moments, and check latents, processes and the
memory of every GPU. The checks sample one in float32, every kind of picture on every arrangement, and fail above 1e-6
of one GPU's latents. With --weights split the random model is written to a file in --folder first (bf16 64 GB, fp8 33)
and loaded from there, as a user's is, so that no GPU ever holds it whole but the one that is compared with; peak: what
PyTorch had reserved on each GPU at the end, the most that it held at once, in bytes. --small tries everything in a
minute, on a CPU with FLUX2_CPU_RANKS=2 too.
"""

import argparse
import gc
import os
import random
import signal
import statistics
import threading
import time

import torch

from common import import_pack, summary, times_in_rounds, write
from full_size import DEV, SMALL, build, build_fp8, import_comfyui, step, step_inputs, weights_file

import_pack()
import_comfyui()
from flux2_pack.attention.parallel import Degrees, degrees, tensor_degrees  # noqa: E402
from flux2_pack.attention.parallel.mesh import pairs  # noqa: E402
from flux2_pack.attention.dispatch import AttentionDispatcher  # noqa: E402
from flux2_pack.flux2.fused import blocks as fused_blocks  # noqa: E402
from flux2_pack.flux2 import attention_slot  # noqa: E402
from flux2_pack.flux2.loading.load import load_model  # noqa: E402
from flux2_pack.flux2.parallel.workers import session as sessions, devices, install, split_model  # noqa: E402

CASES = {
    "bf16-1024": (build, 1024, 0, 10),
    "bf16-1024-ref1": (build, 1024, 1, 6),
    "bf16-2048": (build, 2048, 0, 5),
    # maker, pixels, references, repetitions
    "fp8-1024": (build_fp8, 1024, 0, 10),
    "fp8-2048": (build_fp8, 2048, 0, 5),
}
CONTROL = ("sdpa-flash", "sdpa-efficient" if torch.cuda.is_available() else "sdpa-math")


# --- models
# ----------------------------------------------------------------------------------------------------------------


def made(maker, *arguments):
    """A MODEL that every rank can make again."""
    patcher = maker(*arguments)
    patcher.cached_patcher_init = (maker, arguments)
    return patcher


def prepared(patcher, backend, fast):
    clone = patcher.clone()
    attention_slot.select(clone, AttentionDispatcher(backend))
    if fast:
        fused_blocks.install(clone)
    return clone


def split(model, gpus, ulysses=0, ring=0, overlap_chunks=1, weights=False):
    """(the model on several GPUs, its ParallelPlan). weights: whether they are split too."""
    heads, choose = model.model.diffusion_model.num_heads, tensor_degrees if weights else degrees
    plan, why = devices.plan_ranks(model.load_device, gpus, lambda number: choose(number, heads, ulysses, ring))
    plan = type(plan)(**{**vars(plan), "overlap_chunks": overlap_chunks})
    clone = split_model.split_model(model, plan.tensor) if weights else model.clone()
    install.install(clone, install.ParallelRequest(plan, why))
    return clone, plan


def difference(ours, expected):
    return ((ours.float() - expected.float()).norm() / expected.float().norm()).item()


def timed(work, repeat):
    """Milliseconds of each run; on a CPU by the clock."""
    if torch.cuda.is_available():
        return times_in_rounds({"step": work}, repeat)["step"]
    found = []
    for _ in range(repeat + 1):
        begun = time.perf_counter()
        work()
        found.append((time.perf_counter() - begun) * 1e3)
    return found[1:]


# --- steps
# -----------------------------------------------------------------------------------------------------------------


def exchange(model):
    """What the ranks spent in exchanges since the last time, per step: {"exchange_ms", "compute_ms", "sent_mb",
    "sent_gb_per_s", "tokens"}.
    """
    session = sessions.existing(model.model)
    session.finish()
    times = [one["times"] for one in session.last.values()]
    steps = max(1, min(one["forwards"] for one in times))
    mean = {
        name: statistics.mean(one[name] for one in times) / steps
        for name in ("collective_seconds", "compute_seconds", "sent")
    }
    return {
        "exchange_ms": round(mean["collective_seconds"] * 1e3, 2),
        "compute_ms": round(mean["compute_seconds"] * 1e3, 2),
        "sent_mb": round(mean["sent"] / 1e6, 1),
        "sent_gb_per_s": round(mean["sent"] / 1e9 / max(mean["collective_seconds"], 1e-9), 1),
        "tokens": times[0]["tokens"],
    }


def measure(model, plan, inputs, repeat, one, expected):
    """One row: a step on several GPUs. one: the one-GPU row."""
    out = step(model, inputs)
    session = sessions.existing(model.model)
    exchange(model)
    row = {
        "gpus": plan.size,
        "ulysses": plan.ulysses,
        "ring": plan.ring,
        "overlap_chunks": plan.overlap_chunks,
        **summary(timed(lambda: step(model, inputs), repeat)),
        "one_gpu_ms": one["ms"],
        "transport": session.connection.mesh.transport,
    }
    return {
        **row,
        "speedup": round(one["ms"] / row["ms"], 3),
        **exchange(model),
        "error_to_one_gpu": difference(out, expected),
        "seconds_to_ready": {name: round(seconds, 2) for name, seconds in session.seconds.items()},
    }


def arrangements(gpus, heads, rings):
    return [pair for pair in pairs(gpus, heads) if pair.ring == 1 or rings]


def case(patcher, name, options):
    _, pixels, references, repeat = CASES[name]
    pixels, repeat = (128, 2) if options.small else (pixels, repeat)
    inputs = step_inputs(patcher, pixels, references)
    single = prepared(patcher, options.backend, options.fast)
    expected = step(single, inputs)
    one = {**summary(timed(lambda: step(single, inputs), repeat))}
    noise = difference(*(step(prepared(patcher, backend, False), inputs) for backend in CONTROL))
    print(f"{name:<16} 1 GPU {one['ms']:9.2f} ms  (two exact kernels differ by {noise:.1e})", flush=True)
    rows = []
    for gpus in options.gpus:
        for arranged in arrangements(gpus, patcher.model.diffusion_model.num_heads, options.rings):
            for parts in options.overlap_chunks if arranged.ring == 1 else [1]:
                model, plan = split(single, gpus, arranged.ulysses, arranged.ring, parts)
                rows.append(
                    {"name": name, **measure(model, plan, inputs, repeat, one, expected), "kernel_noise": noise}
                )
                print(line(rows[-1]), flush=True)
    return rows


def line(row):
    return (
        f"{row['name']:<16} {row['gpus']} GPUs, Ulysses {row['ulysses']} x ring {row['ring']}, overlap chunks "
        f"{row['overlap_chunks']}: {row['ms']:9.2f} ms  "
        f"{row['speedup']:.2f}x  exchange {row['exchange_ms']} ms ({row['sent_mb']} MB, {row['sent_gb_per_s']} GB/s)  "
        f"error {row['error_to_one_gpu']:.1e}  ready after {row['seconds_to_ready'].get('ready')} s"
    )


def steps(options):
    found, patcher, maker = [], None, None
    for name in options.cases:
        if CASES[name][0] is not maker:
            maker, patcher = CASES[name][0], end(patcher)
            free()
            patcher = made(maker, SMALL if options.small else DEV)
        found += case(patcher, name, options)
        write(
            {
                "model": "FLUX.2-dev, random weights",
                "backend": options.backend,
                "fast_blocks": options.fast,
                "cases": found,
            },
            options.json,
        )
    end(patcher)


# --- weights split over the GPUs -------------------------------------------------------------------------------------


def split_arrangements(gpus):
    """Degrees that leave two GPUs or more to share the weights."""
    found = [Degrees(1, 1), Degrees(2, 1), Degrees(1, 2)]
    return [one for one in found if gpus % one.size == 0 and gpus // one.size > 1]


def loaded(model):
    """The MODEL, loaded by ComfyUI and nothing beside it on this process's GPU."""
    import comfy.model_management as management

    management.unload_all_models()
    free()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    management.load_models_gpu([model], force_full_load=True)
    return model


def peaks(model):
    """Bytes that PyTorch held at most on each GPU, rank 0's first: its own count here, on the other GPUs what is in
    use, PyTorch's reserve and the driver's share included; None on a CPU.
    """
    session = sessions.existing(model.model)
    rooms = session.pool.done("room", session.pool.ask("room"), 60)
    own = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else None
    others = [rooms[rank] for rank in sorted(rooms)]
    return [own, *(room["total"] - room["free"] if room["free"] is not None else None for room in others)]


def split_steps(options):
    """A step of each case with split weights, from a file as a user's model is."""
    found = []
    for name in options.cases:
        maker, pixels, references, repeat = CASES[name]
        pixels, repeat = (128, 2) if options.small else (pixels, repeat)
        path = weights_file(maker is build_fp8, SMALL if options.small else DEV, options.folder)
        try:
            found += split_case(str(path), name, pixels, references, repeat, options)
        finally:
            os.remove(path)
        head = {"model": "FLUX.2-dev, random weights, from a file", "backend": options.backend}
        write({**head, "fast_blocks": options.fast, "cases": found}, options.json)


def split_case(path, name, pixels, references, repeat, options):
    patcher = load_model(path)
    inputs = step_inputs(patcher, pixels, references)
    # one GPU may be too small for the model: then there is nothing to compare with
    one, expected, one_peak = {"ms": None}, None, None
    if not options.no_one_gpu:
        single = loaded(prepared(patcher, options.backend, options.fast))
        expected = step(single, inputs)
        one = summary(timed(lambda: step(single, inputs), repeat))
        one_peak = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else None
    rows = []
    for gpus in options.gpus:
        model, plan = split(prepared(patcher, options.backend, options.fast), gpus, weights=True)
        rows.append(split_row(name, loaded(model), plan, inputs, repeat, one, expected))
        rows[-1]["one_gpu_peak_bytes"] = one_peak
        end(model)
        print(rows[-1], flush=True)
    return rows


def split_row(name, model, plan, inputs, repeat, one, expected):
    out = step(model, inputs)
    exchange(model)
    row = {"name": name, "weights": "split", "gpus": plan.size, "ulysses": plan.ulysses, "ring": plan.ring}
    row |= {"parts": plan.tensor, **summary(timed(lambda: step(model, inputs), repeat)), "one_gpu_ms": one["ms"]}
    error = None if expected is None else difference(out, expected)
    return {**row, **exchange(model), "error_to_one_gpu": error, "peak_bytes": peaks(model)}


def end(patcher):
    """End the ranks of a model. Returns None, to forget it by."""
    session = sessions.existing(patcher.model) if patcher is not None else None
    if session is not None:
        session.stop()


def free():
    """Give back the memory of what was forgotten."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# --- kills and cancels
# -----------------------------------------------------------------------------------------------------


def sample(model, size, steps, seed=1, *, width=None, batch=1, text=64, references=(), method=None):
    import comfy.sample

    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((batch, 128, size, width or size), generator=generator)
    extra = {
        "guidance": 4.0,
        **(
            {"reference_latents": [torch.randn((1, 128, *one), generator=generator) for one in references]}
            if references
            else {}
        ),
        **({"reference_latents_method": method} if method else {}),
    }
    cond = [[torch.randn((1, text, model.model.diffusion_model.params.context_in_dim), generator=generator), extra]]
    return comfy.sample.sample(
        model, noise, steps, 1.0, "euler", "simple", cond, cond, torch.zeros_like(noise), disable_pbar=True, seed=seed
    )


def used():
    """Bytes in use on each GPU, by anybody; [] without GPUs."""
    return [
        torch.cuda.mem_get_info(index)[1] - torch.cuda.mem_get_info(index)[0]
        for index in range(torch.cuda.device_count())
    ]


def rounds(options):
    """Kills and cancels at random moments. Prints one line per round; raises on the first thing that is lost."""
    import comfy.model_management as management

    before = used()
    patcher = made(
        build,
        {**SMALL, "hidden_size": 2048, "depth": 4, "depth_single_blocks": 8} if torch.cuda.is_available() else SMALL,
    )
    model, _ = split(patcher, options.gpus[0])
    size, chance, pids = (64 if torch.cuda.is_available() else 24), random.Random(3), set()
    expected, slow = sample(model, size, 3), []
    session = sessions.existing(patcher.model)
    for number in range(options.rounds):
        pids |= {member.pid for member in session.pool.workers}
        kill, delay, victim = (
            chance.random() < 0.34,
            chance.random() * options.window,
            chance.choice(session.pool.workers).pid,
        )
        slow.append(
            disturbed(
                model,
                size,
                delay,
                (lambda: os.kill(victim, signal.SIGKILL)) if kill else management.interrupt_current_processing,
            )
        )
        management.interrupt_current_processing(False)
        try:
            found = sample(model, size, 3)
        except RuntimeError:  # killed after the last step: noticed at the next prompt, which this was
            found = sample(model, size, 3)
        if difference(found, expected) > (
            1e-6 if found.dtype == torch.float32 and not torch.cuda.is_available() else 2e-2
        ):
            raise SystemExit(f"round {number}: other latents, {difference(found, expected):.1e}")
        print(
            f"round {number}: {'kill' if kill else 'cancel'} after {delay:.2f} s: {slow[-1][0]} after "
            f"{slow[-1][1]:.2f} s",
            flush=True,
        )
    session.stop()
    left = [pid for pid in pids if os.path.exists(f"/proc/{pid}")]
    patcher = model = session = None
    free()
    time.sleep(2)
    slowest = {
        kind: max((seconds for what, seconds in slow if word in what), default=0)
        for kind, word in (("cancel", "Interrupt"), ("kill", "Ranks"))
    }
    write(
        {
            "rounds": options.rounds,
            "slowest_seconds": slowest,
            "processes_left": left,
            "gpu_bytes_before": before,
            "gpu_bytes_after": used(),
        },
        options.json,
    )


def disturbed(model, size, delay, action):
    """(what a sampling ended with, seconds from the action to its end)."""
    moment = []

    def later():
        time.sleep(delay)
        moment.append(time.perf_counter())
        action()

    thread = threading.Thread(target=later)
    thread.start()
    ended = "nothing"
    try:
        sample(model, size, 40)
    except BaseException as error:
        ended = type(error).__name__
    seconds = time.perf_counter() - moment[0] if moment else 0.0
    thread.join()
    return ended, seconds


# --- every kind of picture
# -------------------------------------------------------------------------------------------------

SAME = 1e-6  # relative, float32
CHECKS = {
    "text to image": {},
    "lengths that divide nothing": {"width": 13, "text": 601},
    "batch 2": {"batch": 2},
    "one reference": {"references": ((8, 6),)},
    "two references": {"references": ((8, 6), (5, 9))},
    "references at timestep zero": {"references": ((8, 6), (5, 9)), "method": "index_timestep_zero"},
    "LoRA": {},
}


def with_lora(patcher, rank=4):
    """The MODEL with a LoRA on a layer of each kind of block, as Load LoRA puts it there."""
    import comfy.sd

    generator, state = torch.Generator().manual_seed(5), {}
    for name in ("double_blocks.0.img_attn.qkv", "single_blocks.1.linear1"):
        rows, columns = patcher.model.diffusion_model.get_parameter(f"{name}.weight").shape
        state[f"diffusion_model.{name}.lora_up.weight"] = torch.randn((rows, rank), generator=generator) * 0.05
        state[f"diffusion_model.{name}.lora_down.weight"] = torch.randn((rank, columns), generator=generator) * 0.05
    return comfy.sd.load_lora_for_models(patcher, None, state, 0.7, 0)[0]


def checks(options):
    """Latents of every kind of picture on every arrangement against those of one GPU. Exits with a sentence when one
    differs.
    """
    patcher, rows = made(build, {**SMALL, "hidden_size": 1536}, torch.float32), []
    for gpus in options.gpus:
        for name, kind in CHECKS.items():
            single = prepared(with_lora(patcher) if name == "LoRA" else patcher, "sdpa-math", options.fast)
            expected = sample(single, 17, 2, **kind)
            heads, weights = patcher.model.diffusion_model.num_heads, options.weights == "split"
            for arranged in split_arrangements(gpus) if weights else arrangements(gpus, heads, True):
                model, plan = split(single, gpus, arranged.ulysses, arranged.ring, weights=weights)
                error = difference(sample(model, 17, 2, **kind), expected)
                row = {"name": name, "gpus": gpus, "ulysses": plan.ulysses, "ring": plan.ring, "error": error}
                rows.append({**row, "transport": sessions.existing(model.model).connection.mesh.transport})
                rows[-1] |= {"weights": "split", "parts": plan.tensor} if weights else {}
                if weights:  # it has ranks of its own, beside the whole model's
                    end(model)
                print(f"{name:<28} {gpus} GPUs, {arranged}: {rows[-1]['error']:.1e}", flush=True)
    end(patcher)
    write(
        {"model": "random weights, float32", "fast_blocks": options.fast, "allowed": SAME, "checks": rows}, options.json
    )
    wrong = [f"{row['name']} on {row['gpus']} GPUs" for row in rows if not row["error"] <= SAME]
    if wrong:
        raise SystemExit(f"Other latents than on one GPU: {', '.join(wrong)}.")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--gpus", type=int, nargs="+", default=[4, 2], help="how many GPUs; another number starts new processes"
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["bf16-1024", "bf16-2048", "fp8-1024"])
    parser.add_argument("--backend", default="auto", help="attention backend of every rank")
    parser.add_argument(
        "--fast", action="store_true", help="Fast Blocks on every rank, and on the one GPU that is compared with"
    )
    parser.add_argument("--rings", action="store_true", help="arrangements with rings too")
    parser.add_argument(
        "--overlap-chunks", type=int, nargs="+", default=[1], help="into how many parts heads are cut for the exchange"
    )
    parser.add_argument(
        "--rounds", type=int, help="instead: so many kills and cancels at random moments, with the first of --gpus"
    )
    parser.add_argument(
        "--checks", action="store_true", help="instead: every kind of picture in float32 against one GPU"
    )
    parser.add_argument(
        "--window", type=float, default=1.0, help="seconds from the start of a sampling in which they happen"
    )
    parser.add_argument(
        "--weights", choices=["whole", "split"], default="whole", help="on every GPU, or split over the GPUs"
    )
    parser.add_argument("--folder", default=".", help="with split weights: where the model's file is written")
    parser.add_argument(
        "--no-one-gpu", action="store_true", help="with split weights: no step on one GPU, which is too small for it"
    )
    parser.add_argument("--small", action="store_true", help="a tiny model, to try every path")
    parser.add_argument("--json", help="file to write the result to")
    options = parser.parse_args()
    with torch.inference_mode():
        work = split_steps if options.weights == "split" else steps
        (rounds if options.rounds else checks if options.checks else work)(options)


if __name__ == "__main__":
    main()
