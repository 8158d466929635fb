"""Several ranks as processes on the CPU: same latents as one process, and what a user sees when something goes wrong.

  bash scripts/test.sh tests/test_ranks.py             FLUX2_ROUNDS=50 for the long version of the kills and cancels (3
                                                       otherwise)

Rank 0 is this process, as it is ComfyUI's in real life; ranks 1 and up are started from
flux2/parallel/workers/worker.py and talk gloo. One session of two ranks serves most tests. The mathematics of more
ranks is test_split.py's. Not covered: NCCL, GPU memory (benchmarks/parallel.py). A second host: torchrun on this one
here, a network between two in test_two_hosts.py. That a killed rank 0 leaves nothing: test_parallel_server.py.
"""

import contextlib
import ctypes
import gc
import itertools
import json
import os
from pathlib import Path
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from pack import ROOT

SAME = 1e-6  # relative, float32
ROUNDS = int(os.environ.get("FLUX2_ROUNDS", "3"))
LARGE = {"size": (44, 44), "steps": 3}  # a step takes long enough to be in the middle of it


@pytest.fixture(scope="module")
def tools(comfy):
    """ComfyUI's modules and ours, imported once the CPU is chosen."""
    import comfy.lora
    import comfy.model_management
    import comfy.sample
    import comfy.samplers
    import comfy.sd
    import comfy_extras.nodes_easycache
    import comfy_extras.nodes_flux
    import comfy.utils
    from flux2_pack.flux2.loading import load
    from flux2_pack.flux2.parallel.workers import (
        ahead,
        answers,
        patch_transfer,
        pool,
        versions,
        session,
        launch,
        devices,
        channel,
        replica,
        report,
        serialize,
        install,
    )
    from flux2_pack.flux2 import attention_slot
    from flux2_pack.nodes import attention, parallel

    return SimpleNamespace(**locals(), management=sys.modules["comfy.model_management"], core=sys.modules["comfy"])


@pytest.fixture(autouse=True)
def what_is_edited_while_the_tests_run(tools):
    """Is no other version: workers read the files of this moment, this process read them long ago."""
    tools.versions.IMPORTED = time.time()
    tools.versions.running_digest.cache_clear()


@pytest.fixture(scope="module")
def model(tools, small_models):
    return tools.load.load_model(str(small_models["model"]))


@contextlib.contextmanager
def ranks_on_cpu(number):
    before, os.environ["FLUX2_CPU_RANKS"] = os.environ.get("FLUX2_CPU_RANKS"), str(number)
    try:
        yield
    finally:
        os.environ.pop("FLUX2_CPU_RANKS") if before is None else os.environ.update(FLUX2_CPU_RANKS=before)


@pytest.fixture(scope="module")
def two(tools, model):
    """The model on two ranks. Every process is gone afterwards."""
    with ranks_on_cpu(2):
        yield tools.parallel.parallel(model)
        session = tools.session.existing(model.model)
        pids = [worker.pid for worker in session.pool.workers]
        session.stop()
        assert not any(alive(pid) for pid in pids)


@pytest.fixture
def session(tools, two):
    """The ParallelSession behind `two`, whose seven lives the tests may take."""
    return tools.session.existing(two.model)


def alive(pid):
    """Whether a process runs; a zombie does not."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def sample(
    tools,
    model,
    *,
    steps=2,
    seed=1,
    size=(6, 8),
    batch=1,
    references=(),
    method=None,
    cfg=1.0,
    sampler="euler",
    text=40,
    negative=None,
    callback=None,
):
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(shape, generator=generator)

    extra = {"guidance": 4.0}
    if references:
        extra["reference_latents"] = [noise(1, 128, *one) for one in references]
    if method:
        extra["reference_latents_method"] = method
    start, conds = noise(batch, 128, *size), [[[noise(1, tokens, 192), extra]] for tokens in (text, negative or text)]
    with torch.inference_mode():
        return tools.core.sample.sample(
            model,
            start,
            steps,
            cfg,
            sampler,
            "simple",
            *conds,
            torch.zeros_like(start),
            disable_pbar=True,
            seed=seed,
            callback=callback,
        )


def difference(ours, expected):
    return ((ours - expected).norm() / expected.norm()).item()


def lora(tools, model, strength, rank=4, seed=5):
    """The model with a LoRA on qkv of a double block and on a fused layer of a single block, as Load LoRA does it."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, weight in (
        (name, getattr(model.model, "diffusion_model").get_parameter(f"{name}.weight"))
        for name in ("double_blocks.0.img_attn.qkv", "single_blocks.3.linear1", "final_layer.linear")
    ):
        state[f"diffusion_model.{name}.lora_up.weight"] = (
            torch.randn((weight.shape[0], rank), generator=generator) * 0.05
        )
        state[f"diffusion_model.{name}.lora_down.weight"] = (
            torch.randn((rank, weight.shape[1]), generator=generator) * 0.05
        )
    patched = tools.core.sd.load_lora_for_models(model, None, LORAS.setdefault((seed, rank), state), strength, 0)[0]
    assert len(patched.patches) == 3
    return patched


def our_lora(tools, model):
    """Load FLUX.2 LoRA on q, k and v apart, with DoRA: rows of a joined weight and lengths of their own."""
    from flux2_pack.flux2.lora import load

    import small_models as files

    generator, tensors = torch.Generator().manual_seed(9), {}
    for name in ("transformer_blocks.0.attn.to_k", "transformer_blocks.1.attn.to_out.0"):
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn((4, 256), generator=generator) * 0.1
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn((256, 4), generator=generator) * 0.1
        tensors[f"base_model.model.{name}.lora_magnitude_vector"] = torch.rand(256, generator=generator) + 0.5
    with tempfile.TemporaryDirectory() as folder:
        return load.apply(model, None, files.write(Path(folder) / "lora.safetensors", tensors), 0.8)[0]


LORAS = {}  # the node keeps the file's tensors: a change of strength has the same ones


# --- same latents
# --------------------------------------------------------------------------------------------------------

CASES = {
    "text to image": {},
    "one reference": {"references": [(4, 5)]},
    "two references, batch 2, odd sizes": {"references": [(4, 5), (7, 3)], "batch": 2, "size": (5, 7), "text": 33},
    "references at timestep zero": {"references": [(4, 5)], "method": "index_timestep_zero"},
    "two prompts, another sampler": {"cfg": 3.0, "sampler": "dpmpp_2m"},
}


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_give_the_latents_of_one(tools, model, two, case):
    assert difference(sample(tools, two, **CASES[case]), sample(tools, model, **CASES[case])) < SAME


def kv_cached(tools, model):
    return tools.comfy_extras.nodes_flux.FluxKVCache.execute(model).args[0]


def kv_cached_beside_an_option_that_changes(tools, model):
    """Another pack's function around the model numbers the passes."""
    cached, numbers = kv_cached(tools, model), itertools.count()

    def numbered(apply_model, given):
        options = {**given["c"]["transformer_options"], "somebodys_number": next(numbers)}
        return apply_model(given["input"], given["timestep"], **{**given["c"], "transformer_options": options})

    cached.set_model_unet_function_wrapper(numbered)
    return cached


def easy_cached(tools, model):
    """EasyCache that skips half of the steps."""
    return tools.comfy_extras.nodes_easycache.EasyCacheNode.execute(model, 3.0, 0.0, 1.0, False).args[0]


def selected(tools, model, **options):
    return tools.attention.Flux2SelectAttention.execute(model, "sdpa-math", **options).args[0]


@pytest.mark.parametrize("before", [True, False], ids=["before the node", "behind the node"])
@pytest.mark.parametrize(
    "patch, case, effect",
    [
        (lambda tools, model: lora(tools, model, 0.7), {}, 1e-3),
        (our_lora, {}, 1e-3),
        (kv_cached, {"references": [(4, 5)], "steps": 3}, 1e-4),
        (kv_cached, {"references": [(4, 5)], "steps": 3, "cfg": 3.0, "negative": 600}, 1e-4),
        (kv_cached_beside_an_option_that_changes, {"references": [(4, 5)], "steps": 3}, 1e-4),
        (easy_cached, {"steps": 6}, 1e-3),
        (selected, {}, 0),
        (
            lambda tools, model: selected(tools, model, edge_backend="sdpa-flash", first_steps=1, last_blocks=2),
            {"steps": 3},
            0,
        ),
    ],
    ids=[
        "LoRA",
        "Load FLUX.2 LoRA",
        "Flux KV Cache",
        "Flux KV Cache, prompts one by one",
        "Flux KV Cache, a changing option",
        "EasyCache",
        "Select Attention",
        "a precision schedule",
    ],
)
def test_what_is_on_the_model_works_with_two_ranks(tools, model, two, patch, case, effect, before):
    """effect: how far it moves the latents on one rank, so that a rank without it would show."""
    expected = sample(tools, patch(tools, model), **case)
    assert difference(expected, sample(tools, model, **case)) >= effect
    with ranks_on_cpu(2):
        ours = tools.parallel.parallel(patch(tools, model)) if before else patch(tools, two)
    assert difference(sample(tools, ours, **case), expected) < SAME
    assert difference(sample(tools, ours, **case), expected) < SAME, "a second sampling starts afresh"


def test_our_other_nodes_are_carried_too(tools, model, monkeypatch):
    """Their kernels need a GPU or a compiler; what a rank is told, and what it makes of that, does not."""
    from flux2_pack.flux2.compiled import blocks as compiled_blocks
    from flux2_pack.flux2.fused import blocks as fused_blocks, fp8_rowwise

    there = model.clone()
    fused_blocks.install(there, fp8_rowwise.RowwiseFp8())
    compiled_blocks.install(there, compiled_blocks.CompilePlan("max-autotune-no-cudagraphs", compiled_blocks.EAGER))
    options = {
        **there.model_options["transformer_options"],
        "wrappers": there.wrappers,
        "rope_options": {"scale_x": 1.5},
    }
    specs = json.loads(json.dumps(tools.patch_transfer.encode_patches(there, options)))
    assert [name for name, _ in specs] == ["options", "Fast Blocks (FLUX.2)", "Compile Blocks (FLUX)"]
    assert specs[1][1] == {"fp8": True}
    with pytest.raises(tools.patch_transfer.Refused, match="cannot use fp8 on this GPU"):
        tools.patch_transfer.apply_patches(model, specs)
    monkeypatch.setattr(fp8_rowwise, "unavailable_for", lambda model: None)
    replica = tools.patch_transfer.apply_patches(model, specs)
    assert fused_blocks.fusing_of(replica).fp8.copies == {} and fused_blocks.fusing_of(model) is None
    fused_blocks.install(there)
    plain = tools.patch_transfer.encode_patches(there, {**options, "wrappers": there.wrappers})
    assert plain[1][1] == {"fp8": False}
    assert fused_blocks.fusing_of(tools.patch_transfer.apply_patches(model, plain)).fp8 is None
    plan = compiled_blocks.plan_of(replica)
    assert (plan.mode, plan.on_failure) == (
        "max-autotune-no-cudagraphs",
        compiled_blocks.EAGER,
    ) and replica.model_options["transformer_options"]["rope_options"] == {"scale_x": 1.5}


def test_the_report_says_what_every_rank_did(tools, two):
    chosen = selected(tools, two)
    sample(tools, chosen, steps=3)
    text, data = tools.report.report(chosen)
    assert tools.report.report(chosen.parent.parent) == (None, None)
    assert [(one["rank"], one["tokens"], one["forwards"]) for one in data["ranks"]] == [(0, 280, 3), (1, 280, 3)], (
        "48 of the picture and 512 of the text"
    )
    assert all(
        one["collective_seconds"] > 0 and one["compute_seconds"] > 0 and one["sent_bytes"] > 0 for one in data["ranks"]
    )
    assert data["ranks"][1]["attention"] == {"sdpa-math": 18} and data["seconds_to_start"]["ready"] > 0
    assert "Ulysses 2 x ring 1" in text and "rank 1 on this machine's CPU" in text and "560" not in text
    full = tools.attention.Flux2AttentionReport.execute(chosen, {"samples": sample(tools, chosen)})
    assert "Sequence parallel: 2 ranks" in full.args[1] and full.ui["flux2_attention"][0]["parallel"]["ulysses"] == 2


# --- one state, one kernel, the same weights
# -------------------------------------------------------------------------------


def test_a_session_has_one_state_and_changes_it_along_its_table(tools, two, session, monkeypatch):
    State, seen, become = tools.session.State, [], tools.session.ParallelSession._become
    assert set(tools.session.TRANSITIONS) == set(State)
    session.stop()
    assert session.state is State.STOPPED

    def watched(self, new, *only_from):
        changed = become(self, new, *only_from)
        if changed:
            seen.append(new)
        return changed

    monkeypatch.setattr(tools.session.ParallelSession, "_become", watched)
    sample(tools, two, callback=lambda step, *_: seen.append(session.state) if step == 1 else None)
    assert seen == [State.STARTING, State.SAMPLING, State.SAMPLING, State.READY] and session.state is State.READY
    tools.management.unload_all_models()
    wait_until(lambda: session.state is State.DRAINING, 30)
    session.prepare(two)
    wait_until(lambda: session.state is State.LOADING, 30)
    with pytest.raises(RuntimeError, match="that is loading cannot become starting"):
        session._become(State.STARTING)
    session.load(two), session.ready(two)
    assert session.state is State.READY
    session.stop()
    assert session.state is State.STOPPED and seen[4:] == [State.DRAINING, State.LOADING, State.READY, State.STOPPED]


def test_a_node_lets_the_ranks_load_before_the_sampler_asks(tools, small_models):
    """While the text encoder runs. Nothing is left of them when no sampler comes."""
    fresh = tools.load.load_model(str(small_models["model"]))
    with ranks_on_cpu(2):
        ours = tools.parallel.parallel(fresh)
    session = tools.session.existing(fresh.model)
    try:
        wait_until(lambda: session.pool.workers and "load" in session.pool.workers[0].done, 60)
        assert session.state is tools.session.State.LOADING
        asked, ask = [], session.pool.ask
        session.pool.ask = lambda what, *rest, **content: asked.append(what) or ask(what, *rest, **content)
        sample(tools, ours, steps=1)
        assert "load" not in asked and "forward" in asked
    finally:
        session.stop()


def test_processes_start_before_the_prompts_first_node_and_are_taken_by_its_model(tools, small_models, two, session):
    """ComfyUI asks every node for a fingerprint before it runs the first."""
    session.stop()  # else there are such processes
    node = tools.parallel.Flux2SequenceParallel
    with ranks_on_cpu(2):
        assert node.fingerprint_inputs(gpus=1) == node.fingerprint_inputs(gpus=None) == "" and not tools.ahead.waiting
        assert node.fingerprint_inputs(gpus=2) == node.fingerprint_inputs(gpus=0) == ""
        (pool,) = tools.ahead.waiting
        wait_until(lambda: pool.workers and "configure" in pool.workers[0].done, 60)
        fresh = tools.load.load_model(str(small_models["model"]))
        ours = tools.parallel.parallel(fresh)
        new = tools.session.existing(fresh.model)
        assert new.pool is pool and not tools.ahead.waiting
        assert node.fingerprint_inputs(gpus=2) == "" and not tools.ahead.waiting, "a session has such processes"
    try:
        assert difference(sample(tools, ours, steps=1), sample(tools, fresh, steps=1)) < SAME
    finally:
        new.stop()
    assert not any(alive(worker.pid) for worker in pool.workers)


def test_processes_that_no_model_takes_end(tools, two, session, monkeypatch):
    session.stop()
    monkeypatch.setattr(tools.ahead, "PREPARED_S", 1)
    with ranks_on_cpu(2):
        tools.install.start_ahead(2)
    (pool,) = tools.ahead.waiting
    wait_until(lambda: not pool.started and pool.workers and not alive(pool.workers[0].pid), 60)


def test_ranks_that_no_sampler_comes_for_end(tools, small_models, monkeypatch):
    monkeypatch.setattr(tools.ahead, "PREPARED_S", 1)
    fresh = tools.load.load_model(str(small_models["model"]))
    with ranks_on_cpu(2):
        tools.parallel.parallel(fresh)
    session = tools.session.existing(fresh.model)
    wait_until(lambda: session.state is tools.session.State.STOPPED, 60)
    wait_until(lambda: not any(alive(worker.pid) for worker in session.pool.workers), 10)


def test_a_single_pass_whose_start_fails_leaves_the_ranks_to_others(tools, model, two, session, expected, monkeypatch):
    """A pack that calls the model itself, or a benchmark: no sampler is there to put things right."""
    sample(tools, two)
    with monkeypatch.context() as patch, pytest.raises(tools.pool.RanksFailed, match="no room"):

        def refuse(self, size):
            raise tools.pool.RanksFailed("no room")

        patch.setattr(tools.session.ParallelSession, "_make_room", refuse)
        session.drop(wait=True)
        session.load(two)
    assert session.state in (tools.session.State.DRAINING, tools.session.State.STARTING)
    with pytest.raises(tools.pool.RanksFailed, match="have no model"):
        session.ready(two)
    assert difference(sample(tools, two), expected) < SAME


def test_every_rank_takes_the_kernel_that_auto_takes_on_rank_0(tools, two, monkeypatch):
    """Another one than it would take itself."""
    from flux2_pack.attention import autotune, dispatch

    class Ours(autotune.Tuner):
        def _decide(self, call, *tensors):
            return autotune.AutoChoice(str(call), str(call.device), "sdpa-math", "measured", []), True

    monkeypatch.setattr(dispatch, "_default_tuner", Ours())
    chosen = two.clone()
    tools.attention_slot.select(chosen, dispatch.AttentionDispatcher("auto"))
    sample(tools, chosen)
    assert tools.report.report(chosen)[1]["ranks"][1]["attention"] == {"sdpa-math": 12}
    monkeypatch.setattr(dispatch, "_default_tuner", autotune.Tuner())
    again = two.clone()
    tools.attention_slot.select(again, dispatch.AttentionDispatcher("auto", unsupported="use SDPA and report"))
    sample(tools, again)
    assert tools.report.report(again)[1]["ranks"][1]["attention"] == {"sdpa": 12}


def test_a_kernel_that_a_rank_cannot_run_is_refused_by_its_name(tools):
    from flux2_pack.attention import registry
    from flux2_pack.attention.call import AttentionRefused
    from flux2_pack.attention.dispatch import AttentionDispatcher
    from flux2_pack.flux2.parallel.workers.kernel_choice import FollowingTuner

    q = torch.zeros(1, 4, 2, 16)
    following = AttentionDispatcher("auto", tuner=FollowingTuner(lambda request: "flash4"))
    with pytest.raises(AttentionRefused, match="flash4"):
        following.attend(q, q, q)
    assert registry.AUTO not in registry.ROWS


def test_a_cancel_is_heard_by_a_rank_that_waits_for_the_choice_of_rank_0(tools, two, session, expected, monkeypatch):
    from flux2_pack.attention import autotune, dispatch

    class Slow(autotune.Tuner):
        def _decide(self, call, *tensors):
            tools.management.interrupt_current_processing(True)
            tools.management.throw_exception_if_processing_interrupted()

    sample(tools, two)
    pids = [worker.pid for worker in session.pool.workers]
    chosen = two.clone()
    tools.attention_slot.select(chosen, dispatch.AttentionDispatcher("auto"))
    with monkeypatch.context() as patch, pytest.raises(tools.management.InterruptProcessingException):
        patch.setattr(dispatch, "_default_tuner", Slow())
        sample(tools, chosen)
    assert difference(sample(tools, two), expected) < SAME and [worker.pid for worker in session.pool.workers] == pids


def test_a_file_that_was_replaced_on_disk_is_refused_by_name(tools, small_models, tmp_path):
    """Rank 0 has read the old one."""
    path = tmp_path / "model.safetensors"
    shutil.copyfile(small_models["model"], path)
    fresh = tools.load.load_model(str(path))
    import safetensors.torch

    tensors = safetensors.torch.load_file(path)
    tensors = {name: tensor * 2 if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    safetensors.torch.save_file(tensors, tmp_path / "other.safetensors", metadata={"format": "pt"})
    os.replace(tmp_path / "other.safetensors", path)
    with ranks_on_cpu(2):
        ours = tools.parallel.parallel(fresh)
    try:
        with pytest.raises(
            tools.pool.RanksFailed, match="Rank 1 .* loaded other weights than rank 0 from .*model.safetensors"
        ):
            sample(tools, ours)
    finally:
        tools.session.existing(fresh.model).stop()


@pytest.mark.parametrize("strength", [0.0, 0.7])
def test_the_digest_of_weights_is_that_of_the_file_whatever_lora_rank_0_has(tools, model, strength):
    plain = tools.replica.digest_of(model)
    patched = lora(tools, model, strength)
    sample(tools, patched, steps=1)
    assert tools.replica.digest_of(patched) == tools.replica.digest_of(model) == plain


def test_a_rank_that_stops_answering_is_named(tools, two, session, expected, monkeypatch):
    """It runs and says nothing: stopped, as by a debugger or a machine that swaps."""
    assert tools.pool.SILENCE < 60
    sample(tools, two)
    monkeypatch.setattr(tools.pool, "SILENCE", 8)
    pid = session.pool.workers[0].pid
    error, seconds = interrupted(tools, two, session, lambda: os.kill(pid, signal.SIGSTOP))
    assert isinstance(error, tools.pool.RanksFailed) and "Rank 1 (this machine's CPU" in str(error)
    assert "has not answered for 8 seconds" in str(error) and seconds < 25 and not alive(pid)
    assert difference(sample(tools, two), expected) < SAME


def test_what_ends_slowly_has_ended_before_the_process_does(comfy, tmp_path):
    """A thread that is inside NCCL while the interpreter is torn down ends the process with an abort."""
    script = f"""
import sys, time
sys.path[:0] = [{str(ROOT / "tests")!r}, {comfy!r}]
import pack, comfy.options
comfy.options.enable_args_parsing(False)
from comfy.cli_args import args
args.cpu = True
from flux2_pack.flux2.parallel.workers import process_groups, session
from flux2_pack.flux2.parallel.workers.pool import ParallelPlan
session.ParallelSession(ParallelPlan(2, 1, "cpu", (None, None)), "cpu")

class Slow:
    def __del__(self):
        time.sleep(1)
        open({str(tmp_path / "ended")!r}, "w").close()

groups = process_groups.ProcessGroups(process_groups.RankZeroStore(None), "prefix", 0, "cpu")
groups._made.append((None, Slow()))
groups.end()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and (tmp_path / "ended").exists(), done.stderr[-3000:]


# --- what changes nothing, and what is not sent again
# ----------------------------------------------------------------------


def test_one_gpu_changes_nothing(tools, model, monkeypatch):
    monkeypatch.delenv("FLUX2_CPU_RANKS", raising=False)
    assert tools.parallel.parallel(model, 1) is model
    assert tools.parallel.parallel(model, 0) is model, "all of this machine is the CPU"


def test_the_model_without_the_node_stays_on_one_rank(tools, model, two, session):
    sample(tools, two)
    passes = session.pool._number
    sample(tools, model)
    assert session.pool._number == passes and tools.install.KEY not in model.model_options["transformer_options"]
    assert "forward_orig" not in vars(model.model.diffusion_model)


def test_a_new_lora_strength_sends_numbers_and_no_weights(tools, two, session, monkeypatch):
    sample(tools, lora(tools, two, 0.7))
    asked, ask = [], session.pool.ask
    monkeypatch.setattr(
        session.pool,
        "ask",
        lambda what, tensors=(), **rest: asked.append((what, len(tensors))) or ask(what, tensors, **rest),
    )
    sample(tools, lora(tools, two, 0.3), steps=1)
    sample(tools, two, steps=1)
    sample(tools, selected(tools, two), steps=1)
    assert [entry for entry in asked if entry[0] not in ("forward", "finish")] == [
        ("weights", 0),
        ("weights", 0),
        ("options", 0),
    ]


def damaged(pool, what, **content):
    """A WorkerPool.ask that damages one kind of message, so that every rank answers it with an error."""
    ask = pool.ask
    return lambda asked, tensors=(), **rest: ask(asked, tensors, **{**rest, **(content if asked == what else {})})


def test_what_one_rank_could_not_take_over_is_sent_again(tools, model, two, session, monkeypatch):
    """Others may have taken it over, so it is not known what any of them has."""
    expected, ours = (
        (sample(tools, lora(tools, model, 0.7)), sample(tools, selected(tools, model))),
        lora(tools, two, 0.7),
    )
    sample(tools, ours)
    pids = [worker.pid for worker in session.pool.workers]
    with (
        monkeypatch.context() as patch,
        pytest.raises(tools.pool.RanksFailed, match="could not take over the LoRA weights"),
    ):
        patch.setattr(session.pool, "ask", damaged(session.pool, "weights", patches={"nothing.weight": []}))
        sample(tools, lora(tools, two, 0.7, seed=6))
    assert difference(sample(tools, ours), expected[0]) < SAME
    with (
        monkeypatch.context() as patch,
        pytest.raises(tools.pool.RanksFailed, match="could not take over the LoRA weights"),
    ):
        patch.setattr(session.pool, "ask", damaged(session.pool, "weights", patches={"nothing.weight": []}))
        sample(tools, lora(tools, two, 0.7, seed=6))
    assert difference(sample(tools, selected(tools, two)), expected[1]) < SAME, "no LoRA has to be said too"
    with (
        monkeypatch.context() as patch,
        pytest.raises(
            tools.pool.RanksFailed, match="could not take over the model's options: This worker does not know 'x'"
        ),
    ):
        patch.setattr(session.pool, "ask", damaged(session.pool, "options", specs=[["x", {}]]))
        sample(tools, two)
    asked, ask = [], session.pool.ask
    monkeypatch.setattr(
        session.pool, "ask", lambda what, *rest, **content: asked.append(what) or ask(what, *rest, **content)
    )
    assert difference(sample(tools, selected(tools, two)), expected[1]) < SAME and "options" in asked
    assert [worker.pid for worker in session.pool.workers] == pids


def test_host_memory_holds_no_copy_of_a_mapped_file(tools, tmp_path):
    import small_models as files

    made = {name: tensor.float() for name, tensor in files.diffusion_model(hidden=512).items()}
    path = files.write(tmp_path / "float32.safetensors", made)
    size = path.stat().st_size
    source = tools.replica.source_of(
        SimpleNamespace(cached_patcher_init=(tools.load.load_model, (str(path), "as stored", "auto")))
    )
    before, patcher = anonymous(), tools.core.model_patcher.CoreModelPatcher
    try:
        replica = tools.replica.Replica(source, "cpu")
    finally:
        tools.core.model_patcher.CoreModelPatcher = patcher
    assert replica.bytes > 0.99 * size > 100e6 and anonymous() - before < 0.1 * size
    name = "diffusion_model.single_blocks.0.linear1.weight"
    change = torch.ones_like(replica.originals[name])
    first = None
    for factor in (1.0, 0.5, 0.25):
        data, tensors = tools.replica.weights_of(
            SimpleNamespace(patches={name: [(factor, ("diff", (change,)), 1.0, None, None)]})
        )
        assert replica.set_weights(data, tensors) == 1
        assert torch.allclose(
            tools.core.utils.get_attr(replica.model.model, name), made["single_blocks.0.linear1.weight"] + factor
        )
        first = anonymous() if first is None else first
    assert replica.set_weights({}, []) == 0 and torch.equal(
        tools.core.utils.get_attr(replica.model.model, name), made["single_blocks.0.linear1.weight"]
    )
    assert anonymous() - first < 0.3 * size


@pytest.mark.parametrize(
    "loader, arguments",
    [
        ("ours", ("as stored", "CPU when idle")),
        ("ours", ("bf16",)),
        ("ours", ("fp8",)),
        ("core's", ({},)),
        ("core's", ({"dtype": torch.bfloat16},)),
    ],
)
def test_a_replica_has_the_weights_of_rank_0_in_its_number_format(tools, small_models, loader, arguments, monkeypatch):
    monkeypatch.setattr(tools.core.model_patcher, "CoreModelPatcher", tools.core.model_patcher.CoreModelPatcher)
    patcher = (tools.load.load_model if loader == "ours" else tools.core.sd.load_diffusion_model)(
        str(small_models["model"]), *arguments
    )
    replica = tools.replica.Replica(json.loads(json.dumps(tools.replica.source_of(patcher))), "cpu")
    ours = replica.model.model
    assert replica.digest == tools.replica.digest_of(patcher) and replica.bytes == tools.replica.bytes_on_device(
        patcher
    )
    expected, found = (dict(one.named_parameters()) for one in (patcher.model, ours))
    assert expected.keys() == found.keys() and all(
        value.dtype == found[name].dtype and torch.equal(value.float(), found[name].float())
        for name, value in expected.items()
    )
    assert ours.manual_cast_dtype == patcher.model.manual_cast_dtype


def test_weights_that_could_not_all_be_replaced_leave_no_old_patch_behind(tools, small_models, monkeypatch):
    """Memory may run out half-way. What was patched before has to be known then, or it stays for every prompt that
    follows.
    """
    monkeypatch.setattr(tools.core.model_patcher, "CoreModelPatcher", tools.core.model_patcher.CoreModelPatcher)
    source = tools.replica.source_of(tools.load.load_model(str(small_models["model"])))
    replica = tools.replica.Replica(source, "cpu")
    first, last = (
        f"diffusion_model.{name}" for name in ("double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight")
    )
    plain = {name: tools.core.utils.get_attr(replica.model.model, name).clone() for name in (first, last)}

    def patched(name):
        return tools.replica.weights_of(
            SimpleNamespace(patches={name: [(1.0, ("diff", (torch.ones_like(plain[name]),)), 1.0, None, None)]})
        )

    replica.set_weights(*patched(last))
    with monkeypatch.context() as short, pytest.raises(MemoryError):
        short.setattr(
            replica.model, "patch_weight_to_device", lambda *args, **kwargs: (_ for _ in ()).throw(MemoryError())
        )
        replica.set_weights(*patched(first))
    assert replica.set_weights({}, []) == 0
    assert all(torch.equal(tools.core.utils.get_attr(replica.model.model, name), plain[name]) for name in plain)


def anonymous():
    """Bytes of this process's memory that are no file's, without what was freed and only waits to be used again."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


# --- refusals
# --------------------------------------------------------------------------------------------------------------


def somebodys_override(func, *args, **kwargs):
    return func(*args, **kwargs)


def somebodys_patch(*args, **kwargs):
    return {}


def with_override(tools, model):
    model.model_options["transformer_options"]["optimized_attention_override"] = somebodys_override


def with_attn1(tools, model):
    model.set_model_attn1_patch(somebodys_patch)


def with_block(tools, model):
    model.set_model_patch_replace(somebodys_patch, "dit", "double_block", 1)


def with_object(tools, model):
    model.add_object_patch("diffusion_model.final_layer", torch.nn.Identity())


def with_merge(tools, model):
    model.add_patches(model.get_key_patches("diffusion_model.single_blocks.0."), 0.5, 0.5)


def with_weight_wrapper(tools, model):
    model.add_weight_wrapper("diffusion_model.img_in.weight", somebodys_patch)


def with_callback(tools, model):
    model.add_callback_with_key("on_pre_run", "somebody", somebodys_patch)


def with_compile(tools, model):
    model.add_wrapper_with_key("apply_model", "torch.compile", somebodys_patch)


@pytest.mark.parametrize(
    "change, words",
    [
        (with_override, ["test_ranks.somebodys_override", "Select Attention"]),
        (with_attn1, ["attn1_patch", "somebodys_patch"]),
        (with_block, ["('dit', ('double_block', 1))", "somebodys_patch"]),
        (with_object, ["diffusion_model.final_layer", "Identity"]),
        (with_merge, ["weight patches", "save the merged model"]),
        (with_weight_wrapper, ["weight wrappers"]),
        (with_callback, ["'somebody'", "on_pre_run"]),
        (with_compile, ["Torch Compile Model", "Compile Blocks"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_cannot_be_carried_is_refused_by_name_and_the_ranks_stay(tools, two, session, change, words):
    sample(tools, two, steps=1)
    pids, changed = [worker.pid for worker in session.pool.workers], two.clone()
    change(tools, changed)
    with pytest.raises(ValueError) as caught:
        sample(tools, changed)
    assert all(word in str(caught.value) for word in ["Sequence parallel", *words]), str(caught.value)
    assert (
        all(map(alive, pids))
        and torch.isfinite(sample(tools, two, steps=1)).all()
        and [worker.pid for worker in session.pool.workers] == pids
    )


def test_a_forward_pass_that_was_swapped_on_rank_0_is_refused_by_name(tools, model, two, session, expected):
    """As step caches of other packs do it, for the length of a call and past every option of the MODEL."""
    network = model.model.diffusion_model

    def somebodys_forward(*args, **kwargs):
        return original(*args, **kwargs)

    sample(tools, two)
    pids, original = [worker.pid for worker in session.pool.workers], network.forward_orig
    network.forward_orig = somebodys_forward
    try:
        with pytest.raises(
            ValueError,
            match=(
                "Sequence parallel cannot carry the object patch 'diffusion_model.forward_orig' of "
                "test_ranks.*somebodys_forward"
            ),
        ):
            sample(tools, two)
    finally:
        del network.forward_orig
    assert difference(sample(tools, two), expected) < SAME and [worker.pid for worker in session.pool.workers] == pids


def test_a_model_that_cannot_be_loaded_twice_is_refused_at_the_node(tools, model):
    with ranks_on_cpu(2):
        unknown = model.clone()
        unknown.cached_patcher_init = None
        with pytest.raises(ValueError, match="does not say how .it sets no cached_patcher_init"):
            tools.parallel.parallel(unknown)
        unknown.cached_patcher_init = (json.loads, ("{}",))
        with pytest.raises(ValueError, match="json.loads of another pack"):
            tools.parallel.parallel(unknown)
        unknown.cached_patcher_init = (tools.core.sd.load_diffusion_model, ("file", {"custom_operations": json}))
        with pytest.raises(ValueError, match="was given a value of type builtins.module"):
            tools.parallel.parallel(unknown)


def test_degrees_and_devices_that_do_not_work_are_refused_with_those_that_do(tools, model, monkeypatch):
    monkeypatch.delenv("FLUX2_CPU_RANKS", raising=False)
    with pytest.raises(
        ValueError,
        match=(
            "4 GPUs were asked for, and there is no GPU that several ranks can use: the model runs on "
            "cpu.*FLUX2_CPU_RANKS=2"
        ),
    ):
        tools.parallel.parallel(model, 4)
    monkeypatch.setenv("FLUX2_CPU_RANKS", "4")
    with pytest.raises(ValueError, match="5 GPUs were asked for, and there is 4 ranks on the CPU.*Set gpus to 4"):
        tools.parallel.parallel(model, 5)
    with pytest.raises(ValueError, match="does not divide the 2 attention heads.*Ulysses 2 x ring 2"):
        tools.parallel.parallel(model, 4, ulysses=4)
    with pytest.raises(ValueError, match="makes 2 GPUs, and 4 are used"):
        tools.parallel.parallel(model, 4, ulysses=2, ring=1)


@pytest.fixture
def gpus(tools, monkeypatch):
    """What PyTorch says of four GPUs that are not there."""
    names, cuda = ["NVIDIA L40S", "NVIDIA L40S", "NVIDIA L4", "NVIDIA L40S"], torch.cuda
    monkeypatch.setattr(cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(cuda, "current_device", lambda: 0)
    monkeypatch.setattr(cuda, "get_device_name", lambda index=0: names[torch.device(f"cuda:{index}").index])
    monkeypatch.setattr(cuda, "can_device_access_peer", lambda a, b: 3 not in (a, b))
    monkeypatch.setattr(tools.devices.process_groups, "unavailable", lambda device: None)
    return names


def test_gpus_that_gain_less_are_named(tools, gpus):
    from flux2_pack.attention.parallel import degrees

    def why(number):
        return tools.devices.plan_ranks("cuda:0", number, lambda n: degrees(n, 48))[1]

    assert "not alike" not in why(2) and "host memory" not in why(2)
    assert "These GPUs are not alike (2 x NVIDIA L40S, 1 x NVIDIA L4): a step takes as long as the slowest" in why(3)
    assert "cuda:0 and cuda:3 and 2 more pairs cannot read each other's memory" in why(4)
    with pytest.raises(ValueError, match="5 GPUs were asked for, and there is 3 x NVIDIA L40S, 1 x NVIDIA L4"):
        why(5)


@pytest.mark.parametrize(
    "free, total, said",
    [
        (
            3,
            48,
            "has 3.0 of 48.0 GB free, and the model takes 20.0: another program uses that GPU.*CUDA_VISIBLE_DEVICES",
        ),
        (15, 16, "has 15.0 of 16.0 GB free, and the model takes 20.0: it does not fit on that GPU.*fp8 checkpoint"),
        (24, 48, ""),
    ],
)
def test_a_gpu_without_room_for_the_model_is_named(tools, two, session, expected, monkeypatch, free, total, said):
    sample(tools, two)
    answers = session._answers
    monkeypatch.setattr(
        session,
        "_answers",
        lambda what, *rest: (
            {1: {"free": int(free * 1e9), "total": int(total * 1e9)}} if what == "room" else answers(what, *rest)
        ),
    )
    if said:
        with pytest.raises(tools.pool.RanksFailed, match=f"Rank 1 .this machine's CPU.* {said}"):
            session._make_room(20e9)
    else:
        session._make_room(20e9)
    assert difference(sample(tools, two), expected) < SAME


def test_the_room_is_asked_for_before_a_model_is_loaded(tools, two, session, expected, monkeypatch):
    """By the bytes that the model takes; models of other sessions leave the GPUs first."""
    sample(tools, two)
    session.drop(wait=True)
    answers, asked, left = session._answers, [], []

    class Other:
        def drop(self, wait):
            left.append(wait)

    monkeypatch.setattr(tools.session, "_sessions", {session, Other()})

    def no_room(what, *rest):
        if what != "room":
            return answers(what, *rest)
        asked.append(len(left))
        return {1: {"free": tools.replica.bytes_on_device(two) - 1, "total": 48e9}}

    with monkeypatch.context() as patch, pytest.raises(tools.pool.RanksFailed, match="another program uses that GPU"):
        patch.setattr(session, "_answers", no_room)
        sample(tools, two)
    assert asked == [0, 1] and left == [True], "asked, others leave, asked again"
    assert difference(sample(tools, two), expected) < SAME


# --- who may join
# ----------------------------------------------------------------------------------------------------------


def pool_waiting_for_one(tools, monkeypatch, port=0):
    """A WorkerPool that listens for one rank from elsewhere, at a free port of this machine."""
    port = port or free_port()
    monkeypatch.setenv("FLUX2_RANKS_LISTEN", f"127.0.0.1:{port}")
    monkeypatch.setenv("FLUX2_RANKS_SECRET", "a secret of some length")
    pool = tools.pool.WorkerPool(tools.pool.ParallelPlan(2, 1, "cpu", (None,), elsewhere=1))
    pool.start()
    return pool, port


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def introduce(tools, port, secret="a secret of some length", host="far"):
    channel = tools.channel.connect(("127.0.0.1", port), secret, timeout=5)
    channel.send({"is": "here", "rank": None, "pid": 1, "host": host, "local_rank": 0})
    return channel


def test_a_process_without_the_secret_cannot_join_and_disturbs_nobody(tools, monkeypatch):
    pool, port = pool_waiting_for_one(tools, monkeypatch)
    try:
        silent = socket.create_connection(("127.0.0.1", port))
        http = socket.create_connection(("127.0.0.1", port))
        http.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" + b"x" * 100)
        with pytest.raises(tools.channel.Stranger, match="secret|did not prove"):
            introduce(tools, port, "another secret of some length").receive()
        assert pool.workers == []
        channel = introduce(tools, port)
        assert channel.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 10_000, (
            "a host that is gone is noticed while data is on its way"
        )
        assert channel.receive()[0]["do"] == "configure" and [worker.where for worker in pool.workers] == ["far GPU 0"]
        silent.close(), http.close()
    finally:
        pool.stop()


def test_the_secret_never_travels(tools, two, session, monkeypatch):
    """Between hosts everything can be read on the way, and the keys of torch's store are sent as they are."""
    sample(tools, two, steps=1)
    asked, ask = [], session.pool.ask
    monkeypatch.setattr(
        session.pool, "ask", lambda what, *rest, **content: asked.append(content) or ask(what, *rest, **content)
    )
    session.end_mesh()
    sample(tools, two, steps=1)
    assert any("prefix" in content for content in asked) and session.pool.secret not in str(asked)


def test_other_versions_on_another_host_are_refused_by_name(tools, monkeypatch):
    pool, port = pool_waiting_for_one(tools, monkeypatch)
    try:
        channel = introduce(tools, port, host="oldhost")
        asked = channel.receive()[0]
        channel.send(
            {
                "done": "configure",
                "number": asked["number"],
                "versions": {**tools.versions.versions(), "PyTorch": "2.6.0"},
                "name": "Some GPU",
            }
        )
        with pytest.raises(tools.pool.RanksFailed) as caught:
            pool.done("configure", 1, 10)
        assert "Rank 1 (oldhost GPU 0, Some GPU) cannot work with rank 0: PyTorch is " in str(
            caught.value
        ) and "2.6.0 there" in str(caught.value)
    finally:
        pool.stop()


def test_the_version_of_the_pack_changes_with_any_file_that_computes(tools, tmp_path):
    """A worker reads the files when it starts, rank 0 read them when ComfyUI did."""
    shutil.copytree(ROOT / "attention", tmp_path / "attention")
    shutil.copytree(ROOT / "flux2", tmp_path / "flux2")
    seen = {tools.versions.running_digest(), tools.versions.pack_digest(tmp_path)}
    assert len(seen) == 1
    for name in (
        "attention/backends/sdpa.py",
        "attention/dispatch.py",
        "flux2/fused/blocks.py",
        "flux2/parallel/workers/step.py",
    ):
        with open(tmp_path / name, "a") as file:
            file.write("\n")
        seen.add(tools.versions.pack_digest(tmp_path))
    assert len(seen) == 5 and tools.versions.versions()["Flux 2 Attention"] == tools.versions.running_digest()


def test_a_taken_port_and_a_missing_secret_are_said(tools, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(
            OSError, match=f"cannot listen at 127.0.0.1:{taken.getsockname()[1]}.*Another program has that port"
        ):
            pool_waiting_for_one(tools, monkeypatch, taken.getsockname()[1])
    monkeypatch.setenv("FLUX2_RANKS_SECRET", "short")
    with pytest.raises(ValueError, match="FLUX2_RANKS_SECRET is missing or shorter"):
        tools.launch.listening_at()
    monkeypatch.setenv("FLUX2_RANKS_LISTEN", "nonsense")
    with pytest.raises(ValueError, match="should be an address of this machine and a port"):
        tools.launch.listening_at()


def test_ranks_that_never_join_are_said_and_can_be_cancelled(tools, monkeypatch):
    monkeypatch.setattr(tools.pool, "REMOTE_STARTING", 1)
    pool, _ = pool_waiting_for_one(tools, monkeypatch)
    with pytest.raises(tools.pool.RanksFailed, match="0 of 1 ranks on other hosts joined within 1 seconds.*torchrun"):
        pool.done("configure", 1, 20)


def test_a_rank_joins_through_torchrun(tools, model, monkeypatch, comfy):
    """The line of docs/several-gpus.md, with this machine as the other host."""
    secret, port = "a secret of some length", free_port()
    monkeypatch.setenv("FLUX2_RANKS_LISTEN", f"127.0.0.1:{port}")
    monkeypatch.setenv("FLUX2_RANKS_SECRET", secret)
    monkeypatch.setenv("FLUX2_CPU_RANKS", "1")
    fresh = tools.load.load_model(model.cached_patcher_init[1][0])
    torchrun = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "1",
            str(ROOT / "flux2/ranks/worker.py"),
            "--join",
            f"127.0.0.1:{port}",
            "--comfyui",
            comfy,
        ],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        ours = tools.parallel.parallel(fresh, 2)
        assert difference(sample(tools, ours), sample(tools, model)) < SAME
        assert "GPU 0" in tools.report.report(ours)[0]
        pool, pid = tools.session.existing(fresh.model).pool, tools.session.existing(fresh.model).pool.workers[0].pid
        del fresh, ours
        tools.management.unload_all_models()
        gc.collect()
        wait_until(lambda: not pool.started, 30)
        time.sleep(0.5)
        assert alive(pid), "it waits for the next session"
    finally:
        os.killpg(torchrun.pid, signal.SIGKILL)
        torchrun.wait()
    wait_until(lambda: not alive(pid), 30)


def test_a_rank_that_starts_afresh_keeps_its_gpu(tools, monkeypatch):
    """By exec, so it finds the environment that it made for itself: one GPU, which is not to be counted from again."""
    from flux2_pack.flux2.parallel.workers import worker

    monkeypatch.delenv("FLUX2_RANKS_GPU", raising=False)
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    monkeypatch.setenv("LOCAL_RANK", "1")
    for _ in range(2):
        worker.see_one_gpu()
        assert os.environ["CUDA_VISIBLE_DEVICES"] == os.environ["HIP_VISIBLE_DEVICES"] == "5"
    os.environ.pop("FLUX2_RANKS_GPU", None)


# --- cancels, kills, memory
# ------------------------------------------------------------------------------------------------


def in_a_step(session, action, delay=0.15):
    """Run action() in the middle of the next step; returns (thread, [the moment])."""
    moment = []

    def work():
        while session._pass is None:
            time.sleep(0.002)
        time.sleep(delay)
        moment.append(time.perf_counter())
        action()

    thread = threading.Thread(target=work)
    thread.start()
    return thread, moment


def interrupted(tools, model, session, action, delay=0.15):
    """(what a large sampling raised, seconds after `action` took place in the middle of a step)."""
    thread, moment = in_a_step(session, action, delay)
    with pytest.raises(BaseException) as caught:
        sample(tools, model, **LARGE)
    seconds = time.perf_counter() - moment[0]
    thread.join()
    return caught.value, seconds


@pytest.fixture
def expected(tools, model):
    return sample(tools, model)


def test_a_cancel_in_a_step_returns_at_once_and_everything_stays(tools, two, session, expected):
    def once(delay):
        sample(tools, two)
        before = [worker.pid for worker in session.pool.workers], session._generation
        error, seconds = interrupted(
            tools, two, session, lambda: tools.management.interrupt_current_processing(True), delay
        )
        assert isinstance(error, tools.management.InterruptProcessingException)
        assert difference(sample(tools, two), expected) < SAME
        # no process and no connection was made anew
        return seconds < 2 and ([worker.pid for worker in session.pool.workers], session._generation) == before

    for delay in (0.02, 0.3):
        assert kept(once, delay)


def resume(pid):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


def kept(promise, *args):
    """Whether a promise in seconds is kept in one of four tries: a machine that is busy with other things may miss
    it.
    """
    return any(promise(*args) for _ in range(4))


def test_a_cancel_is_heard_by_a_rank_that_has_not_begun_the_pass(tools):
    """Its two threads: the message to stop may be read before the pass has begun that was asked for just before it."""
    from flux2_pack.flux2.parallel.workers import worker

    one = worker.Worker(None)
    one.interrupt({"number": 7})
    with one.interruptible(6):
        assert not tools.management.processing_interrupted()
    with one.interruptible(7):
        assert tools.management.processing_interrupted()
    assert not tools.management.processing_interrupted()


def test_a_cancel_between_two_steps_begins_no_pass(tools, two, session, expected):
    sample(tools, two)
    asked = []

    def cancel(step, *_):
        asked.append(session.pool._number)
        tools.management.interrupt_current_processing(True)

    with pytest.raises(tools.management.InterruptProcessingException):
        sample(tools, two, steps=3, callback=cancel)
    assert len(asked) == 1 and session.pool._number == asked[0] + 1, "the end of the sampling is all that is asked for"
    assert difference(sample(tools, two), expected) < SAME


def test_a_cancel_is_heard_while_the_end_of_a_sampling_is_awaited(tools, two, session, expected):
    def once():
        sample(tools, two)
        pid, moment = session.pool.workers[0].pid, []

        def hang(step, *_):
            if step == 1:
                os.kill(pid, signal.SIGSTOP)
                threading.Timer(
                    0.5,
                    lambda: moment.append(time.perf_counter()) or tools.management.interrupt_current_processing(True),
                ).start()
                threading.Timer(20, resume, (pid,)).start()  # whatever comes, the tests go on

        with pytest.raises(tools.management.InterruptProcessingException):
            sample(tools, two, callback=hang)
        seconds = time.perf_counter() - moment[0]
        os.kill(pid, signal.SIGCONT)
        assert difference(sample(tools, two), expected) < SAME and session.pool.workers[0].pid == pid
        return seconds < 2

    assert kept(once)


def test_what_no_rank_can_do_is_said_by_rank_0_and_the_ranks_stay(tools, two, session, expected):
    sample(tools, two)
    pids = [worker.pid for worker in session.pool.workers]
    for _ in range(3):
        with pytest.raises(
            ValueError, match="^2 GPUs cannot share 1 tokens of the image: use fewer GPUs or a larger image"
        ):
            sample(tools, two, size=(1, 1))
    assert difference(sample(tools, two), expected) < SAME and [worker.pid for worker in session.pool.workers] == pids


def test_a_cancel_does_not_wait_for_a_rank_that_hangs(tools, two, session, expected):
    def once():
        sample(tools, two)
        moment = []

        def hang_and_cancel():
            os.kill(session.pool.workers[0].pid, signal.SIGSTOP)
            time.sleep(0.5)
            moment.append(time.perf_counter())
            tools.management.interrupt_current_processing(True)

        error, _ = interrupted(tools, two, session, hang_and_cancel)
        seconds = time.perf_counter() - moment[0]
        assert (
            isinstance(error, tools.management.InterruptProcessingException)
            and difference(sample(tools, two), expected) < SAME
        )
        return seconds < 2.5

    assert kept(once)


def test_a_killed_rank_is_named_and_the_next_prompt_rebuilds(tools, two, session, expected):
    sample(tools, two)
    pid = session.pool.workers[0].pid
    error, seconds = interrupted(tools, two, session, lambda: os.kill(pid, signal.SIGKILL))
    assert isinstance(error, tools.pool.RanksFailed) and seconds < 10
    assert (
        "Rank 1 (this machine's CPU" in str(error)
        and "SIGKILL" in str(error)
        and "the next one starts the rank again" in str(error)
    )
    assert difference(sample(tools, two), expected) < SAME and session.pool.workers[0].pid != pid


def test_a_rank_that_is_lost_between_two_steps_fails_the_sampling(tools, two, session, expected):
    """Also where rank 0 would not notice by an exchange: what a GPU computed after the loss is worthless, so the
    sampling must not go on with new ranks.
    """

    def kill(step, *_):
        if step == 0:
            os.kill(session.pool.workers[0].pid, signal.SIGKILL)
            wait_until(lambda: not session.pool.started, 30)

    with pytest.raises(tools.pool.RanksFailed, match="Rank 1 .*SIGKILL"):
        sample(tools, two, steps=3, callback=kill)
    assert difference(sample(tools, two), expected) < SAME


def test_a_rank_that_fails_before_the_exchanges_leaves_nobody_waiting_in_them(
    tools, two, session, expected, monkeypatch
):
    """As one that cannot allocate the inputs: it takes part in nothing, and gloo's waits end only with the process."""
    from flux2_pack.flux2.parallel.workers import session as module

    sample(tools, two)

    def unknown_kind(inputs, original=module.describe_inputs):
        data, kinds, tensors = original(inputs)
        return data, [["no_dtype", shape] for _, shape in kinds], tensors

    begun = time.monotonic()
    with monkeypatch.context() as patch, pytest.raises(tools.pool.RanksFailed, match="Rank 1 .*no_dtype"):
        patch.setattr(module, "describe_inputs", unknown_kind)
        sample(tools, two)
    assert time.monotonic() - begun < 10
    assert difference(sample(tools, two), expected) < SAME


def test_a_rank_out_of_memory_is_named_and_the_next_prompt_works(tools, two, session, expected):
    sample(tools, two)
    pid = session.pool.workers[0].pid
    with open(f"/proc/{pid}/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    resource.prlimit(pid, resource.RLIMIT_AS, (used + 2**20, resource.RLIM_INFINITY))
    with pytest.raises(tools.pool.RanksFailed) as caught:
        sample(tools, two, size=(64, 64))
    if alive(pid):
        resource.prlimit(pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert (
        "Rank 1 (this machine's CPU" in str(caught.value)
        and "memory ran out" in str(caught.value)
        and "fp8 checkpoint" in str(caught.value)
    )
    assert difference(sample(tools, two), expected) < SAME


def test_what_ends_the_ranks_is_heard_after_what_does_not(tools):
    """Memory runs out on several ranks in the same step: the first takes part in what is left of it, the second cannot,
    and rank 0 would wait for it.
    """
    ended = []
    pool = tools.pool.WorkerPool(
        tools.pool.ParallelPlan(3, 1, "cpu", (None,) * 3), on_failure=lambda: ended.append(True)
    )
    pool._supervisor = threading.current_thread()
    first, second = (tools.pool.WorkerHandle(rank, "somewhere") for rank in (1, 2))
    pool._note(first, {"failed": "forward", "number": 4, "cause": "memory", "broken": False, "text": "memory ran out"})
    assert pool.started and not ended
    pool._note(second, {"failed": "forward", "number": 4, "cause": "memory", "broken": True, "text": "memory ran out"})
    assert (
        ended == [True]
        and not pool.started
        and pool.failure.startswith("Rank 1 (somewhere) could not compute its part of a step: memory ran out.")
    )


def test_a_rank_that_cannot_be_started_takes_those_before_it_along(tools, monkeypatch):
    started, start = [], tools.launch.start

    def no_more_than_one(*args):
        if started:
            raise OSError(11, "Resource temporarily unavailable")
        started.append(start(*args))
        return started[0]

    monkeypatch.setattr(tools.launch, "start", no_more_than_one)
    pool = tools.pool.WorkerPool(tools.pool.ParallelPlan(3, 1, "cpu", (None,) * 3))
    pool.start()
    with pytest.raises(
        tools.pool.RanksFailed, match="The other ranks could not be started: BlockingIOError: .*temporarily unavailable"
    ):
        pool.done("configure", 1, 20)
    assert started[0].poll() is not None


@pytest.mark.alone
def test_ranks_that_do_not_stop_are_waited_for_together(tools):
    """A cancel waits for it, with seven ranks as with one."""
    hanging, begun = [subprocess.Popen(["sleep", "60"]) for _ in range(5)], time.monotonic()
    tools.launch.end(hanging, 0.5)
    assert time.monotonic() - begun < 2.4 and all(process.poll() is not None for process in hanging)


def wait_until(true, seconds):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not after {seconds} seconds"
        time.sleep(0.05)


def test_kills_and_cancels_at_random_moments_lose_nothing(tools, two, session, expected):
    """FLUX2_ROUNDS of them. Each is followed by a sampling that has to be right."""
    sample(tools, two)
    chance, started, threads, files = random.Random(7), set(), threading.active_count(), open_files()
    for number in range(ROUNDS):
        sample(tools, two)
        pids = [worker.pid for worker in session.pool.workers]
        started.update(pids)
        kill = chance.random() < 0.34
        action = (
            (lambda: os.kill(pids[0], signal.SIGKILL))
            if kill
            else (lambda: tools.management.interrupt_current_processing(True))
        )
        try:
            thread, _ = in_a_step(session, action, chance.random() * 0.8)
            sample(tools, two, **LARGE)
        except tools.pool.RanksFailed if kill else tools.management.InterruptProcessingException:
            pass
        thread.join()
        tools.management.interrupt_current_processing(False)
        try:
            assert difference(sample(tools, two), expected) < SAME, f"round {number}"
        except tools.pool.RanksFailed:
            assert kill, "only a rank that was killed after the last step may fail the next prompt"
    started.update(worker.pid for worker in session.pool.workers)
    gc.collect()
    assert sum(map(alive, started)) <= 1 and threading.active_count() <= threads + 8 and open_files() <= files + 8


def open_files():
    """Files, pipes and sockets, listening ones included, that this process holds."""
    return len(os.listdir("/proc/self/fd"))


def test_unloading_frees_every_rank(tools, two, session, expected, monkeypatch):
    sample(tools, two)
    worker, pid = session.pool.workers[0], session.pool.workers[0].pid
    # at once: nobody has looked whether the model is loaded since the sampling ended
    tools.management.unload_all_models()
    wait_until(lambda: "drop" in worker.done, 30)
    assert worker.done["drop"][1]["freed"] and alive(pid), "the process may be needed again"
    assert difference(sample(tools, two), expected) < SAME and session.pool.workers[0].pid == pid
    monkeypatch.setattr(tools.session, "GRACE", 1)
    time.sleep(1.2)
    tools.management.unload_all_models()
    wait_until(lambda: not alive(pid), 60)


@pytest.mark.alone
def test_a_cancel_while_the_ranks_start_leaves_nothing_for_long(tools, model, small_models, monkeypatch):
    monkeypatch.setattr(tools.session, "GRACE", 1)
    fresh = tools.load.load_model(str(small_models["model"]))
    with ranks_on_cpu(2):
        ours = tools.parallel.parallel(fresh)
    session = tools.session.existing(fresh.model)
    threading.Timer(0.5, tools.management.interrupt_current_processing).start()
    begun = time.perf_counter()
    with pytest.raises(tools.management.InterruptProcessingException):
        sample(tools, ours)
    assert time.perf_counter() - begun < 2.5
    pids = [worker.pid for worker in session.pool.workers]
    wait_until(lambda: not any(map(alive, pids)), 30)


def test_compare_and_benchmark_measure_a_model_on_several_gpus(tools, two, session):
    """Their observers stand in the override slot; Sequence Parallel looks behind them."""
    from flux2_pack.flux2.measuring import benchmark, capture, compare

    size, prompt = capture.Size(64, 64), capture.random_conditioning(two)
    with torch.inference_mode():
        job = capture.sampling_job(two, size, prompt, 2)
        variants = [compare.backend_variant("sdpa-math"), compare.model_variant("a", two)]
        found, _ = compare.compare(two, job, "sdpa", variants)
        speed = benchmark.benchmark(two, [size], prompt, wanted=["sdpa"], call_repeat=1, step_repeat=1)
    assert [row.reason for row in found.rows] == ["", ""] and found.rows[0].verdict.word == "same as rounding noise"
    assert found.rows[0].evidence.calls, "what this rank computes between two exchanges is checked"
    assert [row.reason for row in speed.rows if not row.timing] == []
    assert {row.backend for row in speed.rows} >= {"comfyui", "auto", "sdpa"}
