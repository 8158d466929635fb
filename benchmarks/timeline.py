"""Where the time of a klein picture goes, on the host and on the GPU: encoding, each step, between the steps, decoding.

  COMFYUI_PATH=... python benchmarks/timeline.py [--case klein-9b] [--peers core ours] [--json FILE] [--traces FOLDER]

Models, peers and nodes are those of benchmarks/klein.py. After pictures that warm up, torch.profiler records one. A
stage is a stretch of host time: before the first forward pass of the model and behind the last one (noise, sigmas,
loading, the latent's way back), each forward pass, and between two of them (sampler, callback, preview). Of each:

  host ms      its length on the host
  waits ms     what of it the host spent in calls of CUDA that wait for the GPU
  launches     kernels, copies and fills that it started
  GPU ms       how long the GPU was busy with those, overlaps counted once
  GPU idle ms  from the first of them beginning to the last one's end, the GPU was not busy with any of the picture

The host runs ahead of the GPU: where waits are 0 and the GPU has no idle time, host time costs nothing. The profiler
costs host time itself: `picture` is without it, profiled_ms with it. --small tries it on a CPU, where there are no GPU
times.
"""

import argparse
import json
import os
from pathlib import Path
import tempfile

import torch

import klein
from common import save, summary

BETWEEN = "between steps {} and {}"
WAITS = ("Synchronize", "cudaMemcpy", "EventQuery")  # names of calls that wait; asynchronous copies are Memcpy...Async
DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of a trace's events
RUNTIME = ("cuda_runtime", "cuda_driver", "hip_runtime")


# --- a picture, with marks -------------------------------------------------------------------------------------------


def marked(nodes):
    """The Nodes with a mark around each forward pass, in what torch.profiler records."""
    from comfy.patcher_extension import WrappersMP

    count = []

    def wrapper(executor, *args, **kwargs):
        count.append(1)
        with torch.profiler.record_function(f"step {len(count)}"):
            return executor(*args, **kwargs)

    nodes.model = nodes.model.clone()
    nodes.model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "timeline", wrapper)
    return nodes, count


def picture(nodes):
    """One picture, its three parts marked, the GPU included."""
    mark = torch.profiler.record_function
    with mark("encode"):
        positive = nodes.encode()
    with mark("sample"):
        latent = nodes.sample(positive)
    with mark("decode"):
        return nodes.decode(latent)


def recorded(nodes, count, file):
    """The events of one picture, as torch.profiler writes them to a trace."""
    kinds = torch.profiler.ProfilerActivity
    count.clear()
    klein.synchronise()
    with torch.profiler.profile(
        activities=[kinds.CPU, *([kinds.CUDA] if torch.cuda.is_available() else [])]
    ) as profile:
        picture(nodes)
        klein.synchronise()
    profile.export_chrome_trace(str(file))
    return json.loads(Path(file).read_text())["traceEvents"]


# --- what the events say ---------------------------------------------------------------------------------------------


def stages(events):
    """[(name, start, end)] in microseconds of the trace, in the order of time."""
    spans = {
        event["name"]: (event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("cat") == "user_annotation" and "dur" in event
    }
    steps = sorted((start, end, name) for name, (start, end) in spans.items() if name.startswith("step "))
    begin, finish = spans["sample"]
    found = [("encode", *spans["encode"]), ("before the first step", begin, steps[0][0] if steps else finish)]
    for number, (start, end, name) in enumerate(steps):
        found.append((name, start, end))
        last = number == len(steps) - 1
        behind = "behind the last step" if last else BETWEEN.format(number + 1, number + 2)
        found.append((behind, end, finish if last else steps[number + 1][0]))
    return [*found, ("decode", *spans["decode"])]


def waits(event):
    """Whether a call of CUDA's runtime or driver is one that waits for the GPU."""
    name = event["name"]
    return "Async" not in name and any(word in name for word in WAITS)


def union_of(intervals):
    """[(start, end)] without overlaps, in order."""
    found = []
    for start, end in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return found


def rows_of(events):
    """[{stage, host_ms, waits_ms, launches, gpu_ms, gpu_idle_ms}] of a recorded picture."""
    calls = [event for event in events if event.get("cat") in RUNTIME and "dur" in event]
    device = [event for event in events if event.get("cat") in DEVICE and "dur" in event]
    launched = {event["args"]["correlation"]: event["ts"] for event in calls if "correlation" in event.get("args", {})}
    busy = union_of((event["ts"], event["ts"] + event["dur"]) for event in device)
    rows = []
    for name, start, end in stages(events):
        mine = [
            (event["ts"], event["ts"] + event["dur"])
            for event in device
            if start <= launched.get(event["args"].get("correlation"), -1) < end
        ]
        idle = None
        if mine:
            first, last = min(mine)[0], max(stop for _, stop in mine)
            idle = last - first - sum(max(0, min(stop, last) - max(begin, first)) for begin, stop in busy)
        waited = sum(event["dur"] for event in calls if start <= event["ts"] < end and waits(event))
        of_gpu = sum(stop - begin for begin, stop in union_of(mine))
        rows.append(
            {
                "stage": name,
                "host_ms": round((end - start) / 1e3, 3),
                "waits_ms": round(waited / 1e3, 3) if device else None,
                "launches": len(mine) if device else None,
                "gpu_ms": round(of_gpu / 1e3, 3) if device else None,
                "gpu_idle_ms": round(idle / 1e3, 3) if mine else None,
            }
        )
    return rows


def measure(peer, world, options):
    """One peer's row of the result; what it raises is its reason."""
    row = {"peer": peer}
    try:
        nodes, count = marked(klein.make(peer, world))
        for _ in range(options.warm_up):
            picture(nodes)
        row |= {"picture": summary([klein.wall_ms(lambda: picture(nodes)) for _ in range(options.rounds)])}
        with tempfile.TemporaryDirectory() as folder:
            file = Path(options.traces or folder, f"{options.case}-{peer}.json")
            file.parent.mkdir(parents=True, exist_ok=True)
            events = recorded(nodes, count, file)
        row["stages"] = rows_of(events)
        row["profiled_ms"] = round(sum(stage["host_ms"] for stage in row["stages"]), 3)
    except Exception as error:
        row["reason"] = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
    return row


# --- the run ---------------------------------------------------------------------------------------------------------

HEADER = f"{'stage':<26}{'host ms':>10}{'waits ms':>10}{'launches':>10}{'GPU ms':>10}{'GPU idle ms':>13}"


def table(rows):
    """The peers' timelines as text."""
    lines = []
    for row in rows:
        if "reason" in row:
            lines.append(f"{row['peer']}: not run. {row['reason']}")
            continue
        lines += [
            f"{row['peer']}: a picture {row['picture']['ms']:.1f} ms, {row['profiled_ms']:.1f} while recorded",
            HEADER,
        ]
        for stage in row["stages"]:
            values = (stage[name] for name in ("waits_ms", "launches", "gpu_ms", "gpu_idle_ms"))
            waited, launches, gpu, idle = ("" if value is None else value for value in values)
            lines.append(f"{stage['stage']:<26}{stage['host_ms']:>10.3f}{waited:>10}{launches:>10}{gpu:>10}{idle:>13}")
    return "\n".join(lines)


def parse(arguments=None):
    known = [peer for peer in klein.peers.ALL if peer not in klein.peers.DIFFUSERS]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--case", choices=klein.CASES, default="klein-9b")
    parser.add_argument("--peers", nargs="+", choices=known, default=["core", "ours"])
    parser.add_argument("--pixels", type=int, help=f"height and width of the picture (default {klein.PIXELS})")
    parser.add_argument("--attention", default="auto", help="what core-attention and ours select (default auto)")
    parser.add_argument("--compiler", default="inductor", help="torch.compile backend (default inductor)")
    parser.add_argument("--rounds", type=int, default=5, help="timed pictures without the profiler (default 5)")
    parser.add_argument("--warm-up", type=int, default=2, help="pictures before that (default 2)")
    parser.add_argument("--small", action="store_true", help="small models and pictures: to try it, not to measure")
    parser.add_argument("--traces", help="folder for the traces of torch.profiler, one of each peer")
    parser.add_argument("--json", help="file to write the result to")
    return parser.parse_args(arguments)


def main():
    options = parse()
    klein.import_comfyui()
    import comfy.utils
    import folder_paths

    comfy.utils.set_progress_bar_enabled(False)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        folder_paths.set_user_directory(folder)  # auto's measurements are made anew
        world = klein.world_of(options.case, options)
        world.pixels = options.pixels or world.pixels
        rows = [measure(peer, world, options) for peer in options.peers]
    result = save({"case": options.case, "pixels": world.pixels, "steps": klein.STEPS, "rows": rows}, options.json)
    print(table(rows))
    print(json.dumps(result), flush=True)
    os._exit(0) if torch.cuda.is_available() else None


if __name__ == "__main__":
    main()
