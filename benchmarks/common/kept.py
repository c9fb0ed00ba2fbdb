"""Scores that outlive their pictures: one line for each cell and judge, in a file of the repository.

Pictures stay where they were made, in an ignored folder. A cell that has a line here for every judge counts as
finished anywhere, so that another machine makes only what is missing and reports everything. To make one anew, delete
its picture and its lines.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock

from hdb_core.files.atomic import OLD, sweep

from .files import rounded, write_text


class Place(NamedTuple):
    """Which cell, and whose scores. The lines of the file are in this order."""

    row: str
    key: str  # of the row's settings
    person: int
    judge: str


class KeptScores:
    """The lines of one file.

    Args:
        path: of the file, which need not exist.
        judges: name of each judge → its key, which stands for its weights and the definition of the scores.
    """

    def __init__(self, path: Path, judges: Mapping[str, str]) -> None:
        self.path, self.judges = path, judges
        self._lines = self._read()

    def get(self, place: Place) -> dict[str, Any] | None:
        """scores, kinds, facts and whatever else was kept; None where there is nothing."""
        return self._lines.get(place)

    def has(self, row: str, key: str, person: int) -> bool:
        """Whether a cell has been judged by every judge."""
        places = [Place(row, key, person, judge) for judge in self.judges.values()]
        return bool(places) and all(place in self._lines for place in places)

    def key(self, row: str) -> str:
        """The key that most people of a row are kept under; "" if there is none."""
        counts = Counter(place.key for place in self._lines if place.row == row)
        return counts.most_common(1)[0][0] if counts else ""

    def add(self, place: Place, values: Mapping[str, Any]) -> dict[str, Any]:
        """Keeps values, rounded; these."""
        self._lines[place] = rounded(dict(values))
        return self._lines[place]

    def save(self) -> None:
        """Writes the file, with the lines that another process has written since."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_name(f"{self.path.name}.lock")):  # or two could read before either writes
            sweep(self.path.parent, older_than=OLD)
            self._lines = self._read() | self._lines
            lines = (
                json.dumps({**place._asdict(), **self._lines[place]}, separators=(",", ":"))
                for place in sorted(self._lines)
            )
            write_text(self.path, "".join(f"{line}\n" for line in lines))

    def _read(self) -> dict[Place, dict[str, Any]]:
        if not self.path.exists():
            return {}
        found = {}
        for line in self.path.read_text(encoding="utf-8").splitlines():
            values = json.loads(line)
            found[Place(*(values.pop(name) for name in Place._fields))] = values
        return found
