"""The VAE's fused blocks: against ComfyUI's in Triton's interpreter, compiled for GPUs that are not here, the choice,
what ComfyUI is told of memory, and MIOpen's switches.
"""

import threading
from pathlib import Path

import pytest
import torch

from test_fast_blocks import PARTS, compiled_for, run

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def prepare(comfy):
    from flux2_pack.flux2.vae import prepare

    return prepare


@pytest.mark.parametrize("part", PARTS)
def test_fused_blocks_equal_comfyuis_in_the_interpreter(small_models, tmp_path, part):
    pytest.importorskip("triton")
    words = ["-m", "pytest", "-q", "-m", part, "-p", "no:cacheprovider", "--tb=short"]
    done = run([*words, HERE / "vae_blocks_interpreted.py"], tmp_path, "1")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout.splitlines()[-1]


ARCHS = ["gfx942", "gfx1100", "gfx1201", "sm90"]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return compiled_for("vae_kernels_compile.py", ARCHS, tmp_path_factory.mktemp("compiled"))


@pytest.mark.parametrize("arch", ARCHS)
def test_the_kernels_compile_for_gpus_that_are_not_here(arch, compiled):
    kernels = compiled[arch]
    assert all(k["ok"] for k in kernels) and {k["name"] for k in kernels} == {"_statistics", "_combine", "_apply"}


def test_without_a_gpu_auto_is_comfyuis_and_on_is_refused(comfy, small_models, caplog):
    from flux2_pack.flux2.checkpoints.header import CheckpointError
    from flux2_pack.flux2.loading import load

    with caplog.at_level("INFO"):
        vae = load.load_vae(small_models["vae"])
    assert "forward" not in vars(vae.first_stage_model.decoder)
    assert "computed by ComfyUI's blocks, not fused ones" in caplog.text
    with pytest.raises(CheckpointError, match="VAE's fused blocks cannot run here: .*'auto' or 'off'"):
        load.load_vae(small_models["vae"], fused_blocks="on")


def test_another_network_is_left_alone(prepare, small_models):
    from flux2_pack.flux2.loading import load

    network = load.load_vae(small_models["vae"], fused_blocks="off").first_stage_model
    device = torch.device("cpu")
    network.decoder.up[1].block[0].norm1.num_groups = 16
    assert "decoder is not built like" in prepare.unavailable(network, device)
    network.decoder.up[1].block[0].norm1.num_groups = 32
    assert "decoder" not in prepare.unavailable(network, device), "what is missing here is a GPU"
    network.encoder = torch.nn.Identity()
    assert "encoder is not built like" in prepare.unavailable(network, device)


class OnGpu:
    """A VAE as far as `prepare` looks at it, that says it is on an NVIDIA GPU."""

    device = torch.device("cuda")

    def __init__(self, network):
        self.first_stage_model = network


@pytest.mark.parametrize("choice, fused", [("auto", True), ("off", False)])
def test_the_memory_that_comfyui_is_told(prepare, small_models, monkeypatch, choice, fused):
    """Measured on an H200 in bf16, beside the weights: 1.50 and 1.00 GiB fused, 2.14 and 1.26 GiB not, at 1024x1024."""
    from flux2_pack.flux2.loading import load

    monkeypatch.setattr(prepare, "unavailable", lambda *_: None)
    vae = OnGpu(load.load_vae(small_models["vae"], fused_blocks="off").first_stage_model)
    vae.first_stage_model.decoder.ch = 128
    prepare.prepare(vae, choice)
    decode, encode = (1.50, 1.00) if fused else (2.14, 1.26)
    gib = 2**30
    assert decode < vae.memory_used_decode((1, 128, 64, 64), torch.bfloat16) / gib < 1.15 * decode
    assert encode < vae.memory_used_encode((1, 3, 1024, 1024), torch.bfloat16) / gib < 1.15 * encode
    assert vae.memory_used_decode((1, 128, 64, 64), torch.float32) > 1.9 * decode * gib


def test_rocm_gets_no_search_and_comfyuis_blocks(prepare, small_models, monkeypatch):
    from flux2_pack.flux2.loading import load

    vae = load.load_vae(small_models["vae"], fused_blocks="off")
    plain = vae.decode(torch.ones(1, 128, 1, 1))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(prepare, "unavailable", lambda *_: None)
    prepare.prepare(vae, "auto")
    assert not vae.first_stage_model.decoder.forward.fused
    cudnn, seen = torch.backends.cudnn, []
    monkeypatch.setattr(cudnn, "benchmark", True)
    before = cudnn.benchmark, cudnn.deterministic
    vae.first_stage_model.decoder.conv_in.register_forward_hook(
        lambda *_: seen.append((cudnn.benchmark, cudnn.deterministic)) and None
    )
    assert torch.equal(vae.decode(torch.ones(1, 128, 1, 1)), plain)
    assert seen == [(False, True)] and (cudnn.benchmark, cudnn.deterministic) == before


def test_two_threads_put_the_switches_back(prepare, monkeypatch):
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "benchmark", True)
    monkeypatch.setattr(cudnn, "deterministic", False)
    inside, go_on = threading.Event(), threading.Event()

    def first():
        with prepare.immediate_mode:
            inside.set()
            go_on.wait(10)

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait(10)
    with prepare.immediate_mode:
        go_on.set()
        thread.join()
        assert (cudnn.benchmark, cudnn.deterministic) == (False, True), "the other thread's leaving changes nothing"
    assert (cudnn.benchmark, cudnn.deterministic) == (True, False)
