"""What the page shows of attention: on the selector what its last sampling resolved to, and the list of backends on
this machine.

The selector's ui output is a token that names its dispatcher. ComfyUI sends ui outputs to the page, again when the node
is cached, and the page knows which node they belong to, in subgraphs too; so a message about a token finds its node,
and a page that missed it can ask for it.
"""

import asyncio
import functools
import secrets
import sys
import weakref
from pathlib import Path

from ..attention.status import backends_here
from ..attention.status.badge import badge_of

UI_KEY = EVENT = "flux2_attention_status"
STATUS_ROUTE = "/flux2_attention/status/{token}"
BACKENDS_ROUTE = "/flux2_attention/backends"
TEST_ROUTE = "/flux2_attention/backends/test"
TROUBLES_ROUTE = "/flux2_attention/troubleshooting"  # the page behind the "More: ..." line of an error
TROUBLES = Path(__file__).resolve().parents[1] / "docs" / "troubleshooting.md"
BUSY = (
    "The queue is not empty: a test call now would disturb the job and could fail for want of memory. Try again "
    "when it is done."
)

_followed = (
    weakref.WeakValueDictionary()
)  # token -> AttentionDispatcher, as long as ComfyUI keeps the model that it is on


def running_server():
    """ComfyUI's server, or None when the pack is used without one."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


@functools.cache
def process_name():
    """Selections are numbered anew in every process: this keeps the tokens of an old history from naming another
    one.
    """
    return secrets.token_hex(4)


def follow(dispatcher):
    """The token of a AttentionDispatcher; from now on the page hears of its samplings."""
    token = f"{process_name()}-{dispatcher.number}"
    _followed[token] = dispatcher
    dispatcher.log.listener = functools.partial(tell, token)
    return token


def tell(token, run):
    """Send a run's state to the page that queued it. Called by the dispatcher's log, in the sampler's thread."""
    server, dispatcher = running_server(), _followed.get(token)
    if server is not None and dispatcher is not None and server.client_id is not None:
        server.send_sync(EVENT, {"token": token, **of_run(dispatcher, run)}, server.client_id)


def of_run(dispatcher, run):
    """{"state", "text"} of a run, or of a dispatcher that nothing was sampled with."""
    if run is None:
        return {"state": "waiting", "text": ""}
    return badge_of(run, dispatcher.backend, dispatcher.schedule.backend if dispatcher.schedule else None)


def of_token(token):
    """The newest state of a dispatcher with its full report, or None for a token that is unknown or whose model is
    gone.
    """
    dispatcher = _followed.get(token)
    if dispatcher is None:
        return None
    run = dispatcher.log.current
    return {"token": token, **of_run(dispatcher, run), "report": run.as_text() if run else ""}


def compute_device():
    """The torch.device that ComfyUI samples on."""
    import comfy.model_management

    return comfy.model_management.get_torch_device()


def backends(list_them):
    """The answer of the backends routes: overview or test_all, with its text. Runs in a thread of its own: libraries
    take seconds to import.
    """
    found = list_them(compute_device())
    return {**found, "text": backends_here.as_text(found)}


def add_routes():
    """The addresses that the page asks."""
    server = running_server()
    if server is None:
        return
    from aiohttp import web

    testing = asyncio.Lock()

    @server.routes.get(STATUS_ROUTE)
    async def status(request):
        found = of_token(request.match_info["token"])
        return (
            web.json_response(found)
            if found
            else web.json_response({"error": "No dispatcher of this name is in memory."}, status=404)
        )

    @server.routes.get(TROUBLES_ROUTE)
    async def troubles(request):
        return web.Response(text=TROUBLES.read_text(encoding="utf-8"), content_type="text/markdown")

    @server.routes.get(BACKENDS_ROUTE)
    async def listed(request):
        return web.json_response(await asyncio.to_thread(backends, backends_here.list_backends))

    @server.routes.post(TEST_ROUTE)
    async def tested(request):
        if testing.locked() or server.prompt_queue.get_tasks_remaining():
            return web.json_response({"error": BUSY}, status=409)
        async with testing:
            return web.json_response(await asyncio.to_thread(backends, backends_here.test_all))
