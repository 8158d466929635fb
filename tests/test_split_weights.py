"""Weights split over the GPUs, on two and four CPU ranks: the latents of one process, a share of the weights on each.

Rank 0 is this process, the others are started from flux2/parallel/workers/worker.py and talk gloo. What a cancel, a
kill and a lack of memory do is test_ranks.py's, run here on split weights. Fast Blocks: fast_blocks_interpreted.py; a
running server: test_parallel_nodes.py. Not covered: NCCL and GPU memory (benchmarks/parallel.py --weights split).
"""

import gc
import json
from types import SimpleNamespace

import pytest
import torch

import small_models as files
import split_in_process
from test_quantised_files import quantise
from test_ranks import (  # noqa: F401
    CASES,
    anonymous,
    difference,
    easy_cached,
    expected,
    kv_cached,
    lora,
    model,
    our_lora,
    ranks_on_cpu,
    sample,
    selected,
    session,
    test_a_cancel_between_two_steps_begins_no_pass,
    test_a_cancel_in_a_step_returns_at_once_and_everything_stays,
    test_a_killed_rank_is_named_and_the_next_prompt_rebuilds,
    test_a_rank_out_of_memory_is_named_and_the_next_prompt_works,
    test_a_rank_that_fails_before_the_exchanges_leaves_nobody_waiting_in_them,
    test_compare_and_benchmark_measure_a_model_on_several_gpus,
    test_kills_and_cancels_at_random_moments_lose_nothing,
    test_unloading_frees_every_rank,
    tools,
    what_is_edited_while_the_tests_run,
)

SAME = 1e-6  # relative, float32
SHARE = 0.55  # of the weights that each of two ranks may hold


def split(tools, model, number=2, **degrees):
    with ranks_on_cpu(number):
        return tools.parallel.parallel(model, weights=tools.parallel.SPLIT, **degrees)


@pytest.fixture(scope="module")
def two(tools, model):
    """The model with its weights on two ranks. Every process is gone afterwards."""
    made = split(tools, model)
    yield made
    tools.session.existing(made.model).stop()


def block_layers(weights):
    return [name.removesuffix(".weight") for name in weights if "_blocks." in name and "norm" not in name]


# --- same latents ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_with_half_of_the_weights_give_the_latents_of_one(tools, model, two, case):
    assert difference(sample(tools, two, **CASES[case]), sample(tools, model, **CASES[case])) < SAME


@pytest.mark.parametrize("before", [True, False], ids=["before the node", "behind the node"])
@pytest.mark.parametrize(
    "patch, case, effect",
    [
        (lambda tools, model: lora(tools, model, 0.7), {}, 1e-3),
        (our_lora, {}, 1e-3),
        (kv_cached, {"references": [(4, 5)], "steps": 3}, 1e-4),
        (easy_cached, {"steps": 6}, 1e-3),
        (selected, {}, 0),
    ],
    ids=["LoRA", "Load FLUX.2 LoRA with DoRA", "Flux KV Cache", "EasyCache", "Select Attention"],
)
def test_what_is_on_the_model_works_with_split_weights(tools, model, two, patch, case, effect, before):
    """effect: how far it moves the latents on one rank, so that a rank without it would show."""
    alone = sample(tools, patch(tools, model), **case)
    assert difference(alone, sample(tools, model, **case)) >= effect
    ours = split(tools, patch(tools, model)) if before else patch(tools, two)
    assert ours.model is two.model, "no part is loaded again"
    assert difference(sample(tools, ours, **case), alone) < SAME
    assert difference(sample(tools, two, **case), sample(tools, model, **case)) < SAME, "and it leaves with its node"


def test_the_model_that_came_in_stays_whole(tools, model, two):
    whole = sample(tools, model)
    sample(tools, two)
    assert torch.equal(sample(tools, model), whole) and two.model is not model.model
    weight = model.model.diffusion_model.single_blocks[0].linear1.weight
    assert tuple(weight.shape) == (9 * 256, 256)


@pytest.mark.parametrize("ulysses, ring", [(2, 0), (0, 2)], ids=["Ulysses 2", "ring 2"])
def test_four_ranks_share_the_weights_in_pairs_and_the_tokens_between_them(tools, tmp_path, ulysses, ring):
    weights = files.diffusion_model(hidden=512, double=1, single=2, dtype=torch.float32)
    model = tools.load.load_model(str(files.write(tmp_path / "four-heads.safetensors", weights)))
    ours = selected(tools, split(tools, model, 4, ulysses=ulysses, ring=ring))
    case = {"references": [(4, 5)], "text": 33}
    try:
        assert difference(sample(tools, ours, **case), sample(tools, selected(tools, model), **case)) < SAME
        text, data = tools.report.report(ours)
        assert (data["ulysses"], data["ring"], data["parts"]) == (ulysses or 1, ring or 1, 2)
        tokens = [row["tokens"] for row in data["ranks"]]
        assert tokens[0] == tokens[1] and tokens[2] == tokens[3] and len(data["ranks"]) == 4
    finally:
        tools.session.existing(ours.model).stop()


@pytest.mark.parametrize("case", ["fp8", "fp8 e5m2", "int8", "int8 a scale for each row", "int8 ConvRot"])
def test_quantised_weights_are_cut_with_their_scales(tools, tmp_path, case):
    """Each part dequantised is the part of the whole dequantised, and the sums give what one process gives."""
    weights, _, marks = quantise(files.diffusion_model(dtype=torch.float32), LAYERS_OF_ALL_CUTS, case)
    text = {"_quantization_metadata": json.dumps({"layers": marks})}
    path = files.write(tmp_path / "quantised.safetensors", weights, text)
    whole = tools.load.load_model(str(path))
    parts = split_in_process.parts_of(lambda: tools.load.load_model(str(path)), 2)
    for layer in LAYERS_OF_ALL_CUTS:
        cut = parts[0].model.diffusion_model.tensor_parallel.cuts[f"diffusion_model.{layer}.weight"]
        dense = whole.model.diffusion_model.get_submodule(layer).weight.dequantize()
        for rank, part in enumerate(parts):
            held = part.model.diffusion_model.get_submodule(layer).weight
            assert torch.equal(held.dequantize(), cut.of(dense, rank, 2))
    generator = torch.Generator().manual_seed(3)
    given = torch.randn(1, 128, 4, 4, generator=generator), torch.tensor([0.5])
    given = (*given, torch.randn(1, 9, 192, generator=generator))

    def predicted(model):
        with torch.inference_mode():
            return model.model.diffusion_model(*given, guidance=torch.tensor([4.0])).float()

    found = split_in_process.together(parts, predicted)
    # int8 rounds its input to steps of each rank's own share of a token
    assert difference(found[0][0], predicted(whole)) < (SAME if "fp8" in case else 0.02)
    assert torch.equal(found[0][0], found[1][0])


LAYERS_OF_ALL_CUTS = (
    "double_blocks.0.img_attn.qkv",
    "double_blocks.0.txt_attn.proj",
    "double_blocks.1.txt_mlp.0",
    "double_blocks.1.img_mlp.2",
    "single_blocks.0.linear1",
    "single_blocks.3.linear2",
)


@torch.inference_mode()  # as in a server: ComfyUI patches quantised weights only there
def test_an_fp8_file_with_a_lora_on_two_ranks(tools, tmp_path):
    weights = files.diffusion_model(double=1, single=2, dtype=torch.float32)
    weights, _, marks = quantise(weights, block_layers(weights), "fp8")
    text = {"_quantization_metadata": json.dumps({"layers": marks})}
    model = tools.load.load_model(str(files.write(tmp_path / "fp8.safetensors", weights, text)))
    ours = split(tools, model)
    try:
        assert difference(sample(tools, ours), sample(tools, model)) < SAME
        text = "double_blocks.0.img_mlp.2", "single_blocks.1.linear2"
        patched = [lora_on(tools, one, text) for one in (ours, model)]
        alone = sample(tools, patched[1])
        assert difference(alone, sample(tools, model)) > 1e-3
        assert difference(sample(tools, patched[0]), alone) < SAME, "requantised as one process does it"
    finally:
        tools.session.existing(ours.model).stop()


def lora_on(tools, model, layers):
    generator, state = torch.Generator().manual_seed(4), {}
    for layer in layers:
        rows, columns = (256, 768) if layer.endswith("mlp.2") else (256, 1024)
        state[f"diffusion_model.{layer}.lora_up.weight"] = torch.randn((rows, 4), generator=generator) * 0.1
        state[f"diffusion_model.{layer}.lora_down.weight"] = torch.randn((4, columns), generator=generator) * 0.1
    return tools.core.sd.load_lora_for_models(model, None, state, 1.0, 0)[0]


# --- what each rank holds --------------------------------------------------------------------------------------------


def test_each_rank_holds_its_share_and_the_report_says_so(tools, tmp_path):
    """A model of FLUX.2's proportions: most of its weights are in blocks."""
    weights = files.diffusion_model(double=2, single=20, dtype=torch.float32)
    whole = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    model = tools.load.load_model(str(files.write(tmp_path / "deep.safetensors", weights)))
    ours = split(tools, model)
    try:
        assert difference(sample(tools, ours, steps=1), sample(tools, model, steps=1)) < SAME
        held = sum(weight.numel() * weight.element_size() for weight in ours.model.diffusion_model.parameters())
        storages = {weight.untyped_storage().data_ptr(): weight.untyped_storage().nbytes() for weight in cut_in(ours)}
        assert sum(storages.values()) == sum(weight.numel() * weight.element_size() for weight in cut_in(ours))
        text, data = tools.report.report(ours)
        assert data["parts"] == 2 and [row["weights_bytes"] for row in data["ranks"]] == [held, held]
        assert held <= SHARE * whole and "weights split over 2" in text and f"{held / 1e9:.2f} GB of weights" in text
        assert all(row["sent_bytes"] > 0 for row in data["ranks"])
        tools.management.unload_all_models()
        assert tuple(ours.model.diffusion_model.single_blocks[0].linear1.weight.shape) == (9 * 256, 256)
        assert ours.loaded_size() == 0 and ours.model_size() == held
    finally:
        tools.session.existing(ours.model).stop()


def test_host_memory_holds_the_part_and_no_copy_of_the_mapped_file(tools, tmp_path):
    """On the CPU the part itself lies in host memory; on a GPU it does not."""
    weights = files.diffusion_model(hidden=512, dtype=torch.float32)
    path = files.write(tmp_path / "float32.safetensors", weights)
    source = tools.replica.source_of(tools.load.load_model(str(path)))
    gc.collect()
    before = anonymous()
    replica = tools.replica.Replica({**source, "parts": 2}, "cpu", 1)
    assert 0.5 < replica.bytes / path.stat().st_size < 0.62
    # what is not cut stays mapped here; one weight is on its way at a time
    assert anonymous() - before < 0.6 * path.stat().st_size


def cut_in(model):
    network = model.model.diffusion_model
    names = [key.removeprefix("diffusion_model.") for key in network.tensor_parallel.cuts]
    return [network.get_parameter(name) for name in names]


@pytest.mark.parametrize("name, parts, most", [("dev", 2, SHARE), ("klein 9B", 2, SHARE), ("klein 4B", 2, SHARE)])
def test_the_published_models_split_within_the_target(tools, name, parts, most):
    from flux2_pack.benchmarks import full_size
    from flux2_pack.flux2.parallel import tensor_parallel

    network = network_of({"dev": full_size.DEV, "klein 9B": full_size.KLEIN_9B, "klein 4B": full_size.KLEIN_4B}[name])
    assert tensor_parallel.unsupported(network, parts) == []
    cuts = {f"{layer}.weight" for layer in tensor_parallel.cuts_of(network)}
    sizes = {key: weight.numel() for key, weight in network.named_parameters()}
    held = sum(size // (parts if key in cuts else 1) for key, size in sizes.items())
    assert held <= most * sum(sizes.values())


def network_of(sizes):
    """A network of these sizes without memory."""
    import comfy.ops
    from comfy.ldm.flux.model import Flux

    rest = {
        "axes_dim": [32] * 4,
        "num_heads": sizes["hidden_size"] // 128,
        "mlp_ratio": 3.0,
        "theta": 2000,
        "in_channels": 128,
        "out_channels": 128,
        "patch_size": 1,
        "vec_in_dim": None,
        "global_modulation": True,
        "mlp_silu_act": True,
        "qkv_bias": False,
        "ops_bias": False,
        "txt_ids_dims": [3],
    }
    return Flux(**rest, **sizes, device="meta", dtype=torch.bfloat16, operations=comfy.ops.disable_weight_init)


def test_another_lora_writes_its_weights_again_and_no_others(tools, two, monkeypatch):
    sample(tools, two)
    placed = []
    original = tools.replica.place
    monkeypatch.setattr(
        tools.replica, "place", lambda patcher, key, *rest: placed.append(key) or original(patcher, key, *rest)
    )
    sample(tools, lora(tools, two, 0.4))
    assert len(placed) == 3
    sample(tools, lora(tools, two, 0.2))
    assert len(placed) == 6
    sample(tools, two)
    assert len(placed) == 9, "taken from the file again"
    sample(tools, two)
    assert len(placed) == 9


# --- what is refused -------------------------------------------------------------------------------------------------


def test_numbers_of_gpus_that_do_not_work_are_refused_with_those_that_do(tools, model):
    for number, degrees in ((3, {}), (2, {"ulysses": 2}), (4, {"ulysses": 3}), (4, {"ulysses": 2})):
        with pytest.raises(
            ValueError, match=r"Weights cannot be split over \d GPUs .* these numbers of GPUs work: 2\."
        ):
            split(tools, model, number, **degrees)


def test_formats_whose_parts_are_not_known_are_refused_by_layer(tools, tmp_path):
    for case, said in (
        ("nvfp4", "scales for blocks of numbers"),
        ("mxfp8", "scales for blocks of numbers"),
        ("w4a4", "scales for blocks of numbers"),
    ):
        layer = "single_blocks.1.linear2"
        weights, _, marks = quantise(files.diffusion_model(dtype=torch.float32), (layer,), case)
        text = {"_quantization_metadata": json.dumps({"layers": marks})}
        model = tools.load.load_model(str(files.write(tmp_path / f"{case}.safetensors", weights, text)))
        with pytest.raises(ValueError, match=f"{layer}: its format .*{said}"):
            split(tools, model)
        assert tools.session.existing(model.model) is None


def test_layers_that_do_not_name_their_format_are_refused_by_its_class():
    from flux2_pack.flux2.parallel import tensor_parallel

    def said(layout, **others):
        layer = SimpleNamespace(weight=SimpleNamespace(_layout_cls=layout), **others)
        return tensor_parallel.cannot_cut(layer, tensor_parallel.Cut(tensor_parallel.OUTPUTS, (4,)), 2)

    assert "its format (SomebodysLayout) has scales for blocks of numbers" in said("SomebodysLayout")
    assert "its format (mxfp8)" in said("SomebodysLayout", quant_format="mxfp8")
    assert "scales for the layer's inputs" in said(
        "TensorCoreFP8E4M3Layout", quant_format="float8_e4m3fn", pre_quant_scale=torch.ones(4)
    )


def test_a_rotation_that_a_part_would_end_inside_of_is_refused(tools, tmp_path):
    from flux2_pack.flux2.parallel import tensor_parallel

    weights, _, marks = quantise(files.diffusion_model(dtype=torch.float32), LAYERS_OF_ALL_CUTS, "int8 ConvRot")
    text = {"_quantization_metadata": json.dumps({"layers": marks})}
    model = tools.load.load_model(str(files.write(tmp_path / "x.safetensors", weights, text)))
    layer = model.model.diffusion_model.single_blocks[3].linear2
    cut = tensor_parallel.Cut(tensor_parallel.INPUTS, (256, 768))
    assert tensor_parallel.cannot_cut(layer, cut, 2) is None
    assert "rotated in groups of 64, and a part would end inside of one" in tensor_parallel.cannot_cut(layer, cut, 8)


def test_other_models_and_other_settings_are_refused_in_words(tools, model, two, monkeypatch):
    from flux2_pack.flux2.parallel import tensor_parallel

    linear = torch.nn.Linear(2, 2)
    assert "this is another one (Linear)" in tensor_parallel.unsupported(linear, 2)[0]
    other = SimpleNamespace(model=SimpleNamespace(diffusion_model=linear), load_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"models of FLUX.2's shape; this one \(Linear\) lacks"):
        split(tools, other)
    with ranks_on_cpu(2), pytest.raises(ValueError, match="split over 2 GPUs already, by another Sequence Parallel"):
        tools.parallel.parallel(two)
    monkeypatch.setenv("FLUX2_SYMMETRIC_MEMORY", "1")
    with pytest.raises(ValueError, match="cannot be split over the GPUs with FLUX2_SYMMETRIC_MEMORY=1"):
        split(tools, model)
    monkeypatch.delenv("FLUX2_SYMMETRIC_MEMORY")
    assert split(tools, two).model is two.model, "the same once more changes nothing"


def test_compiled_blocks_are_refused_on_split_weights(tools, two):
    from flux2_pack.flux2.compiled import blocks as compiled_blocks

    compiled = two.clone()
    compiled_blocks.install(compiled, compiled_blocks.CompilePlan("default", compiled_blocks.EAGER))
    with pytest.raises(ValueError, match="Compile Blocks .*weights are split"):
        sample(tools, compiled)


def test_a_part_without_its_node_is_no_model(tools, two):
    """Another pack that takes the wrappers away gets a sentence and no wrong image."""
    bare = two.clone()
    bare.wrappers.clear()
    bare.model_options["transformer_options"].clear()
    with pytest.raises(ValueError, match="holds a part of its weights on each GPU, and was called without the others"):
        sample(tools, bare)


def test_a_part_that_does_not_fit_is_refused_with_its_size(tools, two, monkeypatch):
    from flux2_pack.flux2.parallel.workers import split_model

    management = split_model.management
    monkeypatch.setattr(management, "is_device_cpu", lambda device: False)
    monkeypatch.setattr(management, "get_free_memory", lambda device: 1e6)
    with pytest.raises(ValueError, match=r"has 0\.0 GB free, and its part of the weights takes 0\.0"):
        two._refuse_without_room(torch.device("cpu"))
