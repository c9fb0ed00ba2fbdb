"""One error family. A message says what was expected, what came, and what the user can do in ComfyUI."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .lidb import LiDB


class HDBError(Exception):
    """Base of every error this library raises on purpose."""


class LayoutError(HDBError, ValueError):
    """The layers of a model are not those that were expected."""


class BasisError(HDBError, ValueError):
    """A basis cannot be made, or is another one than expected."""


class BasisFileError(HDBError, RuntimeError):
    """The file of a learned basis cannot be read or written."""


class LiDBError(HDBError, ValueError):
    """A LiDB is malformed, or two of them do not belong together."""


class LiDBFileError(HDBError, RuntimeError):
    """A LiDB file cannot be read or written."""


class HyperNetError(HDBError, ValueError):
    """A hypernetwork, or what it is given, cannot be used."""


class HyperNetFileError(HDBError, RuntimeError):
    """A hypernetwork file cannot be read or written."""


class FinetuneError(HDBError, ValueError):
    """The inputs or settings of a fine-tune make no sense."""


class FinetuneDiverged(HDBError, RuntimeError):
    """Training produced NaN, infinity or an exploding loss.

    Attributes:
        lidb: the last state whose loss was sound.
        losses: one finite loss per sound step.
        step: the step (from 1) that failed.
    """

    def __init__(self, message: str, lidb: LiDB, losses: tuple[float, ...], step: int) -> None:
        super().__init__(message)
        self.lidb = lidb
        self.losses = losses
        self.step = step
