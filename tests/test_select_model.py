"""The selector on real ComfyUI MODELs, in process: the latents of core without it, and its neighbours - compile, KV
cache,
LoRA, other packs.

Tensors are compared, in float32 on the CPU. The same over a running server is in test_server.py.
"""

import asyncio
import types

import pytest
import torch

STEPS = 2


@pytest.fixture(scope="module")
def tools(comfy):
    """ComfyUI's modules and ours, imported after ComfyUI is importable. The pack's nodes run under ComfyUI's own
    API.
    """
    import comfy.sample
    import comfy.samplers
    import comfy.sd
    import comfy_extras.nodes_flux as nodes_flux
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from flux2_pack.nodes import attention as nodes
    import comfy

    return types.SimpleNamespace(comfy=comfy, flux=nodes_flux, nodes=nodes, compile=set_torch_compile_wrapper)


@pytest.fixture(scope="module")
def flux2(tools, small_models):
    model = tools.comfy.sd.load_diffusion_model(str(small_models["model"]), model_options={"dtype": torch.float32})
    assert type(model.model).__name__ == "Flux2"
    return model


def flux2_context(batch=1, seed=2):
    return torch.randn(batch, 20, 192, generator=torch.Generator().manual_seed(seed)) * 0.3


def select(tools, model, backend, **options):
    return tools.nodes.Flux2SelectAttention.execute(model, backend, **options).args[0]


def conditioning(context, references=0, **extra):
    refs = [torch.randn(1, 128, 4, 6, generator=torch.Generator().manual_seed(10 + i)) for i in range(references)]
    return [[context, {**({"reference_latents": refs} if refs else {}), **extra}]]


def sample(tools, model, positive, shape=(1, 128, 8, 6), sampler="euler", steps=STEPS, cfg=1.0):
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    return tools.comfy.sample.sample(
        model, noise, steps, cfg, sampler, "simple", positive, positive, torch.zeros(shape), disable_pbar=True, seed=5
    )


def report(tools, model, latent):
    output = tools.nodes.Flux2AttentionReport.execute(model, {"samples": latent})
    return output.args[1], output.ui["flux2_attention"][0]


def calls(data):
    return {
        e["backend"]: sum(x["calls"] for x in data["entries"] if x["backend"] == e["backend"]) for e in data["entries"]
    }


def assert_same(out, expected, tolerance=1e-5):
    assert torch.isfinite(out).all()
    error = ((out - expected).norm() / expected.norm()).item()
    assert error < tolerance, f"relative error {error:.2e}"


@pytest.mark.parametrize("backend", ["auto", "sdpa", "sdpa-flash", "sdpa-math"])
@pytest.mark.parametrize("batch, references", [(1, 0), (2, 1), (1, 2)])
def test_each_backend_gives_cores_latents(tools, flux2, backend, batch, references):
    positive = conditioning(flux2_context(batch), references)
    shape = (batch, 128, 8, 6)
    expected = sample(tools, flux2, positive, shape)
    chosen = select(tools, flux2, backend)
    out = sample(tools, chosen, positive, shape)
    assert_same(out, expected)
    text, data = report(tools, chosen, out)
    assert data["calls"] == STEPS * 6 and data["steps"] == STEPS and data["error"] is None
    assert f"length {512 + 48 + 24 * references}" in text and (backend == "auto" or data["backend"] == backend)


def test_the_model_without_the_node_is_as_before(tools, flux2):
    positive = conditioning(flux2_context())
    before, options = sample(tools, flux2, positive), dict(flux2.model_options)
    select(tools, flux2, "sdpa-math")
    assert (
        torch.equal(sample(tools, flux2, positive), before)
        and flux2.model_options == options
        and not flux2.wrappers.get("outer_sample", {}).get("flux2_attention")
    )


def test_selecting_twice_replaces_and_clones_keep_their_own(tools, flux2):
    positive = conditioning(flux2_context())
    first = select(tools, flux2, "sdpa-flash")
    second = select(tools, first, "sdpa-math")
    lora_like = second.clone()
    for model, backend in (
        (second, "sdpa-math"),
        (first, "sdpa-flash"),
        (lora_like, "sdpa-math"),
        (first, "sdpa-flash"),
    ):
        out = sample(tools, model, positive)
        assert calls(report(tools, model, out)[1]) == {backend: STEPS * 6}
    assert len(second.wrappers["outer_sample"]["flux2_attention"]) == 1


def test_a_report_belongs_to_its_latent(tools, flux2):
    chosen = select(tools, flux2, "sdpa")
    two, three = (sample(tools, chosen, conditioning(flux2_context()), steps=n) for n in (2, 3))
    assert report(tools, chosen, two)[1]["steps"] == 2 and report(tools, chosen, three)[1]["steps"] == 3
    assert "not one that the model's last samplings produced" in report(tools, chosen, two + 1)[0]
    assert "No Select Attention" in report(tools, flux2, two)[0]
    assert "Nothing has been sampled" in report(tools, select(tools, flux2, "sdpa"), two)[0]


@pytest.mark.parametrize("backend", ["flash2", "flash3", "flash4", "sdpa-cudnn", "sage2", "xformers", "comfy-int8"])
def test_a_backend_that_cannot_run_here_refuses_at_the_node_with_reasons(tools, flux2, backend):
    from flux2_pack.attention import registry

    if not registry.unavailable(backend, registry.describe("cpu")):
        pytest.skip("it can run here")
    with pytest.raises(ValueError) as caught:
        select(tools, flux2, backend)
    said = str(caught.value)
    assert f"'{backend}' cannot run here" in said and "on a CPU" in said
    assert "auto finds one that runs here" in said and "install" not in said, "installing would not help"


@pytest.mark.parametrize("sampler, forwards", [("euler", 4), ("heun", 7), ("dpmpp_2m", 4)])
def test_a_schedule_follows_the_samplers_steps(tools, flux2, sampler, forwards):
    chosen = select(tools, flux2, "sdpa", edge_backend="sdpa-math", first_steps=1, last_steps=1)
    out = sample(tools, chosen, conditioning(flux2_context()), sampler=sampler, steps=4)
    edge = {"euler": 2, "heun": 3, "dpmpp_2m": 2}[sampler]  # heun evaluates twice in every step but the last
    assert calls(report(tools, chosen, out)[1]) == {"sdpa-math": edge * 6, "sdpa": (forwards - edge) * 6}


def test_a_schedule_follows_the_models_blocks(tools, flux2):
    chosen = select(tools, flux2, "sdpa", edge_backend="sdpa-math", first_blocks=3, last_blocks=1)
    out = sample(tools, chosen, conditioning(flux2_context()))
    assert calls(report(tools, chosen, out)[1]) == {"sdpa-math": 4 * STEPS, "sdpa": 2 * STEPS}


@pytest.mark.parametrize("order", ["select then compile", "compile then select"])
def test_torch_compile_before_and_after(tools, flux2, order):
    torch._dynamo.reset()
    positive = conditioning(flux2_context(), 1)
    expected = sample(tools, flux2, positive)

    # what core's TorchCompileModel does, with a backend that needs no compiler, and without graph breaks
    def compiled(model):
        model = model.clone(disable_dynamic=True)
        tools.compile(
            model=model,
            backend="aot_eager",
            fullgraph=True,
            options={"guard_filter_fn": lambda entries: ["transformer_options" not in e.name for e in entries]},
            keys=[f"diffusion_model.{kind}_blocks.{i}" for kind, n in (("double", 2), ("single", 4)) for i in range(n)],
        )
        return model

    backend_first = order == "select then compile"
    model = (
        compiled(select(tools, flux2, "sdpa-math")) if backend_first else select(tools, compiled(flux2), "sdpa-math")
    )
    out = sample(tools, model, positive)
    assert_same(out, expected)
    assert calls(report(tools, model, out)[1]) == {"sdpa-math": STEPS * 6}


def test_selections_on_one_compiled_model(tools, flux2):
    torch._dynamo.reset()
    options = {"guard_filter_fn": lambda entries: ["transformer_options" not in e.name for e in entries]}
    compiled = flux2.clone(disable_dynamic=True)
    tools.compile(model=compiled, backend="aot_eager", options=options)
    positive = conditioning(flux2_context())
    for backend in ("sdpa-math", "sdpa-flash", "sdpa-math"):
        chosen = select(tools, compiled, backend)
        out = sample(tools, chosen, positive)
        assert calls(report(tools, chosen, out)[1]) == {backend: STEPS * 6}


def test_a_schedule_in_a_compiled_model_counts_blocks_by_the_order_of_calls(tools, flux2):
    torch._dynamo.reset()
    model = flux2.clone(disable_dynamic=True)
    tools.compile(
        model=model,
        backend="aot_eager",
        options={"guard_filter_fn": lambda entries: ["transformer_options" not in e.name for e in entries]},
    )
    chosen = select(tools, model, "sdpa", edge_backend="sdpa-math", first_steps=1, last_blocks=1)
    out = sample(tools, chosen, conditioning(flux2_context()))
    assert calls(report(tools, chosen, out)[1]) == {"sdpa-math": 6 + 1, "sdpa": 5}


@pytest.mark.parametrize("ours_first", [True, False])
def test_cores_kv_cache(tools, flux2, ours_first):
    positive = conditioning(flux2_context(), 1)
    cache = tools.flux.FluxKVCache
    expected = sample(tools, cache.execute(flux2).args[0], positive, steps=3)
    model = (
        cache.execute(select(tools, flux2, "sdpa-math")).args[0]
        if ours_first
        else select(tools, cache.execute(flux2).args[0], "sdpa-math")
    )
    out = sample(tools, model, positive, steps=3)
    assert_same(out, expected)
    kinds = {e["call"].split(", ")[1] for e in report(tools, model, out)[1]["entries"]}
    assert kinds == {"length 584", "length 560 queries x 584 keys"}


def kj_style(backend_function, seen):
    """A patch as KJNodes writes it: overwrites the slot and never chains."""

    def attention_override(func, *args, **kwargs):
        seen.append(1)
        return backend_function.__wrapped__(*args, **kwargs)

    return attention_override


def with_override(model, override):
    patched = model.clone()
    patched.model_options.setdefault("transformer_options", {})["optimized_attention_override"] = override
    return patched


def test_another_packs_override_before_and_after_ours(tools, flux2):
    from comfy.ldm.modules.attention import attention_pytorch

    positive, seen = conditioning(flux2_context()), []
    expected = sample(tools, flux2, positive)
    before = select(tools, with_override(flux2, kj_style(attention_pytorch, seen)), "sdpa-math")
    out = sample(tools, before, positive)
    assert_same(out, expected)
    text, data = report(tools, before, out)
    assert not seen and "attention_override" in data["previous_override"] and "attention_override" in text
    after = with_override(select(tools, flux2, "sdpa-math"), kj_style(attention_pytorch, seen))
    out = sample(tools, after, positive)
    assert_same(out, expected)
    assert (
        len(seen) == STEPS * 6
        and "took its place" in report(tools, after, out)[0]
        and "attention_override" in report(tools, after, out)[0]
    )


def newer_core_setter(model, function):
    """What set_model_optimized_attention of cores after 0.30 writes into the slot, from its behaviour: the first
    argument is dropped.
    """

    def optimized_attention_override(_, *args, **kwargs):
        return function(*args, **kwargs)

    return with_override(model, optimized_attention_override)


def test_the_attention_node_of_newer_cores_before_and_after_ours(tools, flux2):
    from comfy.ldm.modules.attention import attention_pytorch

    positive, seen = conditioning(flux2_context()), []

    def counted(*args, **kwargs):
        seen.append(1)
        return attention_pytorch.__wrapped__(*args, **kwargs)

    expected = sample(tools, flux2, positive)
    before = select(tools, newer_core_setter(flux2, counted), "sdpa-math")
    assert_same(sample(tools, before, positive), expected)
    assert not seen, "ours was chosen later and computes"
    out = sample(tools, newer_core_setter(before, counted), positive)
    assert_same(out, expected)
    assert len(seen) == STEPS * 6, "theirs was chosen later and computes"


def test_newer_cores_unwrap_their_containers_for_an_override_without_a_container_function(tools, flux2):
    override = select(tools, flux2, "sdpa").model_options["transformer_options"]["optimized_attention_override"]
    assert callable(override) and not hasattr(override, "container_function")


def test_lora_and_attention_patches(tools, flux2):
    positive = conditioning(flux2_context())
    key = "diffusion_model.single_blocks.1.linear1.weight"
    weight = flux2.model.state_dict()[key]

    def modified():
        model = flux2.clone()
        model.add_patches({key: (torch.randn(weight.shape, generator=torch.Generator().manual_seed(4)) * 0.02,)}, 1.0)
        model.set_model_attn1_patch(
            lambda q, k, v, extra_options=None, **kw: {
                "q": q * 1.1,
                "k": k,
                "v": v,
                **{n: kw[n] for n in ("pe", "attn_mask") if n in kw},
            }
        )
        return model

    expected = sample(tools, modified(), positive)
    assert ((expected - sample(tools, flux2, positive)).norm() / expected.norm()) > 1e-3, "the patches do something"
    chosen = select(tools, modified(), "sdpa-math")
    assert_same(sample(tools, chosen, positive), expected)


def test_an_attention_mask_of_the_conditioning(tools, flux2):
    # additive: core's own choice on a CPU, sub-quadratic attention, adds a bool mask to the scores as zeros and ones
    mask = torch.zeros(1, 512 + 48)
    mask[:, :492] = torch.finfo(torch.float32).min  # the padding of the text, which nobody has to attend
    model = flux2.clone()
    model.add_wrapper_with_key(
        "diffusion_model",
        "mask",
        lambda executor, *args, **kwargs: executor(*args, **kwargs, attention_mask=mask[:, None, None]),
    )
    positive = conditioning(flux2_context())
    expected = sample(tools, model, positive)
    for backend in ("sdpa", "sdpa-flash", "sdpa-math"):
        chosen = select(tools, model, backend)
        out = sample(tools, chosen, positive)
        assert_same(out, expected)
        assert "key-padding mask" in report(tools, chosen, out)[0]


def test_a_sampling_that_stops_is_reported_with_its_error(tools, flux2):
    chosen = select(tools, flux2, "sdpa")
    model = chosen.clone()
    model.add_wrapper_with_key(
        "diffusion_model", "fail", lambda executor, *args, **kwargs: (_ for _ in ()).throw(RuntimeError("out of luck"))
    )
    with pytest.raises(RuntimeError):
        sample(tools, model, conditioning(flux2_context()))
    text, data = report(tools, model, torch.zeros(1))
    assert "out of luck" in text and data["calls"] == 0


# --- models that are not FLUX.2


def other_model(tools, name):
    """A small MODEL of another architecture, detected by ComfyUI, with (context width, latent shape, extra
    conditioning).
    """
    operations = tools.comfy.ops.disable_weight_init
    torch.manual_seed(7)
    if name == "FLUX.1":
        import comfy.ldm.flux.model

        net = comfy_flux1(comfy.ldm.flux.model.Flux, operations)
        about = (64, (1, 16, 8, 6), {"pooled_output": torch.randn(1, 32), "guidance": 3.5})
    else:
        import comfy.ldm.wan.model

        net = comfy.ldm.wan.model.WanModel(
            dim=256, ffn_dim=256, text_dim=4096, num_heads=2, num_layers=2, operations=operations, dtype=torch.float32
        )
        about = (4096, (1, 16, 2, 8, 6), {})
    weights = {
        k: torch.randn(v.shape) * (0.05 if v.ndim > 1 else 0.02) + (v.ndim == 1 and "norm" in k)
        for k, v in net.state_dict().items()
    }
    model = tools.comfy.sd.load_diffusion_model_state_dict(weights, model_options={"dtype": torch.float32})
    return model, *about


def comfy_flux1(flux, operations):
    return flux(
        in_channels=16,
        out_channels=16,
        vec_in_dim=32,
        context_in_dim=64,
        hidden_size=256,
        mlp_ratio=4.0,
        num_heads=2,
        depth=1,
        depth_single_blocks=2,
        axes_dim=[16, 56, 56],
        theta=10000,
        patch_size=2,
        qkv_bias=True,
        guidance_embed=True,
        txt_ids_dims=[],
        operations=operations,
        dtype=torch.float32,
    )


@pytest.mark.parametrize("name, per_forward", [("FLUX.1", 3), ("Wan 2.1", 4)])
@pytest.mark.parametrize("backend", ["auto", "sdpa-math"])
def test_other_models_keep_their_latents(tools, name, per_forward, backend):
    model, width, shape, extra = other_model(tools, name)
    positive = conditioning(torch.randn(1, 20, width, generator=torch.Generator().manual_seed(2)), **extra)
    expected = sample(tools, model, positive, shape)
    chosen = select(tools, model, backend)
    out = sample(tools, chosen, positive, shape)
    assert_same(out, expected)
    assert report(tools, chosen, out)[1]["calls"] == STEPS * per_forward


def test_the_nodes_explain_themselves(tools):
    from comfy_api.latest import io
    from flux2_pack import nodes

    listed = asyncio.run(asyncio.run(nodes.comfy_entrypoint()).get_node_list())
    for node in listed:
        schema = node.define_schema()
        assert (
            schema.node_id.startswith("Flux2")
            and schema.category.startswith("Flux 2")
            and schema.display_name
            and len(schema.description) > 60
        )
        assert all(i.tooltip and len(i.tooltip) > 20 for i in schema.inputs), schema.node_id
        assert all(isinstance(o, io.Output) and o.tooltip for o in schema.outputs), schema.node_id
