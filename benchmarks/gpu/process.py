"""Processes of a check: each has a time limit, and whatever it started ends with it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from devtools.environment import ROOT

LOOK_EVERY = 15.0  # seconds, between two calls of what is done meanwhile


def start(command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Starts a command in the root of the repository; all that it prints is added to a log."""
    with log.open("a", encoding="utf-8") as out:
        # A session of its own, so that what it starts ends with it.
        return subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out, start_new_session=True)


def run(command: Sequence[str], log: Path, limit: float, meanwhile: Callable[[], None] = lambda: None) -> str:
    """Runs a command to its end, or stops it.

    Args:
        command: with its arguments.
        log: gets what it prints.
        limit: seconds.
        meanwhile: called every so often while it runs.

    Returns:
        How it ended: "finished", or what happened instead.
    """
    until = time.monotonic() + limit
    process = start(command, log)
    try:
        while (left := until - time.monotonic()) > 0:
            try:
                code = process.wait(min(LOOK_EVERY, left))
                return "finished" if code == 0 else f"failed with code {code}: {log.name}"
            except subprocess.TimeoutExpired:
                meanwhile()
        return f"stopped after {limit:.0f} s"
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and all that it started."""
    kill = getattr(os, "killpg", None)
    with suppress(ProcessLookupError):  # it has ended, and so has all that it started
        kill(process.pid, signal.SIGKILL) if kill else process.kill()
    process.wait()
