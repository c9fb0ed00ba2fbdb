"""The host's web server."""

from __future__ import annotations

from typing import Any


def prompt_server() -> Any:
    """The host's PromptServer; None where ComfyUI runs without one."""
    from server import PromptServer  # starts much of the web server when it is imported

    return getattr(PromptServer, "instance", None)
