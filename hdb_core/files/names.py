"""Names of files as users write them, meaning the same file on every system."""

from __future__ import annotations

import re
import unicodedata
from datetime import datetime

from ..errors import LiDBFileError

MOST_BYTES = 255  # of a file or folder name, on every common system
_HARMFUL = frozenset(':*?"<>|')
_RESERVED = frozenset(
    (
        "con",
        "prn",
        "aux",
        "nul",
        "conin$",
        "conout$",
        *(f"{port}{n}" for port in ("com", "lpt") for n in "123456789¹²³"),
    )
)
_DATE = re.compile(r"%date:([^%]+)%")
_DATE_PARTS = re.compile("dd?|MM?|hh?|mm?|ss?|y{2,4}")


def with_dates(name: str, now: datetime) -> str:
    """A name with ``%date:yyyy-MM-dd%`` and the like filled in as ComfyUI's front end does.

    Args:
        name: with d, dd (day), M, MM (month), yy, yyyy, h, hh (0 to 23), m, mm and s, ss between ``%date:`` and ``%``.
        now: local time.
    """
    numbers = {"d": now.day, "M": now.month, "h": now.hour, "m": now.minute, "s": now.second}

    def part(found: re.Match[str]) -> str:
        text = found[0]
        if text[0] in numbers:
            return f"{numbers[text[0]]:0{len(text)}}"
        return {"yy": f"{now.year:04}"[2:], "yyyy": str(now.year)}.get(text, text)

    return _DATE.sub(lambda date: _DATE_PARTS.sub(part, date[1]), name)


def portable(name: str) -> str:
    r"""One writing for all that mean the same file: ``/`` for ``\``, Unicode in NFC."""
    return unicodedata.normalize("NFC", name.replace("\\", "/"))


def checked_prefix(prefix: str, added_bytes: int) -> str:
    """A name to save under, `portable`, with dates filled in by the caller.

    Args:
        prefix: folders and the beginning of a file's name.
        added_bytes: of what will be added to that name.

    Raises:
        LiDBFileError: if it is not inside its folder, or no name on Windows, macOS or Linux.
    """
    if unwritable := next((c for c in prefix if unicodedata.category(c) in ("Cc", "Cs")), None):
        raise _refused(prefix, f"it holds the control character {unwritable!a}")
    name = portable(prefix)
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if not parts or name.endswith("/") or name.startswith("/") or ".." in parts or name[1:2] == ":":
        raise _refused(prefix, "it is no name inside the output folder")
    for part in parts:
        if reason := _unfit(part):
            raise _refused(prefix, reason)
    if max(len(part.encode()) for part in (*parts[:-1], parts[-1] + added_bytes * "_")) > MOST_BYTES:
        raise _refused(prefix, f"with its number, a part of it is longer than {MOST_BYTES} bytes")
    return "/".join(parts)


def made_portable(name: str, most_bytes: int = MOST_BYTES) -> str:
    """The nearest name that one file or folder can have on every system.

    Args:
        name: any text.
        most_bytes: that it may have.
    """
    harmful = _HARMFUL | set("/\\")
    letters = (c if c not in harmful and unicodedata.category(c)[0] != "C" else "_" for c in name)
    text = _cut(unicodedata.normalize("NFC", "".join(letters)).lstrip(" "), most_bytes) or "_"
    return _cut(f"_{text}", most_bytes) if _unfit(text) else text  # a device


def _cut(text: str, most_bytes: int) -> str:
    return text.encode()[:most_bytes].decode(errors="ignore").rstrip(". ")


def _unfit(part: str) -> str:
    """Why a file or folder cannot have this name on every system; "" if it can."""
    if harmful := _HARMFUL & set(part):
        return f"{min(harmful)} cannot be part of a name on Windows"
    if part[-1] in ". ":
        return f"{part!r} ends with a dot or a space, which Windows leaves out"
    if part.partition(".")[0].rstrip().casefold() in _RESERVED:
        return f"{part!r} is a device on Windows"
    return ""


def _refused(prefix: str, reason: str) -> LiDBFileError:
    shown = prefix if len(prefix) <= 80 else f"{prefix[:80]}…"
    return LiDBFileError(f"filename_prefix cannot be {shown!r}: {reason}. Choose a name such as lidb/person.")
