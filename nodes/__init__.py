"""The nodes of the pack, one file per family. ComfyUI calls comfy_entrypoint."""

from ..attention import requirements

requirements.check()  # first: older versions fail in the middle of an import, with a bare name

from comfy_api.latest import ComfyExtension  # noqa: E402

from ..flux2 import error_links  # noqa: E402
from . import attention, compare, fast, loaders, lora, parallel, prompt, speed, status, workflows  # noqa: E402


class Flux2Attention(ComfyExtension):
    """Everything the pack adds to ComfyUI."""

    async def on_load(self):
        prompt.add_routes()
        status.add_routes()
        workflows.add_routes()

    async def get_node_list(self):
        return [
            error_links.linked(node)
            for node in (
                *loaders.NODES,
                *lora.NODES,
                *attention.NODES,
                *fast.NODES,
                *speed.NODES,
                *parallel.NODES,
                *compare.NODES,
                *prompt.NODES,
            )
        ]


async def comfy_entrypoint():
    return Flux2Attention()
