"""Progress of a fine-tune in the node: bar, live loss curve, time left, and the user's Cancel."""

from __future__ import annotations

import comfy.utils
from comfy.model_management import throw_exception_if_processing_interrupted

from ...hdb_core.finetuning import FinetuneProgress
from ..plot import loss_plot

PREVIEW_SECONDS = 1.0  # between two previews: drawing and sending must not slow the training


def send_text(text: str, node_id: str | None) -> None:
    """Show a line of text on a running node; nothing happens without a server."""
    if node_id is None:
        return
    from server import PromptServer  # starts much of the web server when it is imported

    if (server := getattr(PromptServer, "instance", None)) is not None:
        server.send_progress_text(text, node_id)


class FinetuneDisplay:
    """Callback of a fine-tune. Raises the host's InterruptProcessingException when the user cancels."""

    def __init__(self, node_id: str | None) -> None:
        self.bar = comfy.utils.ProgressBar(1, node_id=node_id)  # the first step brings the total
        self.node_id = node_id
        self.losses: list[float] = []
        self.drawn = -PREVIEW_SECONDS

    def __call__(self, progress: FinetuneProgress) -> None:
        throw_exception_if_processing_interrupted()
        self.losses.append(progress.loss)
        preview = None
        if progress.seconds - self.drawn >= PREVIEW_SECONDS or progress.step == progress.total:
            self.drawn = progress.seconds
            preview = ("PNG", loss_plot(self.losses, progress.total), None)
            left = f"{progress.remaining_seconds:.0f} s left"
            send_text(f"step {progress.step} of {progress.total}, loss {progress.loss:.4f}, {left}", self.node_id)
        self.bar.update_absolute(progress.step, progress.total, preview)
