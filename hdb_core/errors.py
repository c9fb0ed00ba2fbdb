"""One error family. A message says what was expected, what came, and what the user can do in ComfyUI."""

from __future__ import annotations

MOST_SHOWN = 1000  # characters of a message


class HDBError(Exception):
    """Base of every error this library raises on purpose.

    A message may quote the text of somebody else's file, so it is always one line without control characters, and the
    middle of a long one is left out.
    """

    def __init__(self, message: str) -> None:
        text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
        half = MOST_SHOWN // 2 - 2
        super().__init__(text if len(text) <= MOST_SHOWN else f"{text[:half]} … {text[-half:]}")


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


class FaceError(HDBError, ValueError):
    """There is no face, or it cannot be cut out."""


def require(holds: bool, name: str, expected: str, got: object, error: type[HDBError]) -> None:
    """Refuse a setting that makes no sense.

    Raises:
        HDBError: of the class `error`, if the condition does not hold.
    """
    if not holds:
        raise error(f"Expected {name}: {expected}, got {got!r:.100}.")
