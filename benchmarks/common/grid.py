"""Labelled grids of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from devtools.stale import record
from hdb_core.files import atomic

LABEL_WIDTH, LINE_HEIGHT, MARGIN = 150, 13, 3
INK, PAPER = (30, 30, 30), (255, 255, 255)


def grid(lines: Sequence[tuple[str, Sequence[np.ndarray | None]]], columns: Sequence[str] = ()) -> Image.Image:
    """Lines of pictures, each with a label at its left; labels of the columns on top.

    Args:
        lines: label and uint8 (H, W, 3) pictures of one size; None leaves a gap.
        columns: a label for each column.
    """
    height, width = next(p.shape[:2] for _, pictures in lines for p in pictures if p is not None)
    count = max(len(pictures) for _, pictures in lines)
    labels = [wrapped(text, width) for text in columns]
    top = LINE_HEIGHT * max((text.count("\n") + 1 for text in labels), default=0) + MARGIN
    sheet = Image.new("RGB", (LABEL_WIDTH + count * (width + MARGIN), top + len(lines) * (height + MARGIN)), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for i, text in enumerate(labels):
        draw.text((LABEL_WIDTH + i * (width + MARGIN), 0), text, INK, font)
    for j, (label, pictures) in enumerate(lines):
        y = top + j * (height + MARGIN)
        draw.text((MARGIN, y + MARGIN), wrapped(label, LABEL_WIDTH), INK, font)
        for i, picture in enumerate(pictures):
            if picture is not None:
                sheet.paste(Image.fromarray(picture), (LABEL_WIDTH + i * (width + MARGIN), y))
    return sheet


def wrapped(text: str, width: int) -> str:
    """The text in lines of about ``width`` pixels."""
    lines = [""]
    for word in text.split():
        if len(f"{lines[-1]} {word}") * 5.4 > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def save(image: Image.Image, path: Path) -> None:
    """As a PNG of 256 colours: a third of the size, no visible difference."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic.replacing(path) as file:
        image.quantize(256, Image.Quantize.MEDIANCUT).save(file, "PNG", optimize=True)
    record(path)
