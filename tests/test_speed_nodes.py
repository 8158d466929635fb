"""Compiled blocks and warming up, on real ComfyUI MODELs in process: core's own latents, few graphs, nothing left
behind, and reasons in words.

Float32 on the CPU, torch.compile with a backend that needs no compiler; one test compiles with inductor. What they gain
is measured on a GPU by benchmarks/step.py. Graphs are kept from test to test on purpose: the same graph must serve
other selections, LoRAs and lengths.
"""

import json
import os
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import small_models as maker
from server_fixture import SCRIPTS

import api_workflow
from comfy_server import ComfyServer
from generate import FLAGS, parse, settings_from

STEPS, BLOCKS = 2, 6
# traces as any other does; where the blocks write in place, aot_eager also makes the graph functional
BACKEND = "eager"


@pytest.fixture(scope="module")
def tools(comfy):
    import comfy.model_management
    import comfy.sample
    import comfy.sd
    from flux2_pack.flux2.compiled import blocks as compiled_blocks, toolchain, graph_ops
    from flux2_pack.flux2.measuring import warmup
    from flux2_pack.nodes import attention, speed
    import comfy

    return types.SimpleNamespace(
        comfy=comfy,
        compile=compiled_blocks,
        compiler=toolchain,
        graph_ops=graph_ops,
        warmup=warmup,
        attention=attention,
        speed=speed,
    )


@pytest.fixture(scope="module")
def flux2(tools, small_models):
    return tools.comfy.sd.load_diffusion_model(str(small_models["model"]), model_options={"dtype": torch.float32})


def compiled(tools, model, **options):
    clone = model.clone()
    tools.compile.install(clone, tools.compile.CompilePlan(**{"backend": BACKEND, **options}))
    return clone


def log_of(tools, model):
    return tools.compile.plan_of(model).log


def conditioning(batch=1, references=0, method=None):
    context = torch.randn(batch, 20, 192, generator=torch.Generator().manual_seed(2)) * 0.3
    extra = (
        {
            "reference_latents": [
                torch.randn(1, 128, 4, 6, generator=torch.Generator().manual_seed(10 + i)) for i in range(references)
            ]
        }
        if references
        else {}
    )
    return [[context, {**extra, **({"reference_latents_method": method} if method else {})}]]


def sample(tools, model, positive=None, shape=(1, 128, 8, 6), **options):
    noise, positive = torch.randn(shape, generator=torch.Generator().manual_seed(3)), positive or conditioning()
    return tools.comfy.sample.sample(
        model,
        noise,
        STEPS,
        1.0,
        "euler",
        "simple",
        positive,
        positive,
        torch.zeros(shape),
        disable_pbar=True,
        seed=5,
        **options,
    )


def relative(out, expected):
    assert torch.isfinite(out).all()
    return ((out - expected).double().norm() / expected.double().norm()).item()


def assert_compiled(tools, model, calls=STEPS * BLOCKS):
    data = log_of(tools, model).as_data()
    assert data["compiled"] == calls and data["eager"] == {}, data


def touched(model):
    """Modules of a model that have a forward of their own."""
    return [name for name, module in model.model.diffusion_model.named_modules() if "forward" in vars(module)]


# --- compiled blocks -------------------------------------------------------------------------------------------------

CASES = {
    "text to image": {},
    "odd size": {"shape": (1, 128, 7, 5)},
    "two references": {"references": 2},
    "batch of two": {"batch": 2, "shape": (2, 128, 4, 6)},
    "references at timestep zero": {"references": 2, "method": "index_timestep_zero", "backend": "aot_eager"},
}


@pytest.mark.parametrize("case", CASES)
def test_a_sampling_equals_cores(tools, flux2, case):
    given = dict(CASES[case])
    shape, backend = given.pop("shape", (1, 128, 8, 6)), given.pop("backend", BACKEND)
    expected = sample(tools, flux2, conditioning(**given), shape)
    model = compiled(tools, flux2, backend=backend)
    assert relative(sample(tools, model, conditioning(**given), shape), expected) < 1e-6
    assert_compiled(tools, model)
    assert touched(flux2) == []


def test_one_graph_for_each_kind_of_block_serves_every_size(tools, flux2):
    sample(tools, compiled(tools, flux2))
    before = tools.compile.graphs_so_far()
    # 256 and 512 tokens: as many as channels and as the text
    for shape, references in (((1, 128, 16, 16), 0), ((1, 128, 4, 4), 1), ((1, 128, 32, 16), 0), ((1, 128, 10, 2), 2)):
        sample(tools, compiled(tools, flux2), conditioning(references=references), shape)
    assert tools.compile.graphs_so_far() == before


def select(tools, model, backend, **options):
    return tools.attention.Flux2SelectAttention.execute(model, backend, **options).args[0]


def report(tools, model, latent):
    output = tools.attention.Flux2AttentionReport.execute(model, {"samples": latent})
    return output.args[1], output.ui["flux2_attention"][0]


@pytest.mark.parametrize("order", ["select then compile", "compile then select"])
def test_any_selection_runs_without_a_new_graph(tools, flux2, order):
    expected = sample(tools, flux2)
    sample(tools, compiled(tools, flux2))
    before = tools.compile.graphs_so_far()
    for backend in ("sdpa-math", "sdpa-flash"):
        model = (
            compiled(tools, select(tools, flux2, backend))
            if order == "select then compile"
            else select(tools, compiled(tools, flux2), backend)
        )
        out = sample(tools, model)
        text, data = report(tools, model, out)
        assert relative(out, expected) < 1e-5 and data["backend"] == backend and data["calls"] == STEPS * BLOCKS
        assert f"Compiled blocks: {STEPS * BLOCKS} of {STEPS * BLOCKS} block calls" in text
    assert tools.compile.graphs_so_far() == before


def test_a_schedule_over_blocks_and_a_foreign_override_see_the_right_blocks(tools, flux2):
    scheduled = compiled(tools, select(tools, flux2, "sdpa", edge_backend="sdpa-math", first_blocks=3, last_blocks=1))
    data = report(tools, scheduled, sample(tools, scheduled))[1]
    assert {e["backend"]: e["calls"] for e in data["entries"]} == {"sdpa-math": 4 * STEPS, "sdpa": 2 * STEPS}
    seen, model = [], compiled(tools, flux2)

    def override(func, *args, transformer_options, **kwargs):
        seen.append((transformer_options["block_type"], transformer_options["block_index"]))
        return func(*args, **kwargs)

    model.model_options["transformer_options"]["optimized_attention_override"] = override
    sample(tools, model)
    assert seen == STEPS * [("double", 0), ("double", 1), ("single", 0), ("single", 1), ("single", 2), ("single", 3)]


def with_lora(model, strength):
    """A clone with a low-rank change of every weight, norms included."""
    clone, change = model.clone(), {}
    for name, weight in model.model.diffusion_model.named_parameters():
        generator = torch.Generator().manual_seed(len(change))
        change[f"diffusion_model.{name}"] = ("diff", (torch.randn(weight.shape, generator=generator) * 0.02,))
    assert len(clone.add_patches(change, strength)) == len(change)
    return clone


def test_a_lora_on_every_layer_and_its_strength_need_no_new_graph(tools, flux2):
    plain = sample(tools, flux2)
    sample(tools, compiled(tools, flux2))
    before = tools.compile.graphs_so_far()
    for strength in (1.0, -0.5):
        changed = with_lora(flux2, strength)
        expected = sample(tools, changed)
        assert relative(plain, expected) > 1e-3
        assert relative(sample(tools, compiled(tools, changed)), expected) < 1e-6
    assert tools.compile.graphs_so_far() == before


def at_call_time(monkeypatch, network):
    """Weights of some layers are changed when they are called, as those that do not fit on a GPU are, with a LoRA."""
    for layer in (
        network.double_blocks[0].img_mlp[0],
        network.single_blocks[1].linear2,
        network.single_blocks[2].norm.key_norm,
    ):
        monkeypatch.setattr(layer, "weight_function", [lambda weight: weight * 1.5])
        monkeypatch.setattr(layer, "comfy_cast_weights", True)


def test_layers_that_fetch_their_weights_are_called_from_outside_the_graph(tools, small_models, monkeypatch):
    # its own: a layer keeps attributes, which are guarded
    flux2 = tools.comfy.sd.load_diffusion_model(str(small_models["model"]), model_options={"dtype": torch.float32})
    plain = sample(tools, flux2)
    at_call_time(monkeypatch, flux2.model.diffusion_model)
    expected = sample(tools, flux2)
    model = compiled(tools, flux2)
    assert relative(plain, expected) > 1e-3 and relative(sample(tools, model), expected) < 1e-6
    assert_compiled(tools, model)
    assert touched(flux2) == [] and any(
        "called outside the graph" in graph["for"] for graph in log_of(tools, model).as_data()["graphs"]
    )


def quantised(tools, monkeypatch, native, which="_blocks."):
    """A MODEL of an fp8 checkpoint with input scales. native: products in fp8 as on a GPU that has them; which: what
    the names of fp8 layers contain.
    """
    monkeypatch.setattr(tools.comfy.model_management, "supports_fp8_compute", lambda device=None: native)
    return tools.comfy.sd.load_diffusion_model_state_dict(*fp8_checkpoint(which))


def fp8_checkpoint(which="_blocks."):
    """(weights, ComfyUI's model options, metadata) of an fp8 checkpoint of the small model."""
    weights = maker.diffusion_model()
    layers = [name.removesuffix(".weight") for name in weights if which in name and "norm" not in name]
    for layer in layers:
        weight = weights[f"{layer}.weight"].float()
        scale = weight.abs().max() / 448
        weights |= {
            f"{layer}.weight": (weight / scale).to(torch.float8_e4m3fn),
            f"{layer}.weight_scale": scale,
            f"{layer}.input_scale": torch.tensor(0.02),
        }
    metadata = {
        "_quantization_metadata": json.dumps(
            {"format_version": "1.0", "layers": {layer: {"format": "float8_e4m3fn"} for layer in layers}}
        )
    }
    return weights, {}, metadata


@pytest.mark.parametrize("native", [True, False])
def test_an_fp8_checkpoint_computes_what_core_computes(tools, monkeypatch, native):
    model = quantised(tools, monkeypatch, native)
    linear = model.model.diffusion_model.single_blocks[0].linear1
    assert linear.layout_type == "TensorCoreFP8E4M3Layout" and linear._full_precision_mm is not native
    expected, fast = sample(tools, model), compiled(tools, model)
    assert relative(sample(tools, fast), expected) < 1e-6
    assert_compiled(tools, fast)


def test_a_quantised_model_that_is_loaded_again_needs_no_new_graph(tools, monkeypatch):
    """ComfyUI makes a class of Linear for each load of one."""
    torch._dynamo.reset()
    for native in (True, False):
        for load in range(3):
            model = compiled(tools, quantised(tools, monkeypatch, native))
            sample(tools, model)
            assert_compiled(tools, model)
            if (native, load) == (True, 0):
                before = tools.compile.graphs_so_far()
    assert tools.compile.graphs_so_far() == before


def test_a_model_in_which_no_block_is_quantised_is_loaded_again_without_a_new_graph(tools, monkeypatch):
    """Its layers are of such a class all the same."""
    torch._dynamo.reset()
    graphs = []
    for _ in range(3):
        model = quantised(tools, monkeypatch, True, "final_layer.linear")
        linear = model.model.diffusion_model.single_blocks[0].linear1
        assert "<locals>" in type(linear).__qualname__ and getattr(linear, "layout_type", None) is None
        expected, fast = sample(tools, model), compiled(tools, model)
        assert relative(sample(tools, fast), expected) < 1e-6
        assert_compiled(tools, fast)
        graphs = [*graphs, tools.compile.graphs_so_far()]
    assert len(set(graphs)) == 1


# what torch.compile's own parts raise, and what anything may raise while it compiles
GIVING_UP = {
    "the limit of graphs": "FailOnRecompileLimitHit",
    "an error of the system": "OSError",
    "a crash of a compiler": "AssertionError",
}


def giving_up(tools, monkeypatch, case):
    """A backend, or a setting, with which torch.compile gives up on the second batch size and not on the first."""
    if case == "the limit of graphs":
        monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 1)
        return BACKEND
    raised = {
        "an error of the system": OSError(28, "No space left on device"),
        "a crash of a compiler": AssertionError(),
    }

    def backend(graph, inputs):
        if any(t.shape[0] == 2 for t in inputs if isinstance(t, torch.Tensor) and t.ndim == 3):
            raise raised[case]
        return graph.forward

    return backend


@pytest.mark.parametrize("case", GIVING_UP)
@pytest.mark.parametrize("answer", ["stop", "eager"])
def test_every_way_of_giving_up_is_answered_as_failures_says(tools, flux2, monkeypatch, case, answer):
    torch._dynamo.reset()
    tools.compile.set_up()
    backend = giving_up(tools, monkeypatch, case)
    two = {"positive": conditioning(batch=2), "shape": (2, 128, 4, 6)}
    expected = sample(tools, flux2, **two)
    how = tools.compile.EAGER if answer == "eager" else tools.compile.REFUSE
    model = compiled(tools, flux2, backend=backend, on_failure=how)
    sample(tools, model)
    assert_compiled(tools, model)
    if answer == "stop":
        with pytest.raises(tools.compile.CompileRefused, match="torch.compile failed on the double blocks"):
            sample(tools, model, **two)
    else:
        assert torch.equal(sample(tools, model, **two), expected)
        assert "8 calls: torch.compile failed on the single blocks" in tools.compile.report(model)
    assert touched(flux2) == []


def test_what_the_block_itself_raises_passes_through(tools, flux2):
    """Out of memory, or an attention backend that refuses: no failure of compiling, and not to be tried again eager."""
    model = compiled(tools, flux2, on_failure=tools.compile.EAGER)
    sample(tools, model)

    def refuses(func, *args, **kwargs):
        raise MemoryError("not enough")

    model.model_options["transformer_options"]["optimized_attention_override"] = refuses
    with pytest.raises(MemoryError, match="not enough"):
        sample(tools, model)
    assert not tools.compile.plan_of(model).failed and touched(flux2) == []


@pytest.mark.parametrize("answer", ["stop", "eager"])
def test_code_that_was_compiled_and_cannot_run_stops_in_words(tools, flux2, answer):
    """Whatever failures says: the hidden states may have been changed already."""
    from triton.runtime.errors import OutOfResources

    def backend(graph, inputs):
        def run(*args):
            raise OutOfResources(300000, 232448, "shared memory")

        return run

    how = tools.compile.EAGER if answer == "eager" else tools.compile.REFUSE
    with pytest.raises(tools.compile.CompileRefused, match="cannot run here: out of resource: shared memory"):
        sample(tools, compiled(tools, flux2, backend=backend, on_failure=how))


def test_settings_of_the_process_are_made_once_and_not_changed_around_a_pass(tools, flux2):
    """ComfyUI's MultiGPU runs passes side by side: one that ends must not take the settings from one that compiles."""
    from torch.fx.experimental import _config as symbols

    def settings():
        return torch._dynamo.config.recompile_limit, symbols.use_duck_shape

    seen, model = [], compiled(tools, flux2)
    before = settings()
    assert before == (tools.compile.GRAPHS, False)

    def looks(func, *args, transformer_options, **kwargs):
        seen.append(settings())
        return func(*args, **kwargs)

    model.model_options["transformer_options"]["optimized_attention_override"] = looks
    sample(tools, model)
    assert {before} == set(seen) and settings() == before


@pytest.mark.parametrize("name", ["recompile_limit", "cache_size_limit"])  # from PyTorch 2.7 on, and 2.6
def test_the_number_of_graphs_is_set_by_the_name_that_this_pytorch_has(tools, monkeypatch, name):
    config = types.SimpleNamespace(**{name: 8})
    monkeypatch.setattr(tools.compile, "dynamo", lambda: types.SimpleNamespace(config=config))
    tools.compile.set_up.__wrapped__()
    assert vars(config) == {name: tools.compile.GRAPHS}


def test_a_model_unloaded_between_two_samplings(tools, flux2):
    model = compiled(tools, flux2)
    first = sample(tools, model)
    before = tools.compile.graphs_so_far()
    tools.comfy.model_management.unload_all_models()
    assert torch.equal(sample(tools, model), first) and tools.compile.graphs_so_far() == before


def test_replaced_blocks_are_left_to_the_replacement_and_the_report_says_so(tools, flux2):
    model = compiled(tools, flux2)
    for index in range(2):
        model.set_model_patch_replace(
            lambda args, extra: {"img": args["img"], "txt": args["txt"]}, "dit", "double_block", index
        )
    model.set_model_patch_replace(lambda args, extra: extra["original_block"](args), "dit", "single_block", 0)
    sample(tools, model)
    assert_compiled(tools, model, STEPS * 4)
    assert "2 double, 1 single blocks are replaced by another node" in tools.compile.report(model)


def test_patches_inside_the_blocks_run_eager_with_the_reason(tools, flux2):
    model = flux2.clone()
    model.set_model_patch(lambda q, k, v, pe=None, attn_mask=None, extra_options=None: {"q": q * 1.1}, "attn1_patch")
    expected = sample(tools, model)
    model = compiled(tools, model)
    assert torch.equal(sample(tools, model), expected)
    assert log_of(tools, model).as_data()[
        "compiled"
    ] == 0 and "run eager, 12 calls: another node patches the blocks from inside (attn1_patch)" in tools.compile.report(
        model
    )


def broken_compiler(graph, inputs):
    raise RuntimeError("gcc: command not found\nand more")


def test_a_compiler_that_fails_stops_the_run_in_words(tools, flux2):
    with pytest.raises(tools.compile.CompileRefused) as caught:
        sample(tools, compiled(tools, flux2, backend=broken_compiler))
    assert (
        "torch.compile failed on the double blocks" in str(caught.value)
        and "gcc: command not found" in str(caught.value)
        and "run eager and report" in str(caught.value)
    )
    assert touched(flux2) == []


def test_a_compiler_that_fails_is_tried_once_for_each_kind_and_reported(tools, flux2):
    tries = []

    def broken(graph, inputs):
        tries.append(graph)
        broken_compiler(graph, inputs)

    model = compiled(tools, flux2, backend=broken, on_failure=tools.compile.EAGER)
    assert torch.equal(sample(tools, model), sample(tools, flux2)) and len(tries) == 2
    assert "run eager, 8 calls: torch.compile failed on the single blocks" in tools.compile.report(model)


def test_a_cancel_inside_a_compiled_block_ends_the_sampling_and_leaves_nothing_behind(tools, flux2):
    management, model = tools.comfy.model_management, compiled(tools, flux2)
    sample(tools, model)

    def cancelled(func, *args, transformer_options, **kwargs):
        if transformer_options["block_type"] == "single":
            management.interrupt_current_processing()
        return func(*args, **kwargs)

    model.model_options["transformer_options"]["optimized_attention_override"] = cancelled
    with pytest.raises(management.InterruptProcessingException):
        sample(tools, model)
    # two double blocks and one single block
    assert touched(flux2) == [] and log_of(tools, model).as_data()["compiled"] == 3
    management.interrupt_current_processing(False)


def test_installing_twice_replaces_and_other_kinds_of_model_are_refused(tools, flux2):
    twice = compiled(tools, compiled(tools, flux2))
    sample(tools, twice)
    assert_compiled(tools, twice)
    other = types.SimpleNamespace(model=types.SimpleNamespace(diffusion_model=torch.nn.Linear(1, 1)))
    with pytest.raises(ValueError, match="knows the blocks of FLUX models, and this is a SimpleNamespace"):
        tools.compile.install(other, tools.compile.CompilePlan())
    with pytest.raises(ValueError, match="The mode can be default or"):
        tools.compile.CompilePlan("fastest")


# --- the compiler ----------------------------------------------------------------------------------------------------

CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize(
    "device, missing, said",
    [
        (CUDA, "triton", "Triton is not installed"),
        (CUDA, "support", "this Triton does not support the device cuda:0"),
        (CUDA, "gcc", "there is no C compiler"),
        (torch.device("cpu"), "g++", "there is no C++ compiler that torch.compile can use"),
        (torch.device("cpu"), "headers", "Python's headers are not installed"),
    ],
)
def test_what_a_machine_lacks_is_said_by_the_node(tools, flux2, monkeypatch, device, missing, said):
    import torch._inductor.cpp_builder as builder
    import torch.utils._triton as triton

    def no_compiler():
        raise RuntimeError("No working C++ compiler found\nin the list")

    monkeypatch.setattr(triton, "has_triton_package", lambda: missing != "triton")
    monkeypatch.setattr(triton, "has_triton", lambda: missing != "support")
    monkeypatch.setattr(builder, "get_cpp_compiler", no_compiler if missing == "g++" else lambda: "g++")
    monkeypatch.setattr(tools.compiler.shutil, "which", lambda name: None if missing == "gcc" else name)
    monkeypatch.setattr(tools.compiler.os.path, "isfile", lambda path: missing != "headers")
    monkeypatch.setattr(tools.compiler, "_name", lambda device: "a card")
    monkeypatch.delenv("CC", raising=False)
    model = flux2.clone()
    model.load_device = device
    with pytest.raises(tools.compile.CompileRefused) as caught:
        tools.speed.Flux2CompileBlocks.execute(model)
    assert said in str(caught.value) and "Remove the node" in str(caught.value)


def test_compiled_code_goes_to_the_users_folder_unless_the_user_chose_another(tools, monkeypatch, tmp_path):
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    variable = tools.compiler.CACHE_VARIABLE
    for before, expected in ((None, tmp_path), (default_cache_dir(), tmp_path), ("/elsewhere", "/elsewhere")):
        monkeypatch.delenv(variable, raising=False)
        if before:
            monkeypatch.setenv(variable, before)
        assert tools.compiler.keep_on_disk(tmp_path) == str(expected) == os.environ[variable]


def test_a_folder_that_cannot_be_written_leaves_the_place_to_torch(tools, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("a file where a folder should be")
    monkeypatch.delenv(tools.compiler.CACHE_VARIABLE, raising=False)
    assert tools.compiler.keep_on_disk(tmp_path / "file" / "compiled") == "torch's temporary folder"
    assert tools.compiler.CACHE_VARIABLE not in os.environ


def test_inductor_compiles_through_the_node_and_finds_its_code_on_disk(tools, comfy, monkeypatch, tmp_path):
    reason = tools.compiler.unavailable(torch.device("cpu"))
    if reason:
        pytest.skip(reason)
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path))
    monkeypatch.delenv(tools.compiler.CACHE_VARIABLE, raising=False)
    monkeypatch.setenv(tools.compiler.CACHE_VARIABLE, "")
    # no pool of processes, and no search for vector instructions: they take a minute on two cores
    monkeypatch.setattr(torch._inductor.config, "compile_threads", 1)
    monkeypatch.setattr(torch._inductor.config.cpp, "simdlen", 1)
    model = tools.comfy.sd.load_diffusion_model_state_dict(
        maker.diffusion_model(hidden=128, double=1, single=1, dtype=torch.float32), {"dtype": torch.float32}
    )
    expected = sample(tools, model)
    for found in (0, 2):
        torch._dynamo.reset()
        before = tools.compile.found_on_disk()
        fast = tools.speed.Flux2CompileBlocks.execute(model).args[0]
        assert relative(sample(tools, fast), expected) < 1e-5
        assert (
            tools.compile.found_on_disk() - before == found and log_of(tools, fast).as_data()["compiled"] == STEPS * 2
        )
        assert (
            f"2 graphs compiled in {log_of(tools, fast).seconds:.1f} s since the node ran, {found} of them found on "
            "disk"
        ) in tools.compile.report(fast)
    assert any((tmp_path / "flux2_attention" / "compiled").iterdir())


# --- warming up ------------------------------------------------------------------------------------------------------


def warm(tools, model, sizes="64x64, 96x64", **options):
    output = tools.speed.Flux2WarmUp.execute(model, sizes, **options)
    return output.args[0], output.args[1].splitlines()


def test_warming_up_runs_each_size_and_changes_nothing(tools, flux2):
    model = select(tools, flux2, "sdpa-math")
    expected = sample(tools, model)
    runs, options, wrappers, random = (
        list(patched_log(tools, model).runs),
        str(model.model_options),
        str(model.wrappers),
        torch.random.get_rng_state(),
    )
    same, text = warm(tools, model, steps=3)
    assert same is model and [line.split(":")[0] for line in text] == ["Warmed up.", "64x64", "96x64", "attention"]
    assert (
        all("first step" in line and "s per step" in line for line in text[1:3])
        and text[3].startswith("attention: sdpa-math")
        and "36 calls" in text[3]
    )
    assert torch.equal(torch.random.get_rng_state(), random) and (str(model.model_options), str(model.wrappers)) == (
        options,
        wrappers,
    )
    assert patched_log(tools, model).runs == type(patched_log(tools, model).runs)(runs)
    assert (
        torch.equal(sample(tools, model), expected) and report(tools, model, sample(tools, model))[1]["steps"] == STEPS
    )


def patched_log(tools, model):
    from flux2_pack.flux2 import attention_slot

    return attention_slot.override_of(model).dispatcher.log


def test_warming_up_compiles_so_that_the_picture_does_not(tools, flux2):
    torch._dynamo.reset()
    model = compiled(tools, flux2)
    text = "\n".join(warm(tools, model, "64x64", references=0)[1])
    assert "2 graphs compiled in" in text and "double blocks, batch 1, float32" in text
    before = tools.compile.graphs_so_far()
    sample(tools, model, conditioning(references=1))
    assert tools.compile.graphs_so_far() == before


def test_references_batches_and_a_prompt_of_ones_own(tools, flux2, monkeypatch):
    shapes = []
    monkeypatch.setattr(tools.warmup.capture, "random_conditioning", lambda model: pytest.fail("a prompt was given"))
    monkeypatch.setattr(
        tools.warmup.sampling,
        "run",
        lambda model, job, callback: shapes.append(
            (
                tuple(job.latent["samples"].shape),
                len(job.guider.original_conds["positive"][0].get("reference_latents", ())),
            )
        ),
    )
    warm(tools, flux2, "64x64, 96x64+1", references=2, batch_size=3, positive=conditioning())
    assert shapes == [((3, 128, 4, 4), 2), ((3, 128, 4, 6), 1)]


# PyTorch's class, what PyTorch says on a CPU, and Python's own
@pytest.mark.parametrize(
    "short",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory\nmore"),
        MemoryError("no room"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_size_that_does_not_fit_becomes_a_row_and_the_others_go_on(tools, flux2, monkeypatch, short):
    real, sizes = tools.warmup.sampling.run, []

    def run(model, job, callback):
        sizes.append(job.latent["samples"].shape)
        if len(sizes) == 1:
            raise short
        return real(model, job, callback)

    monkeypatch.setattr(tools.warmup.sampling, "run", run)
    text = warm(tools, flux2)[1]
    assert (
        text[1] == f"64x64: did not run. There is not enough memory for this size ({str(short).splitlines()[0]})."
        and "first step" in text[2]
    )


def test_an_error_without_a_text_is_named_by_its_type(tools, flux2, monkeypatch):
    """As Python's MemoryError, and the ones of compilers that are not there."""
    from torch._inductor import cpp_builder

    def failing(error):
        def call(*args):
            raise error

        return call

    monkeypatch.setattr(tools.warmup.sampling, "run", failing(tools.comfy.model_management.OOM_EXCEPTION()))
    assert "There is not enough memory for this size (OutOfMemoryError)." in warm(tools, flux2)[1][1]
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", failing(OSError()))
    assert "can use on a CPU (OSError)." in tools.compiler._no_cpp()


def test_a_cancel_ends_the_warm_up_and_the_log_is_as_before(tools, flux2):
    management, model = tools.comfy.model_management, select(tools, flux2, "sdpa")
    management.interrupt_current_processing()
    with pytest.raises(management.InterruptProcessingException):
        warm(tools, model)
    management.interrupt_current_processing(False)
    assert not patched_log(tools, model).runs


def test_wrong_sizes_are_answered_when_queued(tools):
    said = tools.speed.Flux2WarmUp.validate_inputs
    assert said("1024x1024, 2048x2048+1") is True and said(None) is True
    assert "'1000x1024' is not a size" in said("1000x1024") and "There is no size" in said(" ")


def test_steps_are_timed_without_loading(tools, flux2):
    row = tools.warmup.warm_up(flux2, [tools.warmup.capture.Size(64, 64)], 3)[0]
    assert len(row.steps) == 3 and min(row.steps) > 0 and row.loading >= 0 and "s per step" in row.as_text()


# --- the command line ------------------------------------------------------------------------------------------------


def chain(*flags):
    """The nodes that the model goes through with these flags, from Select Attention to whatever samples, and the
    workflow.
    """
    workflow = api_workflow.fill(settings_from(parse(["--prompt", "A red fox", *flags])))
    key = next(key for key, node in workflow.items() if node["class_type"] == "Flux2SelectAttention")
    names, sampled = [], {"BasicGuider", "BasicScheduler"}
    while True:
        readers = {name: node["class_type"] for name, node in workflow.items() if [key, 0] in node["inputs"].values()}
        behind = [
            found for found, kind in readers.items() if kind.startswith("Flux2") and kind != "Flux2AttentionReport"
        ]
        if not behind:
            assert sampled & set(readers.values()) and "Flux2AttentionReport" in readers.values()
            return names, workflow
        assert len(readers) == 1, "nobody reads the model in front of a speed node"
        (key,) = behind
        names.append(workflow[key]["class_type"])


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("", []),
        ("--warmup", ["Flux2WarmUp"]),
        ("--enable-torch-compile", ["Flux2CompileBlocks"]),
        ("--enable-torch-compile False --warmup false", []),
        (
            "--fast-blocks fp8 --enable-torch-compile True --warmup-resolutions 64x64",
            ["Flux2FastBlocks", "Flux2CompileBlocks", "Flux2WarmUp"],
        ),
    ],
)
def test_flags_put_the_speed_nodes_between_selection_and_sampler(flags, expected):
    assert chain(*flags.split())[0] == expected


def test_what_the_flags_say_reaches_the_nodes():
    inputs = chain("--fast-blocks", "--warmup", "--warmup-steps", "3", "--width", "512", "--height", "768")[1]
    assert inputs["Flux2FastBlocks"]["inputs"]["precision"] == "checkpoint"
    warm_up = inputs["Flux2WarmUp"]["inputs"]
    assert (warm_up["sizes"], warm_up["steps"], warm_up["references"]) == ("512x768", 3, 0) and inputs[
        warm_up["clip"][0]
    ]["class_type"] == "Flux2LoadTextEncoder"
    assert chain("--warmup-resolutions", "64x64", "128x64")[1]["Flux2WarmUp"]["inputs"]["sizes"] == "64x64, 128x64"
    with pytest.raises(api_workflow.BadSettings, match="number of warm-up steps must lie between 1 and 100, not 0"):
        chain("--warmup", "--warmup-steps", "0")


def generate(server, model_files, target, *flags):
    """generate.py on the session's server, with the small models."""
    names = [word for flag, folder in FLAGS.items() for word in (folder, str(model_files[flag][0]))]
    command = [
        sys.executable,
        SCRIPTS / "generate.py",
        "--prompt",
        "A red fox",
        "--width",
        "96",
        "--height",
        "64",
        "--num-inference-steps",
        "2",
        "--server",
        server.url,
        "--output-path",
        str(target),
        *names,
        *flags,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def test_generate_warms_up_on_a_real_server_and_draws_the_same_picture(server, model_files, tmp_path):
    done = [
        generate(server, model_files, tmp_path / f"{name}.png", *flags.split())
        for name, flags in (("plain", ""), ("warm", "--warmup-resolutions 64x64 96x64 --warmup-steps 2"))
    ]
    assert all(process.returncode == 0 for process in done), done[-1].stderr
    said = done[1].stdout
    assert (
        "Warmed up." in said
        and "64x64: " in said
        and "VAE, decoding 96x64" in said
        and "text encoder: " in said
        and "Warmed up." not in done[0].stdout
    )
    assert json.loads(said.splitlines()[-1])["steps"] == 2
    plain, warmed = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("plain", "warm"))
    assert (plain == warmed).all()


def test_a_server_that_keeps_no_node_compiles_an_fp8_model_once(comfyui, model_files, tmp_path, monkeypatch):
    """With --cache-none every prompt loads the model again."""
    for name, value in {"ATEN_CPU_CAPABILITY": "default", "TORCHINDUCTOR_COMPILE_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)  # as above: no search for vector instructions, no pool of processes
    weights, _, metadata = fp8_checkpoint()
    save_file(weights, tmp_path / "fp8.safetensors", metadata)
    files, said = {**model_files, "diffusion_models": [tmp_path / "fp8.safetensors"]}, []
    with ComfyServer(comfyui, models=files, arguments=["--cpu", "--force-fp32", "--cache-none"]) as running:
        for seed in ("1", "2"):
            done = generate(running, files, tmp_path / f"{seed}.png", "--enable-torch-compile", "--seed", seed)
            assert done.returncode == 0, done.stderr
            said.append(done.stdout)
        assert running.log.read_text(errors="replace").count("loaded completely") >= 2
    assert all("Compiled blocks: 12 of 12 block calls." in text for text in said)
    assert "2 graphs compiled in" in said[0] and "compiled in" not in said[1]


def test_generate_says_why_fast_blocks_cannot_run_on_a_cpu(server, model_files, tmp_path):
    done = generate(server, model_files, tmp_path / "fox.png", "--fast-blocks")
    assert done.returncode and "Fast Blocks cannot run here" in done.stderr and "Traceback" not in done.stderr
