"""Numbered files below the host's output folder."""

from __future__ import annotations

import filecmp
import itertools
import os
import re
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import folder_paths

from ...hdb_core.errors import LiDBFileError
from ...hdb_core.files.atomic import OLD, sweep
from ...hdb_core.files.names import checked_prefix, made_portable, portable, with_dates
from ...hdb_core.files.reading import reason
from .folders import EXTENSION, LIDBS, is_hidden, is_taken

_NUMBER = "_{:05}_" + EXTENSION
_MOST_OF_A_NAME = 120  # bytes


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
        sweep(Path(folder), older_than=OLD)
        for number in itertools.count(first):
            path = Path(folder, filename + _NUMBER.format(number))
            if os.path.lexists(path):  # in other letter case, for example, which the host does not count
                continue
            if is_taken(LIDBS, path):  # Load LiDB would take the other one
                continue
            with suppress(FileExistsError):  # another server on the same folder has taken the number
                write(path)
                return path
    except OSError as error:
        raise LiDBFileError(
            f"Cannot write {prefix!r} below {output}: {reason(error)}. "
            "Make the folder writable, free some space, or choose another filename_prefix."
        ) from error
    raise AssertionError("numbers do not end")


def save_once(prefix: str, write: Callable[[Path], object]) -> tuple[Path, bool]:
    """As `save_to_output`, unless an earlier file of the same prefix has the same contents: then that one. A file whose
    name stands for another one in Load LiDB does not count.

    Returns:
        The path, and whether the file is new.
    """
    path = save_to_output(prefix, write)
    filecmp.clear_cache()  # it goes by times, which on some drives are the same for seconds
    name, number = _numbered(path)
    for other in sorted(path.parent.glob(f"*{EXTENSION}")):
        # Of two servers that write the same at once, the one with the lower number stays.
        if (other_name := _numbered(other))[0] == name and other_name[1] < number:
            with suppress(OSError):
                if other.samefile(path) or not filecmp.cmp(other, path, shallow=False):  # it may be a link to this one
                    continue
                if not is_hidden(LIDBS, other):
                    path.unlink()
                    return other, False
    return path, True


def _numbered(path: Path) -> tuple[str, int]:
    found = re.fullmatch(r"(.*)_(\d+)_", path.stem)
    return (found[1], int(found[2])) if found else (path.stem, 0)


def prefix_for(prefix: str, person: str) -> str:
    """A filename_prefix whose last part is a person's name, if they have one."""
    if not person.strip(". "):
        return prefix
    folder = portable(with_dates(prefix, datetime.now())).rpartition("/")
    # A number and an ending follow, and no date is meant.
    return f"{folder[0]}{folder[1]}{made_portable(person, _MOST_OF_A_NAME).replace('%', '_')}"


def output_name(prefix: str) -> str:
    """A filename_prefix as it is on every system, with %date:…% filled in.

    Raises:
        LiDBFileError: it is no name inside the output folder.
    """
    return checked_prefix(with_dates(prefix, datetime.now()), len(_NUMBER.format(0)))


def refusal(prefix: object) -> bool | str:
    """What a node's validate_inputs returns for a filename_prefix; what is no text comes over a wire."""
    try:
        return not isinstance(prefix, str) or bool(output_name(prefix))
    except LiDBFileError as error:
        return str(error)


def name_in_output(path: Path) -> str:
    """The name of such a file as users write it: ``lidb/person_00001_.safetensors``."""
    return path.relative_to(folder_paths.get_output_directory()).as_posix()
