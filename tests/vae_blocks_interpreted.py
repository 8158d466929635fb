"""The VAE's fused blocks against ComfyUI's, on small networks: Triton's interpreter on the CPU, float32.

Run by test_vae_blocks.py in a process of its own: Triton asks for TRITON_INTERPRET when it is imported. The interpreter
computes in numpy and has no bfloat16; that is measured on a GPU by benchmarks/klein.py.
"""

import os

import pytest
import torch

import small_models as maker

CLOSE = 2e-5


@pytest.fixture(scope="module")
def vaes(comfy, tmp_path_factory):
    """{"on" or "off": VAE} of the same weights, the decoder narrow so that the interpreter comes to an end."""
    assert os.environ.get("TRITON_INTERPRET") == "1"
    from flux2_pack.flux2.loading import load

    path = maker.write(tmp_path_factory.mktemp("vae") / "vae.safetensors", maker.vae())
    return {choice: load.load_vae(path, "fp32", fused_blocks=choice) for choice in ("on", "off")}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_close(result, expected):
    assert result.shape == expected.shape
    assert ((result - expected).norm() / expected.norm()).item() < CLOSE


@pytest.mark.parametrize(
    "shape", [pytest.param((1, 128, 1, 1), marks=pytest.mark.quick), (2, 128, 1, 2), (1, 128, 3, 1)]
)
def test_decoding(vaes, shape):
    latent = noise(*shape)
    assert_close(*(vaes[choice].decode(latent) for choice in ("on", "off")))


def test_decoding_in_tiles(vaes):
    latent = noise(1, 128, 3, 2)
    assert_close(*(vaes[choice].decode_tiled(latent, tile_x=2, tile_y=2, overlap=0) for choice in ("on", "off")))


@pytest.mark.parametrize("shape", [(1, 32, 16, 3), (1, 17, 33, 3)])
def test_encoding(vaes, shape):
    assert_close(*(vaes[choice].encode(noise(*shape).sigmoid()) for choice in ("on", "off")))


def test_a_decoder_whose_groups_are_no_power_of_two(comfy, tmp_path):
    from flux2_pack.flux2.loading import load

    path = maker.write(tmp_path / "vae.safetensors", maker.vae(decoder_channels=96))
    assert_close(*(load.load_vae(path, "fp32", fused_blocks=c).decode(noise(1, 128, 1, 1)) for c in ("on", "off")))


def test_weights_that_are_cast_at_each_call(vaes):
    """As ComfyUI leaves layers that did not fit on the GPU, and as a patch at call time changes them."""
    vae, latent = vaes["on"], noise(1, 128, 1, 1)
    layers = [m for m in vae.first_stage_model.decoder.modules() if hasattr(m, "comfy_cast_weights")]
    expected = vae.decode(latent)
    for layer in layers:
        layer.comfy_cast_weights = True
    try:
        assert torch.equal(vae.decode(latent), expected)
        first = vae.first_stage_model.decoder.up[0].block[0].conv1
        first.weight_function.append(lambda weight: weight * 2)
        doubled = vae.decode(latent)
        first.weight_function.clear()
        assert not torch.equal(doubled, expected)
    finally:
        for layer in layers:
            del layer.comfy_cast_weights


def test_gradients_go_through_comfyuis_blocks(vaes):
    with torch.inference_mode(False), torch.enable_grad():
        latent = noise(1, 128, 1, 1).requires_grad_()
        vaes["on"].first_stage_model.decode(latent).sum().backward()
    assert latent.grad is not None and latent.grad.abs().sum() > 0


def test_a_cancel_is_heard_between_layers(vaes, monkeypatch):
    import comfy.model_management

    comfy.model_management.interrupt_current_processing(True)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        vaes["on"].decode(noise(1, 128, 1, 1))


@pytest.mark.parametrize("mean", [0.0, pytest.param(1000.0, marks=pytest.mark.quick)])
def test_statistics_of_a_large_mean(comfy, mean):
    """Sums of squares cancel where the mean is large: these do not. Against float64."""
    from flux2_pack.flux2.vae import kernels

    x = (noise(2, 64, 33, 40) + mean).contiguous(memory_format=torch.channels_last)
    before, kernels.PROGRAMS = kernels.PROGRAMS, 3
    try:
        _, means, rstd = kernels.statistics(x)
    finally:
        kernels.PROGRAMS = before
    groups = x.double().reshape(2, 32, -1)
    torch.testing.assert_close(means.double(), groups.mean(-1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rstd.double(), (groups.var(-1, correction=0) + 1e-6).rsqrt(), rtol=1e-4, atol=0)


@pytest.mark.quick
@pytest.mark.parametrize("scores", [40, 10**6])
def test_attention_in_chunks(comfy, monkeypatch, scores):
    """Chunks that do not divide the queries; the product into float32 exists on GPUs alone and is done by hand here."""
    from flux2_pack.flux2.vae import blocks

    plain = torch.mm

    def mm(a, b, out_dtype=None, out=None):
        result = plain(a, b) if out_dtype is None else plain(a.to(out_dtype), b.to(out_dtype))
        return result if out is None else out.copy_(result)

    monkeypatch.setattr(blocks.torch, "mm", mm)
    monkeypatch.setattr(blocks, "SCORES", scores)
    q, k, v = (noise(2, 1, 13, 512, seed=seed) for seed in range(3))
    assert_close(blocks.in_chunks(q, k, v), torch.nn.functional.scaled_dot_product_attention(q, k, v))
    assert not blocks.keeps_scores_in_float32(torch.bfloat16, torch.device("cpu"))
