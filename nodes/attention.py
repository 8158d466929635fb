"""Choose the attention kernel of a MODEL, and report which one ran."""

from comfy_api.latest import io, ui

from ..attention import registry, dispatch
from ..attention.override import AttentionOverride, name_of
from ..attention.run_log import latent_fingerprint
from ..flux2.compiled import blocks as compiled_blocks
from ..flux2.loading import encoder_attention, lazy_clip
from ..flux2.fused import blocks as fused_blocks
from ..attention.errors import UserError
from ..flux2 import attention_slot, error_links, select_attention
from ..flux2.select_attention import NO_SECOND, ROUNDINGS, tuner
from ..flux2.parallel.workers import report as ranks_report
from . import status

CATEGORY = "Flux 2"
# a text encoder's attention is float32 with a causal mask: no other exact kernel takes that
ENCODER_BACKENDS = ["default", registry.AUTO, "sdpa", "sdpa-efficient", "sdpa-math"]


BACKEND_TOOLTIP = (
    "Computes this model's attention. It runs, or the graph stops with the reason: nothing falls back silently.\n"
    "auto: the fastest exact one, measured on your GPU (recommended).\n"
    "comfyui: ComfyUI's own attention, only counted and timed (the baseline).\n"
    "NVIDIA: flash4, sdpa-cudnn, flash2.\n"
    "AMD: aiter, aiter-triton.\n"
    "Faster but approximate: sage2, sage3, aiter-fp8, aiter-sage."
)


def known_slugs(*slugs):
    """What validate_inputs returns: True, or the sentence that lists the backends. None stands for an input that is
    linked.
    """
    try:
        for slug in slugs:
            if slug not in (None, NO_SECOND, registry.AUTO, registry.COMFYUI):
                registry.row(slug if isinstance(slug, str) else repr(slug)[:40])
    except UserError as error:
        return error_links.answer(error)
    return True


def check_encoder_attention(device, backend):
    """Refuse now a backend that cannot run a text encoder on a device. Raises AttentionRefused."""
    if backend not in (ENCODER_BACKENDS[0], registry.AUTO):
        registry.adapter(backend, registry.describe(device))


def choose_encoder_attention(clip, backend):
    """The CLIP with its attention chosen; "default" leaves it to ComfyUI. AttentionRefused when the backend cannot run
    on its device.
    """
    if backend != ENCODER_BACKENDS[0]:
        check_encoder_attention(clip.patcher.load_device, backend)
        encoder_attention.install(clip, AttentionOverride(dispatch.AttentionDispatcher(backend, tuner=tuner())))
    return clip


class Flux2SelectAttention(io.ComfyNode):
    """MODEL in, MODEL out, with an attention backend of your choice."""

    @classmethod
    def define_schema(cls):
        counts = {"default": 0, "min": 0, "max": 1000, "optional": True, "advanced": True}
        return io.Schema(
            node_id="Flux2SelectAttention",
            display_name="Select Attention",
            category=f"{CATEGORY}/attention",
            description="Chooses the kernel that computes attention for this model: FlashAttention, cuDNN, AITER on "
            "AMD, PyTorch. "
            "Works on any MODEL. Put it between the loader and the sampler; connect the report node to see what ran.",
            # web/search.js: the page's search looks at the first 30 letters of these
            search_aliases=["rocm", "amd", "aiter", "sdpa", "sage", "cudnn", "flash attention"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model to patch. It is cloned: other branches of the graph keep their own attention.",
                ),
                io.Combo.Input(
                    "backend",
                    display_name="attention kernel",
                    options=registry.SLUGS,
                    default=registry.AUTO,
                    tooltip=BACKEND_TOOLTIP,
                ),
                io.Combo.Input(
                    "unsupported_calls",
                    display_name="if the kernel cannot do it",
                    options=[dispatch.REFUSE, dispatch.USE_SDPA],
                    default=dispatch.REFUSE,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "What happens where the kernel cannot compute an attention call, for example one with a mask: "
                        "stop with the reason, or let PyTorch compute that part and say so in the report."
                    ),
                ),
                io.Combo.Input(
                    "edge_backend",
                    display_name="second kernel",
                    options=[NO_SECOND, *registry.SLUGS],
                    default=NO_SECOND,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "Computes the first and last steps or blocks that are set below: set at least one of the four. "
                        "Typical use: an approximate kernel above for speed, an exact one here, where errors show most."
                    ),
                ),
                io.Int.Input(
                    "first_steps",
                    display_name="second kernel: first steps",
                    **counts,
                    tooltip="How many steps at the beginning the second kernel computes. 0: none.",
                ),
                io.Int.Input(
                    "last_steps",
                    display_name="second kernel: last steps",
                    **counts,
                    tooltip="How many steps at the end the second kernel computes. 0: none.",
                ),
                io.Int.Input(
                    "first_blocks",
                    display_name="second kernel: first blocks",
                    **counts,
                    tooltip=(
                        "How many transformer blocks at the input side the second kernel computes, in every step. 0: "
                        "none."
                    ),
                ),
                io.Int.Input(
                    "last_blocks",
                    display_name="second kernel: last blocks",
                    **counts,
                    tooltip=(
                        "How many transformer blocks at the output side the second kernel computes, in every step. 0: "
                        "none."
                    ),
                ),
                io.Combo.Input(
                    "aiter_rounding",
                    display_name="rounding (MI300)",
                    options=ROUNDINGS,
                    default=ROUNDINGS[0],
                    optional=True,
                    advanced=True,
                    tooltip="How AITER's bf16 assembly kernel rounds on MI300: nearest away is AITER's default, "
                    "toward zero is fastest "
                    "and least exact. Other backends ignore it.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The same model with the chosen attention.")],
            # its ui output, which tells the page whose status to show, is sent again when the node is cached
            has_intermediate_output=True,
        )

    @classmethod
    def validate_inputs(cls, backend=None, edge_backend=None):
        return known_slugs(backend, edge_backend)

    @classmethod
    def execute(
        cls,
        model,
        backend,
        unsupported_calls=dispatch.REFUSE,
        edge_backend=NO_SECOND,
        first_steps=0,
        last_steps=0,
        first_blocks=0,
        last_blocks=0,
        aiter_rounding=ROUNDINGS[0],
    ) -> io.NodeOutput:
        patched, dispatcher = select_attention.select(
            model,
            backend,
            unsupported_calls,
            edge_backend,
            first_steps,
            last_steps,
            first_blocks,
            last_blocks,
            aiter_rounding,
        )
        return io.NodeOutput(patched, ui={status.UI_KEY: [status.follow(dispatcher)]})


class Flux2AttentionReport(io.ComfyNode):
    """Which kernel ran, for how many calls, and why."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Flux2AttentionReport",
            display_name="Attention Report",
            category=f"{CATEGORY}/measure",
            is_output_node=True,
            not_idempotent=True,
            description="Shows which attention kernel really ran during the last sampling with this model: backend, "
            "library and version, "
            "kernel, number of calls, shapes, and calls that were not handled and why. Put it between the sampler and "
            "the VAE.",
            search_aliases=["attention backend", "which attention", "is flash attention on", "benchmark"],
            inputs=[
                io.Model.Input("model", tooltip="The model that went into the sampler (after Select Attention)."),
                io.Latent.Input(
                    "latent",
                    tooltip="What the sampler produced. It is passed on unchanged and tells which sampling to report.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The text encoder, to report its attention too. Says something only when its loader was "
                    "told which kernel to use.",
                ),
            ],
            outputs=[
                io.Latent.Output(tooltip="The latent, unchanged."),
                io.String.Output(display_name="report", tooltip="The report as text."),
            ],
        )

    @classmethod
    def execute(cls, model, latent, clip=None) -> io.NodeOutput:
        text, data = report(model, latent["samples"])
        ranks, data["parallel"] = ranks_report.report(model)
        fused = fused_blocks.log_of(model)
        data["fast_blocks"] = fused and fused.as_data()
        text = "\n\n".join(filter(None, (text, fused and fused.as_text(), compiled_blocks.report(model), ranks)))
        if clip is not None:
            text += "\n\n" + encoder_report(clip)
        return io.NodeOutput(latent, text, ui={**ui.PreviewText(text).as_dict(), "flux2_attention": [data]})


def report(model, samples):
    """(text, data) for the sampling that produced `samples`, or for the newest one of this model."""
    dispatcher, override = attention_slot.dispatcher_of(model), attention_slot.override_of(model)
    if dispatcher is None:
        text = (
            "No Select Attention node is on this model: ComfyUI's own attention runs, and it keeps no record. Select "
            "Attention with the backend 'comfyui' leaves attention as it is, and counts and times it."
        )
        text += f" Another override is: {name_of(override)}." if override else ""
        return text, {"backend": None, "calls": 0}
    run, by_latent = dispatcher.log.find(None if samples.is_nested else latent_fingerprint(samples))
    if run is None:
        text = f"Attention backend chosen: {dispatcher.describe()}\nNothing has been sampled with this model yet."
        return text, {"backend": dispatcher.backend, "calls": 0}
    text = run.as_text()
    if not by_latent:
        text += "\nThis latent is not one that the model's last samplings produced: the newest sampling is reported."
    return text, run.as_data()


def encoder_report(clip):
    """What computed the attention of the last prompt that this CLIP encoded."""
    if not lazy_clip.is_loaded(clip):
        return "Text encoder: not loaded, because no prompt has needed it yet."
    chosen = encoder_attention.dispatcher_of(clip)
    if chosen is None:
        return "Text encoder: ComfyUI's own attention, which keeps no record."
    return "Text encoder. " + (
        chosen.log.current.as_text()
        if chosen.log.current
        else f"Attention backend chosen: {chosen.backend}. No prompt has been encoded yet."
    )


NODES = [Flux2SelectAttention, Flux2AttentionReport]
