"""Numbered files below the host's output folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import folder_paths

from ...hdb_core.errors import LiDBFileError
from .folders import EXTENSION


def save_to_output(prefix: str, write: Callable[[Path], object]) -> Path:
    """Number and write a file below the output folder, as the host's own savers do.

    Args:
        prefix: for example ``lidb/person``; %year% and the like are expanded.
        write: writes a new file atomically to the path it gets; FileExistsError if there is one.

    Raises:
        LiDBFileError: the prefix is empty or leaves the output folder, or the folder cannot be written.
    """
    output = folder_paths.get_output_directory()
    parts = Path(prefix).parts
    if not parts or prefix.endswith(("/", "\\")) or ".." in parts or os.path.isabs(prefix) or "\0" in prefix:
        raise LiDBFileError(
            f"filename_prefix must be a name inside the output folder, such as lidb/person, got {prefix!r}."
        )
    try:
        while True:
            folder, filename, counter, _, _ = folder_paths.get_save_image_path(prefix, output)
            os.makedirs(folder, exist_ok=True)
            path = Path(folder, f"{filename}_{counter:05}_{EXTENSION}")
            with suppress(FileExistsError):  # another server on the same folder has taken the number
                write(path)
                return path
    except OSError as error:
        raise LiDBFileError(
            f"Cannot write {prefix!r} below {output}: {error.strerror or error}. "
            "Make the folder writable, free some space, or choose another filename_prefix."
        ) from error


def name_in_output(path: Path) -> str:
    """The name of such a file as users write it: ``lidb/person_00001_.safetensors``."""
    return path.relative_to(folder_paths.get_output_directory()).as_posix()
