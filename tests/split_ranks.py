"""What the ranks of test_split.py do: whole forward passes of ComfyUI's own FLUX.2, on one rank and shared, case by
case.

The model is ComfyUI's class with the settings that it detects for FLUX.2, except for its sizes: 12 heads of 16
channels, so that 2, 3 and 4 ranks can share them. Plain results are computed once, before there are ranks.
"""

from dataclasses import dataclass
import os
import sys
import types

import pytest
import torch

from flux2_pack.attention import reference
from flux2_pack.attention.override import AttentionOverride
from flux2_pack.attention.parallel import make_mesh
from flux2_pack.attention.parallel.mesh import pairs
from flux2_pack.attention.dispatch import AttentionDispatcher

HIDDEN, HEADS, TEXT_WIDTH = 192, 12, 96
DEV, KLEIN = (
    {"guidance_embed": True, "depth": 2, "depth_single_blocks": 3},
    {"guidance_embed": False, "depth": 1, "depth_single_blocks": 4},
)


@dataclass(frozen=True)
class Case:
    """Forward passes. size: of the latent; text: tokens; references: their sizes; method: for their positions; patch,
    mask: see `patched` and `inputs`; steps: passes, each from another latent.
    """

    size: tuple = (9, 7)
    text: int = 37
    references: tuple = ()
    method: str | None = None
    batch: int = 1
    variant: str = "dev"
    lora: bool = False
    patch: str = ""
    mask: str = ""
    steps: int = 1
    dtype: torch.dtype = torch.float32


CASES = {
    "text to image": Case(size=(8, 8), text=48),
    "lengths that divide nothing": Case(),
    "one reference": Case(references=((6, 5),)),
    "two references": Case(references=((6, 5), (3, 9))),
    "references offset": Case(references=((6, 5), (3, 9)), method="offset"),
    "references at timestep zero": Case(references=((6, 5), (3, 9)), method="index_timestep_zero"),
    "batch 2": Case(batch=2),
    # core 0.30 itself stops at this with guidance, whose batch it does not double
    "batch 2, references at timestep zero": Case(
        batch=2, references=((5, 5),), method="index_timestep_zero", variant="klein"
    ),
    "LoRA": Case(lora=True),
    "no guidance, other blocks": Case(variant="klein"),
    "as few tokens as ranks": Case(size=(2, 2), text=4),
    "control": Case(patch="control"),
    "control of picture and references": Case(patch="control", references=((6, 5),)),
    "blocks replaced": Case(patch="replaced"),
    "a block of another pack": Case(patch="own block"),
    "a block that computes while tokens travel": Case(patch="overlapped block", references=((6, 5),), batch=2),
    "another pack's post_input": Case(patch="post_input"),
    "references from a cache": Case(references=((6, 5), (3, 9)), patch="kv cache", steps=3),
    "key mask": Case(mask="keys", batch=2),
    "full mask": Case(mask="full"),
}
HALF = {"bfloat16": Case(references=((6, 5),), dtype=torch.bfloat16)}


# --- the model -------------------------------------------------------------------------------------------------------


def load_comfy():
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    sys.argv = sys.argv[:1]
    import comfy.options

    comfy.options.enable_args_parsing(False)
    from comfy.cli_args import args

    args.cpu = True


def settings(variant):
    return {
        "image_model": "flux2",
        "axes_dim": [4] * 4,
        "num_heads": HEADS,
        "hidden_size": HIDDEN,
        "mlp_ratio": 3.0,
        "theta": 2000,
        "in_channels": 128,
        "out_channels": 128,
        "context_in_dim": TEXT_WIDTH,
        "patch_size": 1,
        "vec_in_dim": None,
        "global_modulation": True,
        "mlp_silu_act": True,
        "qkv_bias": False,
        "ops_bias": False,
        "default_ref_method": "index",
        "ref_index_scale": 10.0,
        "txt_ids_dims": [3],
        **variant,
    }


def patcher(variant=DEV, dtype=torch.float32):
    """A ModelPatcher of ComfyUI's Flux2 with seeded weights."""
    import comfy.model_patcher
    import comfy.supported_models

    config = comfy.supported_models.Flux2(settings(variant))
    config.set_inference_dtype(dtype, None)
    model = config.get_model({}, device="cpu")
    generator = torch.Generator().manual_seed(5)
    for name, weight in sorted(model.diffusion_model.named_parameters()):
        drawn = torch.rand(weight.shape, generator=generator)
        weight.data.copy_(drawn * 0.2 + 0.9 if weight.ndim == 1 else (2 * drawn - 1) * (3 / weight.shape[1]) ** 0.5)
    return comfy.model_patcher.ModelPatcher(model, load_device=torch.device("cpu"), offload_device=torch.device("cpu"))


def add_lora(model, strength=0.7):
    """LoRA patches through ComfyUI's own loader, on weights of both kinds of block."""
    import comfy.lora
    import comfy.lora_convert  # noqa: F401

    generator = torch.Generator().manual_seed(11)
    state = {}
    for name in ("double_blocks.0.img_attn.qkv", "double_blocks.1.txt_mlp.0", "single_blocks.2.linear1"):
        rows, columns = model.model.get_submodule(f"diffusion_model.{name}").weight.shape
        state[f"diffusion_model.{name}.lora_up.weight"] = torch.randn(rows, 4, generator=generator) * 0.2
        state[f"diffusion_model.{name}.lora_down.weight"] = torch.randn(4, columns, generator=generator) * 0.2
    patches = comfy.lora.load_lora(state, comfy.lora.model_lora_keys_unet(model.model, {}))
    assert len(model.add_patches(patches, strength)) == 3


# --- patches that other nodes set ------------------------------------------------------------------------------------


def shifted_text(inputs):
    """A post_input patch that sees the whole sequence: it depends on every token of the text."""
    return {**inputs, "txt": inputs["txt"] + inputs["txt"].mean(1, keepdim=True)}


def replaced_block(args, extra):
    """A block that a pack computes in another way (here: the original one, and a change)."""
    out = extra["original_block"](args)
    return {**out, "img": out["img"] * 1.25}


def own_single_block(model, overlapped=False, between=lambda: None):
    """A replacement that computes a single block by itself, with the heads next to the tokens and attention through
    ComfyUI's function, as packs with fused blocks do. overlapped: where attention is shared, the feed-forward part is
    computed while tokens travel; between: called then.
    """
    from comfy.ldm.flux.math import apply_rope
    from comfy.ldm.modules.attention import optimized_attention

    block = model.model.diffusion_model.single_blocks[1]

    def replacement(args, extra):
        x, mod = args["img"], args["vec"]
        both = block.linear1((1 + mod.scale) * block.pre_norm(x) + mod.shift)
        q, k, v = both[..., : 3 * HIDDEN].unflatten(-1, (3, HEADS, -1)).unbind(2)  # (B, S, H, D)
        q, k = apply_rope(*(t.transpose(1, 2) for t in block.norm(q, k, v)), args["pe"])
        options = args["transformer_options"]
        call = {"heads": HEADS, "skip_reshape": True, "mask": args["attn_mask"], "transformer_options": options}
        slot = options.get("optimized_attention_override")
        begun = (
            slot.begin(optimized_attention, q, k, v.transpose(1, 2), **call)
            if overlapped and hasattr(slot, "begin")
            else None
        )
        between()
        mlp = block.mlp_act(both[..., 3 * HIDDEN :])
        if begun:
            begun.compute()
        attn = begun.finish() if begun else optimized_attention(q, k, v.transpose(1, 2), **call)
        return {"img": x + mod.gate * block.linear2(torch.cat((attn, mlp), -1))}

    return replacement


def kv_cache(model):
    """Core's node, on this MODEL."""
    from comfy_extras.nodes_flux import FluxKVCache

    return FluxKVCache.execute(model).result[0]


def patched(model, case):
    """The MODEL of a case, before anything is shared."""
    clone = model.clone()
    if case.lora:
        add_lora(clone)
    if case.patch == "post_input":
        clone.set_model_post_input_patch(shifted_text)
    if case.patch in ("own block", "overlapped block"):
        clone.set_model_patch_replace(
            own_single_block(clone, case.patch == "overlapped block"), "dit", "single_block", 1
        )
    if case.patch == "replaced":
        for block in (("double_block", 1), ("single_block", 0)):
            clone.set_model_patch_replace(replaced_block, "dit", *block)
    return kv_cache(clone) if case.patch == "kv cache" else clone


# --- passes ----------------------------------------------------------------------------------------------------------


def inputs(case, step):
    """The arguments of apply_model for one pass, the same in every rank."""
    torch.manual_seed(100 + step)
    draw = lambda *shape: torch.randn(shape).to(case.dtype)  # noqa: E731
    x, context = torch.randn(case.batch, 128, *case.size), draw(case.batch, case.text, TEXT_WIDTH)
    rest = {"guidance": torch.full((case.batch,), 4.0)}
    if case.references:
        torch.manual_seed(99)
        rest["ref_latents"] = [draw(case.batch, 128, *size) for size in case.references]
    if case.method:
        rest["ref_latents_method"] = case.method
    tokens = case.text + case.size[0] * case.size[1]
    if case.mask:
        keep = torch.rand((case.batch, 1, tokens) if case.mask == "keys" else (case.batch, tokens, tokens)) > 0.3
        keep[..., 0] = True
        rest["attention_mask"] = torch.zeros(keep.shape).masked_fill(~keep, -1e9)
    if case.patch == "control":
        picture = case.size[0] * case.size[1] + sum(h * w for h, w in case.references)
        rest["control"] = {
            "input": [draw(case.batch, picture - 3, HIDDEN), None],
            "output": [None, draw(case.batch, picture, HIDDEN)],
        }
    return {"x": x, "t": torch.full((case.batch,), 0.7 - 0.1 * step), "c_crossattn": context, **rest}


def passes(model, case, prepare=lambda model, step: None):
    """What the model predicts in each pass, from inside ComfyUI's own apply_model."""
    model.patch_model()
    try:
        out = []
        for step in range(case.steps):
            prepare(model, step)
            options = {
                **model.model_options["transformer_options"],
                "wrappers": model.wrappers,
                "sigmas": torch.tensor([0.7]),
                "cond_or_uncond": [0],
            }
            out.append(model.model.apply_model(**inputs(case, step), transformer_options=options))
        return torch.stack(out)
    finally:
        model.cleanup()
        model.unpatch_model()


def selected(model, backend="sdpa-math"):
    """The MODEL with Select Attention on it, as its node does."""
    from flux2_pack.flux2 import attention_slot as patch

    clone = model.clone()
    patch.select(clone, AttentionDispatcher(backend))
    return clone


def share(model, mesh, **kwargs):
    """A clone whose passes are shared."""
    from flux2_pack.flux2.parallel.forward import shard

    clone = model.clone()
    shard(clone, mesh, **kwargs)
    return clone


# --- what must be noticed --------------------------------------------------------------------------------------------


def changed_cut(change):
    """A fault: what the ranks keep of the inputs, changed. change(kept, inputs, state)."""

    def fault(monkeypatch, forward):
        original = forward.ForwardState.shard_inputs

        def cut(state, inputs):
            return change(original(state, inputs), inputs, state)

        monkeypatch.setattr(forward.ForwardState, "shard_inputs", cut)

    return fault


def first_ids(kept, inputs, state):
    return {**kept, "img_ids": inputs["img_ids"][:, : kept["img_ids"].shape[1]]}


def first_text(kept, inputs, state):
    return {**kept, "txt": inputs["txt"][:, : kept["txt"].shape[1]].contiguous()}


def whole_slices(kept, inputs, state):
    start = sum(end - begin for begin, end in state.shards.image)
    state.zero_slices[:] = [[start, start + sum(end - begin for begin, end in state.shards.references)]]
    return kept


def ungathered(monkeypatch, forward):
    monkeypatch.setattr(
        forward.ForwardState, "gather_output", lambda state, out: state.mesh.gather(out, state.shards.image_lengths())
    )


def unexchanged(monkeypatch, forward):
    from flux2_pack.attention.parallel import usp

    for kind in ("RingAttention", "UlyssesAttention"):
        monkeypatch.setattr(usp, kind, usp.SingleRank)


FAULTS = {
    "text not rotated": (
        "text to image",
        changed_cut(lambda kept, inputs, state: {**kept, "txt_ids": torch.zeros_like(kept["txt_ids"])}),
    ),
    "positions from the beginning": ("text to image", changed_cut(first_ids)),
    "another rank's text": ("text to image", changed_cut(first_text)),
    "the whole sequence's timesteps": ("references at timestep zero", changed_cut(whole_slices)),
    "gathered in the order of the ranks": ("two references", ungathered),
    "nothing exchanged": ("text to image", unexchanged),
}


def faults(prepared, mesh):
    from flux2_pack.flux2.parallel import forward

    found = {}
    for name, (case, fault) in FAULTS.items():
        with pytest.MonkeyPatch.context() as monkeypatch:
            fault(monkeypatch, forward)
            found[name] = error(prepared, mesh, case)
    return found


# --- failures --------------------------------------------------------------------------------------------------------


def cancelled(model, rank):
    """The user cancels while one rank is in the middle of a pass: ComfyUI raises in the next linear layer."""

    def replacement(args, extra):
        if rank == 0:
            comfy.model_management.interrupt_current_processing(True)
        return extra["original_block"](args)

    import comfy.model_management

    model.set_model_patch_replace(replacement, "dit", "single_block", 1)


def cancelled_at_once(model, rank):
    """Cancelled before the tokens are dealt out, behind a patch that changes their number."""
    import comfy.model_management

    model.set_model_post_input_patch(
        lambda inputs: {**inputs, "txt": inputs["txt"][:, 1:], "txt_ids": inputs["txt_ids"][:, 1:]}
    )
    if rank == 0:
        comfy.model_management.interrupt_current_processing(True)


def cancelled_on_the_way(model, rank):
    """Cancelled while q, k and v are on their way, between the parts of a call."""
    import comfy.model_management

    def cancel():
        if rank == 0:
            comfy.model_management.interrupt_current_processing(True)
            comfy.model_management.throw_exception_if_processing_interrupted()

    model.set_model_patch_replace(own_single_block(model, True, cancel), "dit", "single_block", 1)


def out_of_memory(model, rank):
    """A kernel fails on one rank, in the middle of an exchange."""
    override = model.model_options["transformer_options"]["optimized_attention_override"]

    def check(block):
        if rank == 1 and block == 1:
            raise torch.cuda.OutOfMemoryError("no memory left on this rank")

    class Failing(AttentionOverride):
        def __call__(self, func, *args, **kwargs):
            check(kwargs["transformer_options"]["block_index"])
            return override(func, *args, **kwargs)

    def failing_with_lse(*args, **kwargs):
        check(kwargs["block"][1])
        return override.dispatcher.attend(*args, **kwargs)

    failing = Failing(AttentionDispatcher("sdpa"))
    failing.dispatcher = types.SimpleNamespace(attend=failing_with_lse)
    model.model_options["transformer_options"]["optimized_attention_override"] = failing


def skipped(model, rank):
    """A cache of another pack skips a block, and is on one rank alone."""
    if rank == 0:
        model.set_model_patch_replace(lambda args, extra: {"img": args["img"]}, "dit", "single_block", 2)


def too_few_tokens(model, rank):
    """No rank can do this; all of them say so."""
    model.set_model_post_input_patch(
        lambda inputs: {**inputs, "txt": inputs["txt"][:, :1], "txt_ids": inputs["txt_ids"][:, :1]}
    )


FAILURES = {
    function.__name__: function
    for function in (cancelled, cancelled_at_once, cancelled_on_the_way, out_of_memory, skipped, too_few_tokens)
}


def failure(prepared, mesh, prepare_rank):
    """{said, nan, intact, after}: what this rank raised; whether its output has NaN; whether the groups can be used;
    the error of the next pass.
    """
    case = CASES["lengths that divide nothing"]
    model = share(selected(prepared.models["dev"]), mesh)
    prepare_rank(model, mesh.rank)
    said, out = "", None
    try:
        out = passes(model, case)
    except BaseException as raised:
        said = f"{type(raised).__name__}: {raised}"
    return {
        "said": said,
        "nan": out is not None and bool(out.isnan().any()),
        "intact": mesh.broken is None,
        "after": error(prepared, mesh, "one reference"),
    }


# --- everything ------------------------------------------------------------------------------------------------------


@dataclass
class Prepared:
    models: dict
    plain: dict
    control: dict


def prepare():
    load_comfy()
    with torch.inference_mode():
        models = {"dev": patcher(DEV), "klein": patcher(KLEIN), "half": patcher(DEV, torch.bfloat16)}
        plain = {name: passes(patched(models[case.variant], case), case) for name, case in CASES.items()}
        control = {}
        for name, case in HALF.items():
            runs = [passes(selected(models["half"], backend), case) for backend in ("sdpa-math", "sdpa-flash")]
            plain[name], control[name] = runs[0], reference.relative_error(runs[1], runs[0])
    return Prepared(models, plain, control)


def error(prepared, mesh, name, backend="sdpa-math"):
    """Relative error of a case, shared, against the plain passes."""
    case = CASES[name]
    model = share(selected(patched(prepared.models[case.variant], case), backend), mesh)
    return reference.relative_error(passes(model, case), prepared.plain[name])


def orders(prepared, mesh):
    """Select Attention in front of or behind the sharing, another backend, none at all, and what its report says."""
    case = CASES["lengths that divide nothing"]
    plain, model = prepared.plain["lengths that divide nothing"], prepared.models["dev"]
    behind, fallback = selected(share(model, mesh)), AttentionOverride(AttentionDispatcher("sdpa-flash"))
    found = {"behind": reference.relative_error(passes(behind, case), plain)}
    log = behind.model_options["transformer_options"]["optimized_attention_override"].dispatcher.log
    found["report"] = log.current.as_data()
    found["flash"] = error(prepared, mesh, "lengths that divide nothing", "sdpa-flash")
    found["fallback"] = reference.relative_error(passes(share(model, mesh, fallback=fallback), case), plain)
    found["fallback used"] = fallback.dispatcher.log.current is not None
    try:
        found["none"] = reference.relative_error(passes(share(model, mesh), case), plain)
    except ValueError as said:
        found["none"] = str(said)
    return found


def half(prepared, mesh):
    """Errors in bfloat16 against the same backend on one rank, and those of two exact backends on one rank."""
    model = share(selected(prepared.models["half"]), mesh)
    return {
        name: (reference.relative_error(passes(model, case), prepared.plain[name]), prepared.control[name])
        for name, case in HALF.items()
    }


def arranged(prepared, mesh):
    """Everything on one arrangement of the ranks."""
    names = [name for name, case in CASES.items() if not (case.mask and mesh.ring > 1)]
    found = {"errors": {name: error(prepared, mesh, name) for name in names}}
    mesh.stats.reset()
    error(prepared, mesh, "two references")
    found["times"] = mesh.stats.read().as_data()
    found["left behind"] = [
        "forward_orig" in model.model.diffusion_model.__dict__ for model in prepared.models.values()
    ]
    return {
        **found,
        "half": half(prepared, mesh),
        "orders": orders(prepared, mesh),
        "faults": faults(prepared, mesh) if mesh.ring == 1 else {},
        "failures": {name: failure(prepared, mesh, prepare_rank) for name, prepare_rank in FAILURES.items()},
    }


def run(prepared, rank, size):
    with torch.inference_mode():
        return {str(d): arranged(prepared, make_mesh(d.ulysses, d.ring, "cpu")) for d in pairs(size, HEADS)}
