"""Models of a GGUF loader of another pack, by a stand-in (gguf_stand_in.py): the nodes of this pack compute with them
what ComfyUI computes, or refuse in a sentence.

Not covered: the loader itself, which cannot be installed here, and its file format.
"""

import json
import sys
import types

import pytest
import torch

import pack  # noqa: F401
import comfy_server
import small_models as maker
from api_workflow import PictureSettings, fill
from server_fixture import run
from test_server import NODE, latents, with_latents

CLOSE = 1e-5


@pytest.fixture(scope="module")
def tools(comfy):
    import comfy.model_management
    import comfy.sample
    import comfy.sd
    import gguf_stand_in
    from flux2_pack.flux2.checkpoints.header import CheckpointError
    from flux2_pack.flux2.compiled import blocks as compiled
    from flux2_pack.flux2.lora import load as lora
    from flux2_pack.flux2.parallel.workers import replica, gguf as gguf_models
    from flux2_pack.nodes import attention

    global gguf
    gguf = gguf_models

    return types.SimpleNamespace(
        core=comfy, gguf=gguf_stand_in, compiled=compiled, lora=lora, attention=attention, replica=replica,
        Refused=CheckpointError,
    )  # fmt: skip


@pytest.fixture(scope="module")
def weights():
    return maker.diffusion_model(dtype=torch.float32)


@pytest.fixture(scope="module")
def model(tools, weights):
    return tools.gguf.gguf_model(weights)


@pytest.fixture(scope="module")
def plain(tools, weights, tmp_path_factory):
    """ComfyUI's MODEL of the same numbers."""
    file = maker.write(tmp_path_factory.mktemp("gguf") / "plain.safetensors", tools.gguf.unpacked(weights))
    return tools.core.sd.load_diffusion_model(str(file), model_options={"dtype": torch.float32})


def sample(tools, model):
    g = torch.Generator().manual_seed(3)
    noise, context = torch.randn(1, 128, 4, 6, generator=g), torch.randn(1, 20, 192, generator=g) * 0.3
    prompt = [[context, {}]]
    return tools.core.sample.sample(
        model, noise, 2, 1.0, "euler", "simple", prompt, prompt, torch.zeros_like(noise), disable_pbar=True, seed=5
    )


def error(value, wanted):
    return ((value - wanted).norm() / wanted.norm()).item()


def lora_file(folder):
    g, tensors = torch.Generator().manual_seed(4), {}
    for name, shape in {
        "single_transformer_blocks.0.attn.to_qkv_mlp_proj": (2304, 256),
        "transformer_blocks.0.attn.to_k": (256, 256),
        "transformer_blocks.1.attn.to_out.0": (256, 256),
    }.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(4, shape[1], generator=g) * 0.1
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(shape[0], 4, generator=g) * 0.1
        tensors[f"base_model.model.{name}.lora_magnitude_vector"] = torch.rand(shape[0], generator=g) + 0.5
    return maker.write(folder / "lora.safetensors", tensors)


def selected(tools, model):
    return tools.attention.Flux2SelectAttention.execute(model, "sdpa-math").args[0]


def compiled(tools, model):
    clone = model.clone()
    tools.compiled.install(clone, tools.compiled.CompilePlan(backend="eager", on_failure="run eager and report"))
    return clone


def test_the_stand_in_computes_the_numbers_that_it_holds(tools, model, plain):
    assert error(sample(tools, model), sample(tools, plain)) < CLOSE
    assert type(model.clone()).__name__ == "GGUFModelPatcher"


@pytest.mark.parametrize("node", [selected, compiled])
def test_nodes_compute_with_it_what_comfyui_computes(tools, model, plain, node):
    assert error(sample(tools, node(tools, model)), sample(tools, plain)) < CLOSE


def test_the_report_has_every_call(tools, model):
    chosen = selected(tools, model)
    out = sample(tools, chosen)
    report = tools.attention.Flux2AttentionReport.execute(chosen, {"samples": out})
    assert "sdpa-math" in report.args[1] and report.ui["flux2_attention"][0]["calls"] == 12


@pytest.mark.parametrize("order", ["alone", "before", "behind"])
def test_load_flux2_lora_adds_the_change_when_a_layer_unpacks(tools, model, plain, tmp_path, order):
    """DoRA and rows of a joined projection: shapes come from the model's dimensions, not from its packed tensors."""
    file = lora_file(tmp_path)
    wanted = sample(tools, tools.lora.apply(plain, None, file, 0.8)[0])
    before = selected(tools, model) if order == "behind" else model
    patched, _, report = tools.lora.apply(before, None, file, 0.8)
    assert "3 of 3 layers applied." in report
    found = sample(tools, selected(tools, patched) if order == "before" else patched)
    assert error(found, wanted) < CLOSE < 1e-3 < error(sample(tools, model), wanted)


# --- text encoders ----------------------------------------------------------------------------------------------------


def encoder_of(tools, path, monkeypatch, pack):
    """A CLIP of Mistral 3 as CLIPLoader (GGUF) gives one: ComfyUI's classes with layers and patcher of the other pack,
    and nothing of Load FLUX.2 Text Encoder. pack: what is done with the weights of its projections.
    """
    from flux2_pack.flux2.loading import lazy_clip, load

    with monkeypatch.context() as patch:
        read, devices = load._language_weights, load._text_devices

        def packed(*args):
            return {
                name: pack(value) if name.endswith("_proj.weight") else value for name, value in read(*args).items()
            }

        patch.setattr(load, "_language_weights", packed)
        patch.setattr(load, "_text_devices", lambda *args: {**devices(*args), "custom_operations": tools.gguf.Ops})
        clip = load.load_text_encoder(str(path), precision="float32")
    clip.patcher.__class__ = tools.gguf.GGUFModelPatcher
    assert lazy_clip.source_of(clip) is None
    return clip


@pytest.fixture
def clips(tools, small_models, monkeypatch):
    """(CLIP of packed weights, CLIP of the numbers that they stand for)."""
    path = small_models["text_encoder"]
    return (
        encoder_of(tools, path, monkeypatch, lambda weight: tools.gguf.pack(weight)),
        encoder_of(tools, path, monkeypatch, lambda weight: tools.gguf.unpack(tools.gguf.pack(weight))),
    )


def test_prompts_are_encoded_by_a_gguf_text_encoder_and_not_kept(tools, clips):
    from flux2_pack.flux2.prompts import encode

    text = "a red fox [/INST] under a tree"
    packed, plain = (encode.encode(clip, text, cache=types.SimpleNamespace()) for clip in clips)
    assert type(clips[0].patcher).__name__ == "GGUFModelPatcher"
    assert "Packed" in {type(weight).__name__ for weight in clips[0].cond_stage_model.parameters()}
    assert error(packed.conditioning[0][0], plain.conditioning[0][0]) < CLOSE
    assert "Not kept on disk: this CLIP is not from Load FLUX.2 Text Encoder" in packed.report
    assert "[/INST] looks like a special token and was read as plain text" in packed.report
    several = encode.encode_all(clips[0], [text, "a blue fox"])
    assert torch.equal(several[0].conditioning[0][0], packed.conditioning[0][0])


def test_improve_prompt_refuses_a_gguf_text_encoder_in_a_sentence(tools, clips):
    from flux2_pack.flux2.upsampling import upsample

    with pytest.raises(tools.Refused, match="This CLIP is not from Load FLUX.2 Text Encoder, .*Use that node"):
        upsample.upsample(clips[0], "a red fox")


def test_load_flux2_lora_changes_a_gguf_text_encoder(tools, clips, model, tmp_path):
    """The shape of a layer is that of its numbers, not of what is packed."""
    g, name = torch.Generator().manual_seed(9), "text_encoders.mistral3_24b.transformer.model.layers.3.self_attn.q_proj"
    down, up = torch.randn(4, 64, generator=g), torch.randn(256, 4, generator=g)
    file = maker.write(tmp_path / "te.safetensors", {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up})
    outs = []
    for clip in clips:
        _, changed, report = tools.lora.apply(model, clip, file, 0.5)
        assert "text encoder: 1 of 1 layers applied." in report
        outs.append(changed.encode_from_tokens(changed.tokenize("a red fox")))
    assert (
        error(outs[0], outs[1])
        < CLOSE
        < 1e-3
        < error(outs[0], clips[0].encode_from_tokens(clips[0].tokenize("a red fox")))
    )


# --- sequence parallel: the same file by the same loader in another process -------------------------------------------


@pytest.fixture(scope="module")
def installed(tools, weights, tmp_path_factory):
    """(the stand-in's folder in a custom_nodes folder, a GGUF file in a model folder), both known to ComfyUI."""
    import folder_paths

    base = tmp_path_factory.mktemp("installed")
    file = base / "models" / "sub" / "flux2.gguf"
    file.parent.mkdir(parents=True)
    folder = tools.gguf.install(base / "custom_nodes")
    kept = {name: list(folder_paths.folder_names_and_paths[name][0]) for name in ("diffusion_models", "custom_nodes")}
    folder_paths.add_model_folder_path("custom_nodes", str(base / "custom_nodes"), is_default=True)
    folder_paths.add_model_folder_path("diffusion_models", str(base / "models"), is_default=True)
    yield folder, tools.gguf.write(file, weights)
    for name, places in kept.items():
        folder_paths.folder_names_and_paths[name][0][:] = places


@pytest.fixture
def from_file(tools, installed, monkeypatch):
    """A MODEL that the installed stand-in loaded, as the pack's own loader node does."""
    import nodes as core_nodes

    folder, _ = installed
    loader = gguf.imported(folder).NODE_CLASS_MAPPINGS["UnetLoaderGGUF"]
    monkeypatch.setitem(core_nodes.NODE_CLASS_MAPPINGS, "UnetLoaderGGUF", loader)
    monkeypatch.setitem(core_nodes.NODE_CLASS_MAPPINGS, "Flux2SelectAttention", tools.attention.Flux2SelectAttention)
    return loader().load_unet("sub/flux2.gguf", "float16")[0]


def graph(**nodes):
    from comfy_execution.graph import DynamicPrompt

    return DynamicPrompt({name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()})


CHAIN = {
    "loader": ("UnetLoaderGGUF", {"unet_name": "sub/flux2.gguf"}),
    "select": ("Flux2SelectAttention", {"model": ["loader", 0], "backend": "auto"}),
    "parallel": ("Flux2SequenceParallel", {"model": ["select", 0], "gpus": 2}),
    "other": ("UnetLoaderGGUF", {"unet_name": "other.gguf"}),  # for another branch
}


def test_the_file_of_a_model_is_found_in_the_graph(installed, from_file):
    assert gguf.file_of(graph(**CHAIN), "parallel") == str(installed[1])


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"select": ("Flux2SelectAttention", {"backend": "auto"})}, "no Unet Loader .GGUF. is before it"),
        ({"loader": ("UnetLoaderGGUF", {"unet_name": ["text", 0]})}, "comes over a link"),
        (
            {"select": ("Somebodys", {"one": ["loader", 0], "two": ["other", 0]})},
            "2 different files are loaded before it",
        ),
        ({"loader": ("UnetLoaderGGUF", {"unet_name": "gone.gguf"})}, "gone.gguf is in the model folder .* no more"),
        ({"loader": ("SomebodysLoader", {"file": "sub/flux2.gguf"})}, "no Unet Loader .GGUF. is before it"),
    ],
)
def test_a_file_that_the_graph_does_not_tell_is_refused(installed, from_file, changes, reason):
    with pytest.raises(ValueError, match=f"{reason}.*Use Load FLUX.2 Model"):
        gguf.file_of(graph(**CHAIN | changes), "parallel")


def test_without_a_graph_sequence_parallel_refuses_in_a_sentence(tools, model):
    with pytest.raises(ValueError, match="does not say which file it came from"):
        tools.replica.source_of(model)
    with pytest.raises(ValueError, match="no Unet Loader .GGUF. is before it"):
        gguf.file_of(None, None)


def forget_the_pack():
    gguf.imported.cache_clear()
    for name in [name for name in sys.modules if name.startswith("flux2_ranks_gguf")]:
        del sys.modules[name]


def marked(model, file):
    """The MODEL as Sequence Parallel hands it on."""
    model = model.clone()
    model.cached_patcher_init = gguf.how_loaded(model, str(file))
    return model


@pytest.fixture
def worker(tools, installed, monkeypatch):
    """Replica(source) as in a process that rank 0 started: the pack is imported from the folders that it was given."""
    import comfy.model_patcher
    import nodes as core_nodes

    def make(source):
        with monkeypatch.context() as there:
            there.setenv(gguf.CUSTOM_NODES, str(installed[0].parent))
            there.delitem(core_nodes.NODE_CLASS_MAPPINGS, "UnetLoaderGGUF", raising=False)
            there.setattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.CoreModelPatcher)
            forget_the_pack()
            return tools.replica.Replica(json.loads(json.dumps(source)), "cpu")

    return make


def test_a_worker_loads_the_same_weights_by_the_pack_that_is_installed(tools, from_file, installed, worker):
    rank_0 = marked(from_file, installed[1])
    source = tools.replica.source_of(rank_0)
    assert source["loader"] == "Unet Loader (GGUF)"
    assert source["arguments"][:4] == [str(installed[1]), "float16", "default", False]
    replica = worker(source)
    assert type(replica.model).__name__ == "GGUFModelPatcher" and not isinstance(replica.model, type(rank_0))
    assert replica.digest == tools.replica.digest_of(rank_0)
    assert replica.bytes == tools.replica.bytes_on_device(rank_0)
    layer = replica.network.single_blocks[0].linear1
    assert type(layer.weight).__name__ == "Packed" and layer.dequant_dtype is torch.float16


def test_a_worker_s_lora_comes_and_goes_as_that_of_rank_0(tools, from_file, installed, worker, tmp_path):
    """On a CPU the packed weight that is placed is the original: the patches of before must not stay on it."""
    rank_0, file = marked(from_file, installed[1]), lora_file(tmp_path)
    replica, plain = worker(tools.replica.source_of(rank_0)), sample(tools, rank_0)
    for strength in (0.8, -0.4):
        patched = tools.lora.apply(rank_0, None, file, strength)[0]
        assert replica.set_weights(*tools.replica.weights_of(patched)) == 3
        wanted, found = sample(tools, patched), sample(tools, without_patches(replica.model))
        assert error(found, wanted) < CLOSE < 1e-3 < error(wanted, plain)
    replica.set_weights({}, [])
    assert error(sample(tools, without_patches(replica.model)), plain) < CLOSE


def without_patches(model):
    """Its modules as they are: what a worker put on them is not put on again by a sampling."""
    clone = model.clone()
    clone.patches, clone.backup = {}, {}
    clone.unpatch_model = lambda *args, **kwargs: None
    return clone


def test_a_worker_takes_no_pack_that_rank_0_names(tools, installed, tmp_path, monkeypatch):
    """One on another host looks beside its own ComfyUI, whatever base folder rank 0 has."""
    monkeypatch.setattr(gguf, "PACK", tmp_path / "custom_nodes" / "flux2-attention")
    assert gguf.pack_folder() == installed[0]
    monkeypatch.setenv("FLUX2_RANKS_JOINED", "1")
    assert gguf.pack_folder() is None
    own = tools.gguf.install(tmp_path / "custom_nodes", "comfyui-gguf")
    assert gguf.pack_folder() == own.resolve()


@pytest.mark.parametrize(
    "holder, name", [("Linear", "dequant_dtype"), ("Linear", "patch_dtype"), ("", "patch_on_device")]
)
def test_a_pack_that_keeps_its_settings_elsewhere_is_refused(from_file, installed, monkeypatch, holder, name):
    layer = next(one for one in from_file.model.diffusion_model.modules() if hasattr(one, "dequant_dtype"))
    place = next(kind for kind in type(layer if holder else from_file).__mro__ if name in vars(kind))
    if not holder:
        vars(from_file).pop(name, None)
    monkeypatch.delattr(place, name)
    with pytest.raises(ValueError, match="does not say where earlier ones did how it unpacks weights"):
        marked(from_file, installed[1])


def test_a_pack_that_differs_or_is_not_there_is_said(tools, from_file, installed, tmp_path, monkeypatch):
    how = marked(from_file, installed[1]).cached_patcher_init
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv(gguf.CUSTOM_NODES, str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="is not in custom_nodes there. Install the same version on every host"):
        how[0](*how[1])
    with pytest.raises(ValueError, match="look for the pack ComfyUI-GGUF in a folder called comfyui-gguf"):
        marked(from_file, installed[1])
    other = tools.gguf.install(tmp_path)
    monkeypatch.setenv(gguf.CUSTOM_NODES, str(tmp_path))
    with pytest.raises(ValueError, match="it comes from ComfyUI-GGUF, where the other processes look .* and find"):
        marked(from_file, installed[1])
    (other / "nodes.py").write_text("raise ImportError('No module named gguf')\n")
    with pytest.raises(ValueError, match="is not the same as on rank 0"):
        how[0](*how[1])
    file, *settings, _ = how[1]
    forget_the_pack()
    monkeypatch.setitem(sys.modules, "nodes", types.ModuleType("nodes"))  # a worker's: no pack is registered
    with pytest.raises(ValueError, match="cannot be imported there .ImportError: No module named gguf"):
        how[0](file, *settings, gguf.digest_of(other))


def test_comfyui_reloads_the_model_from_the_same_file(tools, from_file, installed):
    """As ComfyUI does for copies on other devices."""
    rank_0 = marked(from_file, installed[1])
    function, arguments = rank_0.cached_patcher_init
    again = function(*arguments, disable_dynamic=True)
    assert tools.replica.digest_of(again) == tools.replica.digest_of(rank_0) and again.model is not rank_0.model


@pytest.fixture(scope="module")
def gguf_server(tools, comfyui, model_files, weights, tmp_path_factory):
    """A server with the stand-in among its packs, and two ranks on the CPU."""
    base = tmp_path_factory.mktemp("server")
    made = base / "made"
    made.mkdir()
    tools.gguf.install(base / "comfyui" / "custom_nodes")
    models = {
        **model_files,
        "diffusion_models": [tools.gguf.write(made / "flux2.gguf", weights)],
        "loras": [lora_file(made)],
    }
    packs = ["--whitelist-custom-nodes", comfy_server.PACK, "ComfyUI-GGUF"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLUX2_CPU_RANKS", "2")
        with comfy_server.ComfyServer(
            comfyui, models=models, base=base / "comfyui", arguments=["--cpu", "--force-fp32", *packs]
        ) as running:
            yield running


def test_two_ranks_in_a_server_give_the_image_of_one(gguf_server, model_files):
    """Loader of the other pack, LoRA and Sequence Parallel, as a user connects them."""
    names = {folder: files[0].name for folder, files in model_files.items()}
    settings = {"models": names, "width": 128, "height": 96, "steps": 3}

    def latent(gpus):
        workflow = fill(PictureSettings("A red fox", **settings, gpus=gpus))
        key = next(key for key, node in workflow.items() if node["class_type"] == "Flux2LoadModel")
        for node in workflow.values():
            node["inputs"].update({name: ["lora", 0] for name, value in node["inputs"].items() if value == [key, 0]})
        workflow[key] = {"class_type": "UnetLoaderGGUF", "inputs": {"unet_name": "flux2.gguf"}}
        workflow["lora"] = {
            "class_type": "Flux2LoadLoRA",
            "inputs": {"model": [key, 0], "lora_name": "lora.safetensors", "strength": 0.8},
        }
        done = run(gguf_server, with_latents(workflow, (NODE["report"], 0)))
        (report,) = done.collect("flux2_attention")
        return latents(gguf_server, done)[0], report, "".join(done.collect("text"))

    one, _, said = latent(1)
    two, report, _ = latent(2)
    assert "3 of 3 layers applied." in said
    assert [rank["rank"] for rank in report["parallel"]["ranks"]] == [0, 1]
    assert error(two, one) < 1e-6 and not torch.equal(two, one)


# --- loaders ----------------------------------------------------------------------------------------------------------


def test_our_loaders_and_model_info_name_the_loader_of_gguf_files(tools, tmp_path):
    from flux2_pack.flux2.loading import load

    file = tmp_path / "flux2.gguf"
    file.write_bytes(b"GGUF" + bytes(64))
    for read in (load.load_model, load.load_text_encoder, load.load_vae):
        with pytest.raises(tools.Refused, match=r"Unet Loader \(GGUF\) or CLIPLoader \(GGUF\)"):
            read(file)
