"""Devices that are not here: Apple (no float64, no choice of SDPA kernel, no Triton), Intel XPU, DirectML, an NPU.

Everything computes on the CPU, which says that it is such a device and refuses what that one does not have: `double`
inside this pack, `_fused_sdp_choice`, `import triton`. Not covered: the kernels of those devices themselves.
"""

import sys

import pytest
import torch

from flux2_pack.attention import autotune, device, registry
from flux2_pack.attention.call import AttentionRefused, call_of
from flux2_pack.attention.dispatch import AttentionDispatcher
from flux2_pack.attention.status import backends_here

PLATFORMS = ["apple", "intel", "privateuseone", "npu"]


def from_this_pack():
    return sys._getframe(2).f_globals.get("__name__", "").startswith("flux2_pack.")


@pytest.fixture(params=PLATFORMS)
def foreign(request, monkeypatch):
    """The CPU as such a device. Returns its platform."""
    double, to, cpu = torch.Tensor.double, torch.Tensor.to, torch.Tensor.cpu

    def on_the_cpu(tensor):
        moved = cpu(tensor).view_as(tensor)
        moved.came_to_the_cpu = True
        return moved

    def refused(tensor):
        if from_this_pack() and not getattr(tensor, "came_to_the_cpu", False):
            raise TypeError(
                f"Cannot convert a {request.param} Tensor to float64 dtype as the device doesn't support it"
            )
        return double(tensor)

    def to_without_float64(tensor, *args, **kwargs):
        if torch.float64 in (*args, kwargs.get("dtype")) and from_this_pack():
            raise TypeError(
                f"Cannot convert a {request.param} Tensor to float64 dtype as the device doesn't support it"
            )
        return to(tensor, *args, **kwargs)

    def no_choice(*args, **kwargs):
        raise NotImplementedError("Could not run 'aten::_fused_sdp_choice'")

    monkeypatch.setattr(torch.Tensor, "double", refused)
    monkeypatch.setattr(torch.Tensor, "to", to_without_float64)
    monkeypatch.setattr(torch.Tensor, "cpu", on_the_cpu)
    monkeypatch.setattr(torch, "_fused_sdp_choice", no_choice)
    monkeypatch.setitem(device.PLATFORMS, "cpu", request.param)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(registry, "_passed", set())
    return request.param


def tensors(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 40, 4, 64, generator=generator).to(dtype) for _ in range(3)]


def test_pytorchs_own_kernels_run_and_everything_else_says_why(foreign):
    about = device.describe("cpu")
    assert about.platform == foreign
    runs = {slug for slug in registry.ROWS if not registry.unavailable(slug, about)}
    assert runs == {"sdpa", "sdpa-math"}
    for slug in runs:
        assert registry.probe(slug, torch.device("cpu"), torch.float32, 64) == []
    for slug in set(registry.ROWS) - runs:
        with pytest.raises(AttentionRefused, match="auto finds one that runs here"):
            registry.adapter(slug, about)
    assert {row["backend"] for row in backends_here.list_backends("cpu")["choices"] if row["group"] == "here"} == {
        "auto",
        "comfyui",
        *runs,
    }


def test_auto_ends_with_a_backend(foreign):
    q, k, v = tensors()
    dispatcher = AttentionDispatcher("auto", tuner=autotune.Tuner())
    out, _ = dispatcher.attend(q, k, v)
    assert out.shape == q.shape and "sdpa (PyTorch for cpu)" in dispatcher.log.current.as_text()
    _, lse = dispatcher.attend(q, k, v, need_lse=True)
    torch.testing.assert_close(lse, (q.transpose(1, 2) @ k.permute(0, 2, 3, 1) / 8).logsumexp(-1))


def test_auto_refuses_in_words_what_nothing_takes(foreign):
    q, k, v = (torch.zeros(1, 40, 4, 64, dtype=torch.float64) for _ in range(3))
    with pytest.raises(AttentionRefused, match=r"(?s)'auto' cannot run for this call.*sdpa: It takes float32"):
        autotune.Tuner().choose(call_of(q, k, v), q, k, v)


# --- a whole sampling ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tools(comfy, small_models):
    import comfy.sd

    from flux2_pack.flux2.measuring import benchmark, capture, compare
    from flux2_pack.flux2.select_attention import select
    from flux2_pack.nodes.attention import report

    class Tools:
        model = comfy.sd.load_diffusion_model(str(small_models["model"]))

    Tools.capture, Tools.compare, Tools.benchmark = capture, compare, benchmark
    Tools.select, Tools.report = staticmethod(select), staticmethod(report)
    return Tools


@pytest.mark.parametrize("slug", ["auto", "sdpa", "comfyui"])
def test_a_whole_sampling_and_its_report(foreign, tools, slug):
    model, dispatcher = tools.select(tools.model, slug)
    job = tools.capture.sampling_job(
        model, tools.capture.Size(64, 64), tools.capture.random_conditioning(tools.model), 2
    )
    with torch.inference_mode():
        latent = tools.compare.sampling.run(model, job, None)
    text, data = tools.report(model, latent)
    assert dispatcher.log.current.error is None and data["calls"] == 12
    assert "12 attention calls" in text and "s per step" in text
    assert "is not one that the model's last samplings produced" not in text, "the latent is recognised"


def test_compare_and_benchmark(foreign, tools):
    size = tools.capture.Size(64, 64)
    with torch.inference_mode():
        job = tools.capture.sampling_job(tools.model, size, tools.capture.random_conditioning(tools.model), 2)
        found, images = tools.compare.compare(
            tools.model, job, "comfyui", [tools.compare.backend_variant(s) for s in ("sdpa-math", "flash4")]
        )
        speed = tools.benchmark.benchmark(tools.model, [size], wanted=["sdpa"], call_repeat=1, step_repeat=1)
    assert [name for name, _ in images] == ["comfyui", "sdpa-math"]
    assert found.as_text().startswith("sdpa-math: same image as comfyui")
    assert "NVIDIA" in found.rows[1].reason and found.control is not None
    assert {row.backend for row in speed.rows if row.timing} == {"comfyui", "auto", "sdpa"}
