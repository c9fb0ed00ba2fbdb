"""What is asked of every file before it is opened."""

from __future__ import annotations

import errno
import os
import pickle
import re
import stat
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError

from ..errors import HDBError

# What the bytes of a stranger make readers raise.
GARBLED = (
    LookupError, TypeError, ValueError, AttributeError, NameError, ArithmeticError, RecursionError, MemoryError, RuntimeError, struct.error,
    zlib.error, SafetensorError, EOFError, pickle.UnpicklingError,
)  # fmt: skip
_MOST_HOLLOW = 1 << 20
_SCAN, _MOST_SCANS = re.compile(rb"\xff\xda\0[\x08\x0a\x0c\x0e]"), 100  # of a JPEG; writers make about ten


def regular(path: Path) -> Path:
    """The same path, if there is a file that can be read to its end.

    Raises:
        FileNotFoundError: if there is nothing.
        OSError: if it is a folder, a pipe or a device, or most of it is not on the disk; if no file can have its name.
    """
    status = nameable(path).stat()
    if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
        raise _invalid(path, "it is a folder or a device and not a file")
    if status.st_size > _MOST_HOLLOW and _bytes_on_disk(path, status.st_size // 2) < status.st_size // 2:
        raise _invalid(path, "most of it is not there, as in a download that has not ended")
    return path


def opened(path: Path) -> BinaryIO:
    """A `regular` file, to be read. One without a size is empty: those that the system makes up may never end.

    Raises:
        FileNotFoundError, OSError: as `regular` does, or if it cannot be opened.
    """
    return path.open("rb") if regular(path).stat().st_size else BytesIO()


def read_whole(path: Path) -> bytes:
    """The contents of a `regular` file, up to the size that it has at first.

    Raises:
        FileNotFoundError, OSError: as `regular` does, or if it cannot be read.
    """
    size = regular(path).stat().st_size
    with opened(path) as file:
        return file.read(size)


def nameable(path: Path) -> Path:
    """The same path, if a file can have its name.

    Raises:
        OSError: if not.
    """
    try:
        if b"\0" not in os.fsencode(path):
            return path
    except UnicodeError:
        pass
    raise _invalid(path, "no file can have this name")


def require_few_scans(picture: bytes) -> None:
    """Refuse a JPEG of endless scans: each takes a dozen bytes and as long as a whole picture.

    Raises:
        ValueError: it is one.
    """
    if len(_SCAN.findall(picture)) > _MOST_SCANS:
        raise ValueError(f"it has more than {_MOST_SCANS} scans")


@contextmanager
def garbled_as(refusal: Callable[[str], HDBError]) -> Iterator[None]:
    """Turns what the bytes of a stranger make readers raise into one error; our own pass as they are.

    Args:
        refusal: makes the error from the `reason`.
    """
    try:
        yield
    except HDBError:
        raise
    except Exception as error:
        # The tokenizers library raises Exception itself, and configs have errors of their own.
        named = type(error) is Exception or type(error).__module__.partition(".")[0] == "huggingface_hub"
        if isinstance(error, GARBLED) or named:
            raise refusal(reason(error)) from error
        raise


def reason(error: BaseException) -> str:
    """Why something cannot be read or written, without numbers and paths of the system's."""
    if isinstance(error, pickle.UnpicklingError):
        return "it holds something else than weights"  # torch's own message advises to run what it holds
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__)[:200]


def _bytes_on_disk(path: Path, enough: int) -> int:
    """How much of a file is no hole; counted until it is enough."""
    if not hasattr(os, "SEEK_DATA"):  # on Windows
        return enough
    found = end = 0
    with path.open("rb") as file:
        try:
            while found < enough:
                start = os.lseek(file.fileno(), end, os.SEEK_DATA)
                end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
                found += end - start
        except OSError as error:
            if error.errno != errno.ENXIO:  # the rest is a hole
                return enough  # a file system that does not know
    return found


def _invalid(path: Path, reason: str) -> OSError:
    return OSError(errno.EINVAL, reason, str(path))
