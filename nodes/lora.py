"""LoRA for FLUX.2 from ComfyUI's folder loras."""

import folder_paths
from comfy_api.latest import io, ui

from ..flux2 import error_links
from ..flux2.checkpoints.folders import locate
from ..flux2.checkpoints.header import CheckpointError
from ..flux2.lora import load

CATEGORY = "Flux 2/loaders"
FOLDER = "loras"


def _path(name):
    return str(locate(name, folder_paths.get_filename_list(FOLDER), folder_paths.get_folder_paths(FOLDER), FOLDER))


class Flux2LoadLoRA(io.ComfyNode):
    """MODEL and CLIP with a LoRA, and what of it was applied."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Flux2LoadLoRA",
            display_name="Load FLUX.2 LoRA",
            category=CATEGORY,
            description="Applies a LoRA, LoKr, LoHa or DoRA to a FLUX.2 model, from any trainer: the key names of the "
            "original code, diffusers, PEFT, kohya, LyCORIS, OneTrainer, SimpleTuner, ai-toolkit and musubi. Says how "
            "many of the file's layers were applied and which were not. A file for another model is refused with what "
            "it is for.",
            search_aliases=[
                "lora",
                "lokr",
                "loha",
                "dora",
                "load lora",
                "lycoris",
                "peft",
                "klein lora",
                "lora key not loaded",
            ],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="A FLUX.2 model, before or after Select Attention, Fast Blocks, Compile Blocks or Sequence "
                    "Parallel. It is cloned: other branches of the graph stay as they are.",
                ),
                io.Combo.Input(
                    "lora_name",
                    display_name="LoRA",
                    options=folder_paths.get_filename_list(FOLDER),
                    tooltip="A .safetensors file in ComfyUI's folder loras, trained for this FLUX.2: dev, klein 4B and "
                    "klein 9B differ in width, and a LoRA fits one of them.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-100.0,
                    max=100.0,
                    step=0.01,
                    tooltip="Factor of the change. 0 leaves the model as it is, negative values turn it round. A new "
                    "strength needs no new loading of the model.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The text encoder, for the few LoRAs that change it too. Without it such layers are left "
                    "out, and the report says so.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The model with the LoRA. Several of these nodes can follow one another."),
                io.Clip.Output(tooltip="The text encoder, changed where the file has layers for it."),
                io.String.Output(
                    display_name="report", tooltip="How many layers were applied, and which were not, with the reason."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, lora_name=None):
        try:
            return lora_name is None or bool(_path(lora_name))  # None: linked, known when the node runs
        except CheckpointError as error:
            return error_links.answer(error)

    @classmethod
    def execute(cls, model, lora_name, strength, clip=None) -> io.NodeOutput:
        model, clip, report = load.apply(model, clip, _path(lora_name), strength)
        return io.NodeOutput(model, clip, report, ui=ui.PreviewText(report))


NODES = [Flux2LoadLoRA]
