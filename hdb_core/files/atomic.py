"""Atomic writing: after a kill at any moment, the old file is there or the new one, and never a part of one."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from .reading import nameable

_PREFIX, _SUFFIX = ".hdb-", ".partial"  # of temporary files
OLD = 86_400  # seconds after which nobody writes to a temporary file any more


def replacing(path: Path) -> AbstractContextManager[Path]:
    """A temporary file beside `path`, to be written; it takes the place of `path` when the block ends without an error.

    Who may read and write `path` stays as it was; of a new file, as the umask says.

    Args:
        path: the file; its folder must exist.

    Raises:
        OSError: if the folder cannot be written, or the disk is full.
    """
    return _written(path, os.replace)


def creating(path: Path) -> AbstractContextManager[Path]:
    """As `replacing`, for a file that must be new, also where several processes write into one folder.

    Raises:
        FileExistsError: if there is such a file by the end of the block; it stays as it is.
        OSError: if the folder cannot be written, or the disk is full.
    """
    return _written(path, _move_new)


def write_text(path: Path, text: str) -> None:
    """Write a text file (UTF-8) atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def leftovers(folder: Path) -> list[Path]:
    """The temporary files of writers in a folder, at work or killed."""
    return list(folder.glob(f"{_PREFIX}*{_SUFFIX}"))


def sweep(*folders: Path, older_than: float = 0) -> None:
    """Remove the temporary files that killed writers have left.

    Args:
        folders: in which no one else writes now; elsewhere only what is `OLD` may go.
        older_than: seconds.
    """
    for folder in folders:
        for leftover in leftovers(folder):
            with suppress(OSError):  # another process sweeps, too, or it is another user's
                if time.time() - leftover.stat().st_mtime >= older_than:
                    leftover.unlink()


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Gives the system's errors the name of the file that is written; that of a full disk has none.

    Raises:
        OSError: what was raised, with the name.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def _written(path: Path, move: Callable[[Path, Path], None]) -> Iterator[Path]:
    with naming(path):  # that was to be written, and not the temporary one
        mode = _mode_of(nameable(path))
        temporary = path.parent / f"{_PREFIX}{secrets.token_hex(8)}{_SUFFIX}"
        # The system applies the umask. What nobody else may read, nobody else may read while it is written.
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666 if mode is None else 0o600))
        try:
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            if mode is not None:
                with suppress(OSError):  # network drives and Windows drives in WSL have modes of their own
                    temporary.chmod(mode)
            move(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def _mode_of(path: Path) -> int | None:
    """Who may read and write a file, as chmod takes it; None if there is none."""
    try:
        return path.stat().st_mode & 0o777
    except OSError:
        return None


def _move_new(temporary: Path, path: Path) -> None:
    """Give a file its name unless another one has it."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a drive without hard links: the name is taken first, by an empty file for a moment
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        try:
            os.replace(temporary, path)
        except OSError:
            path.unlink()
            raise
