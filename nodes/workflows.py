"""The route behind the page's command "Use Flux 2 Attention in this workflow": the open graph with this pack's nodes in
place of core's, by the rules of scripts/convert_workflow.py.
"""

import asyncio

from ..flux2.workflows.convert import convert
from ..flux2.workflows.rules import NotConvertible
from .status import running_server

CONVERT_ROUTE = "/flux2_attention/convert"
DEEP = "This workflow cannot be read: it holds lists or objects inside of one another, more deeply than any graph does."


def answer(workflow):
    """What the page gets: {"changed", "workflow", "text"}; text says what was replaced, or why nothing was."""
    try:
        converted, report = convert(workflow)
    except NotConvertible as error:
        return {"changed": False, "text": str(error)}
    except RecursionError:
        return {"changed": False, "text": DEEP}
    return {"changed": True, "workflow": converted, "text": "\n".join(report)}


def add_routes():
    """The address that the command asks."""
    server = running_server()
    if server is None:
        return
    from aiohttp import web

    @server.routes.post(CONVERT_ROUTE)
    async def converted(request):
        try:
            workflow = await request.json()
        except ValueError as error:
            return web.json_response({"error": f"This is not JSON: {error}"}, status=400)
        except RecursionError:
            return web.json_response({"error": DEEP}, status=400)
        return web.json_response(await asyncio.to_thread(answer, workflow))
