"""One image on several GPUs, as an ordinary MODEL."""

import os

from comfy_api.latest import io

from ..attention.errors import UserError
from ..attention.parallel import degrees, tensor_degrees
from ..attention.parallel.symmetric_memory import SWITCH
from ..flux2.parallel import tensor_parallel
from ..flux2.parallel.forward import unsupported
from ..flux2.parallel.workers import devices, gguf, install, replica, split_model
from .attention import CATEGORY, tuner

WHOLE, SPLIT = "on every GPU", "split over the GPUs"


def parallel(model, gpus=0, ulysses=0, ring=0, weights=WHOLE, gguf_file=lambda: gguf.file_of(None, None)):
    """A clone of a MODEL whose forward passes several GPUs share, or the MODEL itself for one GPU. gguf_file() -> the
    file of a MODEL that does not know it. Raises ValueError in words.
    """
    network = model.model.diffusion_model

    def choose(number):  # asked only where there are several GPUs: with one, any model passes
        refuse(unsupported(network))
        return (tensor_degrees if weights == SPLIT else degrees)(number, network.num_heads, ulysses, ring)

    plan, why = devices.plan_ranks(model.load_device, gpus, choose)
    install.say(f"Changes nothing. {why}" if plan is None else f"{plan.degrees}. {why}")
    if plan is None:
        return model
    refuse(unsupported(network, plan.ulysses * plan.tensor) or unsplittable(model, plan))
    patched = model.clone() if plan.tensor == 1 else split_model.split_model(model, plan.tensor)
    if gguf.is_gguf(model) and getattr(model, "cached_patcher_init", None) is None:
        patched.cached_patcher_init = gguf.how_loaded(model, gguf_file())
    replica.source_of(patched)
    tuner()  # where a ring's kernel is chosen by `auto`, it keeps what it measures in ComfyUI's user folder
    request = install.ParallelRequest(plan, why)
    install.install(patched, request)
    # starting and loading takes them seconds: while the prompt is encoded
    request.session(patched.model, patched.load_device).prepare(patched)
    return patched


def refuse(reasons):
    """Raise UserError where there are sentences against it."""
    if reasons:
        raise UserError(" ".join(reasons), "several-gpus")


def unsplittable(model, plan):
    """Sentences why the weights of a MODEL cannot be split, or stay on every GPU, as planned."""
    parallel = tensor_parallel.of(model.model.diffusion_model)
    if parallel and parallel.size != plan.tensor:
        return [
            f"The weights of this model are split over {parallel.size} GPUs already, by another Sequence Parallel. Use "
            "one of the two."
        ]
    if plan.tensor > 1 and gguf.is_gguf(model):
        return [
            "The weights of a GGUF model cannot be split over the GPUs: its numbers are packed in blocks that a part "
            "would cut. Use a bf16 or fp8 file, or set weights to 'on every GPU'."
        ]
    if plan.tensor > 1 and os.environ.get(SWITCH) == "1":
        return [
            f"Weights cannot be split over the GPUs with {SWITCH}=1: those kernels expect all heads "
            "on every GPU. Start ComfyUI without that variable."
        ]
    return []


class Flux2SequenceParallel(io.ComfyNode):
    """MODEL in, MODEL out, computed by several GPUs."""

    @classmethod
    def define_schema(cls):
        degree = {"default": 0, "min": 0, "max": 64, "optional": True, "advanced": True}
        return io.Schema(
            node_id="Flux2SequenceParallel",
            display_name="Sequence Parallel (FLUX.2)",
            category=f"{CATEGORY}/speed",
            description="Computes every step of one image on several GPUs at once: each GPU has the whole model and a "
            "part of the image, or a share of the weights of a model that is too large for one. Same image, less "
            "time. Samplers, guiders, previews, LoRA, references and Select Attention work as with one GPU, before or "
            "after this node. The first image starts a process per GPU; they stay for the next ones.",
            search_aliases=[
                "multi gpu",
                "multigpu",
                "several gpus",
                "ulysses",
                "ring attention",
                "context parallel",
                "usp",
                "tensor parallel",
                "split weights",
                "xdit",
                "raylight",
                "distributed",
            ],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="A FLUX.2 model from Load FLUX.2 Model, ComfyUI's own loaders or Unet Loader (GGUF): it is "
                    "loaded on every GPU from the same file. It is cloned: other branches of the graph stay on one "
                    "GPU.",
                ),
                io.Int.Input(
                    "gpus",
                    default=0,
                    min=0,
                    max=64,
                    tooltip="How many GPUs compute one image. 0: all of this machine. 1: changes nothing.",
                ),
                io.Int.Input(
                    "ulysses",
                    display_name="GPUs sharing heads (Ulysses), 0 = automatic",
                    **degree,
                    tooltip="How many GPUs share the attention heads among them. The model's heads must divide by it. "
                    "It "
                    "exchanges least. 0 chooses. Ulysses times ring is the number of GPUs.",
                ),
                io.Int.Input(
                    "ring",
                    display_name="GPUs in a ring, 0 = automatic",
                    **degree,
                    tooltip="How many GPUs pass keys and values round in a ring. For more GPUs than heads divide by, "
                    "and "
                    "between hosts. It needs an attention backend with a log-sum-exp. 0 chooses.",
                ),
                io.Combo.Input(
                    "weights",
                    options=[WHOLE, SPLIT],
                    default=WHOLE,
                    optional=True,
                    tooltip="'on every GPU': each GPU holds the whole model; fastest. 'split over the GPUs': each "
                    "holds its share of every large weight, so that together they run a model that is too large for "
                    "one. It exchanges more; Ulysses and ring, left at 0, are not used then. Checked on the CPU, not "
                    "yet timed on GPUs.",
                ),
            ],
            hidden=[io.Hidden.dynprompt, io.Hidden.unique_id],  # a GGUF model's file is found in the graph
            outputs=[
                io.Model.Output(
                    tooltip="The same model, computed by several GPUs. Attention Report says what each of them did."
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, model=None, gpus=0, ulysses=0, ring=0, weights=WHOLE):
        """Nothing but the inputs decides. ComfyUI asks before it runs any node: the other ranks start now."""
        if isinstance(gpus, int):
            install.start_ahead(gpus)
        return ""

    @classmethod
    def execute(cls, model, gpus=0, ulysses=0, ring=0, weights=WHOLE) -> io.NodeOutput:
        asked = cls.hidden  # the graph that runs; nothing where the node is called by a script
        file = lambda: gguf.file_of(asked and asked.dynprompt, asked and asked.unique_id)  # noqa: E731
        return io.NodeOutput(parallel(model, gpus, ulysses, ring, weights, file))


NODES = [Flux2SequenceParallel]
