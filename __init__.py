"""HyperDreamBooth for ComfyUI."""

from typing import Any

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> Any:
    """What the host calls to get the nodes."""
    try:
        from .nodes import HyperDreamBooth  # not at import time: tests of the core run without ComfyUI
    except Exception:
        import logging

        # The host logs one line and drops the pack; the traceback says why.
        logging.getLogger("hyperdreambooth").exception("HyperDreamBooth could not be loaded.")
        raise
    return HyperDreamBooth()
