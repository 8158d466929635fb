"""Fused transformer blocks for a MODEL."""

from comfy_api.latest import io

from ..flux2.compiled import toolchain
from ..flux2.fused import blocks as fused_blocks, kernels, fp8_rowwise

CATEGORY = "Flux 2"
CHECKPOINT, FP8 = "checkpoint", "fp8"


class Flux2FastBlocks(io.ComfyNode):
    """MODEL in, MODEL out, with fused kernels between the matrix products."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Flux2FastBlocks",
            display_name="Fast Blocks (FLUX.2)",
            category=f"{CATEGORY}/speed",
            description="Computes the many small operations between FLUX.2's matrix products and attention with a few "
            "fused Triton kernels. "
            "Same image up to rounding, less time per step. Weights, LoRA, references and the attention backend "
            "stay as they are.",
            search_aliases=["fused kernels", "triton", "speed up", "fast flux", "fp8", "faster"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="A FLUX.2 model. It is cloned: other branches of the graph stay as they are. Before or "
                    "after Select Attention.",
                ),
                io.Combo.Input(
                    "precision",
                    options=[CHECKPOINT, FP8],
                    default=CHECKPOINT,
                    tooltip=(
                        "As in the file: matrix products in the file's number format; an fp8 file runs in fp8.\n"
                        "fp8: a bf16 file's large products run in fp8 with a scale per row: faster, and less exact."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(
                    tooltip="The same model with fused blocks. Attention Report says how many block calls they "
                    "computed."
                )
            ],
        )

    @classmethod
    def execute(cls, model, precision=CHECKPOINT) -> io.NodeOutput:
        device = model.load_device
        reason = kernels.unavailable(device) or (toolchain.unavailable(device) if device.type == "cuda" else None)
        if reason:
            raise RuntimeError(
                f"Fast Blocks cannot run here: {reason} Remove the node: ComfyUI's own blocks need nothing."
            )
        patched = model.clone()
        fused_blocks.install(patched, rowwise_fp8(patched) if precision == FP8 else None)
        return io.NodeOutput(patched)


def rowwise_fp8(model):
    """The fp8 products for a MODEL clone. RuntimeError with the reason where they cannot run."""
    reason = fp8_rowwise.unavailable_for(model)
    if reason:
        raise RuntimeError(f"Fast Blocks cannot use fp8 here: {reason} Set precision to '{CHECKPOINT}'.")
    fp8 = fp8_rowwise.RowwiseFp8()
    fp8.install(model)
    return fp8


NODES = [Flux2FastBlocks]
