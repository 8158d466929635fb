"""Memory modes by ComfyUI's own accounting: what load_models_gpu, free_memory and the samplers do to a component in
each mode.

With a GPU, on it; else on a pretended one, the device cpu:0, whose free memory is a budget less what ComfyUI counts as
loaded. Also the peak of host memory while a diffusers folder is loaded. Not covered: speed, and ComfyUI's dynamic
patchers (they need an NVIDIA GPU).
"""

import json
from pathlib import Path
import subprocess
import sys

import pytest
import torch

import small_models as maker

BUDGET = 3 * 2**30  # bytes; ComfyUI keeps 1.2 GiB of them free for the calculation
PROMPT = "Add a cool hat to the cat"
LOADERS = {"model": "load_model", "text_encoder": "load_text_encoder", "vae": "load_vae"}


@pytest.fixture(scope="module")
def load(comfy):
    from flux2_pack.flux2.loading import load

    return load


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def files(small_models, tmp_path_factory):
    """A still smaller diffusion model, in float32, which a CPU computes faster; text encoder and VAE as ever."""
    weights = maker.diffusion_model(double=1, single=1, dtype=torch.float32)
    return {**small_models, "model": maker.write(tmp_path_factory.mktemp("tiny") / "model.safetensors", weights)}


class Card:
    """The GPU: its device, and how much of it may be used (`budget`, bytes)."""

    def __init__(self, device):
        self.device, self.budget = device, BUDGET

    def free(self):
        import comfy.model_management as management

        return self.budget - sum(
            loaded.model.loaded_size() for loaded in management.current_loaded_models if loaded.model is not None
        )


@pytest.fixture
def card(load, monkeypatch):
    import comfy.model_management as management

    real = torch.cuda.is_available()
    card = Card(torch.device("cuda", torch.cuda.current_device()) if real else torch.device("cpu", 0))
    # what ComfyUI loaded before would be collected unnoticed while its list is another one
    management.unload_all_models()
    monkeypatch.setattr(management, "current_loaded_models", [])
    monkeypatch.setattr(
        management,
        "get_free_memory",
        lambda device=None, torch_free_too=False: (card.free(), 0) if torch_free_too else card.free(),
    )
    if not real:
        monkeypatch.setattr(management, "get_torch_device", lambda: card.device)
        monkeypatch.setattr(management, "is_device_cpu", lambda device: device.type == "cpu" and device.index is None)
        for name, value in (("vram_state", management.VRAMState.NORMAL_VRAM), ("lowvram_available", True)):
            monkeypatch.setattr(management, name, value)
        monkeypatch.setattr(management, "should_use_fp16", lambda *args, **kwargs: True)
        monkeypatch.setattr(management, "get_all_torch_devices", lambda *args, **kwargs: [card.device])
    return card


def made(load, files, kind, memory, **arguments):
    """(component, its patcher)."""
    component = getattr(load, LOADERS[kind])(files[kind], memory_mode=memory, **arguments)
    return component, getattr(component, "patcher", component)


def use(component, kind):
    """Draw, encode or decode once; returns the result."""
    import comfy.sample

    if kind == "text_encoder":
        return component.encode_from_tokens(component.tokenize(PROMPT))
    latent = torch.zeros(1, 128, 4, 4)
    if kind == "vae":
        return component.decode(latent)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(1))
    prompt = [[torch.zeros(1, 8, 192), {}]]
    return comfy.sample.sample(
        component, noise, 1, 1.0, "euler", "simple", prompt, prompt, latent, disable_pbar=True, seed=1
    )


def on_card(patcher, card):
    """Bytes that ComfyUI counts on the card for a model, checked against where the weights are if the card is real."""
    if card.device.type == "cuda":
        there = sum(p.numel() * p.element_size() for p in patcher.model.parameters() if p.device == card.device)
        assert abs(there - patcher.loaded_size()) < 2**20
    return patcher.loaded_size() if patcher.current_loaded_device() == card.device else 0


@pytest.mark.parametrize("kind", LOADERS)
def test_auto_is_comfyui_as_it_is(load, card, files, kind):
    import comfy.model_management as management

    component, patcher = made(load, files, kind, "auto")
    use(component, kind)
    assert on_card(patcher, card) >= 0.99 * patcher.model_size()
    management.unload_all_models()
    assert on_card(patcher, card) == 0


@pytest.mark.parametrize("kind", LOADERS)
def test_cpu_when_idle_leaves_the_card_after_each_use(load, card, files, kind):
    import comfy.model_management as management

    plain = use(made(load, files, kind, "auto")[0], kind)
    component, patcher = made(load, files, kind, "CPU when idle")
    during = watch(patcher, card)
    for _ in range(2):
        assert torch.equal(use(component, kind), plain)
        assert on_card(patcher, card) == 0 and all(
            loaded.model is not patcher for loaded in management.current_loaded_models
        )
    assert max(during) >= 0.99 * patcher.model_size()


def watch(patcher, card):
    """A list that receives the bytes on the card at the start of every forward pass of a part of the model."""
    seen = []
    part = next(
        module for name, module in patcher.model.named_modules() if name.endswith(("img_in", "layers.0", "decoder"))
    )
    part.register_forward_pre_hook(lambda *_: seen.append(on_card(patcher, card)))
    return seen


@pytest.mark.parametrize("kind", LOADERS)
def test_keep_on_gpu_stays_whoever_needs_the_room(load, card, files, kind):
    import comfy.model_management as management

    plain = use(made(load, files, kind, "auto")[0], kind)
    component, patcher = made(load, files, kind, "keep on GPU")
    assert torch.equal(use(component, kind), plain)
    size = on_card(patcher, card)
    assert size >= 0.99 * patcher.model_size()
    management.free_memory(1e30, card.device)
    management.unload_all_models()
    assert on_card(patcher, card) == size
    assert torch.equal(use(component, kind), plain) and on_card(patcher, card) == size


def test_layer_by_layer_never_counts_the_layers_as_loaded(load, card, files):
    plain = use(made(load, files, "model", "auto")[0], "model")
    model, patcher = made(load, files, "model", "layer by layer")
    during = watch(patcher, card)
    assert torch.equal(use(model, "model"), plain)
    assert len(during) == 1 and max(during) < 0.01 * patcher.model_size() and patcher.model.model_lowvram


def test_room_for_a_kept_model_is_what_fits(load, card, files):
    """Too small a card: ComfyUI loads a part, and giving way does not move the rest to the card."""
    import comfy.model_management as management

    whole = made(load, files, "model", "auto")[1].model_size()
    card.budget = int(management.minimum_inference_memory() + 0.6 * whole)
    model, patcher = made(load, files, "model", "keep on GPU")
    management.load_models_gpu([patcher], memory_required=0)
    part = on_card(patcher, card)
    assert 0 < part < 0.7 * whole
    management.free_memory(1e30, card.device)
    assert on_card(patcher, card) == part


@pytest.mark.parametrize("memory", ["keep on GPU", "CPU when idle", "layer by layer"])
def test_modes_survive_clones_and_loras(load, card, files, memory):
    import comfy.sd

    _, patcher = made(load, files, "model", memory)
    lora = {
        "diffusion_model.single_blocks.0.linear1.lora_A.weight": torch.ones(1, 256),
        "diffusion_model.single_blocks.0.linear1.lora_B.weight": torch.ones(2304, 1),
    }
    changed = comfy.sd.load_lora_for_models(patcher.clone(disable_dynamic=True), None, lora, 0.5, 0)[0].clone()
    core = comfy.sd.load_lora_for_models(load.load_model(files["model"]), None, lora, 0.5, 0)[0]
    before, after = use(patcher, "model"), use(changed, "model")
    assert type(changed) is type(patcher) and changed.callbacks == patcher.callbacks
    # ComfyUI adds a LoRA to layers that it fetches while they are computed: in bf16 the rounding differs by a tenth of
    # this LoRA's effect.
    expected = use(core, "model")
    assert (after - expected).norm() < 0.25 * (expected - before).norm()
    share = {"keep on GPU": 1, "CPU when idle": 0, "layer by layer": 0}[memory]
    assert on_card(changed, card) == pytest.approx(share * patcher.model_size(), abs=0.01 * patcher.model_size())
    assert torch.equal(use(patcher, "model"), before)  # without the LoRA again


@pytest.mark.parametrize(
    "kind, memory", [("model", "layer by layer"), ("text_encoder", "keep on GPU"), ("vae", "CPU when idle")]
)
def test_modes_survive_reloading_for_another_device(load, card, files, kind, memory):
    _, patcher = made(load, files, kind, memory)
    again = patcher.deepclone_multigpu(card.device)
    assert type(again) is type(patcher) and again.callbacks == patcher.callbacks and again.model is not patcher.model
    factory, arguments = patcher.cached_patcher_init
    assert type(factory(*arguments, disable_dynamic=True)) is type(patcher)


def test_a_cancelled_sampling_leaves_the_card_too(load, card, files):
    import comfy.model_management as management

    model, patcher = made(load, files, "model", "CPU when idle")

    def cancel(*_):
        raise management.InterruptProcessingException()

    handle = patcher.model.diffusion_model.final_layer.register_forward_pre_hook(cancel)
    with pytest.raises(management.InterruptProcessingException):
        use(model, "model")
    handle.remove()
    assert on_card(patcher, card) == 0 and use(model, "model").isfinite().all()


def test_idle_keeps_other_models_on_the_card(load, card, files):
    model, kept = made(load, files, "model", "auto")
    use(model, "model")
    clip, patcher = made(load, files, "text_encoder", "CPU when idle")
    use(clip, "text_encoder")
    assert on_card(patcher, card) == 0 < on_card(kept, card)


@pytest.mark.parametrize("memory", ["keep on GPU", "CPU when idle", "layer by layer"])
def test_without_a_gpu_nothing_changes(load, files, memory, caplog):
    with caplog.at_level("INFO"):
        model, patcher = made(load, files, "model", memory)
    assert "changes nothing" in caplog.text
    assert torch.equal(use(model, "model"), use(made(load, files, "model", "auto")[0], "model"))
    assert not patcher.model.model_lowvram


def test_a_large_idle_encoder_does_not_start_on_the_card(load, card, files, monkeypatch):
    """ComfyUI puts an encoder of a GiB and more on the card when it is made, if there is room."""
    import comfy.model_management as management

    monkeypatch.setattr(
        management, "text_encoder_initial_device", lambda load_device, offload_device, model_size=0: load_device
    )
    sizes = {
        memory: on_card(made(load, files, "text_encoder", memory)[1], card)
        for memory in ("auto", "keep on GPU", "CPU when idle")
    }
    assert min(sizes["auto"], sizes["keep on GPU"]) > 0 == sizes["CPU when idle"]


def test_an_ordinary_vae_device_node_copies_an_idle_vae(load, card, files):
    """Core's Select VAE Device makes a shallow copy with a cloned patcher."""
    import copy

    vae, _ = made(load, files, "vae", "CPU when idle")
    other = copy.copy(vae)
    other.patcher = vae.patcher.clone()
    assert use(other, "vae").isfinite().all() and on_card(other.patcher, card) == 0


# --- host memory -----------------------------------------------------------------------------------------------------


def folder_in_diffusers_keys(folder, hidden, double, single):
    """A transformer/ folder with zeros in it; returns its bytes of weights."""
    from flux2_pack.flux2.checkpoints import keys, variants

    variant, _ = variants.find(hidden, double, single, 192, True)
    weights = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in keys.diffusers_shapes(variant).items()}
    maker.write(folder / "diffusion_pytorch_model.safetensors", weights)
    (folder / "config.json").write_text("{}")
    return sum(value.nbytes for value in weights.values())


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux' account of a process' memory")
def test_a_diffusers_folder_takes_its_own_size_of_host_memory(comfy, tmp_path):
    """The joined weights are a quarter of this one: made beside the model's own, they would show."""
    size = folder_in_diffusers_keys(tmp_path / "transformer", hidden=1024, double=5, single=0)
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("peak_of_loading.py"), tmp_path / "transformer"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert 0.9 * size < found["peak"] < 1.1 * size, (found, size)
    assert found["model"] == pytest.approx(size, rel=0.01)


def test_a_dynamic_patcher_gets_the_joined_weights_themselves(load, dev_folder, monkeypatch):
    """ComfyUI's dynamic patchers hold the mapped tensors; pretend one, as the real needs an NVIDIA GPU."""
    import comfy.model_patcher

    plain = load.load_model(dev_folder).model.state_dict()

    class Dynamic(comfy.model_patcher.ModelPatcher):
        def is_dynamic(self):
            return True

    monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", Dynamic)
    patcher = load.load_model(dev_folder)
    dynamic = patcher.model.state_dict()
    assert patcher.is_dynamic() and plain.keys() == dynamic.keys()
    assert all(torch.equal(plain[name], dynamic[name]) and dynamic[name].is_contiguous() for name in plain)


@pytest.fixture(scope="module")
def dev_folder(comfy, tmp_path_factory):
    """A diffusers folder with random weights."""
    from flux2_pack.flux2.checkpoints import keys, variants

    folder = tmp_path_factory.mktemp("dev") / "transformer"
    variant, _ = variants.find(256, 1, 1, 192, True)
    w = maker.Weights("folder", torch.bfloat16)
    for name, shape in keys.diffusers_shapes(variant).items():
        w.uniform(name, shape, -1, 1)
    maker.write(folder / "diffusion_pytorch_model.safetensors", w.tensors)
    (folder / "config.json").write_text("{}")
    return folder
