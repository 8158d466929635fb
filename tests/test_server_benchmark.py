"""benchmarks/server.py: its workflow by ComfyUI's own nodes, and its seconds, on the session's server.

Not covered: files of full size, several GPUs.
"""

import asyncio
import importlib.util
import sys

import pytest

from api_workflow import PictureSettings, fill, nodes_of
from comfy_client import ComfyClient
from comfy_server import ROOT


@pytest.fixture(scope="module")
def benchmark():
    """The module under another name: `server` is ComfyUI's own."""
    sys.path.append(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("server_benchmark", ROOT / "benchmarks" / "server.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(ROOT / "benchmarks"))


def workflow(model_files, number):
    names = {folder: files[0].name for folder, files in model_files.items()}
    return fill(PictureSettings(f"A red fox, number {number}", models=names, width=64, height=64, steps=3, seed=number))


def test_a_workflow_of_core_nodes_has_none_of_ours(benchmark, model_files):
    ours = workflow(model_files, 1)
    plain = benchmark.with_core_nodes(ours)
    kinds = {node["class_type"] for node in plain.values()}
    assert {"UNETLoader", "CLIPLoader", "VAELoader"} <= kinds
    assert not any(kind in kinds for kind in (*benchmark.CORE, "Flux2SelectAttention", "Flux2AttentionReport"))
    assert nodes_of(plain, "VAEDecode")[0]["inputs"]["samples"] == ["12", 0], "what the report passed on"
    assert nodes_of(ours, "Flux2LoadModel"), "the given workflow stays"
    missing = {value[0] for node in plain.values() for value in node["inputs"].values() if isinstance(value, list)}
    assert missing <= set(plain)


@pytest.mark.parametrize("peer", ["core", "ours"])
def test_the_seconds_of_an_image_add_up(benchmark, server, model_files, peer):
    async def images():
        async with ComfyClient(server.url) as client:
            rows = []
            for number in (11, 12):
                made = workflow(model_files, number)
                if peer == "core":
                    made = benchmark.with_core_nodes(made, ["Flux2LoadTextEncoder"])
                rows.append(await benchmark.timed(client, made, 3))
            return rows

    for row in asyncio.run(images()):
        parts = sum(row[f"{stage}_s"] for stage in ("load", "encode", "sample", "decode", "other"))
        assert abs(parts - row["image_s"]) < 0.1
        assert 0 < row["step_s"] < row["sample_s"] and 0 < row["first_step_s"] < row["image_s"]
        assert row["decode_s"] > 0 and row["encode_s"] > 0 and (row["backend"] is None) == (peer == "core")
    about = {"case": "small", "peer": peer, "gpus": 1, "start": 1, "image": 2, "server_start_s": 1.0}
    assert str(row["image_s"]) in benchmark.line(about | row)


def test_the_summary_compares_first_steps(benchmark):
    def row(gpus, image, **seconds):
        return {"case": "a", "peer": "ours", "gpus": gpus, "start": 1, "image": image, **seconds}

    rows = [row(1, 1, image_s=9, first_step_s=4), row(2, 1, image_s=8, first_step_s=5.5), row(2, 2, image_s=3)]
    rows.append({"case": "a", "peer": "core", "gpus": 1, "start": 1, "reason": "it did not start"})
    two = {"first_image_s": 8, "first_step_s": 5.5, "first_step_over_one_gpu_s": 1.5, "second_image_s": 3}
    assert benchmark.summaries(rows) == {"a": {"ours on 1": {"first_image_s": 9, "first_step_s": 4}, "ours on 2": two}}


def test_full_size_files_are_made_with_the_names_that_loaders_know(benchmark, comfy):
    """The shapes of the files, without the weights."""
    import torch

    from common import import_pack

    import_pack()
    import full_size

    sizes = {**full_size.SMALL, "guidance_embed": False}
    weights = dict(full_size.random_weights(sizes, "cpu", 0))
    assert weights["img_in.weight"].shape == (256, 128) and weights["img_in.weight"].dtype == torch.bfloat16
    fp8, layers = full_size.fp8_checkpoint(sizes, "cpu", 0)
    assert layers and all(fp8[f"{layer}.weight"].dtype == torch.float8_e4m3fn for layer in layers)
    for layer in layers:
        back = fp8[f"{layer}.weight"].float() * fp8[f"{layer}.weight_scale"]
        assert (back - weights[f"{layer}.weight"].float()).norm() < 0.05 * weights[f"{layer}.weight"].float().norm()
