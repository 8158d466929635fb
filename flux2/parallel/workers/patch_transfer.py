"""What of a MODEL reaches the workers. A worker runs the same network, so whatever works INSIDE the network's forward
pass has to be there too.

  specs = encode_patches(patcher, transformer_options)   # rank 0, before each forward pass: [[rule, spec], ...], JSON;
                                                         Refused names what cannot be sent
  model = apply_patches(model, specs)                    # a worker: a clone of its replica with the same patches on it

Outside the forward pass is everything that samplers, guiders, schedules, previews, CFG and caches of whole steps
(EasyCache) do: rank 0 alone runs it, around a network that happens to compute on several GPUs. So wrappers of every
kind may stay where they are; rules may send those that reach inside.

One TransferRule in RULES for each kind of patch that is known. To add one: what it looks like on rank 0 (`encode`) and
how a worker gets the same (`apply`, usually the function that its node calls). Weights are not here: replica.py sends
LoRA patches.
"""

from dataclasses import dataclass
import os
from typing import Callable

import torch

from ....attention.errors import Explained
from ....attention.dispatch import AttentionDispatcher, Schedule
from ....attention.override import CHOSEN_BY_BLOCK
from ... import attention_slot
from .. import tensor_parallel
from ...attention_slot import SLOT
from ...lora.load import CONFIG_MARK
from .serialize import Unsendable, flatten, restore

OPTIONS = "options"
# set per rank by core, or read by wrappers, which only rank 0 runs
LOCAL_OPTIONS = {
    "wrappers",
    "callbacks",
    "patches",
    "patches_replace",
    SLOT,
    CHOSEN_BY_BLOCK,  # each rank reads it from its own blocks
    "uuids",
    "cond_or_uncond",
    "sigmas",
    "sample_sigmas",
    "prefetch_dynamic_vbars",
    "easycache",
    "reference_image_num_tokens",
    "block_type",
    "block_index",
    "total_blocks",
    "img_slice",
}
# callbacks at these moments can change modules and weights behind the patcher's back, on rank 0 alone
CHANGING_CALLBACKS = ("on_load_after", "on_pre_run", "on_prepare_state", "on_inject_model")
OURS = ("flux2_",)  # keys of this pack's own wrappers and callbacks, none of which changes what a forward pass computes


class Refused(Explained, ValueError):
    """A MODEL carries something that the other GPUs would not see. The text names it and says what to do."""

    topic = "several-gpus"


@dataclass(frozen=True)
class ModelPatch:
    """Something that works inside the forward pass of a MODEL. place: "patch", "replacement", "attention", "object",
    "option", "wrapper"; key: under which name it is there; value: it.
    """

    place: str
    key: object
    value: object


@dataclass(frozen=True)
class TransferRule:
    """name: what people call it. encode(patch) -> a spec (JSON; equal specs are applied once), or None when it is
    something else. apply(model, spec): put the same on a worker's MODEL clone, which it may replace by returning
    another.
    """

    name: str
    encode: Callable
    apply: Callable


def patches_of(patcher, options):
    """Every ModelPatch, from the options of this very call and the patcher of the MODEL (None if unknown)."""
    for name, functions in options.get("patches", {}).items():
        yield from (ModelPatch("patch", name, function) for function in functions)
    for name, replacements in options.get("patches_replace", {}).items():
        yield from (ModelPatch("replacement", (name, key), function) for key, function in replacements.items())
    override = attention_slot.behind_observers(options.get(SLOT))  # observers look on, on rank 0 alone
    if override is not None:
        yield ModelPatch("attention", SLOT, override)
    yield from (ModelPatch("option", name, value) for name, value in options.items() if name not in LOCAL_OPTIONS)
    for kind, keyed in options.get("wrappers", {}).items():
        for key, wrappers in keyed.items():
            yield from (ModelPatch("wrapper", (kind, key), wrapper) for wrapper in wrappers)
    if patcher is not None:
        inner = ((name, value) for name, value in patcher.object_patches.items() if inside(name))
        swapped = ((f"diffusion_model.{name}", value) for name, value in swapped_methods(patcher.model.diffusion_model))
        yield from (ModelPatch("object", name, value) for name, value in (*inner, *swapped))


def inside(name):
    """True for an object patch that changes the network; others (model_sampling, latent formats) belong to rank 0's
    sampler.
    """
    return name.startswith("diffusion_model") or name == "manual_cast_dtype"


def swapped_methods(network):
    """(name, function) of each method of the network that somebody has put another in the place of, as step caches do
    for the length of a call.
    """
    return [
        (name, value)
        for name, value in vars(network).items()
        if callable(value) and callable(getattr(type(network), name, None))
    ]


def encode_patches(patcher, options):
    """[[rule name, spec], ...] for this call, each once, in the order of RULES. Raises Refused for the first patch that
    no rule knows.
    """
    refuse_patcher(patcher, options)
    found = []
    for patch in patches_of(patcher, options):
        rule, spec = next(
            ((rule, spec) for rule in RULES if (spec := rule.encode(patch)) is not None),
            (None, None),
        )
        if rule is None and patch.place not in ("option", "wrapper"):  # those may concern rank 0 alone
            raise Refused(refusal(patch))
        if rule is not None and [rule.name, spec] not in found:
            found.append([rule.name, spec])
    order = [rule.name for rule in RULES]
    return sorted(found, key=lambda entry: order.index(entry[0]))


def apply_patches(model, specs):
    """A clone of a worker's MODEL with these patches on it. Raises Refused for a rule that is not here."""
    rules = {rule.name: rule for rule in RULES}
    model = model.clone()
    for name, spec in specs:
        if name not in rules:
            raise Refused(
                f"This worker does not know '{name}': its copy of the pack is not that of rank 0. Use the same "
                "version on every host."
            )
        model = rules[name].apply(model, spec) or model
    return model


def split_options(specs):
    """(specs without plain options, {name: value} of those)."""
    plain = [spec for name, spec in specs if name == OPTIONS]
    return [entry for entry in specs if entry[0] != OPTIONS], {name: restore(data, []) for name, data in plain}


# --- what cannot be sent ----------------------------------------------------------------------------------------------

PLACES = {
    "patch": "the patch '{key}'",
    "replacement": "the block replacement {key}",
    "attention": "the attention override",
    "object": "the object patch '{key}'",
}
CURES = {
    "attention": "Use Select Attention for the attention kernel.",
    "replacement": "Remove the node that replaces blocks, or use one GPU.",
    "configured": "It comes from a LoRA that configures layers: use Load FLUX.2 LoRA for that file.",
}


def refusal(patch):
    owner = name_of(patch.value)
    place = PLACES[patch.place].format(key=patch.key)
    cure = "configured" if patch.place == "object" and hasattr(patch.value, "with_config") else patch.place
    return (
        f"Sequence parallel cannot carry {place} of {owner} to the other GPUs, which would compute without it. "
        + CURES.get(cure, "Remove the node that sets it, or set gpus to 1.")
    )


def refuse_patcher(patcher, options):
    """Refuse what reaches the network without being one of its options: compiled modules, injections, weight hooks,
    copies on other GPUs.
    """
    wrappers = options.get("wrappers", {}).get("apply_model", {})
    if wrappers.get("torch.compile"):
        raise Refused(
            "Sequence parallel cannot share a model that Torch Compile Model has compiled as a whole: the exchange "
            "between the GPUs is no part of "
            "the compiled graph. Use Compile Blocks (FLUX) instead of that node."
        )
    if patcher is None:
        return
    if tensor_parallel.of(patcher.model.diffusion_model):
        refuse_on_split_weights(patcher, options)
    for reason, present in (
        (
            "hooks that change weights during the sampling (Create Hook LoRA and its relatives). Use Load LoRA "
            "instead.",
            patcher.hook_patches,
        ),
        (
            f"the injections {', '.join(patcher.injections)}, which change modules of rank 0. Remove the node that "
            "sets them.",
            patcher.injections,
        ),
        (
            "weight wrappers, which change weights on rank 0 alone. Remove the node that sets them.",
            patcher.weight_wrapper_patches,
        ),
        (
            "MultiGPU CFG Split, which runs copies of its own. Use one of the two.",
            patcher.get_additional_models_with_key("multigpu"),
        ),
    ):
        if present:
            raise Refused(f"Sequence parallel cannot carry {reason}")
    for moment in CHANGING_CALLBACKS:
        for key, functions in patcher.callbacks.get(moment, {}).items():
            if functions and not str(key).startswith(OURS):
                raise Refused(
                    f"Sequence parallel cannot carry the callback '{key}' ({moment}) of {name_of(functions[0])}: it "
                    "may change the model of rank 0 "
                    "alone. Remove the node that sets it, or set gpus to 1."
                )


def refuse_on_split_weights(patcher, options):
    """Refuse what would compute with whole layers, or put whole layers in the place of parts."""
    if options.get("wrappers", {}).get("diffusion_model", {}).get("flux2_compile"):
        raise Refused(
            "Compile Blocks cannot compile blocks whose weights are split over the GPUs: the sums over the GPUs are no "
            "part of a compiled graph. Remove that node, or set Sequence Parallel's weights to 'on every GPU'."
        )
    layers = [name for name, value in patcher.object_patches.items() if isinstance(value, torch.nn.Module)]
    inner = [name for name in layers if name.startswith("diffusion_model.")]
    if inner:
        raise Refused(
            f"Sequence Parallel has split the weights over the GPUs, and {inner[0]} was replaced by a whole layer "
            f"({name_of(patcher.object_patches[inner[0]])}). Remove the node that did, or set weights to 'on every "
            "GPU'."
        )


def name_of(value):
    """Module and name of somebody's function or object, without the path of the pack that it came from."""
    target = value if hasattr(value, "__qualname__") else type(value)
    return f"{target.__module__.rsplit('/', 1)[-1]}.{target.__qualname__.replace('.<locals>', '')}"


# --- the rules --------------------------------------------------------------------------------------------------------


def encode_dispatcher(patch):
    """Select Attention: its decisions are small values."""
    dispatcher = attention_slot.dispatcher_behind(patch.value)
    if patch.place != "attention" or dispatcher is None:
        return None
    if patch.value.previous is not None:
        raise Refused(
            f"Select Attention keeps another attention override behind it, {name_of(patch.value.previous)}, and "
            "Sequence parallel cannot carry that to the other GPUs. Remove the node that sets it."
        )
    return flatten(
        {
            "backend": dispatcher.backend,
            "unsupported": dispatcher.unsupported,
            "options": dispatcher.options,
            "schedule": vars(dispatcher.schedule) if dispatcher.schedule else None,
        }
    )[0]


def apply_dispatcher(model, spec):
    settings = restore(spec, [])
    if settings["schedule"]:
        settings["schedule"] = Schedule(**settings["schedule"])
    attention_slot.select(model, AttentionDispatcher(**settings))


def encode_kv_cache(patch):
    """Core's Flux KV Cache: a patch of q, k and v, one of the input, and the reference method; all three belong to
    it.
    """
    module, name = (
        getattr(patch.value, "__module__", ""),
        getattr(patch.value, "__qualname__", type(patch.value).__qualname__),
    )
    if (
        patch.place == "patch"
        and module == "comfy_extras.nodes_flux"
        and (name == "KV_Attn_Input" or name.startswith("FluxKVCache."))
    ):
        return {}
    return None


def apply_kv_cache(model, spec):
    from comfy_extras.nodes_flux import FluxKVCache

    return FluxKVCache.execute(model).args[0]


def encode_fast_blocks(patch):
    """Fast Blocks (FLUX.2): a wrapper of the network that computes its blocks."""
    if patch.place != "wrapper" or patch.key != ("diffusion_model", "flux2_fast_blocks") or patch.value.left:
        return None
    return {"fp8": patch.value.fp8 is not None}


def apply_fast_blocks(model, spec):
    from ...fused import blocks as fused_blocks, fp8_rowwise

    fp8 = None
    if spec["fp8"]:
        reason = fp8_rowwise.unavailable_for(model)
        if reason:
            raise Refused(f"Fast Blocks cannot use fp8 on this GPU: {reason} Set precision to 'checkpoint'.")
        fp8 = fp8_rowwise.RowwiseFp8()
        fp8.install(model)
    fused_blocks.install(model, fp8)


def encode_compile(patch):
    """Compile Blocks (FLUX): a wrapper of the network that reaches into its blocks."""
    if patch.place != "wrapper" or patch.key != ("diffusion_model", "flux2_compile"):
        return None
    plan = patch.value.plan
    return {
        "mode": plan.mode,
        "on_failure": plan.on_failure,
        "backend": plan.backend,
        "folder": os.environ.get("TORCHINDUCTOR_CACHE_DIR"),
    }


def apply_compile(model, spec):
    from ...compiled import blocks as compiled_blocks, toolchain

    if spec["folder"] and "FLUX2_RANKS_JOINED" not in os.environ:  # compiled code is taken from this host's own folder
        toolchain.keep_on_disk(spec["folder"])
    compiled_blocks.install(model, compiled_blocks.CompilePlan(spec["mode"], spec["on_failure"], spec["backend"]))


def encode_plain(place):
    """Options and object patches that are plain values: every rank gets the same."""

    def encode(patch):
        if patch.place != place:
            return None
        try:
            data, tensors = flatten(patch.value)
        except Unsendable:
            return None
        return None if tensors else [patch.key, data]

    return encode


def encode_configured(patch):
    """A module that Load FLUX.2 LoRA configured: its configuration, as the bytes in the file."""
    encoded = getattr(patch.value, CONFIG_MARK, None) if patch.place == "object" else None
    return None if encoded is None else [patch.key, encoded]


def apply_configured(model, spec):
    name, encoded = spec
    module = model.get_model_object(name)
    model.add_object_patch(name, module.with_config(torch.tensor(encoded, dtype=torch.uint8)))


def apply_option(model, spec):
    name, data = spec
    model.model_options["transformer_options"][name] = restore(data, [])


def apply_object(model, spec):
    name, data = spec
    model.add_object_patch(name, restore(data, []))


RULES = (
    TransferRule(OPTIONS, encode_plain("option"), apply_option),
    TransferRule("object patches", encode_plain("object"), apply_object),
    TransferRule("Load FLUX.2 LoRA", encode_configured, apply_configured),
    TransferRule("Select Attention", encode_dispatcher, apply_dispatcher),
    TransferRule("Flux KV Cache", encode_kv_cache, apply_kv_cache),
    TransferRule("Fast Blocks (FLUX.2)", encode_fast_blocks, apply_fast_blocks),
    TransferRule("Compile Blocks (FLUX)", encode_compile, apply_compile),
)
