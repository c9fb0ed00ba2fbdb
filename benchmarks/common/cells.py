"""Finished results, one file for each row and person: its pictures as a PNG that carries what made them.

A kill loses at most the cell in work. The folder's name holds a hash of all that made its pictures, so that results
of another checkpoint or setting are never mixed in. Scores are read off the pictures, and kept by `kept`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from hdb_core.files.atomic import replacing

# Raised whenever the same settings would give other pictures.
VERSION = 1


@dataclass(frozen=True)
class Cell:
    """Pictures of one person by one row.

    Attributes:
        pictures: uint8 (prompts, seeds, H, W, 3); the last prompt is the class prompt where `facts` has one.
        facts: "prompts" and whatever the row says of its making: steps, seconds, bytes, flops.
    """

    pictures: np.ndarray
    facts: Mapping[str, Any]


class Cells:
    """The cells of a folder.

    Args:
        root: the folder.
        common: settings that all rows share, part of every key.
    """

    def __init__(self, root: Path, common: Mapping[str, Any]) -> None:
        self.root, self.common = root, {**common, "version": VERSION}

    def key(self, settings: Mapping[str, Any]) -> str:
        """Twelve hex digits of all that made a row."""
        text = json.dumps({**self.common, **settings}, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def path(self, row: str, settings: Mapping[str, Any], person: int) -> Path:
        """Where the cell of a row, made with ``settings``, and a person's seed is."""
        return self.root / f"{row}-{self.key(settings)}" / f"{person}.png"

    def read(self, row: str, settings: Mapping[str, Any], person: int) -> Cell | None:
        """The cell, or None when it is not there yet."""
        path = self.path(row, settings, person)
        if not path.exists():
            return None
        with Image.open(path) as image:
            facts, sheet = json.loads(image.info["facts"]), np.array(image.convert("RGB"))
        rows, columns = facts["grid"]
        height, width = sheet.shape[0] // rows, sheet.shape[1] // columns
        return Cell(sheet.reshape(rows, height, columns, width, 3).swapaxes(1, 2), facts)

    def write(self, row: str, settings: Mapping[str, Any], person: int, cell: Cell) -> None:
        """Writes the cell: the whole file, or none."""
        path = self.path(row, settings, person)
        path.parent.mkdir(parents=True, exist_ok=True)
        rows, columns, height, width = cell.pictures.shape[:4]
        sheet = cell.pictures.swapaxes(1, 2).reshape(rows * height, columns * width, 3)
        info = PngImagePlugin.PngInfo()
        info.add_text("facts", json.dumps({**cell.facts, "grid": (rows, columns)}))
        info.add_text("settings", json.dumps({**self.common, **settings}, default=str))
        with replacing(path) as partial:
            Image.fromarray(sheet).save(partial, "PNG", pnginfo=info)
