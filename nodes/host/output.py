"""Numbered files below the host's output folder."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import folder_paths

from ...hdb_core.errors import LiDBFileError
from ...hdb_core.files.names import checked_prefix, with_dates
from .folders import EXTENSION

_NUMBER = "_{:05}_" + EXTENSION


def save_to_output(prefix: str, write: Callable[[Path], object]) -> Path:
    """Number and write a file below the output folder, as the host's own savers do.

    Args:
        prefix: for example ``lidb/person``; %date:yyyy-MM-dd%, %year% and the like are filled in.
        write: writes a new file atomically to the path it gets; FileExistsError if there is one.

    Raises:
        LiDBFileError: the prefix is no name inside the output folder, or the folder cannot be written.
    """
    output, name = folder_paths.get_output_directory(), output_name(prefix)
    try:
        folder, filename, first, _, _ = folder_paths.get_save_image_path(name, output)
        os.makedirs(folder, exist_ok=True)
        for number in itertools.count(first):
            path = Path(folder, filename + _NUMBER.format(number))
            if os.path.lexists(path):  # in other letter case, for example, which the host does not count
                continue
            with suppress(FileExistsError):  # another server on the same folder has taken the number
                write(path)
                return path
    except OSError as error:
        raise LiDBFileError(
            f"Cannot write {prefix!r} below {output}: {error.strerror or error}. "
            "Make the folder writable, free some space, or choose another filename_prefix."
        ) from error
    raise AssertionError("numbers do not end")


def output_name(prefix: str) -> str:
    """A filename_prefix as it is on every system, with %date:…% filled in.

    Raises:
        LiDBFileError: it is no name inside the output folder.
    """
    return checked_prefix(with_dates(prefix, datetime.now()), len(_NUMBER.format(0)))


def refusal(prefix: str | None) -> bool | str:
    """What a node's validate_inputs returns for a filename_prefix; None comes over a wire."""
    try:
        return prefix is None or bool(output_name(prefix))
    except LiDBFileError as error:
        return str(error)


def name_in_output(path: Path) -> str:
    """The name of such a file as users write it: ``lidb/person_00001_.safetensors``."""
    return path.relative_to(folder_paths.get_output_directory()).as_posix()
