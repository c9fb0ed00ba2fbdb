"""What a saved person shows of themselves: a name, a small picture, how they were made, for which model."""

from __future__ import annotations

import base64
import unicodedata
from dataclasses import replace
from io import BytesIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .files.reading import require_few_scans
from .images import resize_to_cover
from .layout import FAMILIES
from .lidb import About, LiDB
from .recommended import FROM_PREDICTION, IN_LEARNED_BASIS

SIDE = 256  # of a thumbnail, which then takes some 10 KB
LARGEST = 1024  # of one in somebody else's file
QUALITY = 85
LONGEST = 300  # characters of a line that is shown
_TURNS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}  # the order of letters


def labelled(lidb: LiDB, name: str = "", picture: Tensor | None = None) -> LiDB:
    """A person with a name and a picture (3, H, W) in 0..1; without one of them, with what they had."""
    name = " ".join(name.split()) or lidb.about.name
    small = lidb.about.thumbnail if picture is None else thumbnail(picture)
    return replace(lidb, about=replace(lidb.about, name=name, thumbnail=small))


def thumbnail(picture: Tensor) -> str:
    """The middle square of a picture (3, H, W) in 0..1, small, as `About.thumbnail` holds it: JPEG in base64."""
    pixels = (255 * resize_to_cover(picture[None], (SIDE, SIDE))[0]).round().byte().movedim(0, -1)
    file = BytesIO()
    Image.fromarray(pixels.cpu().numpy()).save(file, "JPEG", quality=QUALITY)
    return base64.b64encode(file.getvalue()).decode()


def picture_of(about: About) -> Tensor | None:
    """The thumbnail as (H, W, 3) in 0..1; None if there is none, or it is no such picture."""
    try:
        data = base64.b64decode(about.thumbnail, validate=True)
        require_few_scans(data)
        if b"Exif\0\0" in data or b"MPF\0" in data:  # `thumbnail` writes none; older Pillow makes gigabytes of some
            return None
        with Image.open(BytesIO(data), formats=["JPEG"]) as image:
            if max(image.size) > LARGEST:
                return None
            return torch.from_numpy(np.asarray(image.convert("RGB")).astype(np.float32) / 255)
    except (ValueError, OSError, SyntaxError, Image.DecompressionBombError):  # of a damaged picture
        return None


def made(about: About) -> str:
    """How a person was made: "learned from one photo in 57 steps", "predicted from one photo, then 12 steps"."""
    photos = "one photo" if about.photos == 1 else f"{about.photos} photos"
    steps = "one step" if about.steps == 1 else f"{about.steps} steps"
    if about.made_from == FROM_PREDICTION:
        return f"predicted from {photos}" + (f", then {steps}" if about.steps else "")
    return f"learned from {photos} in {steps}" + (", in a learned basis" if about.made_from == IN_LEARNED_BASIS else "")


def lines(lidb: LiDB) -> list[str]:
    """What there is to know of a person, a line each: the name if there is one, how made, for which model, the prompt."""
    about, family = lidb.about, lidb.layout.family
    model = FAMILIES.get(family, family) + (f" ({about.model})" if about.model not in ("", family) else "")
    named = [about.name] if about.name else []
    said = [*named, made(about), f"for {model}, rank {lidb.rank}", f"prompt: {about.prompt}"]
    return [as_line(text) for text in said]


def as_line(text: str) -> str:
    """The text of a file, which may be a stranger's, to be shown: cut if it is long, without control characters."""
    harmful = (unicodedata.category(c) == "Cc" or unicodedata.bidirectional(c) in _TURNS for c in text)
    line = " ".join("".join(" " if bad else c for c, bad in zip(text, harmful, strict=True)).split())
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}…"
