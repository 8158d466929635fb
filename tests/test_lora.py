"""Load FLUX.2 LoRA: every key family that trainers write, merged weights against the formula in float32 and against
diffusers' own conversion, and what is said of files that do not fit.

The expected weights are made in the trainer's own layout: its change is added to the model in that layout, in float32,
and the sum is brought into ComfyUI's keys by the tables that convert whole models. Not covered: the published LoRAs.
"""

import json
import types

import pytest
import torch

import small_models as maker

CLOSE = 2e-6  # of float32 sums in another order
RANK = 4


@pytest.fixture(scope="module")
def tools(comfy):
    import comfy.sd
    from flux2_pack.flux2.checkpoints import keys, variants
    from flux2_pack.flux2.checkpoints.header import CheckpointError
    from flux2_pack.flux2.loading import load
    from flux2_pack.flux2.lora import load as lora, names, targets
    from flux2_pack.flux2.lora.dora import Decomposed

    return types.SimpleNamespace(
        core=comfy, keys=keys, variants=variants, load=load, lora=lora, names=names, targets=targets,
        Decomposed=Decomposed, Refused=CheckpointError,
    )  # fmt: skip


@pytest.fixture(scope="module")
def weights():
    return maker.diffusion_model(dtype=torch.float32)


@pytest.fixture(scope="module")
def model(tools, weights, tmp_path_factory):
    file = maker.write(tmp_path_factory.mktemp("lora") / "flux2.safetensors", weights)
    loaded = tools.load.load_model(file)
    assert loaded.model.diffusion_model.img_in.weight.dtype == torch.float32
    return loaded


@pytest.fixture(scope="module")
def variant(tools, model):
    return tools.targets.variant_of(model)


@pytest.fixture(autouse=True)
def no_gradients():
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield


def generator(text):
    return maker.Weights(f"lora/{text}", torch.float32).generator("x")


def draw(name, *shape, scale=0.1):
    return torch.randn(shape, generator=generator(name)) * scale


# --- layers and families ---------------------------------------------------------------------------------------------


def layers(tools, variant, naming):
    """{module: shape of its weight} of every matrix of the small model, in "original" or "diffusers" names."""
    shapes = (tools.keys.model_shapes if naming == "original" else tools.keys.diffusers_shapes)(variant)
    return {name.removesuffix(".weight"): shape for name, shape in shapes.items() if len(shape) == 2}


def expected(tools, variant, weights, naming, changed):
    """The model's weights in ComfyUI's keys after `changed(module, weight)` was applied in the layout of `naming`."""
    if naming == "original":
        before = {ours(name): value for name, value in weights.items()}
        return {
            name: changed(name.removesuffix(".weight"), value) if value.ndim == 2 else value
            for name, value in before.items()
        }
    from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers

    theirs = convert_flux2_transformer_checkpoint_to_diffusers({name: value.clone() for name, value in weights.items()})
    theirs = {
        name: changed(name.removesuffix(".weight"), value) if value.ndim == 2 else value
        for name, value in theirs.items()
    }
    converted, stacked, *_ = tools.keys.convert_model(theirs, variant)
    return converted | {name: torch.cat(parts) for name, parts in stacked.items()}


def ours(name):
    return name.removesuffix("scale") + "weight" if name.endswith("_norm.scale") else name


def merged(patcher):
    """The weights of a MODEL with its patches, in ComfyUI's keys."""
    import comfy.model_management

    comfy.model_management.unload_all_models()  # what another test sampled with
    patcher.patch_model()
    try:
        state = {name: value.clone() for name, value in patcher.model.diffusion_model.state_dict().items()}
    finally:
        patcher.unpatch_model()
    return state


def assert_merged(patcher, wanted, changes=True):
    found = merged(patcher)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        error = (found[name].float() - value).norm() / value.norm()
        assert error <= CLOSE, f"{name}: {error}"


def dotted(prefix):
    return lambda module: f"{prefix}{module}"


def flat(prefix):
    return lambda module: f"{prefix}{module.replace('.', '_')}"


def musubi(module):
    """A converter's: the block with dots, the layer in it with underscores."""
    head, _, rest = module.partition(".")
    number, _, layer = rest.partition(".")
    return f"diffusion_model.{head}.{number}.{layer.replace('.', '_')}" if layer else f"diffusion_model.{module}"


AB, DOWN_UP = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")
DEFAULT = ("lora_A.default.weight", "lora_B.default.weight")
FAMILIES = {  # name -> (layer names, spelling of a module, names of the factors, alpha)
    "BFL": ("original", dotted("diffusion_model."), AB, None),
    "ai-toolkit": ("original", dotted("diffusion_model."), AB, 2.0),
    "ai-toolkit, kohya's factors": ("original", dotted("diffusion_model."), DOWN_UP, 2.0),
    "kohya and musubi": ("original", flat("lora_unet_"), DOWN_UP, 2.0),
    "musubi, converted": ("original", musubi, AB, None),
    "bare, original": ("original", dotted(""), AB, None),
    "PEFT, original": ("original", dotted("base_model.model."), AB, None),
    "PEFT, named adapter": ("original", dotted("base_model.model."), DEFAULT, None),
    "LyCORIS, original": ("original", flat("lycoris_"), DOWN_UP, 2.0),
    "diffusers": ("diffusers", dotted("transformer."), AB, None),
    "diffusers, older factors": ("diffusers", dotted("transformer."), ("lora.down.weight", "lora.up.weight"), None),
    "bare, diffusers": ("diffusers", dotted(""), AB, None),
    "PEFT, diffusers": ("diffusers", dotted("base_model.model."), AB, None),
    "PEFT in diffusers": ("diffusers", dotted("transformer.base_model.model."), DEFAULT, None),
    "SimpleTuner for ComfyUI": ("diffusers", dotted("diffusion_model."), AB, 2.0),
    "LyCORIS and SimpleTuner": ("diffusers", flat("lycoris_"), DOWN_UP, 2.0),
    "OneTrainer": ("diffusers", flat("lora_transformer_"), DOWN_UP, 2.0),
    "OneTrainer, dots": ("diffusers", dotted("transformer."), DOWN_UP, 2.0),
    "kohya, diffusers": ("diffusers", flat("lora_unet_"), DOWN_UP, 2.0),
}


def factors(module, shape):
    """(down, up) of a layer."""
    return draw(f"{module}/down", RANK, shape[1]), draw(f"{module}/up", shape[0], RANK)


def low_rank_file(tools, variant, family, only=lambda module: True, dtype=None):
    """The tensors of a LoRA on every layer in the spelling of a family."""
    naming, spell, (down_name, up_name), alpha = FAMILIES[family]
    tensors = {}
    for module, shape in layers(tools, variant, naming).items():
        if only(module):
            down, up = factors(module, shape)
            tensors |= {f"{spell(module)}.{down_name}": down, f"{spell(module)}.{up_name}": up}
            tensors |= {} if alpha is None else {f"{spell(module)}.alpha": torch.tensor(alpha)}
    return {name: value if dtype is None or value.ndim == 0 else value.to(dtype) for name, value in tensors.items()}


def apply(tools, model, folder, tensors, strength=1.0, metadata=None, clip=None, name="a.safetensors"):
    return tools.lora.apply(model, clip, maker.write(folder / name, tensors, metadata), strength)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_family_is_applied_whole_and_exactly(tools, model, variant, weights, tmp_path, family):
    naming, _, _, alpha = FAMILIES[family]
    count = len(layers(tools, variant, naming))
    patched, _, report = apply(tools, model, tmp_path, low_rank_file(tools, variant, family), 0.7)
    assert f"\n{count} of {count} layers applied." in report and "LoRA of rank 4" in report

    def change(module, weight):
        down, up = factors(module, weight.shape)
        return weight + 0.7 * (1.0 if alpha is None else alpha / RANK) * up @ down

    assert_merged(patched, expected(tools, variant, weights, naming, change))


@pytest.mark.parametrize("family", ["BFL", "kohya and musubi"])
def test_the_mapping_is_that_of_diffusers(tools, model, variant, weights, tmp_path, family):
    """diffusers converts the file to its own layer names by itself; its result is merged by its rule, W + B A."""
    from diffusers.loaders import lora_conversion_utils as theirs

    skip = ("guidance_in", "adaLN", "modulation") if family != "BFL" else ()  # which their kohya table leaves out
    given = low_rank_file(tools, variant, family, lambda module: not any(part in module for part in skip))
    convert = {
        "BFL": theirs._convert_non_diffusers_flux2_lora_to_diffusers,
        "kohya and musubi": theirs._convert_kohya_flux2_lora_to_diffusers,
    }[family]
    converted = convert({name: value.clone() for name, value in given.items()})

    def change(module, weight):
        down = converted.get(f"transformer.{module}.lora_A.weight")
        return weight if down is None else weight + converted[f"transformer.{module}.lora_B.weight"] @ down

    wanted = expected(tools, variant, weights, "diffusers", change)
    if family == "BFL":
        # diffusers renames the final modulation without exchanging its halves, as it does for whole models: the
        # original's rows are what such a file was trained on
        name = "final_layer.adaLN_modulation.1"
        down, up = factors(name, weights[f"{name}.weight"].shape)
        wanted[f"{name}.weight"] = weights[f"{name}.weight"] + up @ down
    assert_merged(apply(tools, model, tmp_path, given)[0], wanted)


# --- kinds -----------------------------------------------------------------------------------------------------------


def lokr_full(module, rows, columns):
    return {"lokr_w1": draw(f"{module}/1", 4, 4), "lokr_w2": draw(f"{module}/2", rows // 4, columns // 4)}


def lokr_low_rank(module, rows, columns):
    return {
        "lokr_w1": draw(f"{module}/1", 4, 4),
        "lokr_w2_a": draw(f"{module}/a", rows // 4, RANK),
        "lokr_w2_b": draw(f"{module}/b", RANK, columns // 4),
        "alpha": torch.tensor(2.0),
    }


def lokr_odd(module, rows, columns):
    """The first factor has one row: halves of the product are no halves of it."""
    return {"lokr_w1": draw(f"{module}/1", 1, 1), "lokr_w2": draw(f"{module}/2", rows, columns)}


def loha(module, rows, columns):
    return {
        f"hada_w{n}_{side}": draw(f"{module}/{n}{side}", *shape)
        for n in (1, 2)
        for side, shape in (("a", (rows, RANK)), ("b", (RANK, columns)))
    } | {"alpha": torch.tensor(2.0)}


def difference(module, rows, columns):
    return {"diff": draw(module, rows, columns)}


def low_rank(module, rows, columns):
    down, up = factors(module, (rows, columns))
    return {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(2.0)}


def change_of(parts):
    """The formulas of LyCORIS, float32."""
    scale = parts["alpha"] / RANK if "alpha" in parts else 1.0
    if "lokr_w1" in parts:
        second = parts["lokr_w2"] if "lokr_w2" in parts else parts["lokr_w2_a"] @ parts["lokr_w2_b"]
        return scale * torch.kron(parts["lokr_w1"], second)
    if "hada_w1_a" in parts:
        return scale * (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])
    return parts["diff"] if "diff" in parts else scale * parts["lora_up.weight"] @ parts["lora_down.weight"]


def lengths(module, rows, columns, side):
    return draw(f"{module}/m", *((rows, 1) if side == "rows" else (1, columns)), scale=0.2) + 1.0


KINDS = {
    "LoRA": low_rank,
    "LoKr": lokr_full,
    "LoKr, low rank": lokr_low_rank,
    "LoKr, odd": lokr_odd,
    "LoHa": loha,
    "differences": difference,
}
KIND_FAMILIES = {
    "original": ("original", dotted("diffusion_model.")),
    "lycoris": ("diffusers", flat("lycoris_")),
    "peft": ("original", dotted("base_model.model.")),
    "bare": ("original", dotted("")),
}


@pytest.mark.parametrize("side", ["", "rows", "columns"])
@pytest.mark.parametrize("family", KIND_FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_its_formula(tools, model, variant, weights, tmp_path, kind, family, side):
    """side: DoRA, with lengths of rows (PEFT, LyCORIS) or of columns (older LyCORIS)."""
    if side and kind in ("differences", "LoKr, odd"):
        pytest.skip("no trainer writes it")
    naming, spell = KIND_FAMILIES[family]
    every = layers(tools, variant, naming)
    tensors = {}
    for module, shape in every.items():
        parts = KINDS[kind](module, *shape) | ({"dora_scale": lengths(module, *shape, side)} if side else {})
        tensors |= {f"{spell(module)}.{part}": value for part, value in parts.items()}
    patched, _, report = apply(tools, model, tmp_path, tensors, 0.6)
    assert f"{len(every)} of {len(every)} layers applied." in report and ("DoRA" in report) == bool(side)

    def change(module, weight):
        together = weight + change_of(KINDS[kind](module, *weight.shape))
        if side:
            scale = lengths(module, *weight.shape, side)
            together = scale * together / together.norm(dim=1 if side == "rows" else 0, keepdim=True)
        return weight + 0.6 * (together - weight)

    assert_merged(patched, expected(tools, variant, weights, naming, change))


def test_dora_of_peft_has_magnitudes_in_one_row(tools, model, variant, weights, tmp_path):
    def magnitude(module, rows):
        return lengths(module, rows, 1, "rows")[:, 0]

    tensors = {}
    for module, shape in layers(tools, variant, "diffusers").items():
        down, up = factors(module, shape)
        name = f"base_model.model.{module}"
        tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        tensors[f"{name}.lora_magnitude_vector"] = magnitude(module, shape[0])

    def change(module, weight):
        down, up = factors(module, weight.shape)
        together = weight + up @ down
        return magnitude(module, len(weight))[:, None] * together / together.norm(dim=1, keepdim=True)

    assert_merged(apply(tools, model, tmp_path, tensors)[0], expected(tools, variant, weights, "diffusers", change))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("metadata", [None, {"modelspec.architecture": "flux2", "ss_network_dim": "4"}])
def test_number_formats(tools, model, variant, weights, tmp_path, dtype, metadata):
    """Values as the file has them, summed in float32; the file's own metadata change nothing."""
    stored = getattr(torch, dtype)
    given = low_rank_file(tools, variant, "diffusers", dtype=stored)
    file = tmp_path / "a.safetensors"
    maker.save_file(given, file, metadata=metadata)

    def change(module, weight):
        down, up = (value.to(stored).float() for value in factors(module, weight.shape))
        return weight + up @ down

    patched = tools.lora.apply(model, None, file, 1.0)[0]
    assert_merged(patched, expected(tools, variant, weights, "diffusers", change))


def test_fused_and_split_projections(tools, model, variant, weights, tmp_path):
    """diffusers with fused projections, and parts of a single block's projection."""
    h = variant.hidden
    fused = {
        "transformer_blocks.1.attn.to_qkv": ("double_blocks.1.img_attn.qkv", 0, 3 * h),
        "transformer_blocks.0.attn.to_added_qkv": ("double_blocks.0.txt_attn.qkv", 0, 3 * h),
        "single_transformer_blocks.2.attn.to_k": ("single_blocks.2.linear1", h, h),
        "single_transformer_blocks.3.attn.to_qkv_mlp_proj": ("single_blocks.3.linear1", 0, 9 * h),
        "single_blocks.1.linear1_qkv": ("single_blocks.1.linear1", 0, 3 * h),
    }
    tensors, wanted = {}, {ours(name): value.clone() for name, value in weights.items()}
    for module, (weight, first, count) in fused.items():
        down, up = factors(module, (count, h))
        tensors |= {f"transformer.{module}.lora_A.weight": down, f"transformer.{module}.lora_B.weight": up}
        wanted[f"{weight}.weight"][first : first + count] += up @ down
    assert_merged(apply(tools, model, tmp_path, tensors)[0], wanted)


@pytest.mark.parametrize("form", ["set_weight", "diff", "w_norm", "scale"])
def test_norms(tools, model, weights, tmp_path, form):
    names = {"double_blocks.0.img_attn.norm.query_norm": 1.5, "single_blocks.1.norm.key_norm": 0.5}
    tensors = {f"diffusion_model.{name}.{form}": torch.full((128,), value) for name, value in names.items()}
    tensors |= {
        "diffusion_model.single_blocks.0.linear2.lora_A.weight": torch.zeros(1, 1024),
        "diffusion_model.single_blocks.0.linear2.lora_B.weight": torch.zeros(256, 1),
    }
    wanted = {ours(name): value.clone() for name, value in weights.items()}
    for name, value in names.items():
        added = 0 if form in ("set_weight", "scale") else wanted[f"{name}.weight"]
        wanted[f"{name}.weight"] = torch.full((128,), value) + added
    assert_merged(apply(tools, model, tmp_path, tensors)[0], wanted)


# --- alphas that the file does not hold as tensors -------------------------------------------------------------------

PEFT = {"r": RANK, "lora_alpha": 8, "alpha_pattern": {"attn.to_q": 2, r"transformer_blocks\.1\..*": 6}}


def alpha_of(module):
    """PEFT's rule for PEFT above."""
    return 2 if module.endswith("attn.to_q") else 6 if module.startswith("transformer_blocks.1.") else 8


@pytest.mark.parametrize("place", ["metadata", "adapter_config.json"])
@pytest.mark.parametrize("rslora", [False, True])
def test_alphas_of_peft(tools, model, variant, weights, tmp_path, place, rslora):
    config = PEFT | {"use_rslora": rslora}
    given = low_rank_file(tools, variant, "PEFT, diffusers" if place != "metadata" else "diffusers")
    if place == "metadata":
        text = json.dumps({f"transformer.{key}": value for key, value in config.items()})
        patched = apply(tools, model, tmp_path, given, metadata={"format": "pt", "lora_adapter_metadata": text})[0]
    else:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        patched = apply(tools, model, tmp_path, given, name="adapter_model.safetensors")[0]

    def change(module, weight):
        down, up = factors(module, weight.shape)
        return weight + alpha_of(module) / (RANK**0.5 if rslora else RANK) * up @ down

    assert_merged(patched, expected(tools, variant, weights, "diffusers", change))


def test_damaged_metadata_is_said(tools, model, variant, tmp_path):
    given = low_rank_file(tools, variant, "diffusers")
    for text, said in (("{", "alphas in its metadata"), ("[]", "alphas in its metadata")):
        with pytest.raises(tools.Refused, match=said):
            apply(tools, model, tmp_path, given, metadata={"lora_adapter_metadata": text})
    text = json.dumps({"transformer.lora_alpha": "much", "transformer.r": 4})
    with pytest.raises(tools.Refused, match="its alpha in the file's metadata is 'much'"):
        apply(tools, model, tmp_path, given, metadata={"lora_adapter_metadata": text})


# --- what is said ----------------------------------------------------------------------------------------------------


def test_layers_that_do_not_fit_are_named_with_the_reason(tools, model, variant, tmp_path):
    given = low_rank_file(tools, variant, "BFL", lambda module: "single_blocks.0" in module)
    given |= {
        "diffusion_model.double_blocks.7.img_attn.proj.lora_A.weight": torch.zeros(4, 256),
        "diffusion_model.double_blocks.7.img_attn.proj.lora_B.weight": torch.zeros(256, 4),
        "diffusion_model.double_blocks.0.img_attn.proj.lora_A.weight": torch.zeros(4, 128),
        "diffusion_model.double_blocks.0.img_attn.proj.lora_B.weight": torch.zeros(256, 4),
        "diffusion_model.double_blocks.1.img_attn.proj.lora_A.weight": torch.zeros(4, 256),
        "diffusion_model.img_in.lora_A.weight": torch.zeros(4, 128),
        "diffusion_model.img_in.lora_B.weight": torch.zeros(256, 3),
        "diffusion_model.txt_in.alpha": torch.tensor(1.0),
        "diffusion_model.time_in.in_layer.lora_A.one.weight": torch.zeros(4, 256),
        "diffusion_model.time_in.in_layer.lora_A.two.weight": torch.zeros(4, 256),
        "diffusion_model.time_in.out_layer.diff_b": torch.zeros(256),
        "unexpected": torch.zeros(3),
    }
    _, _, report = apply(tools, model, tmp_path, given)
    assert "\n2 of 10 layers applied; these were not:\n" in report
    for line in (
        "diffusion_model.double_blocks.7.img_attn.proj: the model has no such layer.",
        "double_blocks.0.img_attn.proj: it changes 256 x 128 numbers where the model has 256 x 256.",
        "double_blocks.1.img_attn.proj, diffusion_model.img_in: its parts do not fit together.",
        "txt_in: the file has only its alpha.",
        "time_in.in_layer: the file has several adapters for it.",
        "time_in.out_layer: its part diff_b is not used by FLUX.2, which has no biases.",
        "unexpected: it is no part of a LoRA that is known here.",
    ):
        assert line in report, report


def test_damaged_files_never_break_it(tools, model, variant, tmp_path):
    """Parts left out, of another shape or type: a report or a sentence, and weights that can be computed."""
    import random

    kinds = [low_rank, lokr_low_rank, loha, difference]
    chance, outcomes = random.Random(7), set()
    names = [name for name in layers(tools, variant, "original") if "blocks.0" in name]
    for number in range(120):
        tensors = {}
        for name in chance.sample(names, 3):
            rows, columns = layers(tools, variant, "original")[name]
            parts = chance.choice(kinds)(name, rows, columns)
            parts |= {"dora_scale": lengths(name, rows, columns, "rows")} if chance.random() < 0.5 else {}
            for part, value in parts.items():
                change = chance.random()
                if change < 0.08:
                    continue
                if change < 0.16:
                    odd = [value[:0], value.flatten()[0], value.flatten(), value.int()] if value.ndim else []
                    value = chance.choice([*odd, value[None]])
                tensors[f"diffusion_model.{name}.{part}"] = value
        try:
            patched, _, report = apply(
                tools, model, tmp_path, tensors or {"x": torch.zeros(1)}, name=f"{number}.safetensors"
            )
            merged(patched)
            outcomes.add("applied" if "these were not" not in report else "some")
        except tools.Refused:
            outcomes.add("refused")
    assert outcomes == {"applied", "some", "refused"}


OTHERS = {
    "FLUX.1": ["diffusion_model.double_blocks.0.img_mod.lin", "diffusion_model.double_blocks.0.img_attn.qkv"],
    "FLUX.1 ": ["transformer.single_transformer_blocks.7.proj_mlp", "transformer.transformer_blocks.0.attn.to_q"],
    "FLUX.1 or another model": ["lora_unet_double_blocks_18_img_attn_qkv", "lora_unet_double_blocks_0_img_attn_proj"],
    "Z-Image or Lumina": ["diffusion_model.layers.3.attention.to_q", "diffusion_model.layers.3.feed_forward.w1"],
    "Qwen-Image": ["transformer.transformer_blocks.0.img_mlp.net.0.proj"],
    "Stable Diffusion or SDXL": ["lora_unet_down_blocks_1_attentions_0_proj_in"],
    "Wan": ["diffusion_model.blocks.0.self_attn.q"],
}


@pytest.mark.parametrize("title", OTHERS)
def test_a_lora_of_another_model_is_refused_by_name(tools, model, tmp_path, title):
    """Also where some layers would fit by chance: FLUX.1 and klein 4B are equally wide."""
    tensors = {}
    for name in OTHERS[title]:
        rows = 768 if "qkv" in name else 256
        tensors |= {f"{name}.lora_down.weight": torch.zeros(4, 256), f"{name}.lora_up.weight": torch.zeros(rows, 4)}
    with pytest.raises(tools.Refused, match=f"is a LoRA for {title.strip()}: it has the layer"):
        apply(tools, model, tmp_path, tensors)


def test_a_lora_of_another_size_is_refused_by_name(tools, model, tmp_path):
    tensors = {
        "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(1, 4096),
        "transformer.transformer_blocks.0.attn.to_q.lora_B.weight": torch.zeros(4096, 1),
    }
    with pytest.raises(tools.Refused, match="for FLUX.2 klein 9B, which is 4096 wide. This model is .* 256 wide"):
        apply(tools, model, tmp_path, tensors)


def test_files_that_are_no_lora(tools, model, small_models, tmp_path):
    for file, said in (
        (small_models["model"], "is a FLUX.2 .*expects a LoRA.*Load FLUX.2 Model"),
        (small_models["vae"], "is a FLUX.2 VAE.*expects a LoRA.*Load FLUX.2 VAE"),
        (maker.write(tmp_path / "b.safetensors", {"a": torch.zeros(2)}), "is no LoRA: none of its 1 tensors"),
        (tmp_path / "none.safetensors", "does not exist"),
    ):
        with pytest.raises(tools.Refused, match=said):
            tools.lora.apply(model, None, file, 1.0)
    (tmp_path / "c.safetensors").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(tools.Refused, match="GGUF"):
        tools.lora.apply(model, None, tmp_path / "c.safetensors", 1.0)


def test_strength_zero_changes_nothing_and_several_add_up(tools, model, variant, weights, tmp_path):
    given = low_rank_file(tools, variant, "diffusers")
    same, _, report = apply(tools, model, tmp_path, given, 0.0)
    assert same is model and "Strength 0" in report and not model.patches
    first = apply(tools, model, tmp_path, given, 0.5)[0]
    both = apply(tools, first, tmp_path, given, 0.25)[0]

    def change(module, weight):
        down, up = factors(module, weight.shape)
        return weight + 0.75 * up @ down

    assert_merged(both, expected(tools, variant, weights, "diffusers", change))
    assert first.model is model.model and not model.patches


# --- text encoders ---------------------------------------------------------------------------------------------------

ENCODER_SPELLINGS = (
    "text_encoder.model.layers.{}.self_attn.q_proj",
    "text_encoder.model.language_model.layers.{}.self_attn.q_proj",
    "text_encoder.language_model.model.layers.{}.self_attn.q_proj",
    "base_model.model.model.layers.{}.self_attn.q_proj",
    "lora_te_layers_{}_self_attn_q_proj",
    "lora_te1_model_layers_{}_self_attn_q_proj",
)


@pytest.mark.parametrize("spelling", ENCODER_SPELLINGS)
def test_layers_of_the_text_encoder(tools, model, variant, small_models, tmp_path, spelling):
    clip = tools.load.load_text_encoder(small_models["text_encoder"])
    given = low_rank_file(tools, variant, "diffusers", lambda module: module == "x_embedder")
    name = spelling.format(3)
    down, up = factors(name, (256, 64))
    given |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    _, changed, report = apply(tools, model, tmp_path, given, clip=clip)
    assert "\n1 of 1 layers applied." in report and "text encoder: 1 of 1 layers applied." in report
    (key,) = changed.patcher.patches
    assert key.endswith("layers.3.self_attn.q_proj.weight") and not clip.patcher.patches
    now = []
    for one in (clip, changed):
        one.load_model()
        now.append(one.patcher.model.state_dict()[key].float().clone())
    error = (now[1] - now[0] - up @ down).norm() / (up @ down).norm()
    assert error < 0.02, "the encoder is kept in bf16"
    _, same, report = apply(tools, model, tmp_path, given)
    assert same is None and "1 layers are for the text encoder and were not applied: connect clip." in report
    only = {key: value for key, value in given.items() if key.startswith(name)}
    with pytest.raises(tools.Refused, match="changes the text encoder alone .*Connect clip"):
        apply(tools, model, tmp_path, only)


def test_a_lora_for_the_model_alone_does_not_read_a_lazy_encoder(tools, model, variant, small_models, tmp_path):
    from flux2_pack.flux2.loading import lazy_clip

    path = small_models["text_encoder"]
    clip = lazy_clip.text_encoder(lazy_clip.EncoderSource(str(path)), lambda: tools.load.load_text_encoder(path), True)
    _, same, _ = apply(tools, model, tmp_path, low_rank_file(tools, variant, "diffusers"), clip=clip)
    assert same is clip and not lazy_clip.is_loaded(clip)


# --- with the rest of the pack and of ComfyUI ------------------------------------------------------------------------


def dora_file(tools, variant):
    """DoRA in PEFT's names on every layer: the kind with the most that can go wrong on the way."""
    tensors = low_rank_file(tools, variant, "PEFT, diffusers")
    for module, shape in layers(tools, variant, "diffusers").items():
        tensors[f"base_model.model.{module}.lora_magnitude_vector"] = lengths(module, shape[0], 1, "rows")[:, 0]
    return tensors


def forward(network):
    g = torch.Generator().manual_seed(6)
    latent, prompt = torch.randn(1, 128, 4, 4, generator=g), torch.randn(1, 9, 192, generator=g)
    return network(latent, torch.tensor([0.3]), prompt, guidance=torch.tensor([4.0]))


def error(value, wanted):
    return ((value - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_layers_that_are_fetched_at_each_step_get_the_change_when_they_are_used(tools, model, variant, tmp_path, share):
    """ComfyUI's partial loading, as on a small card and in 'layer by layer'."""
    patched = apply(tools, model, tmp_path, dora_file(tools, variant), 0.7)[0]
    network, plain = model.model.diffusion_model, forward(model.model.diffusion_model)
    patched.patch_model()
    wanted = forward(network)
    patched.unpatch_model()
    patched.patch_model(torch.device("cpu"), lowvram_model_memory=max(0.1, share * patched.model_size()))
    late = [module for module in network.modules() if getattr(module, "weight_function", None)]
    found = forward(network)
    patched.detach()
    assert late and error(found, wanted) < 1e-5 < 1e-3 < error(wanted, plain)
    assert torch.equal(forward(network), plain)


def test_strengths_change_on_the_same_loaded_model(tools, model, variant, tmp_path):
    """As ComfyUI runs two prompts: the next MODEL takes the weights back and patches them again."""
    outs = []
    for strength in (0.5, 1.0, 0.5, 0.0):
        patched = apply(tools, model, tmp_path, dora_file(tools, variant), strength)[0]
        tools.core.model_management.load_models_gpu([patched])
        assert patched.model is model.model
        outs.append(forward(model.model.diffusion_model))
    tools.core.model_management.unload_all_models()
    assert torch.equal(outs[0], outs[2]) and error(outs[1], outs[0]) > 1e-3 and error(outs[3], outs[0]) > 1e-3


def select(tools, model):
    from flux2_pack.nodes.attention import Flux2SelectAttention

    return Flux2SelectAttention.execute(model, "sdpa-math").args[0]


def compiled(tools, model):
    from flux2_pack.flux2.compiled import blocks

    clone = model.clone()
    blocks.install(clone, blocks.CompilePlan(backend="eager"))
    return clone


@pytest.mark.parametrize("node", [select, compiled])
def test_before_and_behind_our_other_nodes(tools, model, variant, tmp_path, node):
    import comfy.sample

    def sample(one):
        prompt = [[draw("prompt", 1, 20, 192, scale=0.3), {}]]
        latent, noise = torch.zeros(1, 128, 4, 6), draw("noise", 1, 128, 4, 6, scale=1.0)
        return comfy.sample.sample(
            one, noise, 2, 1.0, "euler", "simple", prompt, prompt, latent, disable_pbar=True, seed=5
        )

    given = dora_file(tools, variant)
    wanted = sample(apply(tools, model, tmp_path, given, 0.7)[0])
    before = sample(node(tools, apply(tools, model, tmp_path, given, 0.7)[0]))
    behind = sample(apply(tools, node(tools, model), tmp_path, given, 0.7)[0])
    assert error(before, wanted) < 1e-5 and error(behind, wanted) < 1e-5 and error(sample(model), wanted) > 1e-3


def test_patches_reach_other_ranks_as_they_are(tools, model, variant, tmp_path):
    """What rank 0 sends and a rank makes of it, DoRA included; the sampling on two ranks is in test_ranks.py."""
    from flux2_pack.flux2.parallel.workers import serialize

    patched = apply(tools, model, tmp_path, dora_file(tools, variant), 0.7)[0]
    data, tensors = serialize.flatten(patched.patches)
    again = model.clone()
    again.patches = serialize.restore(json.loads(json.dumps(data)), tensors)
    wanted, found = merged(patched), merged(again)
    assert [name for name, value in wanted.items() if not torch.equal(found[name], value)] == []


class Configurable(torch.nn.Module):
    """What ComfyUI 0.36 calls ConfigurableModule: configured from JSON bytes, as a new module."""

    def __init__(self, config=None):
        super().__init__()
        self.config = config

    def with_config(self, encoded):
        return type(self)(json.loads(bytes(encoded.tolist())))


def test_a_configuration_of_a_layer_is_no_reason_for_sequence_parallel_to_refuse(
    tools, model, variant, tmp_path, monkeypatch
):
    """A stand-in for newer cores, whose add_patches makes an object patch of such an entry."""
    from flux2_pack.flux2.parallel.workers import patch_transfer

    block = model.model.diffusion_model.double_blocks[0]
    monkeypatch.setattr(block, "attention", Configurable(), raising=False)
    add = type(model).add_patches

    def newer(self, patches, *strengths):
        for key in [key for key, patch in patches.items() if isinstance(patch, tuple) and patch[0] == "config"]:
            name, encoded = key.removesuffix(".config"), patches[key][1][0]
            self.add_object_patch(name, self.get_model_object(name).with_config(encoded))
        return add(self, patches, *strengths)

    config = torch.frombuffer(bytearray(b'{"attention": "sparse"}'), dtype=torch.uint8)
    given = low_rank_file(tools, variant, "BFL") | {"diffusion_model.double_blocks.0.attention.config": config}
    _, _, report = apply(tools, model, tmp_path, given)
    assert "double_blocks.0.attention: this ComfyUI does not know configurations of layers." in report

    monkeypatch.setattr(type(model), "add_patches", newer)
    monkeypatch.setattr(tools.lora, "ConfigurableModule", Configurable)
    patched, _, report = apply(tools, model, tmp_path, given)
    assert "layers applied." in report
    specs = json.loads(json.dumps(patch_transfer.encode_patches(patched, {})))
    replica = patch_transfer.apply_patches(model, specs)
    assert replica.object_patches["diffusion_model.double_blocks.0.attention"].config == {"attention": "sparse"}

    by_core = model.clone()
    by_core.add_object_patch("diffusion_model.double_blocks.0.attention", block.attention.with_config(config))
    with pytest.raises(patch_transfer.Refused, match="use Load FLUX.2 LoRA for that file"):
        patch_transfer.encode_patches(by_core, {})


# --- in a server -----------------------------------------------------------------------------------------------------


def test_a_new_strength_in_a_server_loads_no_model_again(tools, server, model_files, variant):
    from api_workflow import PictureSettings, fill
    from server_fixture import run

    folder = server.base / "models" / "loras"
    folder.mkdir(exist_ok=True)
    file = maker.write(folder / "of-a-test.safetensors", low_rank_file(tools, variant, "PEFT, original"))
    names = {kind: files[0].name for kind, files in model_files.items()}

    def run_at(strength):
        workflow = fill(PictureSettings("A red fox", models=names, width=64, height=64, steps=1))
        (reader,) = [key for key, entry in workflow.items() if entry["inputs"].get("model") == ["1", 0]]
        workflow[reader]["inputs"]["model"] = ["lora", 0]
        workflow["lora"] = {
            "class_type": "Flux2LoadLoRA",
            "inputs": {"model": ["1", 0], "lora_name": file.name, "strength": strength},
        }
        workflow["show"] = {"class_type": "PreviewAny", "inputs": {"source": ["lora", 2]}}
        result = run(server, workflow)
        (image,) = result.images()
        saved = server.base / "output" / image["subfolder"] / image["filename"]
        return result.outputs["show"]["text"][0], saved.read_bytes()

    def loads():
        return server.log.read_text(errors="replace").count("model weight dtype")

    try:
        report, first = run_at(0.5)
        after_the_first = loads()
        _, second = run_at(1.5)
    finally:
        file.unlink()
    count = len(layers(tools, variant, "original"))
    assert f"{count} of {count} layers applied." in report and first != second
    assert loads() == after_the_first > 0
