"""Fused blocks against core's blocks, on small real-format models: Triton's interpreter on the CPU, float32, tensors
compared.

Run by test_fast_blocks.py in a process of its own: Triton asks for TRITON_INTERPRET when it is imported. The
interpreter computes in numpy and has no bfloat16; that is measured on a GPU by benchmarks/fast_check.py.
"""

import itertools
import json
import os
import types

import pytest
import torch

import small_models as maker

CLOSE = 1e-6
ALL = {"fast": 6, "left": {}}  # the small model has two double and four single blocks


@pytest.fixture(scope="module")
def tools(comfy):
    assert os.environ.get("TRITON_INTERPRET") == "1"
    import comfy.sample
    import comfy.sd
    from flux2_pack.flux2.fused import blocks as fused_blocks
    from flux2_pack.nodes import attention, fast
    import comfy

    return types.SimpleNamespace(comfy=comfy, fast_blocks=fused_blocks, node=fast.Flux2FastBlocks, attention=attention)


@pytest.fixture(scope="module")
def flux2(tools, small_models):
    return tools.comfy.sd.load_diffusion_model(str(small_models["model"]), model_options={"dtype": torch.float32})


def fast(tools, model):
    return tools.node.execute(model).args[0]


def inputs(case, dtype=torch.float32):
    """Arguments of one forward pass: x, t, c_crossattn, guidance, references. Short, because the interpreter takes a
    millisecond for each row.
    """
    g = torch.Generator().manual_seed(3)
    batch, (height, width), references = case.get("batch", 1), case.get("size", (2, 2)), case.get("references", 0)
    found = {
        "x": torch.randn(batch, 128, height, width, generator=g),
        "t": torch.tensor([0.7, 0.3])[:batch],
        "guidance": torch.full((1,), 4.0),
        "c_crossattn": torch.randn(batch, case.get("tokens", 3), 192, generator=g).to(dtype) * 0.3,
    }
    if references:
        found["ref_latents"] = [torch.randn(batch, 128, 1, 2 + n, generator=g).to(dtype) for n in range(references)]
        found["ref_latents_method"] = case.get("method", "index")
    return found


def forward(model, given, mode=torch.inference_mode):
    options = dict(model.model_options.get("transformer_options", {}))
    options["wrappers"] = {kind: dict(keyed) for kind, keyed in model.wrappers.items()}
    with mode():
        return model.model.apply_model(
            **{k: v.clone() if torch.is_tensor(v) else v for k, v in given.items()}, transformer_options=options
        )


def relative(out, expected):
    assert torch.isfinite(out).all()
    return ((out - expected).double().norm() / expected.double().norm()).item()


CASES = {
    "text to image": {},
    "odd lengths": {"size": (3, 3), "tokens": 4},
    "batch of two": {"batch": 2},
    "one reference": {"references": 1},
    "two references": {"references": 2, "tokens": 5},
    "references at timestep zero": {"references": 2, "method": "index_timestep_zero"},
    "timestep zero in a batch": {"batch": 2, "references": 1, "method": "index_timestep_zero"},
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.quick if case == "text to image" else ()) for case in CASES]
)
def test_a_forward_pass_equals_cores(tools, flux2, case):
    given = inputs(CASES[case])
    model = fast(tools, flux2)
    assert relative(forward(model, given), forward(flux2, given)) < CLOSE
    assert tools.fast_blocks.log_of(model).as_data() == ALL


@pytest.mark.parametrize("kind", ["float32", "fp8", "int8"])
def test_blocks_with_half_of_the_weights_equal_the_whole_ones(tools, flux2, monkeypatch, kind):
    """Of two GPUs that the weights are split over: each computes its heads, and products that kernels compute without
    calling their layer are added too.
    """
    import split_in_process

    makers = {
        "float32": lambda: tools.comfy.sd.load_diffusion_model_state_dict(maker.diffusion_model(dtype=torch.float32)),
        "fp8": lambda: fp8_checkpoint(tools, monkeypatch, True, None),
        "int8": lambda: int8_checkpoint(tools, "rowwise"),
    }
    given = inputs({"references": 1})
    expected = forward(fast(tools, makers[kind]()), given)
    parts = [fast(tools, part) for part in split_in_process.parts_of(makers[kind], 2)]
    found = split_in_process.together(parts, lambda model: forward(model, given))
    for (out, mesh), part in zip(found, parts):
        # quantised inputs: a token has a scale of its own on each GPU, and what lies between two steps may round apart
        assert relative(out, expected) < {"float32": CLOSE, "fp8": 0.03, "int8": 0.03}[kind]
        assert mesh.additions == 2 * 4 + 4 and tools.fast_blocks.log_of(part).as_data() == ALL
    assert torch.equal(found[0][0], found[1][0])


def counted(monkeypatch):
    """Counts of launches by the name of the kernels' wrappers."""
    from collections import Counter
    from flux2_pack.flux2.fused.kernels import qkv, norm, swiglu

    counts = Counter()
    for module, names in (
        (norm, ("norm_modulate", "add_gated", "add_gated_norm_modulate")),
        (qkv, ("single_qkv", "joint_qkv")),
        (swiglu, ("swiglu",)),
    ):
        for name in names:

            def wrapper(*args, name=name, function=getattr(module, name), **kwargs):
                counts[name] += 1
                return function(*args, **kwargs)

            monkeypatch.setattr(module, name, wrapper)
    return counts


# A double block: a norm, add+norm, SwiGLU and an add on each side, q/k/v once; a single block: one of each, no add+norm
LAUNCHES = {
    "norm_modulate": 2 * 2 + 4,
    "add_gated_norm_modulate": 2 * 2,
    "add_gated": 2 * 2 + 4,
    "swiglu": 2 * 2 + 4,
    "joint_qkv": 2,
    "single_qkv": 4,
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda mode: mode.__name__)
def test_the_fast_path_is_live_and_has_as_many_kernels_as_it_should(tools, flux2, monkeypatch, mode):
    counts = counted(monkeypatch)
    out = forward(fast(tools, flux2), inputs({}), mode)
    assert counts == LAUNCHES
    assert relative(out, forward(flux2, inputs({}))) < CLOSE


def test_a_sampling_that_is_cut_short_leaves_the_blocks_as_they_were(tools, flux2, monkeypatch):
    model, calls = fast(tools, flux2), itertools.count()
    monkeypatch.setattr(tools.fast_blocks, "uncomputable", lambda *args: 1 / 0 if next(calls) == 4 else None)
    with pytest.raises(ZeroDivisionError):
        forward(model, inputs({}))
    assert not any("forward" in vars(module) for module in flux2.model.diffusion_model.modules())


def peak_bytes(work, path):
    """The most bytes that PyTorch held at once while work ran, above what it held before."""
    from torch.profiler import ProfilerActivity, profile

    work()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    profiled.export_chrome_trace(str(path))
    changes = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    return max(itertools.accumulate(event["args"]["Bytes"] for event in sorted(changes, key=lambda event: event["ts"])))


@pytest.mark.parametrize("kind", ["double", "single"])
def test_a_block_needs_less_memory_than_cores(tools, flux2, kind, tmp_path, monkeypatch):
    from comfy.ldm.flux import math as flux_math
    from comfy.ldm.flux.layers import EmbedND, ModulationOut
    from comfy.ldm.modules.attention import attention_pytorch
    from flux2_pack.flux2.fused.kernels import qkv, norm, swiglu
    from flux2_pack.flux2.fused.linear import Products

    # core's choice for a CPU copies q, k and v
    monkeypatch.setattr(flux_math, "optimized_attention", attention_pytorch)
    # allocated for, not launched: the interpreter holds tensors until its next launch
    for kernel in (norm._residual_norm, qkv._qkv, swiglu._swiglu):
        monkeypatch.setattr(kernel, "run", lambda *args, **kwargs: None)
    block, fused = (
        getattr(flux2.model.diffusion_model, f"{kind}_blocks")[0],
        getattr(tools.fast_blocks, f"{kind}_block"),
    )
    rows, text, mod = 256, 32, ModulationOut(*torch.zeros(3, 1, 1, 256))
    lengths = (rows - text, text) if kind == "double" else (rows,)
    options = {
        "vec": ((mod, mod), (mod, mod)) if kind == "double" else mod,
        "pe": EmbedND(128, 2000, [32] * 4)(torch.zeros(1, rows, 4)),
    }

    @torch.inference_mode()
    def peak(compute):
        return peak_bytes(
            lambda: compute([torch.zeros(1, length, 256) for length in lengths]), tmp_path / "trace.json"
        ) / (rows * 256 * 4)

    ours = peak(
        lambda streams: fused(block, Products(), *streams, **options, attn_mask=None, segment=(0, 0), options={})
    )
    cores = peak(lambda streams: block(*streams, **options))
    assert 9 < ours < cores - 1  # in hidden states of all tokens


def test_the_model_without_the_node_is_as_before_and_twice_is_once(tools, flux2, monkeypatch):
    options = {k: v for k, v in flux2.model_options.items()}
    twice = fast(tools, fast(tools, flux2))
    counts = counted(monkeypatch)
    forward(flux2, inputs({}))
    assert not counts and flux2.model_options == options
    forward(twice, inputs({}))
    assert counts["single_qkv"] == 4
    assert all(len(twice.wrappers[kind]["flux2_fast_blocks"]) == 1 for kind in ("outer_sample", "diffusion_model"))


def test_attention_comes_from_the_selector_in_either_order(tools, flux2):
    given = inputs({})
    expected = forward(flux2, given)
    select = tools.attention.Flux2SelectAttention
    for model in (
        select.execute(fast(tools, flux2), "sdpa-math").args[0],
        fast(tools, select.execute(flux2, "sdpa-math").args[0]),
    ):
        assert relative(forward(model, given), expected) < CLOSE
        data = model.model_options["transformer_options"][
            "optimized_attention_override"
        ].dispatcher.log.current.as_data()
        assert [(e["backend"], e["calls"]) for e in data["entries"]] == [("sdpa-math", 6)]


def test_patches_on_attention_see_what_they_see_in_cores_block(tools, flux2):
    given, seen = inputs({"references": 1}), []

    def on_qkv(q, k, v, pe=None, attn_mask=None, extra_options=None):
        seen.append((tuple(q.shape), extra_options["block_type"], extra_options["img_slice"]))
        return {"q": q * 1.1, "k": k, "v": v * 0.9}

    def on_output(attn, extra_options):
        return attn * (1.2 if extra_options["block_type"] == "single" else 0.8)

    patched = flux2.clone()
    patched.set_model_attn1_patch(on_qkv)
    patched.set_model_attn1_output_patch(on_output)
    expected = forward(patched, given)
    core, seen[:] = list(seen), []
    assert relative(forward(fast(tools, patched), given), expected) < CLOSE
    assert seen == core and len(seen) == 6 and relative(expected, forward(flux2, given)) > 1e-3


def test_a_controlnets_inputs_are_added(tools, flux2):
    given = inputs({})
    given["control"] = {
        "input": [torch.randn(1, 4, 256) for _ in range(2)],
        "output": [torch.randn(1, 4, 256), None, torch.randn(1, 3, 256)],
    }
    assert relative(forward(fast(tools, flux2), given), forward(flux2, given)) < CLOSE


def test_another_packs_replacement_of_a_block_stays_and_gets_the_fused_block_as_its_original(tools, flux2):
    given, seen = inputs({}), []

    def other(args, extra):
        seen.append(1)
        out = extra["original_block"](args)
        return {**out, "img": out["img"] * 1.5}

    patched = flux2.clone()
    patched.set_model_patch_replace(other, "dit", "single_block", 2)
    expected = forward(patched, given)
    model = fast(tools, patched)
    assert relative(forward(model, given), expected) < CLOSE and len(seen) == 2
    assert tools.fast_blocks.log_of(model).as_data() == ALL


def test_weights_that_are_patched_at_call_time_go_through_comfyuis_casting(tools, flux2):
    """As with offloaded weights and a LoRA: every linear layer and every norm of a block has a function on its
    weight.
    """
    given = inputs({})
    plain = forward(flux2, given)
    touched = [
        m
        for m in flux2.model.diffusion_model.modules()
        if getattr(m, "weight", None) is not None and hasattr(m, "weight_function")
    ]
    try:
        for n, module in enumerate(touched):
            module.comfy_cast_weights, module.weight_function = True, [lambda w, n=n: w * (1 + 0.01 * (n % 7))]
        expected = forward(flux2, given)
        assert relative(forward(fast(tools, flux2), given), expected) < CLOSE and relative(expected, plain) > 1e-3
    finally:
        for module in touched:
            module.comfy_cast_weights, module.weight_function = False, []


def test_a_lora_on_every_layer_and_its_strength(tools, flux2):
    """Added before or after the node, it reaches the weights that the fused blocks use."""
    weights = {
        name: w
        for name, w in flux2.model.state_dict().items()
        if name.endswith("weight") and "blocks" in name and w.ndim == 2
    }
    g = torch.Generator().manual_seed(7)
    patches = {name: ("diff", (torch.randn(w.shape, generator=g) * 0.02,)) for name, w in weights.items()}
    given, outs = inputs({}), []
    for order in ("before", "after"):
        model = flux2.clone() if order == "before" else fast(tools, flux2)
        assert len(model.add_patches(patches, 0.7)) == len(patches)
        model = fast(tools, model) if order == "before" else model
        model.patch_model()
        outs.append(forward(model, given))
        expected = forward(flux2, given)  # the same weights, core's blocks
        model.unpatch_model()
        assert relative(outs[-1], expected) < CLOSE and relative(expected, forward(flux2, given)) > 1e-3
    assert torch.equal(*outs)


def test_models_of_a_gguf_loader(tools):
    """Packed weights that a layer unpacks at each call: its products are its own, what is between them is fused."""
    import gguf_stand_in

    model, given = gguf_stand_in.gguf_model(maker.diffusion_model(dtype=torch.float32)), inputs({})
    expected = forward(model, given)
    fused = fast(tools, model)
    assert relative(forward(fused, given), expected) < CLOSE
    assert tools.fast_blocks.log_of(fused).as_data() == ALL


# the share of the weights that is loaded; the others are cast, and get their LoRA, when they are called
LOADS = {"--lowvram": 0.5, "--novram": 0.0}


@pytest.mark.parametrize("mode", LOADS)
def test_a_lora_on_weights_that_are_not_loaded_and_a_model_unloaded_between_two_prompts(tools, flux2, mode):
    """By ComfyUI's own loading, as with --lowvram and --novram, norms included; then unloaded and loaded whole."""
    network, given, g = flux2.model.diffusion_model, inputs({}), torch.Generator().manual_seed(8)
    model, device = fast(tools, flux2), torch.device("cpu")
    change = {
        f"diffusion_model.{name}": ("diff", (torch.randn(w.shape, generator=g) * 0.02,))
        for name, w in network.named_parameters()
        if "blocks" in name
    }
    assert len(model.add_patches(change, 0.7)) == len(change)
    plain = forward(flux2, given)
    model.patch_model(device, lowvram_model_memory=max(0.1, LOADS[mode] * model.model_size()))
    late = [
        name
        for name, module in network.named_modules()
        if "blocks" in name and getattr(module, "weight_function", None)
    ]
    assert (0 < len(late) < len(change)) if LOADS[mode] else len(late) == len(change)
    out, expected = forward(model, given), forward(flux2, given)
    assert tools.fast_blocks.log_of(model).as_data() == ALL
    model.detach()
    assert torch.equal(forward(flux2, given), plain)
    model.patch_model(device)
    again = forward(model, given)
    model.detach()
    assert relative(out, expected) < CLOSE and relative(again, out) < CLOSE and relative(expected, plain) > 1e-3


def fp8_checkpoint(tools, monkeypatch, native, without_scale):
    """A MODEL of an fp8 checkpoint. native: its products run in fp8, as on a GPU that has them; one layer has no input
    scale.
    """
    monkeypatch.setattr(tools.comfy.model_management, "supports_fp8_compute", lambda device=None: native)
    weights = maker.diffusion_model(dtype=torch.float32)
    layers = [name.removesuffix(".weight") for name in weights if "_blocks." in name and "norm" not in name]
    for layer in layers:
        scale = weights[f"{layer}.weight"].abs().max() / 448
        weights |= {
            f"{layer}.weight": (weights[f"{layer}.weight"] / scale).to(torch.float8_e4m3fn),
            f"{layer}.weight_scale": scale,
        }
        weights |= {f"{layer}.input_scale": torch.tensor(0.02)} if layer != without_scale else {}
    metadata = {
        "_quantization_metadata": json.dumps(
            {"format_version": "1.0", "layers": {layer: {"format": "float8_e4m3fn"} for layer in layers}}
        )
    }
    return tools.comfy.sd.load_diffusion_model_state_dict(weights, {}, metadata)


def test_the_kernels_of_an_fp8_checkpoint_write_the_input_of_its_products(tools, monkeypatch):
    """With the checkpoint's scale, except where the layer would not quantise its input: there the LoRA comes when it is
    called.
    """
    from comfy.quant_ops import QuantizedTensor

    given, without_scale = inputs({}), "single_blocks.1.linear1"
    exact = forward(fp8_checkpoint(tools, monkeypatch, False, without_scale), given)
    core, seen = fp8_checkpoint(tools, monkeypatch, True, without_scale), {}
    network = core.model.diffusion_model
    for name, layer in network.named_modules():
        if getattr(layer, "layout_type", None):
            layer.register_forward_pre_hook(lambda _, given, name=name: seen.update({name: given[0]}))
    network.single_blocks[2].linear2.weight_function = [lambda weight: weight]
    expected = forward(core, given)
    assert not any(isinstance(x, QuantizedTensor) for x in seen.values())
    out = forward(fast(tools, core), given)
    scales = {name: x.params.scale.item() for name, x in seen.items() if isinstance(x, QuantizedTensor)}
    left = {f"double_blocks.{n}.{side}_attn.proj" for n in range(2) for side in ("img", "txt")} | {
        "single_blocks.2.linear2"
    }
    assert (
        set(seen) - set(scales) == left
        and scales.pop(without_scale) == 1
        and set(scales.values()) == {torch.tensor(0.02).item()}
    )
    # the interpreter rounds fp8 towards zero: twice the error of a GPU
    assert 0 < relative(out, exact) < 3 * relative(expected, exact)


INT8 = {"tensorwise": {}, "rowwise": {"per_channel": True}, "ConvRot": {"per_channel": True, "convrot": True}}


def int8_checkpoint(tools, kind):
    """A MODEL of an int8 checkpoint, its weights quantised by comfy-kitchen."""
    from comfy.quant_ops import TensorWiseINT8Layout

    weights, layers = maker.diffusion_model(dtype=torch.float32), {}
    for name in [name for name in weights if "_blocks." in name and "norm" not in name]:
        data, params = TensorWiseINT8Layout.quantize(weights[name], **INT8[kind])
        weights |= {name: data, f"{name}_scale": params.scale}
        layers[name.removesuffix(".weight")] = {"format": "int8_tensorwise", "convrot": params.convrot}
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    return tools.comfy.sd.load_diffusion_model_state_dict(weights, {}, metadata)


@pytest.mark.parametrize("kind", INT8)
def test_the_kernels_of_an_int8_checkpoint_write_the_input_of_its_products(tools, monkeypatch, kind):
    """Rotated and over a scale per token, as core's layer would have made it; what core's layer then computes."""
    from flux2_pack.flux2.fused import int8_rowwise

    core, given, made = int8_checkpoint(tools, kind), inputs({"references": 1}), []
    expected = forward(core, given)
    product = int8_rowwise.product
    monkeypatch.setattr(
        int8_rowwise,
        "product",
        lambda linear, x: (made.append((x.format.group, x.data.shape[-1])), product(linear, x))[1],
    )
    model = fast(tools, core)
    out = forward(model, given)
    assert relative(out, expected) < 1e-3 and tools.fast_blocks.log_of(model).as_data() == ALL
    # all but what follows attention in a double block: q/k/v and both of the feed-forward part, twice; linear1 and 2
    assert len(made) == 2 * 2 * 3 + 4 * 2 and {group for group, _ in made} == {256 if kind == "ConvRot" else 0}


@pytest.mark.parametrize("kind", [*list(INT8)[:-1], pytest.param("ConvRot", marks=pytest.mark.quick)])
@pytest.mark.parametrize("tokens", [3, 20])
def test_an_int8_product_is_cores_to_the_last_bit_but_where_rounding_is_a_tie(tools, kind, tokens):
    from flux2_pack.flux2.fused import int8_rowwise
    from flux2_pack.flux2.fused.kernels import quantise
    from flux2_pack.flux2.fused.kernels.formats import INT8_ROW, Format

    linear = int8_checkpoint(tools, kind).model.diffusion_model.single_blocks[0].linear2
    x = torch.randn(1, tokens, linear.in_features, generator=torch.Generator().manual_seed(4))
    group = int8_rowwise.group_of(linear)
    out, expected = int8_rowwise.product(linear, quantise.quantise_rows(x, Format(INT8_ROW, group=group))), linear(x)
    assert out.shape == expected.shape and relative(out, expected) < (1e-6 if kind == "ConvRot" else 1e-7)
    linear.weight_function = [lambda weight: weight]  # a LoRA computed at call time: the layer does that
    assert int8_rowwise.group_of(linear) is None


def test_int8_rows_are_what_comfy_kitchen_makes_of_them(comfy):
    """Every kernel, every group; values as its own code for any device makes them, from what is not quantised."""
    from comfy_kitchen.backends.eager.quantization import quantize_and_rotate_rowwise, quantize_int8_rowwise
    from comfy_kitchen.tensor.int8_utils import _build_hadamard
    from flux2_pack.flux2.fused.kernels import norm, quantise, swiglu
    from flux2_pack.flux2.fused.kernels.formats import INT8_ROW, Format

    g, off, count = torch.Generator().manual_seed(0), 0, 0
    for dtype, group in itertools.product((torch.float32, torch.float16), (0, 4, 16, 64, 256)):
        x, mlp, attn, mod = (torch.randn(2, 3, width, generator=g).to(dtype) for width in (512, 1024, 256, 1024))
        x[1, 2] = 0
        shift, scale, gate = *mod[:1, :1].chunk(2, -1), mod[:1, :1, :512]
        to = Format(INT8_ROW, group=group)
        summed = norm.add_gated_norm_modulate(x.clone(), x, gate, shift, scale)
        for plain, quantised in (
            (x, quantise.quantise_rows(x, to)),
            (norm.norm_modulate(x, shift, scale), norm.norm_modulate(x, shift, scale, to=to)),
            (summed, norm.add_gated_norm_modulate(x.clone(), x, gate, shift, scale, to=to)),
            (swiglu.swiglu(mlp, attn), swiglu.swiglu(mlp, attn, to=to)),
            (swiglu.swiglu(mlp), swiglu.swiglu(mlp, to=to)),
        ):
            rows = plain.float()
            hadamard = _build_hadamard(group) if group else None
            data, scales = quantize_and_rotate_rowwise(rows, hadamard, group) if group else quantize_int8_rowwise(rows)
            assert torch.allclose(quantised.scale, scales, rtol=1e-6) and quantised.data.dtype == torch.int8
            difference = (quantised.data.int() - data.int()).abs()
            assert difference.max() <= 1
            off, count = off + difference.sum().item(), count + difference.numel()
    assert off < 1e-4 * count  # a tie, which sums of another order round the other way


def test_float16_overflow_is_mended_as_in_core(tools):
    from flux2_pack.flux2.fused.kernels.norm import add_gated

    x, delta = (
        torch.full((1, 2, 8), 60000.0).half(),
        torch.tensor([60000.0, -60000.0, float("nan"), 1, 2, 3, 4, 5]).half().expand(1, 2, 8).contiguous(),
    )
    gate = torch.ones(1, 1, 8).half()
    expected = torch.nan_to_num(x.float() + delta.float(), nan=0.0).clamp(-65504, 65504).half()
    assert torch.equal(add_gated(x.clone(), delta, gate, finite=True), expected)


def test_the_report_says_what_was_fused(tools, flux2):
    model = fast(tools, flux2)
    assert (
        "Fused blocks: nothing has been sampled yet."
        in tools.attention.Flux2AttentionReport.execute(model, {"samples": torch.zeros(1, 128, 3, 4)}).args[1]
    )
    forward(model, inputs({}))
    output = tools.attention.Flux2AttentionReport.execute(model, {"samples": torch.zeros(1, 128, 3, 4)})
    assert (
        "Fused blocks: 6 of 6 block calls." in output.args[1] and output.ui["flux2_attention"][0]["fast_blocks"] == ALL
    )


def test_what_another_pack_does_around_cores_block_is_not_lost(tools, flux2):
    """A replacement behind the node that calls core's block, and does something to what it gives."""
    given = inputs({})

    def stronger(args, extra):
        return {"img": extra["original_block"](args)["img"] * 1.5}

    core, wrapped = flux2.clone(), fast(tools, flux2)
    for model in (core, wrapped):
        model.set_model_patch_replace(stronger, "dit", "single_block", 0)
    expected = forward(core, given)
    assert relative(forward(wrapped, given), expected) < CLOSE and relative(expected, forward(flux2, given)) > 1e-3
    assert tools.fast_blocks.log_of(wrapped).as_data() == ALL


def test_arguments_that_are_not_known_are_left_to_cores_block(tools, flux2):
    """As a newer core may add them; and a second segment of tokens, which core could ask for and does not."""
    network, seen = flux2.model.diffusion_model, []

    def previous(*args, **kwargs):
        seen.append(kwargs)
        return args

    x, block = torch.zeros(1, 4, 256), network.single_blocks[0]
    log = tools.fast_blocks.FusedLog()
    fused = tools.fast_blocks.FusedBlock("single", block, previous, None, log, None)
    dims = [(0, 1, 0), (1, 2, 1), (2, 3, 0), (3, 4, 1)]
    assert fused(x, vec=None, pe=None, new=1, transformer_options={"a": 1}) == (x,)
    assert fused(x, None, None, modulation_dims=dims) == (x, None, None)
    assert seen[0] == {"vec": None, "pe": None, "new": 1, "transformer_options": {"a": 1}}
    assert seen[1]["modulation_dims"] == dims
    assert sorted(log.left) == [
        "core passes arguments that the fused blocks do not know: new",
        "more than one segment of tokens has a modulation of its own",
    ]


def test_a_block_or_an_attention_that_another_pack_has_changed_from_inside_stays_so(tools, flux2, monkeypatch):
    from comfy.ldm.flux import layers, math

    network, given, original = flux2.model.diffusion_model, inputs({}), math.optimized_attention
    plain = forward(flux2, given)

    def both():
        """(error to core's, calls left to core's blocks and why), with the change in both."""
        model, expected = fast(tools, flux2), forward(flux2, given)
        assert relative(expected, plain) > 1e-4
        return relative(forward(model, given), expected), tools.fast_blocks.log_of(model).as_data()["left"]

    with monkeypatch.context() as patch:  # as packs do that put one attention kernel everywhere
        patch.setattr(math, "optimized_attention", lambda *args, **kwargs: original(*args, **kwargs) * 1.2)
        error, left = both()
        assert error < CLOSE and not left
    with monkeypatch.context() as patch:
        patch.setattr(layers, "attention", lambda *args, **kwargs: math.attention(*args, **kwargs) * 1.2)
        error, left = both()
        assert error < CLOSE and left == {
            "another pack has put a function of its own in the place of FLUX's attention": 6
        }
    block = network.single_blocks[1]
    with monkeypatch.context() as patch:
        patch.setattr(block, "forward", lambda *args, **kwargs: type(block).forward(block, *args, **kwargs) * 1.1)
        error, left = both()
        assert error < CLOSE and left == {"another pack has put a function of its own in the place of the block's": 1}
    # packs, too, put back what they found there: the class's own function, now the block's
    assert "forward" in vars(block)
    hook = network.double_blocks[1].register_forward_hook(lambda module, args, out: (out[0] * 1.1, out[1]))
    error, left = both()
    hook.remove()
    del block.forward
    assert error < CLOSE and not left


COMPILED = {
    "the whole model": ["diffusion_model"],
    "block by block": [f"diffusion_model.{kind}_blocks.{n}" for kind in ("double", "single") for n in range(2)],
}


@pytest.mark.parametrize("keys", COMPILED)
def test_a_model_that_cores_node_compiles_keeps_its_fused_blocks(tools, flux2, keys):
    """Two references at timestep zero: what core tells a block only in a closure must reach the kernels here too."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    given, model = inputs({"references": 2, "method": "index_timestep_zero"}), fast(tools, flux2)
    set_torch_compile_wrapper(model=model, backend="eager", keys=COMPILED[keys])
    assert relative(forward(model, given), forward(flux2, given)) < CLOSE
    assert tools.fast_blocks.log_of(model).as_data() == ALL


def test_compile_blocks_leaves_them_too(tools, flux2):
    from flux2_pack.flux2.compiled import blocks as compiled_blocks

    given, model = inputs({}), fast(tools, flux2)
    compiled_blocks.install(model, compiled_blocks.CompilePlan(backend="eager"))
    assert relative(forward(model, given), forward(flux2, given)) < CLOSE
    assert tools.fast_blocks.log_of(model).as_data() == ALL and not compiled_blocks.plan_of(model).log.graphs
    assert "Fast Blocks (FLUX.2) computes the blocks" in compiled_blocks.report(model)


def test_a_block_with_another_epsilon_in_its_norms_is_not_fused(tools, flux2, monkeypatch):
    block = flux2.model.diffusion_model.double_blocks[0]
    monkeypatch.setattr(block.txt_attn.norm.key_norm, "eps", 1e-3)
    reasons = tools.fast_blocks.install(flux2.clone())
    assert list(reasons) == [("double", 0)] and "epsilon" in reasons["double", 0]
    model = fast(tools, flux2)
    given = inputs({})
    assert relative(forward(model, given), forward(flux2, given)) < CLOSE
    assert tools.fast_blocks.log_of(model).as_data() == {"fast": 5, "left": {reasons["double", 0]: 1}}


def far(shape, apart):
    """A float16 tensor whose tokens lie `apart` elements from one another, in memory that is reserved and not used."""
    batch, tokens, width = shape
    return (
        torch.empty(tokens * apart, dtype=torch.float16)
        .as_strided(shape, (0, apart, 1))
        .copy_(torch.randn(shape, generator=torch.Generator().manual_seed(1)))
    )


def test_offsets_beyond_32_bits(comfy, monkeypatch):
    """As at 4096x4096 with references, where the output of a block's first product has more than 2**31 elements."""
    from triton.runtime import interpreter
    from flux2_pack.flux2.fused.kernels import qkv, norm, quantise, swiglu

    # copies a tensor's whole storage, onto itself on a CPU
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)
    x, weight = far((1, 3, 192), 2**30), torch.ones(32, dtype=torch.float16)
    near, shift, scale = x.contiguous(), *torch.zeros(1, 1, 384, dtype=torch.float16).chunk(2, -1)
    for far_out, near_out in (
        (norm.norm_modulate(x, shift, scale), norm.norm_modulate(near, shift, scale)),
        (swiglu.swiglu(x), swiglu.swiglu(near)),
        *zip(qkv.single_qkv(x, 2, (weight, weight), None), qkv.single_qkv(near, 2, (weight, weight), None)),
        *zip(
            qkv.joint_qkv(near, x, 2, (weight, weight), (weight, weight), None),
            qkv.joint_qkv(near, near, 2, (weight, weight), (weight, weight), None),
        ),
        (quantise.quantise_rows(x).data.float(), quantise.quantise_rows(near).data.float()),
    ):
        assert torch.equal(far_out, near_out)
    expected = norm.add_gated(near.clone(), near, scale + 1)
    assert torch.equal(norm.add_gated(x, near, scale + 1), expected)


def test_it_refuses_a_cpu_without_the_interpreter_and_models_of_another_kind(tools, flux2, monkeypatch):
    other = flux2.clone()
    other.model = types.SimpleNamespace(diffusion_model=torch.nn.Module())
    with pytest.raises(ValueError, match="it has no blocks of the FLUX kind"):
        tools.fast_blocks.install(other)
    with pytest.raises(RuntimeError, match="fp8 here"):
        tools.node.execute(flux2, "fp8")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match="this model computes on 'cpu'.*set precision to 'auto'"):
        tools.node.execute(flux2, "checkpoint")


def test_auto_leaves_the_model_to_comfyui_where_the_kernels_cannot_run_and_the_report_says_why(
    tools, flux2, monkeypatch
):
    from flux2_pack.flux2.compiled import blocks as compiled_blocks

    schema = tools.node.define_schema()
    assert next(entry.default for entry in schema.inputs if entry.id == "precision") == "auto"
    given = inputs({})
    expected = forward(flux2, given)
    with monkeypatch.context() as patch:
        patch.delenv("TRITON_INTERPRET")
        model = tools.node.execute(flux2).args[0]
    with monkeypatch.context() as patch:
        counts = counted(patch)
        assert torch.equal(forward(model, given), expected) and not counts
    text = tools.attention.Flux2AttentionReport.execute(model, {"samples": torch.zeros(1, 128, 3, 4)}).args[1]
    assert "Fused blocks: none, ComfyUI's own run: the fused kernels run on NVIDIA and AMD GPUs" in text
    assert "computes on 'cpu'" in tools.fast_blocks.log_of(model).as_data()["reason"]
    both = model.clone()
    compiled_blocks.install(both, compiled_blocks.CompilePlan(backend="eager"))
    forward(both, given)
    assert sum(compiled_blocks.plan_of(both).log.compiled.values()) == 6
    again = tools.node.execute(model).args[0]  # where they can run again, they do
    assert relative(forward(again, given), expected) < CLOSE and tools.fast_blocks.log_of(again).as_data() == ALL


def test_auto_leaves_a_model_of_another_kind(tools, flux2):
    other = types.SimpleNamespace(
        load_device=torch.device("cpu"),
        model=types.SimpleNamespace(diffusion_model=torch.nn.Module()),
        wrappers={},
        clone=flux2.clone,
    )
    log = tools.fast_blocks.log_of(tools.node.execute(other).args[0])
    assert (
        "ComfyUI's own run: None of this model's blocks can be fused: it has no blocks of the FLUX kind"
        in log.as_text()
    )


@pytest.mark.parametrize(
    "lacking, said",
    [("compiler", "no C compiler, and Triton needs one"), ("headers", "Python's headers are not installed")],
)
def test_what_triton_lacks_to_start_a_kernel_is_said_by_the_node(tools, flux2, monkeypatch, lacking, said):
    """And not by a failure of gcc in the middle of the first step."""
    import torch.utils._triton as triton
    from flux2_pack.flux2.compiled import toolchain

    model = flux2.clone()
    model.load_device = torch.device("cuda", 0)
    monkeypatch.setattr(triton, "has_triton", lambda: True)
    monkeypatch.setattr(toolchain.shutil, "which", lambda name: None if lacking == "compiler" else name)
    monkeypatch.setattr(toolchain.os.path, "isfile", lambda path: lacking != "headers")
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(RuntimeError, match=f"Fast Blocks cannot run here: .*{said}.*Remove the node"):
        tools.node.execute(model, "checkpoint")
    text = tools.fast_blocks.log_of(tools.node.execute(model).args[0]).as_text()
    assert "ComfyUI's own run" in text and said in text


def scaled_mm(a, b, scale_a, scale_b, bias=None, out_dtype=None, use_fast_accum=False):
    """torch._scaled_mm's row-wise form, in float32."""
    out = (a.float() * scale_a) @ (b.float() * scale_b)
    return (out if bias is None else out + bias).to(out_dtype)


def rows_by_torch(x, to):
    """What the kernel quantise_rows does; the interpreter would take minutes for a model's weights."""
    from flux2_pack.flux2.fused.kernels.formats import Quantised

    scale = x.float().abs().amax(-1, keepdim=True).clamp_min(1e-12) / torch.finfo(to.dtype).max
    return Quantised((x.float() / scale).to(to.dtype), scale, to, x.dtype)


@pytest.mark.quick
def test_rows_of_fp8_have_the_scale_of_their_largest_element(comfy):
    """And are, bit for bit, what quantising the unquantised result gives: so the error that is measured is theirs."""
    from flux2_pack.flux2.fused.kernels import norm, quantise, swiglu
    from flux2_pack.flux2.fused.kernels.formats import FP8_ROW, Format

    g = torch.Generator().manual_seed(1)
    for dtype in (torch.float32, torch.float16):
        x, mlp, attn, mod = (torch.randn(2, 3, width, generator=g).to(dtype) for width in (64, 96, 32, 128))
        x[1, 2] = 0
        shift, scale = mod[:1, :1].chunk(2, -1)
        row = Format(FP8_ROW)
        for exact, fp8 in (
            (x, quantise.quantise_rows(x)),
            (norm.norm_modulate(x, shift, scale), norm.norm_modulate(x, shift, scale, to=row)),
            (swiglu.swiglu(mlp, attn), swiglu.swiglu(mlp, attn, to=row)),
            (swiglu.swiglu(mlp), swiglu.swiglu(mlp, to=row)),
        ):
            assert fp8.data.dtype == torch.float8_e4m3fn and fp8.dtype == dtype
            assert torch.allclose(fp8.scale, exact.float().abs().amax(-1, keepdim=True).clamp_min(1e-12) / 448)
            # 0.03 on a GPU: the interpreter does not round fp8 to nearest
            assert relative(fp8.data.float() * fp8.scale, exact.float()) < 0.09
            again = quantise.quantise_rows(exact)
            assert torch.equal(again.scale, fp8.scale)
            assert torch.equal(again.data.view(torch.uint8), fp8.data.view(torch.uint8))


def test_fp8_products_with_a_scale_per_row_say_their_error_and_keep_copies_until_weights_change(
    tools, flux2, monkeypatch
):
    from flux2_pack.flux2.fused import fp8_rowwise
    from flux2_pack.flux2.fused.kernels import quantise

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    monkeypatch.setattr(quantise, "quantise_rows", rows_by_torch)
    fp8, model, given = fp8_rowwise.RowwiseFp8(), flux2.clone(), inputs({})
    fp8.install(model)
    tools.fast_blocks.install(model, fp8)
    log = tools.fast_blocks.log_of(model)
    out = forward(model, given)
    # the interpreter rounds fp8 towards zero: twice the error of a GPU
    assert 1e-5 < relative(out, forward(flux2, given)) < 0.3
    assert set(fp8.errors) == {
        f"{side}_{name}" for side in ("img", "txt") for name in ("attn.qkv", "attn.proj", "mlp.0", "mlp.2")
    } | {"linear1", "linear2"}
    assert all(0.01 < error < 0.12 for error in fp8.errors.values())
    assert "linear1" in log.as_text() and log.as_data()["fp8_errors"] == fp8.errors
    again = forward(model, given)
    assert len(fp8.copies) == 2 * 8 + 4 * 2 and relative(again, out) < 0.1 and torch.equal(forward(model, given), again)
    model.add_patches({"diffusion_model.single_blocks.0.linear2.weight": ("diff", (torch.ones(256, 1024),))}, 1.0)
    model.patch_model()  # what ComfyUI does before it samples
    changed = forward(model, given)
    model.unpatch_model()
    assert relative(changed, again) > 1e-4


def test_fp8_products_with_a_scale_per_row_on_split_weights(tools, flux2, monkeypatch):
    """What is measured against is this GPU's own product, not the sum over GPUs that its layer gives."""
    import split_in_process
    from flux2_pack.flux2.fused import fp8_rowwise
    from flux2_pack.flux2.fused.kernels import quantise

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    monkeypatch.setattr(quantise, "quantise_rows", rows_by_torch)

    def made():
        return tools.comfy.sd.load_diffusion_model_state_dict(maker.diffusion_model(dtype=torch.float32))

    parts, given = split_in_process.parts_of(made, 2), inputs({})
    kinds = [fp8_rowwise.RowwiseFp8() for _ in parts]
    for part, fp8 in zip(parts, kinds):
        fp8.install(part)
        tools.fast_blocks.install(part, fp8)
    found = split_in_process.together(parts, lambda model: forward(model, given))
    assert torch.equal(found[0][0], found[1][0]) and 1e-5 < relative(found[0][0], forward(made(), given)) < 0.3
    assert [mesh.additions for _, mesh in found] == [12, 12]
    assert all(len(fp8.errors) == 10 and all(0.01 < error < 0.12 for error in fp8.errors.values()) for fp8 in kinds)


LORA_LAYERS = {"single_blocks.0.linear1": (2304, 256), "double_blocks.1.img_mlp.2": (256, 768)}


def lora_file(folder):
    """(a LoRA file for Load FLUX.2 LoRA, {layer: its change at strength 1}), changes larger than the weights."""
    g, tensors, changes = torch.Generator().manual_seed(11), {}, {}
    for layer, (rows, columns) in LORA_LAYERS.items():
        down, up = torch.randn(4, columns, generator=g) * 0.03, torch.randn(rows, 4, generator=g) * 6
        tensors |= {
            f"transformer.{layer}.lora_A.weight": down,
            f"transformer.{layer}.lora_B.weight": up,
            f"transformer.{layer}.alpha": torch.tensor(2.0),
        }
        changes[layer] = up @ down * (2.0 / 4)
    return maker.write(folder / "lora.safetensors", tensors), changes


@pytest.mark.parametrize("order", ["before", "behind"])
def test_rows_of_fp8_are_made_again_for_our_lora_and_each_of_its_strengths(tools, flux2, monkeypatch, tmp_path, order):
    """Load FLUX.2 LoRA before and behind Fast Blocks: the copies are rows of W + strength * B A * alpha / rank."""
    from flux2_pack.flux2.fused import fp8_rowwise
    from flux2_pack.flux2.fused.kernels import quantise
    from flux2_pack.flux2.lora import load as lora

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    monkeypatch.setattr(quantise, "quantise_rows", rows_by_torch)
    file, changes = lora_file(tmp_path)
    network, given, fp8 = flux2.model.diffusion_model, inputs({}), fp8_rowwise.RowwiseFp8()
    stored = {layer: network.get_parameter(f"{layer}.weight").clone() for layer in changes}

    def fused(model):
        model = model.clone()
        fp8.install(model)
        tools.fast_blocks.install(model, fp8)
        return model

    base, outs = fused(flux2) if order == "behind" else flux2, []
    for strength in (1.0, -0.5):
        patched = lora.apply(base, None, file, strength)[0]
        model = fused(patched) if order == "before" else patched
        model.patch_model()
        outs.append(forward(model, given))
        copies = {layer: fp8.copies[network.get_submodule(layer)][1:3] for layer in changes}
        model.unpatch_model()
        for layer, (data, scales) in copies.items():
            wanted = rows_by_torch((stored[layer] + strength * changes[layer])[None], fp8.format)
            assert torch.allclose(scales[0], wanted.scale[0, :, 0], rtol=1e-5)
            assert relative(data.float() * scales.t(), wanted.data[0].float() * wanted.scale[0]) < 2e-3
    assert relative(*outs) > 0.005


@pytest.mark.parametrize("order", ["before", "behind"])
def test_our_lora_on_an_fp8_file_is_in_the_products_of_fast_blocks(tools, monkeypatch, tmp_path, order):
    """ComfyUI quantises the sum again: the weights that the products read are the formula's, to fp8's rounding."""
    from flux2_pack.flux2.lora import load as lora

    loaded, given = fp8_checkpoint(tools, monkeypatch, True, ""), inputs({})
    network, (file, changes) = loaded.model.diffusion_model, lora_file(tmp_path)
    stored = {layer: network.get_parameter(f"{layer}.weight").dequantize() for layer in changes}
    base, outs = fast(tools, loaded) if order == "behind" else loaded, []
    for strength in (1.0, -0.5):
        patched = lora.apply(base, None, file, strength)[0]
        model = fast(tools, patched) if order == "before" else patched
        model.patch_model()
        outs.append(forward(model, given))
        assert tools.fast_blocks.log_of(model).as_data()["left"] == {}
        found = {layer: network.get_parameter(f"{layer}.weight").dequantize().float() for layer in changes}
        expected = forward(patched, given)  # the same weights, core's blocks
        model.unpatch_model()
        for layer, weight in found.items():
            assert relative(weight, stored[layer].float() + strength * changes[layer]) < 0.06
        assert relative(outs[-1], expected) < 0.1
    assert relative(*outs) > 0.005


@pytest.mark.quick
def test_products_that_fp8_leaves_alone_are_said(tools):
    from flux2_pack.flux2.fused import fp8_rowwise

    fp8 = fp8_rowwise.RowwiseFp8()
    for linear in (types.SimpleNamespace(layout_type="TensorCoreFP8E4M3Layout"), torch.nn.Linear(24, 32)):
        assert not fp8.suits(linear)
    text = fp8.as_text()
    assert (
        "no product was computed so" in text
        and "quantised already (fp8)" in text
        and "24 x 32 is no multiple of 16" in text
    )
    assert fp8.suits(torch.nn.Linear(32, 32))


def test_copies_leave_room_for_the_vae_when_a_sampling_ends(tools, flux2, monkeypatch):
    from flux2_pack.flux2.fused import fp8_rowwise
    from flux2_pack.flux2.fused.kernels import quantise

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    monkeypatch.setattr(quantise, "quantise_rows", rows_by_torch)
    monkeypatch.setattr(fp8_rowwise, "unavailable_for", lambda model: None)
    model = tools.node.execute(flux2, "fp8").args[0]
    fp8, given = tools.fast_blocks.log_of(model).fp8, inputs({})
    forward(model, given)  # the first product of each kind is measured
    out = forward(model, given)
    assert len(fp8.copies) == 24
    model.cleanup()  # what ComfyUI's samplers do at the end
    assert not fp8.copies and "24 weights were kept in fp8 meanwhile" in fp8.as_text()
    assert torch.equal(forward(model, given), out)


@pytest.mark.quick
def test_a_copy_goes_when_its_weight_has_been_moved(tools, monkeypatch):
    """As partial unloading does, of which ComfyUI tells nobody."""
    from flux2_pack.flux2.fused import fp8_rowwise
    from flux2_pack.flux2.fused.kernels import quantise

    monkeypatch.setattr(quantise, "quantise_rows", rows_by_torch)
    fp8, linear, like = (
        fp8_rowwise.RowwiseFp8(),
        tools.comfy.ops.manual_cast.Linear(32, 16, bias=False, dtype=torch.bfloat16),
        (torch.device("cpu"), torch.bfloat16),
    )
    linear.weight = torch.nn.Parameter(torch.ones(16, 32, dtype=torch.bfloat16), requires_grad=False)
    fp8.weight(linear, *like)
    assert list(fp8.copies) == [linear]
    linear.weight, linear.weight_function = (
        torch.nn.Parameter(linear.weight * 2, requires_grad=False),
        [lambda weight: weight * 3],
    )
    _, scales, _ = fp8.weight(linear, *like)
    assert torch.allclose(scales, torch.full((1, 16), 6 / 448)) and not fp8.copies


def test_no_copy_is_kept_where_it_would_take_the_room_of_what_comes_next(tools, monkeypatch):
    from flux2_pack.flux2.fused import fp8_rowwise
    from flux2_pack.flux2.fused.kernels import quantise

    monkeypatch.setattr(quantise, "quantise_rows", rows_by_torch)
    linear = tools.comfy.ops.manual_cast.Linear(32, 16, bias=False, dtype=torch.bfloat16)
    linear.weight = torch.nn.Parameter(torch.ones(16, 32, dtype=torch.bfloat16), requires_grad=False)
    for free, kept in ((4 * 2**30, []), (4 * 2**30 + 1, [linear])):
        monkeypatch.setattr(tools.comfy.model_management, "get_free_memory", lambda device: free)
        fp8 = fp8_rowwise.RowwiseFp8()
        fp8.weight(linear, torch.device("cpu"), torch.bfloat16)
        assert list(fp8.copies) == kept


def test_fp8_leaves_weights_in_formats_that_it_does_not_know(tools):
    """Packs that load GGUF and the like keep packed bytes in a tensor class of their own, in a layer that is a
    Linear.
    """
    from flux2_pack.flux2.fused import fp8_rowwise

    class Packed(torch.Tensor):
        pass

    fp8, linear = fp8_rowwise.RowwiseFp8(), torch.nn.Linear(32, 32)
    for weight in (torch.zeros(32, 18, dtype=torch.uint8).as_subclass(Packed), torch.zeros(32, 32, dtype=torch.int8)):
        linear.weight = torch.nn.Parameter(weight, requires_grad=False)
        assert not fp8.suits(linear)
    assert (
        "a layer's weight is kept in a format of its own (Packed, torch.uint8)" in fp8.as_text()
        and "torch.int8" in fp8.as_text()
    )


def test_fp8_asks_for_a_model_that_computes_in_bfloat16(tools, flux2, monkeypatch):
    from flux2_pack.flux2.fused import fp8_rowwise

    monkeypatch.setattr(tools.comfy.model_management, "supports_fp8_compute", lambda device=None: True)
    for stored, computed, fits in (
        (torch.float8_e4m3fn, torch.float16, False),
        (torch.float8_e4m3fn, torch.bfloat16, True),
        (torch.bfloat16, None, True),
        (torch.float16, None, False),
        (torch.bfloat16, torch.float32, False),
    ):
        monkeypatch.setattr(flux2.model, "get_dtype", lambda: stored)
        monkeypatch.setattr(flux2.model, "manual_cast_dtype", computed)
        reason = fp8_rowwise.unavailable_for(flux2)
        assert (reason is None) == fits and (fits or str(computed or stored) in reason)
