"""Models of a GGUF loader of another pack, by a stand-in (gguf_stand_in.py): the nodes of this pack compute with them
what ComfyUI computes, or refuse in a sentence.

Not covered: the loader itself, which cannot be installed here, and its file format.
"""

import types

import pytest
import torch

import small_models as maker

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
    from flux2_pack.flux2.parallel.workers import replica
    from flux2_pack.nodes import attention

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
    assert type(model.clone()).__name__ == "Patcher"


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


def test_sequence_parallel_refuses_what_cannot_be_loaded_again(tools, model):
    with pytest.raises(ValueError, match="loads this model on every GPU, and its loader does not say how"):
        tools.replica.source_of(model)


def test_our_loaders_and_model_info_name_the_loader_of_gguf_files(tools, tmp_path):
    from flux2_pack.flux2.loading import load

    file = tmp_path / "flux2.gguf"
    file.write_bytes(b"GGUF" + bytes(64))
    for read in (load.load_model, load.load_text_encoder, load.load_vae):
        with pytest.raises(tools.Refused, match=r"Unet Loader \(GGUF\) or CLIPLoader \(GGUF\)"):
            read(file)
