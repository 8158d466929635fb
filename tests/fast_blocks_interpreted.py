"""Fused blocks against core's blocks, on small real-format models: Triton's interpreter on the CPU, float32, tensors compared.

Run by test_fast_blocks.py in a process of its own: Triton asks for TRITON_INTERPRET when it is imported. The interpreter computes in numpy and has no bfloat16;
that is measured on a GPU by benchmarks/fast_check.py.
"""
import os
import types

import pytest
import torch

CLOSE = 1e-6
ALL = {"fast": 6, "left": {}}  # the small model has two double and four single blocks


@pytest.fixture(scope="module")
def tools(comfy):
    assert os.environ.get("TRITON_INTERPRET") == "1"
    import comfy.sample
    import comfy.sd
    from flux2_pack.flux2 import fast_blocks
    from flux2_pack.nodes import attention, fast
    import comfy
    return types.SimpleNamespace(comfy=comfy, fast_blocks=fast_blocks, node=fast.Flux2FastBlocks, attention=attention)


@pytest.fixture(scope="module")
def flux2(tools, small_models):
    return tools.comfy.sd.load_diffusion_model(str(small_models["model"]), model_options={"dtype": torch.float32})


def fast(tools, model):
    return tools.node.execute(model).args[0]


def inputs(case, dtype=torch.float32):
    """Arguments of one forward pass: x, t, c_crossattn, guidance, references. Short, because the interpreter takes a millisecond for each row."""
    g = torch.Generator().manual_seed(3)
    batch, (height, width), references = case.get("batch", 1), case.get("size", (2, 2)), case.get("references", 0)
    found = {"x": torch.randn(batch, 128, height, width, generator=g), "t": torch.tensor([0.7, 0.3])[:batch], "guidance": torch.full((1,), 4.0),
             "c_crossattn": torch.randn(batch, case.get("tokens", 3), 192, generator=g).to(dtype) * 0.3}
    if references:
        found["ref_latents"] = [torch.randn(batch, 128, 1, 2 + n, generator=g).to(dtype) for n in range(references)]
        found["ref_latents_method"] = case.get("method", "index")
    return found


def forward(model, given):
    options = dict(model.model_options.get("transformer_options", {}))
    options["wrappers"] = {kind: dict(keyed) for kind, keyed in model.wrappers.items()}
    with torch.inference_mode():
        return model.model.apply_model(**{k: v.clone() if torch.is_tensor(v) else v for k, v in given.items()}, transformer_options=options)


def relative(out, expected):
    assert torch.isfinite(out).all()
    return ((out - expected).double().norm() / expected.double().norm()).item()


CASES = {"text to image": {}, "odd lengths": {"size": (3, 3), "tokens": 4}, "batch of two": {"batch": 2}, "one reference": {"references": 1},
         "two references": {"references": 2, "tokens": 5}, "references at timestep zero": {"references": 2, "method": "index_timestep_zero"},
         "timestep zero in a batch": {"batch": 2, "references": 1, "method": "index_timestep_zero"}}


@pytest.mark.parametrize("case", CASES)
def test_a_forward_pass_equals_cores(tools, flux2, case):
    given = inputs(CASES[case])
    model = fast(tools, flux2)
    assert relative(forward(model, given), forward(flux2, given)) < CLOSE
    assert tools.fast_blocks.log_of(model).as_data() == ALL


def counted(monkeypatch):
    """Counts of launches by the name of the kernels' wrappers."""
    from collections import Counter
    from flux2_pack.flux2.kernels import heads, norm, swiglu
    counts = Counter()
    for module, names in ((norm, ("norm_modulate", "add_gated", "add_gated_norm_modulate")), (heads, ("single_qkv", "joint_qkv")), (swiglu, ("swiglu",))):
        for name in names:
            def wrapper(*args, name=name, function=getattr(module, name), **kwargs):
                counts[name] += 1
                return function(*args, **kwargs)
            monkeypatch.setattr(module, name, wrapper)
    return counts


def test_the_fast_path_is_live_and_has_as_many_kernels_as_it_should(tools, flux2, monkeypatch):
    counts = counted(monkeypatch)
    forward(fast(tools, flux2), inputs({}))
    # a double block: norm, add+norm, SwiGLU and add on each side, q/k/v once; a single block: norm, q/k/v, SwiGLU, add
    assert counts == {"norm_modulate": 2 * 2 + 4, "add_gated_norm_modulate": 2 * 2, "add_gated": 2 * 2 + 4, "swiglu": 2 * 2 + 4, "joint_qkv": 2, "single_qkv": 4}


def test_the_model_without_the_node_is_as_before_and_twice_is_once(tools, flux2, monkeypatch):
    options = {k: v for k, v in flux2.model_options.items()}
    twice = fast(tools, fast(tools, flux2))
    counts = counted(monkeypatch)
    forward(flux2, inputs({}))
    assert not counts and flux2.model_options == options
    forward(twice, inputs({}))
    assert counts["single_qkv"] == 4 and len(twice.wrappers["outer_sample"]["flux2_fast_blocks"]) == 1


def test_attention_comes_from_the_selector_in_either_order(tools, flux2):
    given = inputs({})
    expected = forward(flux2, given)
    select = tools.attention.Flux2SelectAttention
    for model in (select.execute(fast(tools, flux2), "sdpa-math").args[0], fast(tools, select.execute(flux2, "sdpa-math").args[0])):
        assert relative(forward(model, given), expected) < CLOSE
        data = model.model_options["transformer_options"]["optimized_attention_override"].selection.log.current.as_data()
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
    given["control"] = {"input": [torch.randn(1, 4, 256) for _ in range(2)], "output": [torch.randn(1, 4, 256), None, torch.randn(1, 3, 256)]}
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
    """As with offloaded weights and a LoRA: every linear layer and every norm of a block has a function on its weight."""
    given = inputs({})
    plain = forward(flux2, given)
    touched = [m for m in flux2.model.diffusion_model.modules() if getattr(m, "weight", None) is not None and hasattr(m, "weight_function")]
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
    weights = {name: w for name, w in flux2.model.state_dict().items() if name.endswith("weight") and "blocks" in name and w.ndim == 2}
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


def test_float16_overflow_is_mended_as_in_core(tools):
    from flux2_pack.flux2.kernels.norm import add_gated
    x, delta = torch.full((1, 2, 8), 60000.0).half(), torch.tensor([60000.0, -60000.0, float("nan"), 1, 2, 3, 4, 5]).half().expand(1, 2, 8).contiguous()
    gate = torch.ones(1, 1, 8).half()
    expected = torch.nan_to_num(x.float() + delta.float(), nan=0.0).clamp(-65504, 65504).half()
    assert torch.equal(add_gated(x.clone(), delta, gate, finite=True), expected)


def test_the_report_says_what_was_fused(tools, flux2):
    model = fast(tools, flux2)
    assert "Fused blocks: nothing has been sampled yet." in tools.attention.Flux2AttentionReport.execute(model, {"samples": torch.zeros(1, 128, 3, 4)}).args[1]
    forward(model, inputs({}))
    output = tools.attention.Flux2AttentionReport.execute(model, {"samples": torch.zeros(1, 128, 3, 4)})
    assert "Fused blocks: 6 of 6 block calls." in output.args[1] and output.ui["flux2_attention"][0]["fast_blocks"] == ALL


def test_calls_that_cannot_be_fused_are_left_to_core_and_counted(tools, flux2):
    model, given = fast(tools, flux2), inputs({"references": 1, "method": "index_timestep_zero"})

    def hiding(args, extra):
        inner = extra["original_block"]
        return inner(args)
    replacement = model.model_options["transformer_options"]["patches_replace"]["dit"][("single_block", 0)]
    wrapped = model.clone()
    wrapped.set_model_patch_replace(lambda args, extra: replacement(args, {"original_block": lambda a: hiding(a, extra)}), "dit", "single_block", 0)
    assert relative(forward(wrapped, given), forward(flux2, given)) < CLOSE
    data = tools.fast_blocks.log_of(model).as_data()
    assert data["fast"] == 5 and list(data["left"].values()) == [1] and "second modulation" in next(iter(data["left"]))
    text = tools.fast_blocks.log_of(model).as_text()
    assert "5 of 6 block calls" in text and "left to ComfyUI's block, 1 calls" in text


def test_it_refuses_a_cpu_without_the_interpreter_and_models_of_another_kind(tools, flux2, monkeypatch):
    other = flux2.clone()
    other.model = types.SimpleNamespace(diffusion_model=torch.nn.Module())
    with pytest.raises(ValueError, match="it has no blocks of the FLUX kind"):
        tools.fast_blocks.install(other)
    with pytest.raises(RuntimeError, match="fp8 here"):
        tools.node.execute(flux2, "fp8")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match="this model computes on 'cpu'"):
        tools.node.execute(flux2)


def scaled_mm(a, b, scale_a, scale_b, bias=None, out_dtype=None, use_fast_accum=False):
    """torch._scaled_mm's row-wise form, in float32."""
    out = (a.float() * scale_a) @ (b.float() * scale_b)
    return (out if bias is None else out + bias).to(out_dtype)


def rows_by_torch(x, scales):
    """What the kernel quantise_rows does; the interpreter would take minutes for a model's weights."""
    scales.copy_(x.float().abs().amax(-1, keepdim=True).clamp_min(1e-12) / 448)
    return (x.float() / scales).to(torch.float8_e4m3fn)


def test_rows_of_fp8_have_the_scale_of_their_largest_element(comfy):
    from flux2_pack.flux2.kernels import norm, quantise, swiglu
    g = torch.Generator().manual_seed(1)
    x, mlp, attn, scales = torch.randn(2, 3, 64, generator=g), torch.randn(2, 3, 96, generator=g), torch.randn(2, 3, 32, generator=g), torch.empty(2, 3, 1)
    x[1, 2] = 0
    shift, scale = torch.randn(1, 1, 128, generator=g).chunk(2, -1)
    for exact, fp8 in ((x, quantise.quantise_rows), (norm.norm_modulate(x, shift, scale), lambda _, s: norm.norm_modulate(x, shift, scale, fp8_scale=s)),
                       (swiglu.swiglu(mlp, attn), lambda _, s: swiglu.swiglu(mlp, attn, fp8_scale=s)), (swiglu.swiglu(mlp), lambda _, s: swiglu.swiglu(mlp, fp8_scale=s))):
        data = fp8(exact, scales)
        assert torch.allclose(scales, exact.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 448) and data.dtype == torch.float8_e4m3fn
        assert relative(data.float() * scales, exact) < 0.09  # 0.03 on a GPU: the interpreter does not round fp8 to nearest


def test_fp8_products_with_a_scale_per_row_say_their_error_and_keep_copies_until_weights_change(tools, flux2, monkeypatch):
    from flux2_pack.flux2 import row_fp8
    from flux2_pack.flux2.kernels import quantise
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    monkeypatch.setattr(quantise, "quantise_rows", rows_by_torch)
    rows, model, given = row_fp8.RowFp8(), flux2.clone(), inputs({})
    rows.install(model)
    log, _ = tools.fast_blocks.install(model, rows)
    out = forward(model, given)
    assert 1e-5 < relative(out, forward(flux2, given)) < 0.3  # the interpreter rounds fp8 towards zero: twice the error of a GPU
    assert set(rows.errors) == {f"{side}_{name}" for side in ("img", "txt") for name in ("attn.qkv", "attn.proj", "mlp.0", "mlp.2")} | {"linear1", "linear2"}
    assert all(0.01 < error < 0.12 for error in rows.errors.values()) and "linear1" in log.as_text() and log.as_data()["fp8_errors"] == rows.errors
    assert len(rows.copies) == 2 * 8 + 4 * 2 and torch.equal(forward(model, given), out)
    model.add_patches({"diffusion_model.single_blocks.0.linear2.weight": ("diff", (torch.ones(256, 1024),))}, 1.0)
    model.patch_model()  # what ComfyUI does before it samples
    changed = forward(model, given)
    model.unpatch_model()
    assert relative(changed, out) > 1e-4


def test_products_that_fp8_leaves_alone_are_said(tools):
    from flux2_pack.flux2 import row_fp8
    rows = row_fp8.RowFp8()
    for linear in (types.SimpleNamespace(layout_type="TensorCoreFP8E4M3Layout"), torch.nn.Linear(24, 32)):
        assert not rows.suits(linear)
    text = rows.as_text()
    assert "no product was computed so" in text and "quantised already (fp8)" in text and "24 x 32 is no multiple of 16" in text
    assert rows.suits(torch.nn.Linear(32, 32))
