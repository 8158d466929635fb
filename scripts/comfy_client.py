"""Talk to a running ComfyUI: what it has, upload, queue, follow, download. Every failure is one sentence for the user.

  async with ComfyClient("http://127.0.0.1:8188") as client:
      result = await client.run(workflow, on_progress=print)
      data = await client.download(result.images()[0])

Needs aiohttp. Not covered: servers behind a login, and prompts queued by somebody else.
"""

import asyncio
import contextlib
import json
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

SECONDS_TO_CONNECT, SECONDS_TO_ANSWER, SECONDS_TO_RUN = 10, 60, 3600
NETWORK_ERRORS = (aiohttp.ClientError, OSError, asyncio.TimeoutError)


class ComfyError(Exception):
    """Something the user can act on; str() is the sentence."""


class ServerUnreachable(ComfyError):
    pass


class PromptRefused(ComfyError):
    pass


class ExecutionFailed(ComfyError):
    pass


class TimedOut(ComfyError):
    pass


@dataclass(frozen=True)
class Progress:
    """A node started (value is None), or a node that counts (a sampler) finished step `value` of `total` at clock
    `when`.
    """

    node: str
    class_type: str
    title: str
    value: int | None = None
    total: int | None = None
    when: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Result:
    """What a prompt left in the history: {node id: {ui key: list}}."""

    prompt_id: str
    outputs: dict
    seconds: float

    def collect(self, key):
        return [entry for output in self.outputs.values() for entry in output.get(key) or []]

    def images(self):
        return [image for image in self.collect("images") if image.get("type") == "output"]


class ComfyClient:
    """One session with one server."""

    def __init__(self, url, seconds_to_run=SECONDS_TO_RUN):
        self.url = (url if "://" in url else f"http://{url}").rstrip("/")
        self.seconds_to_run = seconds_to_run
        self.client_id = uuid.uuid4().hex

    async def __aenter__(self):
        limits = aiohttp.ClientTimeout(total=None, sock_connect=SECONDS_TO_CONNECT, sock_read=SECONDS_TO_ANSWER)
        self.session = aiohttp.ClientSession(timeout=limits)
        return self

    async def __aexit__(self, *_):
        await self.session.close()

    # --- single requests ---------------------------------------------------------------------------------------------

    async def _request(self, method, path, **arguments):
        """(status, body). Raises ServerUnreachable when nothing answers."""
        try:
            async with self.session.request(method, self.url + path, **arguments) as answer:
                return answer.status, await answer.read()
        except NETWORK_ERRORS as error:
            raise ServerUnreachable(self._unreachable(error)) from error

    def _unreachable(self, error):
        return (
            f"No ComfyUI server answers at {self.url} ({str(error) or type(error).__name__}). Is it running, and "
            "is the address right?"
        )

    async def _json(self, path):
        status, body = await self._request("GET", path)
        try:
            if status == 200:
                return json.loads(body)
        except ValueError:
            status = "200 without JSON"
        raise ServerUnreachable(f"{self.url} answers, but not like a ComfyUI server: GET {path} gave status {status}.")

    async def object_info(self, node):
        """The description of one node class, or None if the server does not have it."""
        return (await self._json(f"/object_info/{node}")).get(node)

    async def choices(self, node, name):
        """The options of a combo input. V1 nodes state the list itself as the type, V3 nodes put it into the
        options.
        """
        info = await self.object_info(node)
        if info is None:
            raise ComfyError(
                f"The ComfyUI at {self.url} has no node {node}. Install Flux 2 Attention into its custom_nodes and "
                "restart it."
            )
        inputs = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
        kind, *options = inputs[name]
        return list(kind) if isinstance(kind, list) else list(options[0]["options"])

    async def upload_image(self, path):
        """Put an image into the server's input folder; returns the name to give to LoadImage."""
        form = aiohttp.FormData()
        form.add_field("image", Path(path).read_bytes(), filename=f"{uuid.uuid4().hex[:8]}-{Path(path).name}")
        status, body = await self._request("POST", "/upload/image", data=form)
        if status != 200:
            raise ComfyError(f"{self.url} did not take the upload of {path}: status {status}.")
        stored = json.loads(body)
        return "/".join(part for part in (stored.get("subfolder"), stored["name"]) if part)

    async def download(self, image):
        """The bytes of an image named in a history entry."""
        query = {key: image[key] for key in ("filename", "subfolder", "type")}
        status, body = await self._request("GET", "/view", params=query)
        if status != 200:
            raise ComfyError(f"{self.url} did not hand out {image['filename']}: status {status}.")
        return body

    async def history(self, prompt_id):
        return (await self._json(f"/history/{prompt_id}")).get(prompt_id)

    # --- a prompt from queue to result -------------------------------------------------------------------------------

    async def run(self, workflow, on_progress=lambda progress: None):
        """Queue an API workflow, report progress, return its Result. Cancelled or timed out, the job is removed from
        the server too.
        """
        try:
            return await asyncio.wait_for(self._run(workflow, on_progress), self.seconds_to_run)
        except asyncio.TimeoutError as error:
            raise TimedOut(
                f"The job did not finish within {self.seconds_to_run} seconds and was cancelled on {self.url}."
            ) from error

    async def _run(self, workflow, on_progress):
        started = time.monotonic()
        async with await self._websocket() as socket:  # connected first, so that no message is missed
            prompt_id = await self._queued(workflow)
            try:
                await self._follow(socket, prompt_id, workflow, on_progress)
            except asyncio.CancelledError:
                await asyncio.shield(self.cancel(prompt_id))
                raise
        outputs = await self._outputs(prompt_id)
        return Result(prompt_id, outputs, time.monotonic() - started)

    async def _queued(self, workflow):
        """queue; cancelled meanwhile, what the server may have taken already is removed again."""
        asked = asyncio.ensure_future(self.queue(workflow))
        try:
            return await asyncio.shield(asked)
        except asyncio.CancelledError:
            with contextlib.suppress(ComfyError):
                await self.cancel(await asked)
            raise

    async def _websocket(self):
        try:
            return await self.session.ws_connect(f"{self.url}/ws", params={"clientId": self.client_id}, max_msg_size=0)
        except NETWORK_ERRORS as error:
            raise ServerUnreachable(self._unreachable(error)) from error

    async def queue(self, workflow):
        """Returns the prompt id. ComfyUI also queues a prompt of which only some outputs are valid; that is refused
        here.
        """
        status, body = await self._request("POST", "/prompt", json={"prompt": workflow, "client_id": self.client_id})
        try:
            answer = json.loads(body)
        except ValueError:
            raise ServerUnreachable(
                f"{self.url} answers, but not like a ComfyUI server: POST /prompt gave status {status}."
            ) from None
        if answer.get("prompt_id") and answer.get("node_errors"):
            await self.cancel(answer["prompt_id"])
        if status != 200 or answer.get("node_errors"):
            await self._spell_out_lists(answer, workflow)
            raise PromptRefused(refusal(answer, workflow))
        return answer["prompt_id"]

    async def _spell_out_lists(self, answer, workflow):
        """ComfyUI shortens lists of more than twenty options to "(list of length N)"; put the options there."""
        for node, problems in (answer.get("node_errors") or {}).items():
            for problem in problems["errors"]:
                said, shortened, _ = problem["details"].partition("(list of length")
                if shortened:
                    options = await self.choices(workflow[node]["class_type"], problem["extra_info"]["input_name"])
                    problem["details"] = said + ", ".join(map(str, options))

    async def cancel(self, prompt_id):
        await self._request("POST", "/queue", json={"delete": [prompt_id]})
        await self._request("POST", "/interrupt", json={"prompt_id": prompt_id})

    async def _follow(self, socket, prompt_id, workflow, on_progress):
        """Read messages until this prompt has ended."""
        async for message in socket:
            if message.type != aiohttp.WSMsgType.TEXT:  # binary messages are previews
                continue
            event = json.loads(message.data)
            data = event.get("data") or {}
            if data.get("prompt_id") == prompt_id and ended(event["type"], data, workflow, on_progress):
                return
        raise ServerUnreachable(
            f"The connection to {self.url} was lost while the job was running; the server may have ended."
        )

    async def _outputs(self, prompt_id):
        """The history entry appears a moment after the last message."""
        for _ in range(100):
            entry = await self.history(prompt_id)
            if entry:
                return entry["outputs"]
            await asyncio.sleep(0.1)
        raise ComfyError(f"{self.url} finished the job but has no history of it.")


def ended(kind, data, workflow, on_progress):
    """Handle one message about our prompt; True when it was the last one."""
    if kind == "execution_error":
        raise ExecutionFailed(failure(data, workflow))
    if kind == "execution_interrupted":
        raise ExecutionFailed("The job was cancelled on the server.")
    if kind == "progress":
        on_progress(Progress(*describe(data["node"], workflow), data["value"], data["max"]))
    if kind == "executing" and data["node"] is not None:
        on_progress(Progress(*describe(data["node"], workflow)))
    return kind == "execution_success" or (kind == "executing" and data["node"] is None)


def describe(node, workflow):
    """(id, class, title) of a node; nodes that another node made at run time are known by their id alone."""
    entry = workflow.get(node, {})
    kind = entry.get("class_type", "")
    return node, kind, entry.get("_meta", {}).get("title") or kind or f"node {node}"


def failure(data, workflow):
    _, _, title = describe(data["node_id"], workflow)
    return f'"{title}" ({data["node_type"]}) failed: {data["exception_message"].strip() or data["exception_type"]}'


def refusal(answer, workflow):
    """ComfyUI's answer to a prompt that it does not take: a general error, and errors per node and input."""
    lines = []
    for node, problems in (answer.get("node_errors") or {}).items():
        _, kind, title = describe(node, workflow)
        for problem in problems["errors"]:
            where = (problem.get("extra_info") or {}).get("input_name")
            lines.append(
                f'"{title}" ({kind}){f", input {where}" if where else ""}: {problem["message"]}: {problem["details"]}'
            )
    error = answer.get("error")
    if not lines and error:
        lines = [
            error if isinstance(error, str) else ": ".join(filter(None, (error.get("message"), error.get("details"))))
        ]
    return "ComfyUI refused the workflow. " + "; ".join(lines or ["It gave no reason."])
