"""Fused transformer blocks for a MODEL."""

from comfy_api.latest import io

from ..attention.errors import explained
from ..flux2.compiled import toolchain
from ..flux2.fused import blocks as fused_blocks, kernels, fp8_rowwise

CATEGORY = "Flux 2"
AUTO, CHECKPOINT, FP8 = "auto", "checkpoint", "fp8"


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
                    options=[AUTO, CHECKPOINT, FP8],
                    default=AUTO,
                    tooltip=(
                        "auto: as in the file wherever this card can run the kernels; elsewhere the model stays as it "
                        "is, and Attention Report says why. Right on every card.\n"
                        "As in the file: the same, but the node stops with the reason where the kernels cannot run.\n"
                        "fp8: change to it for a bf16 file on a card with fp8 products (NVIDIA from Ada, AMD MI300X, "
                        "MI355X, Radeon RX 9000) when speed counts more than the last bit of accuracy."
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
    def execute(cls, model, precision=AUTO) -> io.NodeOutput:
        device, patched = model.load_device, model.clone()
        reason = kernels.unavailable(device) or (toolchain.unavailable(device) if device.type == "cuda" else None)
        if precision == AUTO:
            reason = reason or fused_blocks.none_fusable(model)
            fused_blocks.leave(patched, reason) if reason else fused_blocks.install(patched)
            return io.NodeOutput(patched)
        if reason:
            raise explained(
                RuntimeError(
                    f"Fast Blocks cannot run here: {reason} Remove the node, or set precision to '{AUTO}': then "
                    "ComfyUI's own blocks run, which need nothing."
                ),
                "fast-blocks",
            )
        fused_blocks.install(patched, rowwise_fp8(patched) if precision == FP8 else None)
        return io.NodeOutput(patched)


def rowwise_fp8(model):
    """The fp8 products for a MODEL clone. RuntimeError with the reason where they cannot run."""
    reason = fp8_rowwise.unavailable_for(model)
    if reason:
        raise explained(
            RuntimeError(f"Fast Blocks cannot use fp8 here: {reason} Set precision to '{CHECKPOINT}'."), "fast-blocks"
        )
    fp8 = fp8_rowwise.RowwiseFp8()
    fp8.install(model)
    return fp8


NODES = [Flux2FastBlocks]
