"""Progress of a fine-tune in the node: bar, live loss curve, time left, and the user's Cancel."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from textwrap import wrap
from typing import Any

import comfy.utils
from comfy.model_management import InterruptProcessingException, throw_exception_if_processing_interrupted
from comfy_api.latest import io, ui
from PIL import Image

from ...hdb_core.finetuning import FinetuneProgress
from ..plot import beside, loss_plot
from .kept import kept, of_model
from .pictures import SamplePictures
from .server import prompt_server

log = logging.getLogger("hyperdreambooth")
PREVIEW_SECONDS = 1.0  # between two previews: drawing and sending must not slow the training
SHOWN_CAPTIONS = 3
LINE = 40  # letters in a line of a node that is 320 pixels wide
# The front end takes texts as HTML, and makes links of [[…|…]], for which it puts __LNK0__ and so on meanwhile.
_AS_TEXT = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "[[": "[&#91;", "__LNK": "_&#95;LNK"}


def send_text(text: str, node_id: str | None) -> None:
    """Show a text on a running node, to the client alone that queued it; nothing happens without one.

    The host would send it to all clients, and each shows it on its own node of the same number. Names and prompts in it
    may be a stranger's: they are shown letter by letter, whatever the browser would make of them.
    """
    if node_id is None:
        return
    server = prompt_server()
    if server is not None and server.client_id is not None:
        server.send_progress_text(_as_text(text), node_id, server.client_id)


def wrapped(text: str) -> str:
    """A text in lines that fit a node of usual width: the front end would break them inside of words."""
    return "\n".join(
        "\n".join(wrap(line, LINE, break_long_words=False, break_on_hyphens=False)) for line in text.split("\n")
    )


def _as_text(text: str) -> str:
    text = wrapped(text)
    for letters, written in _AS_TEXT.items():
        text = text.replace(letters, written)
    return text.encode("utf-8", "replace").decode()


def progress_text(progress: FinetuneProgress) -> str:
    """A line such as "step 20 of at most 112, loss 0.1234, likeness 21 % of 40 %, at most 40 s left"."""
    most = "at most " if progress.enough is not None and progress.step < progress.total else ""
    parts = [f"step {progress.step} of {most}{progress.total}", f"loss {progress.loss:.4f}"]
    if progress.enough is not None and progress.gained is not None:
        parts.append(f"likeness {100 * progress.gained:.0f} % of {100 * progress.enough:.0f} %")
    return ", ".join([*parts, f"{most}{progress.remaining_seconds:.0f} s left"])


def trained_at(height: int, width: int, resolution: int) -> str:
    """The size that photos are trained at, and that it was chosen if it was."""
    return f"trained at {width} × {height} pixels{'' if resolution else ' (resolution 0 is automatic)'}"


def captioned(captions: Sequence[str]) -> str:
    """What photos are captioned with, so that words left over from other photos are seen."""
    different = [f"“{caption}”" for caption in dict.fromkeys(captions)]
    more = f" and {len(different) - SHOWN_CAPTIONS} others" if len(different) > SHOWN_CAPTIONS else ""
    return f"captioned {', '.join(different[:SHOWN_CAPTIONS])}{more}"


def preview(pictures: Any, node: type[io.ComfyNode]) -> dict[str, Any]:
    """Pictures that a node shows, as its ``ui``; none where the host cannot write them, since the node's result counts more.

    Args:
        pictures: (N, H, W, 3) in 0..1, or a sequence of (H, W, 3).
        node: as it is executed.
    """
    try:
        return ui.PreviewImage(pictures, cls=node).as_dict()
    except OSError as error:
        log.warning("%s shows no picture: %s", node.define_schema().display_name, error)
        return {}


class FinetuneDisplay:
    """Callback of a fine-tune within `shown`. Raises the host's InterruptProcessingException when the user cancels.

    Args:
        node_id: where it is shown.
        model: the host's class of the base model.
        notes: lines that stay below the progress.
    """

    def __init__(self, node_id: str | None, model: str, notes: Sequence[str] = ()) -> None:
        self.bar = comfy.utils.ProgressBar(1, node_id=node_id)  # the first step brings the total
        self.node_id, self.model, self.notes = node_id, model, notes
        self.losses: list[float] = []
        self.drawn = -PREVIEW_SECONDS
        self.last: FinetuneProgress | None = None
        self.pictures: SamplePictures | None = None
        self.picture: Image.Image | None = None

    @contextmanager
    def shown(self) -> Iterator[None]:
        """While a training runs. However it ends, the text says so; if the user cancels, the person so far is saved."""
        self.say("getting ready")
        try:
            yield
        except InterruptProcessingException:
            send_text(self._cancelled(), self.node_id)
            raise
        except BaseException:
            send_text("stopped by an error" + (f" after {self.last.step} steps" if self.last else ""), self.node_id)
            raise
        finally:
            self.last = self.pictures = None  # they know the person and the model

    def _cancelled(self) -> str:
        if self.last is None or self.last.person is None:
            return "cancelled before the first step"
        lidb = of_model(self.last.person(), self.model)
        said = f"cancelled after step {self.last.step}; the person {kept(lidb, 'unfinished')}"
        log.info("Fast Finetune: %s", said)
        return said

    def __call__(self, progress: FinetuneProgress) -> None:
        self.last = progress
        throw_exception_if_processing_interrupted()
        self.losses.append(progress.loss)
        preview, picture = None, None if self.pictures is None else self.pictures.after(progress)
        self.picture = picture or self.picture
        if picture or progress.seconds - self.drawn >= PREVIEW_SECONDS or progress.step == progress.total:
            self.drawn = progress.seconds
            preview = ("PNG", beside(loss_plot(self.losses, progress.total), self.picture), None)
            self.say(progress_text(progress))
        self.bar.update_absolute(progress.step, progress.total, preview)

    def say(self, text: str) -> None:
        """Show a text with the notes below it."""
        send_text("\n".join([text, *self.notes]), self.node_id)
