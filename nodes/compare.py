"""Is another attention good enough, and is it faster? Two nodes that answer with pictures and numbers from the user's
own model and card.
"""

import comfy.utils
from comfy_api.latest import io, ui

from ..attention import registry
from ..attention.errors import UserError
from ..attention.measuring import statistics, time_backends
from ..flux2 import error_links, page_words
from ..flux2.measuring import benchmark, capture, compare, result_file, sampling
from ..flux2.select_attention import NO_SECOND, check_schedule
from . import figures
from .attention import CATEGORY, known_slugs

SLOTS = ("a", "b", "c", "d")
NO_SLIDER = (
    "The two images of the slider could not be saved in ComfyUI's folder temp, so there is none. Make room or give "
    "ComfyUI the right to write there."
)


class Flux2CompareAttention(io.ComfyNode):
    """The same noise through several attentions, with a verdict."""

    @classmethod
    def define_schema(cls):
        counts = {"default": 0, "min": 0, "max": 1000, "optional": True, "advanced": True}
        choices = [NO_SECOND, *registry.SLUGS]
        candidates = [
            io.Combo.Input(
                f"candidate_{n}",
                display_name=f"candidate {n}",
                options=choices,
                default=registry.AUTO if n == 1 else NO_SECOND,
                optional=True,
                tooltip="A backend to compare with the reference. One that cannot run here becomes a row with its "
                "reason.",
            )
            for n in range(1, 5)
        ]
        models = [
            io.Model.Input(
                f"model_{slot}",
                display_name=f"prepared model {slot.upper()}",
                optional=True,
                tooltip="A model that other nodes prepared, compared as it is: several GPUs, LoRA, compilation, other "
                "packs' patches.",
            )
            for slot in SLOTS
        ]
        return io.Schema(
            node_id="Flux2CompareAttention",
            display_name="Compare Attention",
            category=f"{CATEGORY}/measure",
            is_output_node=True,
            description="Runs the same noise through a reference and up to eight candidates and shows what changes: "
            "images, a heat map, errors per step "
            "and per block, seconds per step, and a verdict that is measured against the rounding noise of two exact "
            "kernels.",
            search_aliases=[
                "accuracy",
                "quality",
                "difference",
                "psnr",
                "ssim",
                "attention backend",
                "is it good enough",
            ],
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model to sample with. It is cloned for each candidate and left as it is."
                ),
                io.Latent.Input(
                    "latent_image",
                    tooltip="The latent to start from, as for a sampler. An empty one gives text to image.",
                ),
                io.Sampler.Input("sampler", tooltip="The sampler. All candidates use the same one."),
                io.Sigmas.Input(
                    "sigmas",
                    tooltip="The schedule. Use the number of steps that you generate with: errors grow from step to "
                    "step.",
                ),
                io.Int.Input(
                    "noise_seed",
                    default=42,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="The seed of the noise, the same for all candidates.",
                ),
                io.Combo.Input(
                    "reference",
                    options=registry.SLUGS,
                    default=registry.COMFYUI,
                    tooltip="What the candidates are compared with: an exact backend, unless you want to know how two "
                    "others differ.",
                ),
                io.Conditioning.Input(
                    "positive",
                    optional=True,
                    tooltip="The prompt (with guidance and reference images, if any). For a negative prompt connect "
                    "a guider instead.",
                ),
                io.Guider.Input(
                    "guider",
                    optional=True,
                    tooltip="Instead of positive: a guider with its prompts and settings. Its model is replaced by "
                    "the candidates'.",
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="Decodes the images. Without it there are rough previews, and no PSNR and SSIM.",
                ),
                *candidates,
                io.Combo.Input(
                    "edge_backend",
                    display_name="second kernel",
                    options=choices,
                    default=NO_SECOND,
                    optional=True,
                    advanced=True,
                    tooltip="Computes the first and last steps of the candidates chosen above: set at least one of "
                    "the two.",
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
                *models,
            ],
            outputs=[
                io.Image.Output(
                    display_name="images", tooltip="The reference and the candidates side by side, with their names."
                ),
                io.Image.Output(
                    display_name="differences",
                    tooltip="Where each candidate's image differs from the reference's, on one scale.",
                ),
                io.String.Output(
                    display_name="table",
                    tooltip="Verdicts with their thresholds, errors per step and per block, and times, as text.",
                ),
                io.Image.Output(display_name="reference image", tooltip="The reference's image alone."),
                io.Image.Output(
                    display_name="candidate image",
                    tooltip="The first candidate's image alone, for Compare Images; the reference's where none ran.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(
        cls, reference=None, candidate_1=None, candidate_2=None, candidate_3=None, candidate_4=None, edge_backend=None
    ):
        return known_slugs(reference, candidate_1, candidate_2, candidate_3, candidate_4, edge_backend)

    @classmethod
    def execute(
        cls,
        model,
        latent_image,
        sampler,
        sigmas,
        noise_seed,
        reference=registry.COMFYUI,
        positive=None,
        guider=None,
        vae=None,
        candidate_1=NO_SECOND,
        candidate_2=NO_SECOND,
        candidate_3=NO_SECOND,
        candidate_4=NO_SECOND,
        edge_backend=NO_SECOND,
        first_steps=0,
        last_steps=0,
        model_a=None,
        model_b=None,
        model_c=None,
        model_d=None,
    ) -> io.NodeOutput:
        if (positive is None) == (guider is None):
            raise UserError("Connect either positive (a prompt) or guider, not both and not neither.", compare.TOPIC)
        check_schedule(edge_backend, first_steps, last_steps)
        chosen = [s for s in (candidate_1, candidate_2, candidate_3, candidate_4) if s != NO_SECOND]
        variants = [compare.backend_variant(slug, edge_backend, first_steps, last_steps) for slug in chosen]
        prepared = zip(SLOTS, (model_a, model_b, model_c, model_d))
        variants += [compare.model_variant(slot, m) for slot, m in prepared if m is not None]
        guider = guider or sampling.guider_of(model, positive)
        job = sampling.SamplingJob(guider, latent_image, sampler, sigmas, noise_seed)
        bar = comfy.utils.ProgressBar((len(variants) + 2) * job.steps)  # and the reference and the control
        found, images = compare.compare(
            model, job, reference, compare.unnamed_twice(variants), vae, lambda: bar.update(1), page_words.tell
        )
        found.notes += [] if figures.has_chart() else [figures.NO_CHART]
        (name, base), *others = images
        shown = pair(images, cls)
        found.notes += [] if shown else [NO_SLIDER]
        text = found.as_text()
        return io.NodeOutput(
            figures.side_by_side([(f"{name} (reference)", base), *others]),
            figures.heat_maps(base, others),
            text,
            base,
            others[0][1] if others else base,
            ui={
                **ui.PreviewText(text).as_dict(),
                "flux2_compare": [statistics.as_json(found.as_data())],
                "flux2_pair": shown,
            },
        )


def pair(images, node):
    """What web/slider.js shows: the reference's and the first candidate's image, as files in ComfyUI's folder temp; []
    where the disk refuses, which must not cost the comparison.
    """
    try:
        shown = [(name, ui.PreviewImage(image[:1], cls=node).as_dict()["images"][0]) for name, image in images[:2]]
        return [{**file, "name": name} for name, file in shown]
    except OSError:
        return []


class Flux2BenchmarkAttention(io.ComfyNode):
    """Time every backend on this model and card."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Flux2BenchmarkAttention",
            display_name="Benchmark Attention",
            category=f"{CATEGORY}/measure",
            is_output_node=True,
            description="Times every attention backend that runs here on the calls that this model really makes, then "
            "whole steps of the model. Gives a chart, "
            "a table with the reasons of the backends that cannot run, and a JSON file in ComfyUI's output folder. "
            "The model stays as it is.",
            search_aliases=["speed", "it/s", "fastest attention", "time", "attention backend"],
            inputs=[
                io.Model.Input("model", tooltip="The model to measure, with everything that other nodes did to it."),
                io.String.Input(
                    "sizes",
                    default="1024x1024",
                    tooltip="Image sizes, separated by commas. +1 behind a size adds a reference image of "
                    "1024x1024: 1024x1024, 1024x1024+1, 2048x2048.",
                ),
                io.Conditioning.Input(
                    "positive",
                    optional=True,
                    tooltip="A prompt. FLUX.2 needs none: noise in its place takes the same time. Other models need "
                    "one.",
                ),
                io.String.Input(
                    "backends",
                    display_name="only these (empty = all)",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="Only these kernels, separated by commas. Empty: every one that can run here.",
                ),
                io.Int.Input(
                    "call_repeat",
                    display_name="timed calls",
                    default=time_backends.REPEAT,
                    min=1,
                    max=1000,
                    optional=True,
                    advanced=True,
                    tooltip="How often each attention call is timed, after warming up. The median counts.",
                ),
                io.Int.Input(
                    "step_repeat",
                    display_name="timed steps (0 = skip)",
                    default=3,
                    min=0,
                    max=100,
                    optional=True,
                    advanced=True,
                    tooltip="How many whole steps are timed for each backend, after one that warms up. 0: attention "
                    "calls only.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="chart",
                    tooltip="Bars of the medians, with the spread. Needs matplotlib; without it, a sentence that says "
                    "so.",
                ),
                io.String.Output(
                    display_name="table",
                    tooltip="Every figure, and the reasons of the backends that cannot run here, as text.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, sizes=None, backends=None):
        try:
            capture.sizes(sizes) if sizes is not None else None
        except ValueError as error:
            return error_links.answer(error)
        return known_slugs(*names(backends or ""))

    @classmethod
    def execute(
        cls, model, sizes, positive=None, backends="", call_repeat=time_backends.REPEAT, step_repeat=3
    ) -> io.NodeOutput:
        wanted, parsed = names(backends), capture.sizes(sizes)
        bar = comfy.utils.ProgressBar(benchmark.ticks(model, parsed, wanted, call_repeat, step_repeat))
        tick = sampling.stopper(bar)
        found = benchmark.benchmark(model, parsed, positive, wanted, call_repeat, step_repeat, tick, page_words.tell)
        found.notes += [] if figures.has_chart() else [figures.NO_CHART]
        data = statistics.as_json(found.as_data())
        text = f"{found.as_text()}\n\n{result_file.save(data)}"
        return io.NodeOutput(
            figures.chart(found), text, ui={**ui.PreviewText(text).as_dict(), "flux2_benchmark": [data]}
        )


def names(text):
    """The slugs in a list separated by commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


NODES = [Flux2CompareAttention, Flux2BenchmarkAttention]
