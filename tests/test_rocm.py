"""What this pack decides on AMD, on a machine without AMD: loaders, selector, auto, reports, Fast Blocks' decisions and
Sequence Parallel's planning under a PyTorch that claims to be a ROCm build (rocm_fixture.py)."""

import re
import types

import pytest
import torch

import aiter_fakes
import rocm_fixture
from rocm_fixture import CARDS, INSTINCT, pretend
from flux2_pack.attention import reference, registry
from flux2_pack.attention.autotune import Tuner
from flux2_pack.attention.backends import sdpa
from flux2_pack.attention.call import AttentionRefused, call_of
from flux2_pack.attention.device import Device
from flux2_pack.attention.dispatch import AttentionDispatcher
from flux2_pack.attention.parallel import degrees
from flux2_pack.attention.status import backends_here

# what a sentence to the owner of an AMD card must not name
FOREIGN = re.compile(r"\b(CUDA|cuDNN|NCCL|NVIDIA|nvcc|Hopper|Blackwell)\b")


@pytest.fixture(params=CARDS)
def rocm(request, monkeypatch):
    return pretend(monkeypatch, request.param, gpus=4)


@pytest.fixture
def mi300(monkeypatch):
    return pretend(monkeypatch, "gfx942", gpus=4)


def tensors(dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(1, 64, 4, 128, generator=generator).to(dtype) for _ in range(3)]


# --- the device ------------------------------------------------------------------------------------------------------


def test_the_device_is_amds_and_its_flags_are_cut_off(rocm):
    name = CARDS[rocm.arch][0]
    assert rocm.device == Device("amd", rocm.arch, name) and str(rocm.device) == f"{name} ({rocm.arch})"
    assert torch.cuda.get_device_properties(0).warp_size == (64 if rocm.arch in INSTINCT else 32)


def test_the_list_of_backends_speaks_of_this_card(rocm, monkeypatch):
    monkeypatch.setattr(backends_here, "describe", registry.describe)
    found = backends_here.list_backends(torch.device("cuda"))
    assert found["machine"]["device"] == str(rocm.device) and "ROCm 7.2" in found["machine"]["PyTorch"]
    for row in found["backends"]:
        fits = registry.row(row["backend"]).hardware.reasons(rocm.device) == []
        assert (row["state"] == backends_here.ELSEWHERE) != fits, row
        if fits:  # a backend of this card: what it lacks is said without another vendor's names
            assert not FOREIGN.search(" ".join([*row["reasons"], row["install"]])), row
        elif "amd" not in registry.row(row["backend"]).hardware.archs:
            assert row["reasons"] == [f"It needs an NVIDIA GPU, and this model runs on an AMD GPU ({rocm.arch})."]
        else:
            assert f"this is {rocm.device.name} ({rocm.arch})" in row["reasons"][0]
    assert backends_here.as_text(found).count(rocm.arch) > 1


def test_each_architecture_fits_the_backends_that_the_page_promises(rocm):
    fits = {slug for slug, row in registry.ROWS.items() if not row.hardware.reasons(rocm.device)}
    assert {"sdpa", "sdpa-flash", "sdpa-efficient", "sdpa-math", "flash2", "aiter-triton", "sage1", "xformers"} <= fits
    assert "sdpa-cudnn" not in fits and not fits & {"flash3", "flash4", "sage2", "sage3"}
    assert ("aiter" in fits) == (rocm.arch in INSTINCT)
    assert ("aiter-v4-bf16" in fits) == (rocm.arch == "gfx950")
    assert ("aiter-flydsl" in fits) == (rocm.arch == "gfx1201")
    assert ("comfy-int8" in fits) == rocm.arch.startswith("gfx1")


# --- calls -----------------------------------------------------------------------------------------------------------


def test_auto_and_the_report_on_each_architecture(rocm):
    dispatcher = AttentionDispatcher("auto", tuner=Tuner())
    q, k, v = tensors()
    out, _ = dispatcher.attend(q, k, v)
    assert reference.relative_error(out, reference.attend(q, k, v)[0]) < 0.01
    (entry,) = dispatcher.log.current.as_data()["entries"]
    text = dispatcher.log.current.as_text()
    assert entry["backend"] == "sdpa" and f"auto on {rocm.device}" in text
    assert "sdpa-cudnn" not in text, "what does not exist here is no candidate"


def test_cudnn_is_refused_and_never_called(rocm):
    with pytest.raises(AttentionRefused, match=f"needs an NVIDIA GPU.*AMD GPU .{rocm.arch}"):
        AttentionDispatcher("sdpa-cudnn").attend(*tensors())


@pytest.mark.parametrize("slug", ["sdpa-flash", "sdpa-efficient"])
def test_aotritons_limits_are_those_that_torch_gives(mi300, monkeypatch, slug):
    """Which calls PyTorch's AMD kernels take differs by version and card: torch is asked, with tensors of the call's
    heads, head size and dtype, and its own words are passed on."""
    asked = []

    def can_use(params, debug=False):
        asked.append((params.query.shape, params.query.dtype, params.enable_gqa))
        if params.query.shape[-1] > 64 and debug:
            import warnings

            warnings.warn("AOTriton takes head sizes up to 64 here")
        return params.query.shape[-1] <= 64

    for name in ("can_use_flash_attention", "can_use_efficient_attention"):
        monkeypatch.setattr(torch.backends.cuda, name, can_use)
    monkeypatch.setattr(sdpa, "ROCM_DEVICE", "cpu")
    sdpa.refused_by_torch.cache_clear()
    q, k, v = tensors()
    found = registry.unsupported(slug, call_of(q, k, v))
    assert len(found) == 1 and "AOTriton takes head sizes up to 64 here" in found[0] and "PyTorch" in found[0]
    assert registry.unsupported(slug, call_of(*(t[..., :64] for t in (q, k, v)))) == []
    assert {(shape[1], shape[-1], dtype) for shape, dtype, _ in asked} == {
        (4, 128, torch.bfloat16),
        (4, 64, torch.bfloat16),
    }
    sdpa.refused_by_torch.cache_clear()


def test_a_rocm_that_cannot_be_asked_refuses_nothing(mi300):
    """No GPU to make tensors on: PyTorch decides at the call."""
    sdpa.refused_by_torch.cache_clear()
    assert registry.unsupported("sdpa-flash", call_of(*tensors())) == []
    sdpa.refused_by_torch.cache_clear()


@pytest.mark.parametrize(
    "arch, slug, kernel",
    [
        ("gfx942", "aiter", "fmha_v3 assembly, rounding nearest away"),
        ("gfx950", "aiter-v4-bf16", "fmha_v4 assembly, BF16 queries and keys, BF16 values"),
        ("gfx942", "aiter-triton", "AITER Triton mha (default, AITER's own tile)"),
        ("gfx1100", "aiter-triton", "AITER Triton mha (dao_ai, AITER's own tile)"),
        ("gfx1201", "aiter-flydsl", "FlyDSL flash attention (gfx1201)"),
        ("gfx950", "aiter-flydsl-fp8", "FlyDSL flash attention, fp8 (gfx950)"),
    ],
)
def test_amds_backends_through_the_dispatcher(monkeypatch, tmp_path, arch, slug, kernel):
    card = pretend(monkeypatch, arch).device
    library = aiter_fakes.Library(monkeypatch, tmp_path).provide(aiter_fakes.MAIN).tiles("gfx942", "gfx950")
    library.on(card, registry.row(slug).module)
    generator = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(1, 256, 4, 128, generator=generator).bfloat16() for _ in range(3))
    dispatcher = AttentionDispatcher(slug, tuner=Tuner())
    out, _ = dispatcher.attend(q, k, v)
    assert reference.relative_error(out, reference.attend(q, k, v)[0]) < 0.06
    (entry,) = dispatcher.log.current.as_data()["entries"]
    assert (entry["backend"], entry["kernel"]) == (slug, kernel)


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tools(comfy):
    import comfy.model_management
    import comfy.sample
    from flux2_pack.flux2.loading import load
    from flux2_pack.nodes import attention

    return types.SimpleNamespace(load=load, nodes=attention, sample=comfy.sample, management=comfy.model_management)


def test_the_loaders_and_the_selector_work_under_a_rocm_torch(tools, small_models, mi300):
    """Files to an image: model, text encoder and VAE load, the selector patches, a step samples, the report names the
    card."""
    with torch.inference_mode():
        model = tools.load.load_model(small_models["model"])
        clip = tools.load.load_text_encoder(small_models["text_encoder"])
        vae = tools.load.load_vae(small_models["vae"])
        prompt = clip.encode_from_tokens_scheduled(clip.tokenize("A hat"))
        chosen = tools.nodes.Flux2SelectAttention.execute(model, "auto").args[0]
        latent = torch.zeros(1, 128, 4, 6)
        noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(1))
        sampled = tools.sample.sample(
            chosen, noise, 1, 1.0, "euler", "simple", prompt, prompt, latent, disable_pbar=True, seed=1
        )
        image = vae.decode(sampled)
    assert torch.isfinite(image).all()
    text = tools.nodes.Flux2AttentionReport.execute(chosen, {"samples": sampled}).args[1]
    assert str(mi300.device) in text and not FOREIGN.search(text)


def test_select_attention_refuses_before_the_model_runs(tools, small_models, mi300):
    with torch.inference_mode():
        model = tools.load.load_model(small_models["model"])
    with pytest.raises(AttentionRefused, match="needs an NVIDIA GPU, and this model runs on an AMD GPU"):
        tools.nodes.Flux2SelectAttention.execute(model, "flash4")
    with pytest.raises(AttentionRefused, match="AITER cannot be imported") as refused:
        tools.nodes.Flux2SelectAttention.execute(model, "aiter")
    assert not FOREIGN.search(str(refused.value))


def test_fast_blocks_decide_by_what_the_card_can(comfy, monkeypatch, rocm):
    import comfy.model_management as management
    from flux2_pack.flux2.fused import fp8_rowwise, kernels

    assert kernels.unavailable(torch.device("cuda")) is None, "Triton comes with PyTorch for ROCm"
    model = types.SimpleNamespace(
        load_device=torch.device("cuda"), model=types.SimpleNamespace(get_dtype_inference=lambda: torch.bfloat16)
    )
    monkeypatch.setattr(management, "supports_fp8_compute", lambda device=None: rocm.arch in ("gfx950", "gfx1201"))
    reason = fp8_rowwise.unavailable_for(model)
    # gfx942 computes in a format of its own
    formats = {"gfx942": torch.float8_e4m3fnuz, "gfx950": torch.float8_e4m3fn, "gfx1201": torch.float8_e4m3fn}
    assert fp8_rowwise.fp8_dtype(model.load_device) == formats.get(rocm.arch)
    assert reason is None if rocm.arch in formats else "no fp8 matrix products" in reason


# --- several GPUs ----------------------------------------------------------------------------------------------------


def test_sequence_parallel_plans_over_amd_gpus(comfy, rocm):
    from flux2_pack.flux2.parallel.workers import devices

    plan, why = devices.plan_ranks(torch.device("cuda"), 4, lambda number: degrees(number, 48))
    assert (plan.ulysses, plan.ring, plan.gpus) == (4, 1, (0, 1, 2, 3)) and plan.device == "cuda"
    peers = rocm.arch in INSTINCT  # Infinity Fabric; Radeon cards often reach each other through the host alone
    assert ("cannot read each other's memory" in why) != peers and not FOREIGN.search(why)
    with pytest.raises(ValueError, match=re.escape(f"8 GPUs were asked for, and there is 4 x {CARDS[rocm.arch][0]}.")):
        devices.plan_ranks(torch.device("cuda"), 8, lambda number: degrees(number, 48))


def test_ranks_on_rocm_are_told_of_rccl_and_see_one_gpu_each(comfy, mi300, monkeypatch):
    from flux2_pack.flux2.parallel.workers import launch, process_groups, versions

    assert versions.versions()["RCCL"] == "2.27.7" and "NCCL" not in versions.versions()
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "4,5,6,7")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    values = launch.environment_of(1, 4, 2, ("127.0.0.1", 1), "secret", 4)
    assert values["HIP_VISIBLE_DEVICES"] == values["CUDA_VISIBLE_DEVICES"] == "6"
    monkeypatch.setattr(process_groups.dist, "is_nccl_available", lambda: False)
    reason = process_groups.unavailable("cuda")
    assert "RCCL" in reason and not FOREIGN.search(reason)


def test_symmetric_memory_is_not_tried_on_amd_unless_asked_for(mi300, monkeypatch):
    from flux2_pack.attention.parallel import symmetric_memory

    monkeypatch.delenv(symmetric_memory.SWITCH, raising=False)
    reason = symmetric_memory.unavailable(torch.device("cuda"))
    assert reason.startswith("it has never been run on AMD GPUs") and symmetric_memory.SWITCH in reason
    monkeypatch.setenv(symmetric_memory.SWITCH, "1")
    assert "AMD" not in (symmetric_memory.unavailable(torch.device("cuda")) or "")


def test_the_pretended_torch_is_put_back():
    assert torch.version.hip is None and rocm_fixture.HIP.startswith("7.2")
