"""Compile the blocks of a MODEL, and run it before the first image."""

import functools
import os

import comfy.utils
import folder_paths
from comfy_api.latest import io, ui

from ..flux2 import error_links, page_words
from ..flux2.measuring import capture, sampling, warmup
from ..flux2.compiled import blocks as compiled_blocks, toolchain
from .attention import CATEGORY


def cache_folder():
    """Where compiled code is kept: in ComfyUI's user folder, which outlives restarts."""
    return os.path.join(folder_paths.get_user_directory(), "flux2_attention", "compiled")


class Flux2CompileBlocks(io.ComfyNode):
    """MODEL in, MODEL out, its blocks compiled by torch.compile."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Flux2CompileBlocks",
            display_name="Compile Blocks (FLUX)",
            category=f"{CATEGORY}/speed",
            hidden=[io.Hidden.unique_id],
            description="Compiles FLUX's transformer blocks with torch.compile: once for each kind of block, for "
            "every image size. The first step takes "
            "up to a minute longer, the following ones less. Use it instead of Fast Blocks: for other FLUX models, or "
            "where those do not run.",
            search_aliases=["torch.compile", "inductor", "speed up", "faster", "compile model"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="A FLUX model. It is cloned: other branches of the graph stay as they are. Before or "
                    "after Select Attention; "
                    "LoRA, fp8 and offloading keep working.",
                ),
                io.Combo.Input(
                    "mode",
                    options=list(compiled_blocks.MODES),
                    default=compiled_blocks.MODES[0],
                    optional=True,
                    advanced=True,
                    tooltip="default: seconds of compiling.\nmax-autotune-no-cudagraphs: also tries Triton kernels "
                    "for the matrix products, which takes "
                    "minutes and rarely pays on cards with a good cuBLAS.",
                ),
                io.Combo.Input(
                    "failures",
                    display_name="if compiling fails",
                    options=[compiled_blocks.REFUSE, compiled_blocks.EAGER],
                    default=compiled_blocks.REFUSE,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "What happens where torch.compile cannot compile a block: stop with the reason, or run such "
                        "blocks uncompiled and say so in Attention Report."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(
                    tooltip="The same model with compiled blocks. Attention Report and Warm Up say how many calls "
                    "were compiled and how long that "
                    "took. Compiled code is kept in ComfyUI's user folder (flux2_attention/compiled), unless "
                    "TORCHINDUCTOR_CACHE_DIR names another place."
                )
            ],
        )

    @classmethod
    def execute(cls, model, mode=compiled_blocks.MODES[0], failures=compiled_blocks.REFUSE) -> io.NodeOutput:
        reason = toolchain.unavailable(model.load_device)
        if reason:
            raise compiled_blocks.CompileRefused(f"Compile Blocks cannot run here: {reason} {compiled_blocks.INSTEAD}")
        toolchain.keep_on_disk(cache_folder())
        patched, node = model.clone(), cls.hidden.unique_id if cls.hidden else None  # it compiles in the sampler's node
        tell = functools.partial(page_words.tell, node_id=node)
        compiled_blocks.install(patched, compiled_blocks.CompilePlan(mode, failures, tell=tell))
        return io.NodeOutput(patched)


class Flux2WarmUp(io.ComfyNode):
    """A few steps at the sizes that will be generated, before the first image."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Flux2WarmUp",
            display_name="Warm Up",
            category=f"{CATEGORY}/speed",
            description="Runs a few steps at the image sizes you are going to generate, so that compiling, tuning and "
            "memory allocation happen now and not in your "
            "first image. "
            "Shows what ran and how long it took. Runs once for a model: later prompts find it done. The model stays "
            "as it is.",
            search_aliases=["warmup", "warm up", "preload", "first picture slow", "compile"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model as it goes into the sampler, behind Select Attention, Fast Blocks, Compile "
                    "Blocks and LoRA loaders. "
                    "Any model works if positive is connected.",
                ),
                io.String.Input(
                    "sizes",
                    default="1024x1024",
                    tooltip="Image sizes, separated by commas. +1 behind a size adds a reference image of "
                    "1024x1024: "
                    "1024x1024, 1024x1024+1, 2048x2048.",
                ),
                io.Int.Input(
                    "steps",
                    default=2,
                    min=1,
                    max=100,
                    tooltip="Steps at each size. The first does what is done once, the second shows the time of all "
                    "others.",
                ),
                io.Int.Input(
                    "references",
                    default=0,
                    min=0,
                    max=9,
                    tooltip="How many reference images of 1024x1024 the sizes without a +number are generated with.",
                ),
                io.Clip.Input("clip", optional=True, tooltip="The text encoder. Connected, it encodes a prompt once."),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="The VAE. Connected, it decodes once at each size, and encodes a reference image if "
                    "there are any.",
                ),
                io.Conditioning.Input(
                    "positive",
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "A prompt for the steps. FLUX.2 needs none: without it clip makes one, or noise takes its "
                        "place. Other models need one."
                    ),
                ),
                io.Int.Input(
                    "batch_size",
                    default=1,
                    min=1,
                    max=64,
                    optional=True,
                    advanced=True,
                    tooltip="Images in a batch, as in the empty latent.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The model, unchanged: connect the sampler here, so that it waits."),
                io.String.Output(display_name="report", tooltip="What was run and how long it took, as text."),
            ],
        )

    @classmethod
    def validate_inputs(cls, sizes=None):
        try:
            capture.sizes(sizes) if sizes is not None else None
        except ValueError as error:
            return error_links.answer(error)
        return True

    @classmethod
    def execute(
        cls, model, sizes, steps=2, references=0, clip=None, vae=None, positive=None, batch_size=1
    ) -> io.NodeOutput:
        parsed = [
            size if size.references else capture.Size(size.width, size.height, references)
            for size in capture.sizes(sizes)
        ]
        tick = sampling.stopper(comfy.utils.ProgressBar(warmup.ticks(parsed, steps, clip, vae)))
        with warmup.unlogged(model) as ran:
            rows = warmup.warm_up(model, parsed, steps, positive, clip, vae, batch_size, tick)
        text = "\n".join(
            ["Warmed up.", *(row.as_text() for row in rows), *ran, *filter(None, [compiled_blocks.report(model)])]
        )
        return io.NodeOutput(model, text, ui=ui.PreviewText(text))


NODES = [Flux2CompileBlocks, Flux2WarmUp]
