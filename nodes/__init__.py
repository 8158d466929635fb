"""The nodes of the pack, one file per family. ComfyUI calls comfy_entrypoint."""
from comfy_api.latest import ComfyExtension

from . import attention, compare, loaders, prompt


class Flux2Attention(ComfyExtension):
    """Everything the pack adds to ComfyUI."""

    async def on_load(self):
        prompt.add_routes()

    async def get_node_list(self):
        return [*loaders.NODES, *attention.NODES, *compare.NODES, *prompt.NODES]


async def comfy_entrypoint():
    return Flux2Attention()
