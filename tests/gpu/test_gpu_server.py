"""An image by a real ComfyUI server on the GPU that is here, with its own choice of precision; and, with two GPUs, by
both of them.
"""

import pytest
from PIL import Image
import torch

from api_workflow import PictureSettings, fill
from comfy_server import ComfyServer
from devices import gpus, on_cpu
from server_fixture import run
from test_parallel_server import ranks_of
from test_ranks import alive, wait_until

pytestmark = pytest.mark.gpu
MIB = 2**20


@pytest.fixture(scope="module")
def gpu_server(comfyui, model_files):
    processor = ["--cpu"] if on_cpu() else []
    with ComfyServer(comfyui, models=model_files, arguments=[*processor, "--cache-none"]) as running:
        yield running


def picture(server, result):
    (saved,) = result.images()
    with Image.open(server.base / "output" / saved["subfolder"] / saved["filename"]) as image:
        return torch.tensor(list(image.convert("RGB").getdata()), dtype=torch.float32)


def settings(model_files, **others):
    names = {folder: files[0].name for folder, files in model_files.items()}
    return PictureSettings("A red fox", models=names, **{"width": 256, "height": 192, "steps": 3, **others})


def memory_in_use():
    """Bytes in use on each GPU, by anybody."""
    return [total - free for free, total in map(torch.cuda.mem_get_info, range(gpus()))]


@pytest.mark.parametrize("fast", [None, "auto"], ids=["core's blocks", "fast blocks"])
def test_an_image_and_a_report_that_names_the_gpu_and_what_ran(gpu_server, model_files, fast):
    result = run(gpu_server, fill(settings(model_files, fast_blocks=fast)))
    (report,), text = result.collect("flux2_attention"), "".join(result.collect("text"))
    assert report["calls"] == 3 * 6 and report["backend"] in text
    if not on_cpu():
        assert torch.cuda.get_device_name(0) in text and "measured" in text, "auto times what runs here"
    assert picture(gpu_server, result).std() > 1, "not one colour"


def test_the_same_seed_gives_the_same_image(gpu_server, model_files):
    """Of one backend: what auto takes may differ before and after it has measured. The server keeps no results."""
    made = [
        picture(gpu_server, run(gpu_server, fill(settings(model_files, backend="sdpa", seed=seed))))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(made[0], made[1]) and not torch.equal(made[1], made[2])


@pytest.mark.gpu(gpus=2, cpu=False)
def test_two_gpus_make_the_image_of_one_and_free_their_memory(comfyui, model_files):
    """bf16 on different splits rounds differently: on average less than two of 255 levels of a colour."""
    before = memory_in_use()
    with ComfyServer(comfyui, models=model_files) as server:
        one, two = (run(server, fill(settings(model_files, gpus=number, backend="sdpa"))) for number in (1, 2))
        (report,) = two.collect("flux2_attention")
        assert [rank["rank"] for rank in report["parallel"]["ranks"]] == [0, 1], report["parallel"]
        assert (picture(server, one) - picture(server, two)).abs().mean() < 2
        pids = ranks_of(server)
        assert pids and max(now - was for now, was in zip(memory_in_use(), before)) > 100 * MIB
    wait_until(lambda: not any(map(alive, pids)), 20)
    wait_until(lambda: all(now - was < 64 * MIB for now, was in zip(memory_in_use(), before)), 20)
