"""Sequence parallel in a running ComfyUI: the same latents with the node as without, cancel, a killed rank, unloading,
and nothing left at the end.

A server of its own, whose processes may be killed: CPU, float32, small models, two ranks (FLUX2_CPU_RANKS=2).
"""

import asyncio
import itertools
import json
import os
import signal
import time
import urllib.request
from pathlib import Path

import pytest
import torch

from api_workflow import PictureSettings, fill
from comfy_client import ComfyClient, ComfyError, ExecutionFailed
from comfy_server import ComfyServer
from server_fixture import run
from test_ranks import alive, kept, wait_until
from test_server import NODE, core, difference, latents, with_latents

SAME = 1e-6


@pytest.fixture(scope="module")
def own_server(comfyui, model_files):
    """A ComfyServer; at the end its process is killed, and its ranks have to be gone soon after."""
    os.environ["FLUX2_CPU_RANKS"] = "2"
    try:
        with ComfyServer(comfyui, models=model_files, arguments=["--cpu", "--force-fp32"]) as running:
            yield running
            pids = ranks_of(running)
            assert pids, "the last test leaves a rank running"
            running.process.send_signal(signal.SIGKILL)
            wait_until(lambda: not any(map(alive, pids)), 15)
    finally:
        os.environ.pop("FLUX2_CPU_RANKS")


def ranks_of(server):
    """Process ids of the ranks that a server has started."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = status.read_text()
        except OSError:
            continue
        parents[int(status.parent.name)] = int(text.rsplit(")", 1)[1].split()[1])
    return [
        pid
        for pid, parent in parents.items()
        if parent == server.process.pid and "worker.py" in Path(f"/proc/{pid}/cmdline").read_text()
    ]


def settings(model_files, **others):
    names = {folder: files[0].name for folder, files in model_files.items()}
    return PictureSettings("A red fox", models=names, **{"width": 128, "height": 96, "steps": 3, **others}), names


def sampled(server, workflow):
    """(latents, report data) of a workflow, its text report checked to be there."""
    result = run(server, with_latents(workflow, (NODE["report"], 0)))
    (report,) = result.collect("flux2_attention")
    return latents(server, result)[0], report


def test_the_flags_of_the_program_put_the_node_behind_the_speed_nodes():
    import generate

    filled = fill(
        generate.settings_from(
            generate.parse(
                [
                    "--prompt",
                    "a cat",
                    "--num-gpus",
                    "8",
                    "--ulysses-degree",
                    "8",
                    "--ring-degree",
                    "1",
                    "--enable-torch-compile",
                ]
            )
        )
    )
    assert filled["Flux2SequenceParallel"]["inputs"] == {
        "model": ["Flux2CompileBlocks", 0],
        "gpus": 8,
        "ulysses": 8,
        "ring": 1,
    }
    assert [
        node["class_type"] for node in filled.values() if ["Flux2SequenceParallel", 0] in node["inputs"].values()
    ] == ["BasicGuider", "Flux2AttentionReport"]
    for flags, gpus in (
        (["--ulysses-degree", "2", "--ring-degree", "2"], 4),
        (["--num-gpus", "0"], 0),
        ([], None),
        (["--num-gpus", "1"], None),
    ):
        filled = fill(generate.settings_from(generate.parse(["--prompt", "a cat", *flags])))
        assert filled.get("Flux2SequenceParallel", {"inputs": {"gpus": None}})["inputs"]["gpus"] == gpus


def watched(server, workflow):
    """(latents, what the page was told of progress) of a workflow."""

    async def work():
        async with ComfyClient(server.url) as client:
            return await client.run(workflow, on_progress=seen.append)

    seen = []
    return latents(server, asyncio.run(work()))[0], [(one.class_type, one.value, one.total) for one in seen]


def test_the_node_changes_no_latents(own_server, model_files):
    plain, names = settings(model_files)
    (expected,) = latents(own_server, run(own_server, core(fill(plain), names)))
    split = fill(settings(model_files, gpus=2)[0])
    ours, told = watched(own_server, with_latents(split, (NODE["report"], 0)))
    assert difference(ours, expected) < 5e-6, "the selected kernel sums in another order than core's"
    assert (
        ("SamplerCustomAdvanced", 0, 1) in told
        and ("SamplerCustomAdvanced", 1, 1) in told
        and ("SamplerCustomAdvanced", 3, 3) in told
    )
    same_kernel, _ = sampled(own_server, fill(plain))
    assert difference(ours, same_kernel) < SAME and not torch.equal(ours, same_kernel)
    ours, report = sampled(own_server, split)
    assert difference(ours, same_kernel) < SAME
    assert [one["rank"] for one in report["parallel"]["ranks"]] == [0, 1] and report["parallel"]["ulysses"] == 2
    assert len(ranks_of(own_server)) == 1


def test_a_ring_and_more_ranks_than_there_are(own_server, model_files):
    plain, _ = settings(model_files)
    expected, _ = sampled(own_server, fill(plain))
    before = ranks_of(own_server)
    ours, report = sampled(own_server, fill(settings(model_files, gpus=2, ring=2)[0]))
    assert difference(ours, expected) < SAME and report["parallel"]["ring"] == 2 and ranks_of(own_server) == before, (
        "the same processes, connected differently"
    )
    with pytest.raises(ExecutionFailed) as caught:
        run(own_server, fill(settings(model_files, gpus=7)[0]))
    assert "7 GPUs were asked for, and there is 2 ranks on the CPU" in str(
        caught.value
    ) and "Flux2SequenceParallel" in str(caught.value)


def cancelled_in_a_step(server, workflow, action):
    """(the client's error, seconds from `action` until the server was idle), with `action` a moment after the first
    step.
    """

    async def work():
        async with ComfyClient(server.url) as client:
            loop, stepped = asyncio.get_running_loop(), asyncio.Event()
            job = asyncio.ensure_future(
                client.run(
                    workflow,
                    on_progress=lambda progress: (progress.value or 0) >= 1 and progress.total == 30 and stepped.set(),
                )
            )
            await asyncio.wait({asyncio.ensure_future(stepped.wait()), job}, return_when=asyncio.FIRST_COMPLETED)
            await wait_for_sampling(server)
            begun = time.monotonic()
            await loop.run_in_executor(None, action)
            with pytest.raises(ComfyError) as caught:
                await job
            return caught.value, time.monotonic() - begun

    return asyncio.run(work())


async def wait_for_sampling(server):
    """Until the ranks are computing the step after the one that was reported: one of these sizes takes most of a
    second.
    """
    await asyncio.sleep(0.3)


def post(server, path, content=None):
    request = urllib.request.Request(
        server.url + path, json.dumps(content or {}).encode(), {"Content-Type": "application/json"}
    )
    urllib.request.urlopen(request, timeout=10).close()


def test_cancel_and_kill_in_a_step_and_the_prompt_after_it(own_server, model_files):
    small, large = (
        fill(settings(model_files, gpus=2, **size)[0]) for size in ({}, {"width": 768, "height": 768, "steps": 30})
    )
    sampled(own_server, small)
    seeds = itertools.count(600)

    def cancelled():
        before, seed = ranks_of(own_server), next(seeds)
        error, seconds = cancelled_in_a_step(own_server, large, lambda: post(own_server, "/interrupt"))
        assert "cancel" in str(error).lower() or "interrupt" in str(error).lower()
        assert difference(again(own_server, model_files, seed, gpus=2), again(own_server, model_files, seed)) < SAME
        return seconds < 2 and ranks_of(own_server) == before

    assert kept(cancelled)
    before = ranks_of(own_server)
    error, seconds = cancelled_in_a_step(own_server, large, lambda: os.kill(ranks_of(own_server)[0], signal.SIGKILL))
    assert "Rank 1" in str(error) and "SIGKILL" in str(error) and seconds < 10
    assert difference(again(own_server, model_files, 7, gpus=2), again(own_server, model_files, 7)) < SAME and ranks_of(
        own_server
    ) not in ([], before)


def again(server, model_files, seed, **others):
    """Latents of a seed that was not drawn before: ComfyUI would answer from its cache."""
    return sampled(server, fill(settings(model_files, seed=seed, **others)[0]))[0]


def test_unloading_in_comfyui_frees_the_ranks(own_server, model_files):
    again(own_server, model_files, 8, gpus=2)
    before = ranks_of(own_server)
    asked = itertools.count()

    def dropped():
        """Ask again every two seconds: ComfyUI 0.30 sleeps through a request that comes while it collects garbage
        after a prompt.
        """
        if next(asked) % 40 == 0:
            post(own_server, "/free", {"unload_models": True})
        return "1 other ranks drop theirs" in own_server.log_tail(40)

    wait_until(dropped, 30)
    assert (
        difference(again(own_server, model_files, 9, gpus=2), again(own_server, model_files, 9)) < SAME
        and ranks_of(own_server) == before
    )
