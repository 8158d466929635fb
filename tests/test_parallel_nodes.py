"""The other nodes on a MODEL that two ranks compute, each through a running ComfyUI: LoRA, EasyCache, Compile Blocks,
Warm Up, Compare Attention, Benchmark Attention. CPU, float32, small models (FLUX2_CPU_RANKS=2).

Each runs on one rank and on two, and has to give the same latents or the same kind of result; and each has an effect of
its own that would be missing if the other rank did not know of it.
"""

import json

import pytest
import safetensors.torch
import torch

from api_workflow import fill
from comfy_client import ExecutionFailed
from comfy_server import ComfyServer
from pack import ROOT
from server_fixture import run
from test_parallel_server import sampled, settings
from test_server import NODE, difference, node

SAME = 1e-6
FLOAT32_OF_BF16 = 2  # bytes of a weight on a server started with --force-fp32, over those in the file
LORA = "small.safetensors"


@pytest.fixture(scope="module")
def two_ranks(comfyui, model_files):
    """A ComfyServer whose Sequence Parallel uses two ranks of the CPU. Its compiler looks for no vector instructions
    and starts no pool of processes on each rank.
    """
    settings = {"FLUX2_CPU_RANKS": "2", "ATEN_CPU_CAPABILITY": "default", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        with ComfyServer(comfyui, models=model_files, arguments=["--cpu", "--force-fp32"]) as running:
            folder = running.base / "models" / "loras"
            folder.mkdir(exist_ok=True)
            save_lora(model_files["diffusion_models"][0], folder / LORA)
            yield running


def save_lora(model, path, rank=4):
    """A LoRA on layers of both kinds of block, under the names that trainers give them."""
    generator, made = torch.Generator().manual_seed(5), {}
    with safetensors.safe_open(model, "pt") as file:
        for name in ("double_blocks.0.img_attn.qkv", "single_blocks.1.linear1"):
            rows, columns = file.get_slice(f"{name}.weight").get_shape()
            made[f"diffusion_model.{name}.lora_up.weight"] = torch.randn((rows, rank), generator=generator) * 0.05
            made[f"diffusion_model.{name}.lora_down.weight"] = torch.randn((rank, columns), generator=generator) * 0.05
    safetensors.torch.save_file(made, path)


def behind_the_loader(workflow, class_type, **inputs):
    """The workflow with a node MODEL -> MODEL behind the model loader."""
    source = [NODE["model"], 0]
    changed = {
        key: {
            **one,
            "inputs": {name: ["more", 0] if value == source else value for name, value in one["inputs"].items()},
        }
        for key, one in workflow.items()
    }
    return {**changed, "more": node(class_type, model=source, **inputs)}


def on_one_and_two(server, model_files, change=lambda workflow: workflow, **others):
    """(latents on one rank, latents on two, the report of two)."""
    one, _ = sampled(server, change(fill(settings(model_files, **others)[0])))
    two, report = sampled(server, change(fill(settings(model_files, gpus=2, **others)[0])))
    assert [rank["rank"] for rank in report["parallel"]["ranks"]] == [0, 1]
    return one, two, report


@pytest.fixture(scope="module")
def plain(two_ranks, model_files):
    return {steps: sampled(two_ranks, fill(settings(model_files, steps=steps)[0]))[0] for steps in (3, 6)}


def test_a_lora_is_on_every_rank(two_ranks, model_files, plain):
    for strength in (0.8, 0.3):
        one, two, _ = on_one_and_two(
            two_ranks,
            model_files,
            lambda w: behind_the_loader(w, "LoraLoaderModelOnly", lora_name=LORA, strength_model=strength),
        )
        assert difference(two, one) < SAME < 1e-4 < difference(one, plain[3])


def test_easycache_skips_the_same_steps_on_every_rank(two_ranks, model_files, plain):
    easy = {"reuse_threshold": 3.0, "start_percent": 0.0, "end_percent": 1.0, "verbose": False}
    one, two, report = on_one_and_two(
        two_ranks, model_files, lambda w: behind_the_loader(w, "EasyCache", **easy), steps=6
    )
    assert difference(two, one) < SAME < 1e-3 < difference(one, plain[6])
    passes = {rank["forwards"] for rank in report["parallel"]["ranks"]}
    assert len(passes) == 1 and passes.pop() < 6, "steps were skipped, the same ones on both"


def test_blocks_are_compiled_on_every_rank(two_ranks, model_files, plain):
    one, two, report = on_one_and_two(two_ranks, model_files, compile_blocks=True)
    assert difference(two, one) < 1e-5 and difference(two, plain[3]) < 1e-4
    assert report["parallel"]["ranks"][1]["forwards"] == 3


def test_warm_up_runs_on_every_rank_and_changes_nothing(two_ranks, model_files, plain):
    """128x96, as the images that follow."""
    one, two, report = on_one_and_two(two_ranks, model_files, warmup="128x96", warmup_steps=1)
    assert difference(two, one) < SAME and difference(one, plain[3]) < SAME
    assert report["parallel"]["ranks"][1]["forwards"] == 3, "the image's own"


def split_weights(workflow):
    """The workflow with the weights split over the GPUs, where it has Sequence Parallel."""
    for one in workflow.values():
        if one["class_type"] == "Flux2SequenceParallel":
            one["inputs"]["weights"] = "split over the GPUs"
    return workflow


def test_split_weights_give_the_latents_of_one_process_with_a_lora_and_after_it(two_ranks, model_files, plain):
    def with_lora(workflow):
        return split_weights(
            behind_the_loader(workflow, "LoraLoaderModelOnly", lora_name=LORA, strength_model=0.8),
        )

    one, two, report = on_one_and_two(two_ranks, model_files, split_weights)
    assert difference(two, one) < SAME and difference(two, plain[3]) < SAME
    assert report["parallel"]["weights"] == "split" and report["parallel"]["parts"] == 2
    held = {rank["weights_bytes"] for rank in report["parallel"]["ranks"]}
    assert len(held) == 1 and held.pop() < 0.62 * model_files["diffusion_models"][0].stat().st_size * FLOAT32_OF_BF16
    one, two, report = on_one_and_two(two_ranks, model_files, with_lora)
    assert difference(two, one) < SAME < 1e-4 < difference(one, plain[3])
    assert report["parallel"]["weights"] == "split"
    _, whole, report = on_one_and_two(two_ranks, model_files)
    assert difference(whole, plain[3]) < SAME and report["parallel"]["weights"] == "on every GPU"


def test_compare_attention_measures_split_weights(two_ranks, model_files):
    chosen = {"reference": "sdpa", "candidate_1": "sdpa-math", "candidate_2": "sdpa"}
    workflow = measuring("flux2_compare_attention", "Flux2CompareAttention", model_files, **chosen)
    (data,) = run(two_ranks, split_weights(workflow)).collect("flux2_compare")
    math, same = data["candidates"][:2]
    assert not any(row["reason"] for row in data["candidates"]), [row["reason"] for row in data["candidates"]]
    assert 0 < math["latent"]["relative"] < 1e-4 and same["latent"]["relative"] < SAME


def test_heads_that_do_not_divide_are_refused_by_the_node(two_ranks, model_files):
    workflow = split_weights(fill(settings(model_files, gpus=2, ulysses=2)[0]))
    with pytest.raises(ExecutionFailed, match="Weights cannot be split over 2 GPUs with Ulysses 2"):
        run(two_ranks, workflow)


def measuring(name, class_type, model_files, **inputs):
    """A template of example_workflows with the small models and Sequence Parallel in front of the node."""
    workflow = json.loads((ROOT / "example_workflows" / "api" / f"{name}.json").read_text())
    names = {folder: files[0].name for folder, files in model_files.items()}
    for one in workflow.values():
        key = {"Flux2LoadModel": "diffusion_models", "Flux2LoadTextEncoder": "text_encoders", "Flux2LoadVAE": "vae"}
        folder = key.get(one["class_type"])
        if folder:
            field = next(field for field in one["inputs"] if field.endswith("_name"))
            one["inputs"][field] = names[folder]
        for side, value in (("width", 128), ("height", 96), ("steps", 2)):
            if side in one["inputs"]:
                one["inputs"][side] = value
        if one["class_type"] == class_type:
            source, one["inputs"]["model"] = one["inputs"]["model"], ["parallel", 0]
            one["inputs"].update(inputs)
    return {**workflow, "parallel": node("Flux2SequenceParallel", model=source, gpus=2)}


def test_compare_attention_measures_a_model_on_two_ranks(two_ranks, model_files):
    workflow = measuring(
        "flux2_compare_attention",
        "Flux2CompareAttention",
        model_files,
        reference="sdpa",
        candidate_1="sdpa-math",
        candidate_2="sdpa",
        model_a=["parallel", 0],
    )
    (data,) = run(two_ranks, workflow).collect("flux2_compare")
    math, same, prepared = data["candidates"]
    assert not any(row["reason"] for row in data["candidates"]), [row["reason"] for row in data["candidates"]]
    assert 0 < math["latent"]["relative"] < 1e-4 and same["latent"]["relative"] < SAME
    assert prepared["latent"]["relative"] < 1e-4 and len(math["attention"]) == 6, "of every block"


def test_benchmark_attention_times_a_model_on_two_ranks(two_ranks, model_files):
    workflow = measuring(
        "flux2_benchmark_attention",
        "Flux2BenchmarkAttention",
        model_files,
        sizes="128x96",
        backends="sdpa, sdpa-math",
        call_repeat=1,
        step_repeat=1,
    )
    (data,) = run(two_ranks, workflow).collect("flux2_benchmark")
    reasons = [row.get("reason") for row in data["rows"]]
    assert data["rows"] and not any(reasons), reasons
