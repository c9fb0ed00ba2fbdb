"""Result files: rounded numbers, written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from devtools.stale import record
from hdb_core.files import atomic


def rounded(value: Any) -> Any:
    """Floats below 1,000 to four digits, others to whole numbers, at any depth."""
    if isinstance(value, float):
        return round(value, 4) if abs(value) < 1000 else round(value)
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


def write_text(path: Path, text: str) -> None:
    """The whole file, or what was there before; a result is recorded with the weights that made it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_text(path, text)
    record(path)


def write_json(path: Path, objects: Any) -> None:
    """A list with one object a line, or any other value indented."""
    if isinstance(objects, list):
        text = "[\n" + ",\n".join(json.dumps(item) for item in objects) + "\n]\n"
    else:
        text = json.dumps(objects, indent=1) + "\n"
    write_text(path, text)
