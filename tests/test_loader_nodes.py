"""The loader nodes as ComfyUI sees them: schema, choices from the model folders, values in and out, and sentences for
what is wrong.
"""

import shutil

import pytest

import small_models as maker

INPUTS = {  # node id -> inputs, in the order that saved workflows rely on; append only
    "Flux2LoadModel": ["model_name", "weight_dtype", "memory"],
    "Flux2LoadTextEncoder": ["text_encoder_name", "device", "padding", "attention", "memory", "load", "precision"],
    "Flux2LoadVAE": ["vae_name", "precision", "memory", "fused_blocks"],
    "Flux2ModelInfo": ["file_name"],
}


@pytest.fixture(scope="module")
def nodes(comfy):
    from flux2_pack.nodes import loaders

    return {node.define_schema().node_id: node for node in loaders.NODES}


@pytest.fixture
def models(comfy, small_models, tmp_path, monkeypatch):
    """ComfyUI's model folders in a folder of their own, with the small models linked into them."""
    import folder_paths

    for folder in ("diffusion_models", "text_encoders", "vae", "checkpoints", "loras", "diffusers"):
        (tmp_path / folder).mkdir()
        extensions = folder_paths.folder_names_and_paths[folder][1]
        monkeypatch.setitem(folder_paths.folder_names_and_paths, folder, ([str(tmp_path / folder)], extensions))
        folder_paths.filename_list_cache.pop(folder, None)
    for kind in ("model", "text_encoder", "vae"):
        (tmp_path / maker.FILES[kind]).symlink_to(small_models[kind])
    yield tmp_path
    folder_paths.filename_list_cache.clear()


def options(node, name):
    return next(item.options for item in node.define_schema().inputs if item.id == name)


def test_ids_and_inputs_are_those_that_workflows_rely_on(nodes):
    assert {node_id: [item.id for item in node.define_schema().inputs] for node_id, node in nodes.items()} == INPUTS


def test_everything_is_explained(nodes):
    for node in nodes.values():
        schema = node.define_schema()
        assert schema.category == "Flux 2/loaders" and schema.description and schema.search_aliases
        assert all(item.tooltip for item in [*schema.inputs, *schema.outputs])


def test_nodes_give_plain_comfyui_types(nodes, models):
    import comfy.model_patcher
    import comfy.sd

    model = nodes["Flux2LoadModel"].execute("flux2-small.safetensors", "as stored").args[0]
    clip = nodes["Flux2LoadTextEncoder"].execute("mistral3-flux2-small.safetensors", "default").args[0]
    vae = nodes["Flux2LoadVAE"].execute("flux2-vae-small.safetensors", "auto").args[0]
    assert (
        isinstance(model, comfy.model_patcher.ModelPatcher)
        and type(clip) is comfy.sd.CLIP
        and type(vae) is comfy.sd.VAE
    )


@pytest.mark.parametrize("needs", [[], ["VRAM at 1024 x 1024: much.", "VRAM at 2048 x 2048: more."]])
def test_the_model_loader_says_what_a_run_needs(nodes, models, monkeypatch, needs):
    """On the node while the graph runs; nothing where there is no GPU to fit into."""
    from flux2_pack.nodes import loaders

    asked, told = [], []
    monkeypatch.setattr(loaders.examine, "video_memory", lambda *facts: asked.append(facts) or needs)
    monkeypatch.setattr(loaders.page_words, "tell", told.append)
    (model,) = nodes["Flux2LoadModel"].execute(maker.FILES["model"].rpartition("/")[2], "bf16").args
    assert asked[-1] == (model.model_size(), model.model.diffusion_model.params.hidden_size) and told == needs[:1]


def test_choices_are_files_and_model_folders(nodes, models):
    folder = models / "diffusion_models" / "dev"
    maker.write(folder / "model-00001-of-00001.safetensors", {})
    (folder / "config.json").write_text("{}")
    part = models / "diffusers" / "FLUX.2-dev" / "transformer"
    part.mkdir(parents=True)
    (part / "config.json").write_text("{}")
    (part.parent / "model_index.json").write_text("{}")
    assert options(nodes["Flux2LoadModel"], "model_name") == [
        "dev",
        "flux2-small.safetensors",
        "FLUX.2-dev/transformer",
    ]
    assert nodes["Flux2LoadModel"].validate_inputs("FLUX.2-dev/transformer") is True
    assert options(nodes["Flux2LoadVAE"], "vae_name") == ["flux2-vae-small.safetensors"]


@pytest.mark.parametrize(
    "node, name",
    [
        ("Flux2LoadModel", "gone.safetensors"),
        ("Flux2LoadTextEncoder", "../x"),
        ("Flux2LoadVAE", "/etc/passwd"),
        ("Flux2ModelInfo", "vae/gone.safetensors"),
    ],
)
def test_a_missing_file_is_said_before_anything_runs(nodes, models, node, name):
    text = nodes[node].validate_inputs(name)
    assert text.startswith("There is no ") and "in the model folder" in text and "small.safetensors" in text
    assert nodes[node].validate_inputs(options(nodes[node], INPUTS[node][0])[0]) is True


def test_an_unknown_folder_is_said(nodes, models):
    assert "There is no model folder 'nowhere'" in nodes["Flux2ModelInfo"].validate_inputs("nowhere/x.safetensors")


def test_info_describes_right_and_wrong_files_without_loading_them(nodes, models):
    info = nodes["Flux2ModelInfo"]
    shutil.copy(models / "vae" / "flux2-vae-small.safetensors", models / "loras" / "misplaced.safetensors")
    (models / "checkpoints" / "notes.safetensors").write_text("these are notes, not a model")
    expected = {
        "diffusion_models/flux2-small.safetensors": [
            "FLUX.2 (custom size)",
            "2 double + 4 single blocks",
            "bf16",
            "On this device",
            "computed in",
        ],
        "text_encoders/mistral3-flux2-small.safetensors": ["Mistral 3 (30 layers, 64 wide)", "Loaded: 30 of 30 layers"],
        "loras/misplaced.safetensors": ["FLUX.2 VAE with a small decoder", "Goes into: Load FLUX.2 VAE (folder vae)"],
        "checkpoints/notes.safetensors": ["notes.safetensors is not a safetensors file"],
    }
    assert set(expected) <= set(options(info, "file_name"))
    for name, parts in expected.items():
        output = info.execute(name)
        text = output.args[0]
        assert all(part in text for part in parts), text
        assert output.ui.as_dict() == {"text": (text,)}
