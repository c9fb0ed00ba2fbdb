"""People on disk: a folder of face photos, one sub-folder a person; a photo directly in the folder is a person of its own.

A text file of the same name beside a photo holds words that are true of that photo and not of the person
("smiling, at the beach"); they follow the prompt when that photo is denoised. A picture "1.mask.png" beside "1.jpg" is
white where that photo shows the person: this part is learned, and the rest counts little.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from ...errors import HyperNetError
from ...images import resize_to_cover

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
MASK = ".mask.png"
Item = TypeVar("Item")
Read = TypeVar("Read")


@dataclass(frozen=True)
class Photo:
    """A photo, its own words and its mask."""

    path: Path
    words: str = ""
    mask: Path | None = None

    def pixels(self, size: int) -> Tensor:
        """The central square, float32 (size, size, 3) in 0..1, cut and resized as the nodes do.

        Raises:
            HyperNetError: if the file is no picture.
        """
        return resize_to_cover(self.whole()[None], (size, size))[0].movedim(0, -1)

    def region(self, height: int, width: int) -> Tensor:
        """How much each place of the latents counts, float32 (1, height, width) of mean 1; without a mask, all the same.

        Raises:
            HyperNetError: if the mask is no picture, black, or of another shape than the photo.
        """
        if self.mask is None:
            return torch.ones(1, height, width)
        mask = Photo(self.mask)
        (wide, high), (mask_wide, mask_high) = self.size(), mask.size()
        if abs(mask_wide * high - mask_high * wide) > max(wide, high):  # a pixel more or less is rounding
            raise HyperNetError(
                f"{self.mask} is {mask_wide} × {mask_high}, its photo {wide} × {high}: it cannot lie over it. "
                "Make the mask from the same, uncut photo."
            )
        white = resize_to_cover(mask.whole()[None, :1], (height, width))[0]
        if not bool(white.any()):
            raise HyperNetError(f"{self.mask} marks nothing of its photo. Paint the face white, or remove the file.")
        return white / white.mean()

    def size(self) -> tuple[int, int]:
        """Width and height of the upright picture, in pixels.

        Raises:
            HyperNetError: if the file is no picture.
        """
        with self._opened() as file:
            turned = file.getexif().get(ExifTags.Base.Orientation, 1) > 4
            return (file.height, file.width) if turned else file.size

    def whole(self) -> Tensor:
        """The picture upright and uncut, float32 (3, H, W) in 0..1, as Load Image reads it.

        Raises:
            HyperNetError: if the file is no picture.
        """
        with self._opened() as file:
            image = ImageOps.exif_transpose(file).convert("RGB")
        return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).movedim(-1, 0)

    @contextmanager
    def _opened(self) -> Iterator[Image.Image]:
        try:
            with Image.open(self.path) as file:
                yield file
        except OSError as error:
            raise HyperNetError(
                f"{self.path} cannot be read as a picture ({error}). Remove it or save it again."
            ) from error


def in_threads(read: Callable[[Item], Read], items: Sequence[Item]) -> list[Read]:
    """Apply ``read`` to each item, on all cores: pictures are decoded beside each other."""
    with ThreadPoolExecutor(min(len(items), os.cpu_count() or 1) or 1) as pool:
        return list(pool.map(read, items))


@dataclass(frozen=True)
class Person:
    """A person with one photo or several."""

    name: str
    photos: tuple[Photo, ...]


def find_people(folder: Path) -> list[Person]:
    """All people of a folder, by name.

    Raises:
        HyperNetError: if there is none, or two have one name.
    """
    if not folder.is_dir():
        raise HyperNetError(f"There is no folder {folder}. Give --photos a folder with a sub-folder for each person.")
    people: dict[str, Person] = {}
    for entry in sorted(folder.iterdir()):
        files = sorted(entry.iterdir()) if entry.is_dir() else [entry]
        pictures = (file for file in files if file.suffix.lower() in SUFFIXES and not file.name.endswith(MASK))
        photos = tuple(_photo(file) for file in pictures)
        if not photos:
            continue
        name = entry.name if entry.is_dir() else entry.stem
        if name in people:
            raise HyperNetError(
                f"{folder} holds two people named {name!r}. Rename one, or put all photos into its folder."
            )
        people[name] = Person(name, photos)
    if not people:
        raise HyperNetError(f"{folder} holds no photos ({', '.join(sorted(SUFFIXES))}) .")
    return list(people.values())


def _photo(path: Path) -> Photo:
    words, mask = path.with_suffix(".txt"), path.with_suffix(MASK)
    said = words.read_text(encoding="utf-8").strip() if words.is_file() else ""
    return Photo(path, said, mask if mask.is_file() else None)
