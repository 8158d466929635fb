"""Words about a run that lasts, for ComfyUI's page: web/progress.js shows them on the node, without making it larger.

ComfyUI's own progress texts make a canvas node grow over what lies below it.
"""

import sys

EVENT = "flux2_attention_progress"


def tell(text, node_id=None):
    """Show a sentence on a node, the one that is executing by default. Nothing happens outside a server."""
    page = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    node_id = node_id or executing()
    if page is not None and node_id is not None:
        page.send_sync(EVENT, {"node": str(node_id), "text": text}, page.client_id)


def executing():
    """The id of the node that ComfyUI executes in this thread, or None."""
    from comfy_execution.utils import get_executing_context

    context = get_executing_context()
    return context and context.node_id
