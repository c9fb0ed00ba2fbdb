"""One error family. A message says what was expected, what came, and what the user can do in ComfyUI."""

from __future__ import annotations


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


def require(holds: bool, name: str, expected: str, got: object, error: type[HDBError]) -> None:
    """Refuse a setting that makes no sense.

    Raises:
        HDBError: of the class `error`, if the condition does not hold.
    """
    if not holds:
        raise error(f"Expected {name}: {expected}, got {got!r:.100}.")
