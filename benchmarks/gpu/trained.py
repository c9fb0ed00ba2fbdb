"""Where the trainings of checks 2 and 3 leave what they made, and where they find what was made before."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from devtools.environment import ROOT
from miniature.checkpoint import BASE_FILE, CONTROL_FILE, HYPERNET_FILE, VAE_FILE

from .check import WORK


class Made(NamedTuple):
    """A packed file of a training.

    Attributes:
        folder: of the training, in `WORK`.
        file: its name.
    """

    folder: str
    file: str

    @property
    def path(self) -> Path:
        """Where the training packs it."""
        return WORK / self.folder / self.file

    def found(self) -> Path:
        """The one that was trained here, or the shipped one."""
        return self.path if self.path.is_file() else ROOT / "weights" / self.file


VAE = Made("vae", VAE_FILE)
BASE = Made("base", BASE_FILE)
HYPERNET = Made("hypernet", HYPERNET_FILE)
CONTROL = Made("control", CONTROL_FILE)
