"""People on disk: a folder of face photos, one sub-folder a person; a photo directly in the folder is a person of its own.

A text file of the same name beside a photo holds words that are true of that photo and not of the person
("smiling, at the beach"); they follow the prompt when that photo is denoised. A picture "1.mask.png" beside "1.jpg" is
white where that photo shows the person: this part is learned, and the rest counts little.

A file "….tar" in the folder is a shard: it holds the same, under the same names, uncompressed, as webdataset writes it. Its
photos stay in it, and are read at their places.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ...errors import HyperNetError
from ...files.reading import GARBLED, opened, read_whole, reason, regular, require_few_scans
from ...images import resize_to_cover
from ...prompt import require_text
from .tar import members

# Photos of formats that nothing here reads, as telephones make them, are counted or refused, and not passed over.
SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif"}
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # whatever a file is called; for others, Pillow may start programs
MASK, WORDS, SHARD = ".mask.png", ".txt", ".tar"
LARGE, ROOM = 16_000_000, 4  # pixels of a picture whose numbers take much memory; see `Photo.whole`
MOST_WITHIN, MOST_OF_A_BYTE = 50_000_000, 50  # pixels of any picture, and of a larger one for each byte of its file
PREPARED = "prepared.json"  # of a folder that `prepare` has made: how its photos are cut, {"cut": "face"}
Item = TypeVar("Item")
Read = TypeVar("Read")


class Entry(NamedTuple):
    """A file within a shard."""

    shard: Path
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.name} in {self.shard}"


Place = Path | Entry


def read_bytes(place: Place) -> bytes:
    """The contents of a file, or of one within a shard.

    Raises:
        OSError: if it cannot be read.
    """
    if isinstance(place, Path):
        return read_whole(place)
    with place.shard.open("rb") as file:
        file.seek(place.offset)
        return file.read(place.size)


@dataclass(frozen=True, slots=True)
class Photo:
    """A photo, its own words and its mask."""

    path: Place
    words: str = ""
    mask: Place | None = None

    def pixels(self, size: int) -> Tensor:
        """The central square, float32 (size, size, 3) in 0..1, cut and resized as the nodes do.

        Raises:
            HyperNetError: if the file is no picture.
        """
        return resize_to_cover(self.whole(size)[None], (size, size))[0].movedim(0, -1)

    def region(self, height: int, width: int) -> Tensor:
        """How much each place of the latents counts, float32 (1, height, width) of mean 1; without a mask, all the same.

        Raises:
            HyperNetError: if the mask is no picture, black, or of another shape than the photo.
        """
        if self.mask is None:
            return torch.ones(1, height, width)
        mask = Photo(self.mask)
        (wide, high), (mask_wide, mask_high) = self.size(), mask.size()
        if not is_of_shape(mask.size(), self.size()):
            raise HyperNetError(
                f"{self.mask} is {mask_wide} × {mask_high}, its photo {wide} × {high}, which has another shape. "
                "Make the mask from the same, uncut photo."
            )
        white = resize_to_cover(mask.whole(max(height, width), "black")[None, :1], (height, width))[0]
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

    def whole(self, side: int = 0, ground: str = "white") -> Tensor:
        """The picture upright and uncut, float32 (3, H, W) in 0..1, as Load Image reads it.

        Args:
            side: to which it will be reduced: a very large picture is, on the way, to `ROOM` times that; 0 is not.
            ground: colour behind a transparent picture; black for a mask, which may be painted white on nothing.

        Raises:
            HyperNetError: if the file is no picture.
        """
        with self._opened() as file:
            least = ROOM * side if file.width * file.height > LARGE else 0
            if least:
                file.draft(file.mode, (least, least))  # decodes a JPEG to an eighth at once
            image = ImageOps.exif_transpose(file)
            if image.mode in ("L", "RGB", "RGBA"):  # others first become these, with more memory
                image = _reduced(image, least)
            if image.mode.startswith("I"):  # 16 bits of grey, of which Pillow makes white from 255 on
                image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, ground), image)
            image = _reduced(image.convert("RGB"), least)
        return torch.from_numpy(np.asarray(image, dtype=np.float32)).div_(255).movedim(-1, 0)

    @contextmanager
    def _opened(self) -> Iterator[Image.Image]:
        try:
            data = read_bytes(self.path)
            require_few_scans(data)
            with Image.open(io.BytesIO(data), formats=FORMATS) as file:
                if file.width * file.height > max(MOST_WITHIN, MOST_OF_A_BYTE * len(data)):
                    raise ValueError(f"{file.width} × {file.height} pixels in {len(data):,} bytes; make it smaller")
                yield file
        except (OSError, SyntaxError, Image.DecompressionBombError, *GARBLED) as error:
            why = f"it is none of {', '.join(FORMATS)}" if isinstance(error, UnidentifiedImageError) else reason(error)
            raise HyperNetError(
                f"{self.path} cannot be read as a picture ({why}). Remove it or save it again."
            ) from error


def is_of_shape(one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether two pictures have one shape, at any resolution; a pixel more or less is rounding."""
    return abs(one[0] * other[1] - one[1] * other[0]) <= max(other)


def _reduced(image: Image.Image, least: int) -> Image.Image:
    """A picture with a shorter side of at most so many pixels; 0 leaves it as it is."""
    scale = least / min(image.size) if least else 1.0
    width, height = (round(scale * side) for side in image.size)
    return image if scale >= 1 else image.resize((width, height), Image.Resampling.BOX)


def in_threads(read: Callable[[Item], Read], items: Sequence[Item]) -> list[Read]:
    """Apply ``read`` to each item, on all cores: pictures are decoded beside each other."""
    with ThreadPoolExecutor(min(len(items), os.cpu_count() or 1) or 1) as pool:
        return list(pool.map(read, items))


@dataclass(frozen=True, slots=True)
class Person:
    """A person with one photo or several."""

    name: str
    photos: tuple[Photo, ...]


def find_people(folder: Path) -> list[Person]:
    """All people of a folder, by name; those of a shard stand side by side.

    Raises:
        HyperNetError: if there is none, two have one name, a photo has two masks or texts, or a folder or a
            shard cannot be read.
    """
    if not folder.is_dir():
        raise HyperNetError(f"There is no folder {folder}. Give --photos a folder with a sub-folder for each person.")
    with _listing(folder):
        if (inner := folder / "photos" / PREPARED).exists():
            raise HyperNetError(f"The photos that were prepared in {folder} are in {inner.parent}. Give that folder.")
        entries = sorted(folder.iterdir())
        single: dict[str, list[Path]] = {}
        for entry in entries:
            if not entry.is_dir():
                single.setdefault(_plain(entry.name), []).append(entry)
    people: dict[str, Person] = {}
    for entry in entries:
        for person in _people_of(entry, single):
            if person.name in people:
                raise HyperNetError(
                    f"{folder} holds two people named {person.name!r}. Rename one, or put all photos into its folder, or "
                    "into one shard."
                )
            people[person.name] = person
    if not people:
        raise HyperNetError(f"{folder} holds no photos ({', '.join(sorted(SUFFIXES))}) and no shards ({SHARD}).")
    return list(people.values())


@contextmanager
def _listing(folder: Path) -> Iterator[None]:
    """Turns what the system says of a folder that it does not let us list into one sentence.

    Raises:
        HyperNetError: with the folder.
    """
    try:
        yield
    except OSError as error:
        raise HyperNetError(f"{folder} cannot be read ({reason(error)}). Make it readable, or leave it out.") from error


def _people_of(entry: Path, single: dict[str, list[Path]]) -> list[Person]:
    """The people of an entry of the folder of photos; what belongs to a single photo is among ``single`` files."""
    if entry.is_dir():
        with _listing(entry):
            files = {f"{entry.name}/{file.name}": file for file in entry.iterdir() if not file.is_dir()}
        return _grouped(files)
    if entry.suffix.lower() == SHARD:
        return _grouped(_files_of(entry))
    if not _is_photo(entry.name):
        return []
    names = [entry.name, *(entry.with_suffix(end).name for end in (WORDS, MASK))]
    return _grouped({file.name: file for name in names for file in single.get(name, [])})


def _grouped(files: Mapping[str, Place]) -> list[Person]:
    """People from files by name: "anna/1.jpg" is of anna, "ben.jpg" of ben."""
    plain: dict[str, list[Place]] = {}
    for name, place in files.items():
        plain.setdefault(_plain(name), []).append(place)
    photos: dict[str, list[Photo]] = {}
    for name in sorted(plain):
        if _is_photo(name):
            path = PurePosixPath(name)
            words, mask = (_only(plain.get(str(path.with_suffix(end)), [])) for end in (WORDS, MASK))
            own = Photo(files[name], "" if words is None else _text(words), mask)
            photos.setdefault(str(path.parent) if path.parent.name else path.stem, []).append(own)
    return [Person(name, tuple(own)) for name, own in photos.items()]


def _only(places: Sequence[Place]) -> Place | None:
    """The words or the mask of a photo, if it has any.

    Raises:
        HyperNetError: if it has two, such as "1.txt" and "1.TXT".
    """
    if len(places) > 1:
        first, second, *_ = sorted(str(place) for place in places)
        raise HyperNetError(
            f"{first} and {second} belong to the same photo, which takes one of them. Remove the other."
        )
    return places[0] if places else None


def _text(words: Place) -> str:
    try:
        return require_text(read_bytes(words).decode("utf-8-sig").strip())
    except (OSError, ValueError) as error:
        why = "it is no text in UTF-8" if isinstance(error, UnicodeError) else reason(error)
        raise HyperNetError(f"{words} cannot be read: {why}. Save it again in UTF-8, shorten or remove it.") from error


def _is_photo(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in SUFFIXES and not _plain(name).endswith(MASK)


def _plain(name: str) -> str:
    """The name, with words and masks called as we call them: "1.TXT" is "1.txt", and "1.Mask.jpg" is "1.mask.png"."""
    suffix = PurePosixPath(name).suffix
    stem = name.removesuffix(suffix)
    if suffix.lower() in SUFFIXES and stem.lower().endswith(".mask"):
        return stem[: -len(".mask")] + MASK
    return stem + WORDS if suffix.lower() == WORDS else name


def _files_of(shard: Path) -> dict[str, Place]:
    """Name → place of the files of a shard."""
    try:
        size = regular(shard).stat().st_size
        with opened(shard) as file:
            found = ((member.name.removeprefix("./"), member) for member in members(file, size))
            return {name: Entry(shard, name, member.offset, member.size) for name, member in found}
    except (tarfile.TarError, OSError, *GARBLED) as error:
        raise HyperNetError(
            f"{shard} is damaged or compressed ({reason(error)}). Write it again as a plain .tar."
        ) from error
