"""Who takes part in benchmarks/step.py: each a way of running one step of the same weights.

A peer is made once for a model, and gives a function for each size: prepare(inputs) -> work() -> the denoised latent
(1, 128, H, W). Making or running may raise: that is the row's reason.
"""

from dataclasses import dataclass
import os

import torch

import twins
from full_size import step

OURS = ("ours", "ours-fp8", "ours-cudnn-fp8", "ours-cudnn-fp8-fused")
DIFFUSERS = ("diffusers", "diffusers-compiled")
ALL = ("core", "core-attention", "core-compiled", *DIFFUSERS, *OURS)


@dataclass
class Setting:
    """What peers are made of. weights: "bf16", "fp8" or "int8"; attention: the selector's slug; compiler:
    torch.compile's backend; weight_bytes: of the model.
    """

    patcher: object
    sizes: dict
    weights: str
    attention: str
    compiler: str
    weight_bytes: int = 0
    diffusers_attention: str | None = None


def make(name, setting):
    """prepare(inputs) -> work() of a peer. ValueError for a peer that makes no sense here, with the reason."""
    if name in DIFFUSERS:
        return diffusers_peer(setting, name.endswith("compiled"))
    if name == "ours-fp8" and setting.weights != "bf16":
        raise ValueError(f"the checkpoint is {setting.weights} already: see ours")
    model = {
        "core": lambda: setting.patcher,
        "core-attention": lambda: select(setting.patcher, setting.attention),
        "core-compiled": lambda: compiled(select(setting.patcher, setting.attention), setting.compiler),
        "ours": lambda: fast(setting, "checkpoint"),
        "ours-fp8": lambda: fast(setting, "fp8"),
        "ours-cudnn-fp8": lambda: fast(setting, "checkpoint", "cudnn-fp8"),
        "ours-cudnn-fp8-fused": lambda: fast_fp8_qkv(setting),
    }.get(name)
    if model is None:  # core+SLUG: one more backend under core's blocks
        return prepared(select(setting.patcher, name.removeprefix("core+")))
    return prepared(model())


def prepared(model):
    def prepare(inputs):
        def work():
            return step(model, inputs)

        work.model = model
        return work

    return prepare


def select(patcher, slug):
    from flux2_pack.nodes.attention import Flux2SelectAttention

    return Flux2SelectAttention.execute(patcher, slug).args[0]


def fast(setting, precision, slug=None):
    from flux2_pack.nodes.fast import Flux2FastBlocks

    return Flux2FastBlocks.execute(select(setting.patcher, slug or setting.attention), precision).args[0]


def fast_fp8_qkv(setting):
    """fast with backend cudnn-fp8, its q, k and v written by the fused blocks: the switch is read when they are
    installed.
    """
    from flux2_pack.flux2.fused import fp8_attention

    before = os.environ.get(fp8_attention.SWITCH)
    os.environ[fp8_attention.SWITCH] = "1"
    try:
        return fast(setting, "checkpoint", "cudnn-fp8")
    finally:
        os.environ.pop(fp8_attention.SWITCH)
        if before is not None:
            os.environ[fp8_attention.SWITCH] = before


def compiled(patcher, compiler):
    from flux2_pack.flux2.compiled import blocks as compiled_blocks

    clone = patcher.clone()
    compiled_blocks.install(clone, compiled_blocks.CompilePlan(backend=compiler))
    return clone


def diffusers_peer(setting, is_compiled):
    if setting.weights != "bf16":
        raise ValueError(f"diffusers has no path for ComfyUI's {setting.weights} checkpoints")
    if setting.diffusers_attention is None:
        raise ValueError("no attention backend of diffusers was found to run here")
    dtype = setting.patcher.model.get_dtype_inference()
    arguments = {"fullgraph": True, "dynamic": True, "backend": setting.compiler} if is_compiled else None
    model = twins.twin(setting.patcher, setting.sizes, setting.diffusers_attention, arguments)

    def prepare(inputs):
        given = twins.inputs_of(inputs, dtype)
        return lambda: twins.step(model, given, inputs)

    return prepare


def fastest_attention(setting, inputs, time_ms):
    """({name: ms}, the fastest) of diffusers' attention backends for one step; ({}, None) where none runs or diffusers
    is not installed.
    """
    found = {}
    for name in twins.ATTENTION if inputs["x"].is_cuda else twins.ATTENTION[:1]:
        try:
            model = twins.twin(setting.patcher, setting.sizes, name)
            given = twins.inputs_of(inputs, setting.patcher.model.get_dtype_inference())
            found[name] = time_ms(lambda: twins.step(model, given, inputs))
        except Exception as error:  # not on this card, or no diffusers: the next one
            print(
                (
                    f"diffusers with {name}: {type(error).__name__}: "
                    f"{str(error).strip().splitlines()[0] if str(error).strip() else ''}"
                ),
                flush=True,
            )
    return found, min(found, key=found.get, default=None)


def ran(work):
    """{backend: calls} of the attention of a peer's steps since this was last asked, where it keeps a log."""
    from flux2_pack.flux2 import attention_slot

    dispatcher = attention_slot.dispatcher_of(work.model) if hasattr(work, "model") else None
    entries = dispatcher.log.current.as_data()["entries"] if dispatcher and dispatcher.log.current else []
    if dispatcher:
        dispatcher.log.runs.clear()
    return {entry["backend"]: entry["calls"] for entry in entries}


def error_between(out, expected):
    """Relative Frobenius distance."""
    return (
        ((out.float() - expected.float()).norm() / expected.float().norm()).item()
        if torch.isfinite(out).all()
        else float("nan")
    )
