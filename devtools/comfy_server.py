"""ComfyUI as a child process: used alike by the demonstration, the benchmarks and the live tests."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

from .comfy_client import ComfyClient, ServerError
from .device import host_options
from .environment import OWN_MODELS, PACK, Host

HOST_PROCESS = Path(__file__).with_name("host_process.py")
# Newer hosts drop results when memory is short: a person would be learned again for every prompt.
KEEP_RESULTS = ("--cache-classic",)


class ComfyServer(ComfyClient):
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
        for models in (self.host.base / name for name in (OWN_MODELS, "extra_model_paths.yaml")):
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
            self.check_alive()
            try:
                self.get("/system_stats", timeout=5)
                return
            except ServerError:
                time.sleep(0.2)
        raise ServerError(f"ComfyUI did not answer within {timeout:.0f} s.\n{self.log_tail()}")

    def check_alive(self) -> None:
        """Raises ServerError, with the end of its log, if the process has ended."""
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


def raise_on_terminate() -> None:
    """Makes a termination signal unwind like Ctrl-C, so that `with` blocks stop their servers."""

    def handler(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, handler)
