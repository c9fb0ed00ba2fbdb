"""Talks to a running ComfyUI: files, schemas, and prompts that are waited for."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

# Loopback must not go through a proxy that the environment names.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ServerError(RuntimeError):
    """The server could not start, died, or does not answer."""


class PromptError(RuntimeError):
    """The server refused a prompt or a node raised.

    Attributes:
        details: the server's own report: `node_errors`, or the `execution_error` event with its traceback.
    """

    def __init__(self, message: str, details: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.details = details


class PromptInterrupted(RuntimeError):
    """The prompt was interrupted."""


@dataclass(frozen=True)
class Progress:
    """One progress event of a node: `value` of `maximum` steps, `seconds` since the node began."""

    node: str
    class_type: str
    value: int
    maximum: int
    seconds: float

    @property
    def eta(self) -> float:
        """Seconds left at the pace so far."""
        return self.seconds / self.value * (self.maximum - self.value) if self.value else float("nan")


@dataclass(frozen=True)
class PromptResult:
    """What a finished prompt left.

    Attributes:
        outputs: node id → its `ui` output, as in the server's history.
        seconds: node id → wall time; nodes that came from the cache are absent.
    """

    prompt_id: str
    outputs: Mapping[str, Mapping[str, Any]]
    seconds: Mapping[str, float] = field(default_factory=dict)


class ComfyClient(ABC):
    """The HTTP and websocket interface of a server, whose process a subclass knows."""

    @property
    @abstractmethod
    def url(self) -> str:
        """Where the server answers."""

    @abstractmethod
    def check_alive(self) -> None:
        """Raises ServerError if the server has ended."""

    @abstractmethod
    def log_tail(self) -> str:
        """The end of the server's log."""

    def get(self, path: str, timeout: float = 60) -> Any:
        """GET; JSON is parsed, anything else comes as bytes."""
        return self._request(urllib.request.Request(self.url + path), timeout)

    def post(self, path: str, payload: Any, timeout: float = 60) -> Any:
        """POST of a JSON payload."""
        headers = {"Content-Type": "application/json"}
        return self._request(urllib.request.Request(self.url + path, json.dumps(payload).encode(), headers), timeout)

    def _request(self, request: urllib.request.Request, timeout: float) -> Any:
        try:
            with _opener.open(request, timeout=timeout) as response:
                body = response.read()
                return json.loads(body) if response.headers.get_content_type() == "application/json" else body
        except urllib.error.HTTPError as error:
            body = error.read().decode(errors="replace")
            if error.code == 400 and "node_errors" in body:
                raise _refused(json.loads(body)) from None
            raise ServerError(f"{request.full_url} answered {error.code}: {body[:500]}") from error
        except OSError as error:  # URLError, a reset or a timeout
            raise ServerError(f"ComfyUI does not answer at {request.full_url}: {error}") from error

    def object_info(self) -> dict[str, Any]:
        """Every registered node's schema."""
        return self.get("/object_info")

    def interrupt(self) -> None:
        """Asks the running prompt to stop."""
        self.post("/interrupt", {})

    def fetch(self, image: Mapping[str, str]) -> bytes:
        """The file behind one entry of a node's `images` output."""
        keys = ("filename", "subfolder", "type")
        return self.get("/view?" + urllib.parse.urlencode({key: image.get(key, "") for key in keys}))

    def images(self, result: PromptResult, node: str) -> list[bytes]:
        """All pictures that a node of a finished prompt put out, encoded as the host saved them."""
        return [self.fetch(image) for image in result.outputs.get(node, {}).get("images", ())]

    # -- prompts ----------------------------------------------------------------------------------------------------

    def run(
        self, prompt: Mapping[str, Any], on_progress: Callable[[Progress], None] | None = None, timeout: float = 3600
    ) -> PromptResult:
        """Submits a prompt in API format and waits for its end.

        Raises:
            PromptError: refused by validation, or a node raised.
            PromptInterrupted: `interrupt` was called.
            ServerError: the server died, or nothing finished within `timeout` seconds.
        """
        try:
            return asyncio.run(asyncio.wait_for(self._run(prompt, on_progress), timeout))
        except TimeoutError:
            raise ServerError(f"The prompt did not finish within {timeout:.0f} s.\n{self.log_tail()}") from None

    async def _run(self, prompt: Mapping[str, Any], on_progress: Callable[[Progress], None] | None) -> PromptResult:
        import aiohttp  # a requirement of the host; this module itself must import without it

        client = uuid.uuid4().hex
        seconds: dict[str, float] = {}
        node, since = None, time.monotonic()
        failure: PromptError | PromptInterrupted | None = None
        try:
            async with (
                aiohttp.ClientSession() as session,
                session.ws_connect(f"{self.url}/ws?clientId={client}", max_msg_size=0) as socket_,
            ):
                prompt_id = self.post("/prompt", {"prompt": prompt, "client_id": client})["prompt_id"]
                while True:
                    try:
                        message = await socket_.receive(timeout=5)
                    except TimeoutError:
                        self.check_alive()
                        continue
                    if message.type in (aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.CLOSING, aiohttp.WSMsgType.ERROR):
                        raise aiohttp.ClientConnectionError("the connection closed")
                    if message.type is not aiohttp.WSMsgType.TEXT:
                        continue  # previews
                    event = json.loads(message.data)
                    kind, data = event["type"], event.get("data", {})
                    if data.get("prompt_id") != prompt_id:
                        continue
                    if kind == "executing":
                        if node is not None:
                            seconds[node] = seconds.get(node, 0.0) + time.monotonic() - since
                        node, since = data["node"], time.monotonic()
                        if node is None:  # sent last, after errors too, when the history is written
                            break
                    elif kind == "progress" and on_progress and data["node"] in prompt:
                        at, elapsed = data["node"], time.monotonic() - since
                        on_progress(Progress(at, prompt[at]["class_type"], data["value"], data["max"], elapsed))
                    elif kind == "execution_error":
                        text = f"{data.get('node_type')}: {data.get('exception_type')}: {data.get('exception_message')}"
                        failure = PromptError(text.strip(), data)
                    elif kind == "execution_interrupted":
                        failure = PromptInterrupted("The prompt was interrupted.")
        except aiohttp.ClientError as error:
            await asyncio.sleep(0.5)  # a dying process needs a moment until it can be polled
            self.check_alive()
            raise ServerError(f"Lost the connection to ComfyUI ({error}).\n{self.log_tail()}") from error
        if failure:
            raise failure
        outputs = self.get(f"/history/{prompt_id}")[prompt_id]["outputs"]
        return PromptResult(prompt_id, outputs, seconds)


def _refused(body: Mapping[str, Any]) -> PromptError:
    reasons = [
        f"{node.get('class_type')} ({number}): {error.get('message')} {error.get('details', '')}".strip()
        for number, node in body.get("node_errors", {}).items()
        for error in node.get("errors", ())
    ]
    return PromptError("; ".join(reasons) or str(body.get("error")), body)
