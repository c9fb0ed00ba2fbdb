"""A running ComfyUI server as an object: used alike by the demonstration, the benchmarks and the live tests."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from .device import host_options
from .environment import PACK, Host

HOST_PROCESS = Path(__file__).with_name("host_process.py")
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


class ComfyServer:
    """ComfyUI in a child process on the loopback interface; a context manager.

    Several servers can share a host: models and custom nodes come from `host.base`, whatever is written goes to `work`.
    """

    def __init__(
        self,
        host: Host,
        work: Path,
        *,
        port: int = 0,
        device: str = "cpu",
        options: tuple[str, ...] = (),
        console: bool = False,
    ) -> None:
        """Prepares, does not start yet.

        Args:
            work: holds input, output, temp, user and the log; made if missing.
            port: 0 takes a free one.
            device: that the host computes on; the CPU even where there is a GPU.
            options: more options for ComfyUI's command line.
            console: show the server's output instead of writing `work/server.log`.
        """
        self.host, self.work, self.port = host, work.resolve(), port
        self.input, self.output = self.work / "input", self.work / "output"
        self.log = self.work / "server.log"
        self._options, self._console = (*host_options(device), *options), console
        self._any_port = port == 0
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, timeout: float = 300) -> None:
        """Starts the server and waits until it answers.

        Raises:
            ServerError: taken port, a server that ends while starting (with the end of its log), or a timeout.
        """
        for attempt in range(3):
            self.port = _free_port(0 if self._any_port else self.port)
            try:
                self._launch()
                self._wait_ready(timeout)
            except BaseException as error:
                self.stop()
                # Another program can take the free port before the server does.
                if (
                    self._any_port
                    and attempt < 2
                    and isinstance(error, ServerError)
                    and "address" in str(error).lower()
                ):
                    continue
                raise
            return

    def _launch(self) -> None:
        for folder in ("input", "output", "temp", "user"):
            (self.work / folder).mkdir(parents=True, exist_ok=True)
        command = [
            str(self.host.python), str(HOST_PROCESS), str(self.host.root),
            "--base-directory", str(self.host.base),
            "--input-directory", str(self.input),
            "--output-directory", str(self.output),
            "--temp-directory", str(self.work),  # the host adds /temp
            "--user-directory", str(self.work / "user"),
            "--database-url", f"sqlite:///{self.work / 'user' / 'comfyui.db'}",
            "--disable-all-custom-nodes", "--whitelist-custom-nodes", PACK,
            "--listen", "127.0.0.1", "--port", str(self.port), "--disable-auto-launch",
            *self._options,
        ]  # fmt: skip
        models = self.host.base / "extra_model_paths.yaml"
        if models.is_file():
            command += ["--extra-model-paths-config", str(models)]
        # Its own group, so that Ctrl-C in the console reaches only the caller, which then stops the server.
        group: dict[str, Any] = (
            {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
            if sys.platform == "win32"
            else {"start_new_session": True}
        )
        environ = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
        with open(os.devnull if self._console else self.log, "wb") as log:
            out = None if self._console else log
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=out, stderr=out, env=environ, **group
            )

    def _wait_ready(self, timeout: float) -> None:
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            self._check_alive()
            try:
                self.get("/system_stats", timeout=5)
                return
            except ServerError:
                time.sleep(0.2)
        raise ServerError(f"ComfyUI did not answer within {timeout:.0f} s.\n{self.log_tail()}")

    def _check_alive(self) -> None:
        if self._process is None:
            raise ServerError("ComfyUI is not running.")
        if (code := self._process.poll()) is not None:
            raise ServerError(f"ComfyUI ended with code {code}. The end of its log ({self.log}):\n{self.log_tail()}")

    def wait(self) -> int:
        """Blocks until the server ends by itself; returns its exit code."""
        assert self._process is not None
        return self._process.wait()

    def stop(self) -> None:
        """Ends the server; safe to call at any time and more than once."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.stdin:
            process.stdin.close()  # host_process.py ends on this
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(5)

    def log_tail(self, lines: int = 25) -> str:
        """The last lines of the server's log."""
        if not self.log.is_file():
            return ""
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])

    # -- HTTP -------------------------------------------------------------------------------------------------------

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
                        self._check_alive()
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
            self._check_alive()
            raise ServerError(f"Lost the connection to ComfyUI ({error}).\n{self.log_tail()}") from error
        if failure:
            raise failure
        outputs = self.get(f"/history/{prompt_id}")[prompt_id]["outputs"]
        return PromptResult(prompt_id, outputs, seconds)


def _free_port(port: int) -> int:
    """`port` if nothing listens there, a free one for 0; raises ServerError when it is taken."""
    with socket.socket() as probe:
        if os.name != "nt":
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ServerError(
                f"Port {port} is taken ({error.strerror}). Stop the program that uses it, or choose another: --port 8288."
            ) from error
        return probe.getsockname()[1]


def _refused(body: Mapping[str, Any]) -> PromptError:
    reasons = [
        f"{node.get('class_type')} ({number}): {error.get('message')} {error.get('details', '')}".strip()
        for number, node in body.get("node_errors", {}).items()
        for error in node.get("errors", ())
    ]
    return PromptError("; ".join(reasons) or str(body.get("error")), body)


def raise_on_terminate() -> None:
    """Makes a termination signal unwind like Ctrl-C, so that `with` blocks stop their servers."""

    def handler(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, handler)
