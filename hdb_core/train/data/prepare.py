"""Makes a training's photos from a folder of any photos: cut, checked, with their words and masks, and a report.

They are cut to the central square, or to the face, by the rule of `faces` that *Crop to Face* has, too.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import count
from pathlib import Path, PurePosixPath
from shutil import rmtree
from threading import Lock
from typing import NamedTuple

import torch
from PIL import ExifTags, Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional

from ...errors import FaceError, HyperNetError, require
from ...faces import Box, Detector, Square, cut_out, in_order, oval, rivals, square_of
from ...files.atomic import leftovers, replacing, sweep, write_bytes, write_text
from ...files.fields import as_type
from ...files.names import made_portable, portable
from ...files.reading import GARBLED, opened, reason
from ...images import resize_to_cover
from ...prompt import require_text
from .photos import (
    MASK,
    PREPARED,
    SUFFIXES,
    WORDS,
    Person,
    Photo,
    Place,
    find_people,
    in_threads,
    is_of_shape,
    read_bytes,
)
from .shards import Files, FolderWriter, Keyed, ShardWriter

TABLE, REPORT = "photos.csv", "report.png"  # beside the photos
METADATA = "metadata.jsonl"  # of a folder of pictures as Hugging Face's datasets read it
REASONS = ("unreadable", "mask of other shape", "no face", "several faces", "tiny", "blurred", "double")
DOUBLE = 0.01  # mean difference of two small copies, of the range of a colour
SMALL = 16  # side of these copies, pixels
CHUNK = 64  # people at once
_MOST_SIDE = 8192  # pixels; sharpness is measured at the smallest one
_MOST_NAME = 200  # bytes of a person's name, to which numbers and endings are added
_SHEET, _TILE, _LABEL = (8, 12), 112, 14  # columns and most rows of the contact sheet; pixels
_INK, _DROPPED, _PAPER = (30, 30, 30), (190, 30, 30), (255, 255, 255)


class Unusable(Exception):
    """A photo is dropped for one of `REASONS`."""


class Cut(NamedTuple):
    """What is kept of a picture, and where that shows the face, (side, side), if known."""

    square: Square
    mask: Tensor | None = None


Cutter = Callable[[Tensor], Cut]  # of a picture (3, H, W) in 0..1; raises `Unusable`


@dataclass(frozen=True)
class Checks:
    """Which photos are kept.

    Attributes:
        size: side that larger squares are reduced to, pixels.
        smallest: least side of a square, pixels.
        least_sharpness: least share of a photo's contrast in its finest details; 0 keeps blurred ones. Of 13 photographs
            at 256 pixels, sharp ones had 0.04 to 0.18, twice enlarged ones 0.019 to 0.044, four times at most 0.018.

    Raises:
        HyperNetError: a number makes no sense.
    """

    size: int = 512
    smallest: int = 256
    least_sharpness: float = 0.018

    def __post_init__(self) -> None:
        for name in ("size", "smallest"):
            value = getattr(self, name)
            require(2 <= value <= _MOST_SIDE, name, f"from 2 to {_MOST_SIDE:,}", value, HyperNetError)
        require(0 <= self.least_sharpness <= 1, "least_sharpness", "from 0 to 1", self.least_sharpness, HyperNetError)


class Seen(NamedTuple):
    """A photo as the report has it: its person and file, why it was dropped or "", side, sharpness, a small picture."""

    person: str
    file: str
    reason: str
    side: int
    sharpness: float
    tile: Tensor | None  # (3, _TILE, _TILE)


class _Read(NamedTuple):
    """A photo that has passed all checks but the one for doubles."""

    seen: Seen
    files: Files  # ending → contents
    small: Tensor  # (3, SMALL, SMALL)
    hash: str


def _centre(picture: Tensor) -> Cut:
    height, width = picture.shape[-2:]
    side = min(height, width)
    return Cut(Square((width - side) // 2, (height - side) // 2, side))


def _around_face(detector: Detector) -> Cutter:
    """Cuts to the only face, or the one that is much larger than the others."""
    turn = Lock()  # OpenCV's detectors take one picture at a time

    def cut(picture: Tensor) -> Cut:
        with turn:
            boxes = detector(picture)
        found = in_order(boxes, "largest first", *picture.shape[-2:])
        if not found:
            raise Unusable("no face")
        if rivals(found):
            raise Unusable("several faces")
        return _around(found[0])

    return cut


def _around(face: Box) -> Cut:
    try:
        square = square_of(face)
    except FaceError as error:
        raise Unusable("tiny") from error
    return Cut(square, oval(face, square))


def sharpness(square: Tensor, size: int) -> float:
    """The share of a square's (3, S, S) contrast that is lost where it is reduced from ``size`` to half of that."""
    grey = resize_to_cover(square.mean(0, keepdim=True)[None], (size, size))
    half = functional.interpolate(grey, scale_factor=0.5, mode="bicubic", antialias=True)
    coarse = functional.interpolate(half, (size, size), mode="bicubic")
    return float((grey - coarse).std() / grey.std().clamp(min=1e-3))


def prepare(
    source: Path, into: Path, checks: Checks, detector: Detector | None = None, shard_bytes: int = 0,
    report: Callable[[int], None] | None = None,
) -> Counter[str]:  # fmt: skip
    """Write the photos of a folder that can be used into ``into/photos``, and ``report.png`` and ``photos.csv`` beside.

    Args:
        source: a sub-folder for each person, single photos, or shards.
        into: a folder that is empty, not there yet, or of a command that was stopped.
        checks: what is dropped.
        detector: finds the face that a photo is cut to; None keeps the central square.
        shard_bytes: size of the shards; 0 writes a folder for each person.
        report: called with the number of people after every few.

    Returns:
        How many photos were kept, under "kept", and dropped, under `REASONS`; and "people", who have any left.

    Raises:
        HyperNetError: if there are no photos, ``into`` holds something, or nothing is left.
    """
    people = find_people(source)
    words, names = _metadata(source), _names(people)
    if words and words.keys().isdisjoint(portable(str(photo.path)) for own in people for photo in own.photos):
        raise HyperNetError(
            f"{source / METADATA} names no photo of {source}, but {min(words)}. Give file names as seen from that folder: "
            "anna/1.jpg. Photos in shards have their words beside them."
        )
    unfinished, finished = into / "photos.partial", into / "photos"
    held = list(into.iterdir()) if into.exists() else []
    if unfinished in held and _is_ours(unfinished, held):
        sweep(into)  # of a command that was stopped
        rmtree(unfinished)
    elif held:
        raise HyperNetError(f"{into} holds something already. Give --into a new folder, or delete that one.")
    unfinished.mkdir(parents=True)
    cut, name = (_centre, "centre") if detector is None else (_around_face(detector), "face")
    write_text(unfinished / PREPARED, json.dumps({"cut": name}) + "\n")
    counted: Counter[str] = Counter()
    sheet = _Sheet()
    rows, hashes = io.StringIO(newline=""), set[str]()
    table = csv.writer(rows, lineterminator="\n")
    table.writerow(["person", "file", "dropped", "side", "sharpness"])
    with ShardWriter(unfinished, shard_bytes) if shard_bytes else FolderWriter(unfinished) as writer:
        for person, photos in _read(people, words, checks, cut, report):
            kept: list[_Read] = []
            for own in photos:
                seen = own.seen if isinstance(own, _Read) else own
                if isinstance(own, _Read):
                    if own.hash in hashes or any(_alike(own.small, other.small) for other in kept):
                        seen = seen._replace(reason="double")
                    else:
                        hashes.add(own.hash)
                        kept.append(own)
                counted[seen.reason or "kept"] += 1
                table.writerow([seen.person, seen.file, seen.reason, seen.side, f"{seen.sharpness:.4f}"])
                sheet.add(seen)
            counted["people"] += bool(kept)
            writer.add(_keyed(names[person.name], person, kept))
    write_bytes(into / TABLE, rows.getvalue().encode("utf-8", "backslashreplace"))  # names may be no text
    with replacing(into / REPORT) as temporary:
        sheet.image().save(temporary, "PNG")
    unfinished.rename(finished)  # now that nothing of it is missing
    if not counted["kept"]:
        raise HyperNetError(
            f"None of the photos of {source} can be used: {dropped(counted)}. {into / TABLE} has the size and "
            f"sharpness of each. Delete {into} and change --smallest ({checks.smallest}) or --least-sharpness "
            f"({checks.least_sharpness}), or take other photos."
        )
    return counted


def _is_ours(unfinished: Path, held: Sequence[Path]) -> bool:
    """Whether a stopped command has left the folder: it writes `PREPARED` before any photo. An empty one is nobody's.

    Args:
        unfinished: the folder.
        held: everything beside it, which may be what the command writes last.
    """
    if unfinished.is_symlink() or not unfinished.is_dir():
        return False
    if (unfinished / PREPARED).is_file():
        return all(path in (unfinished, *leftovers(path.parent)) or path.name in (TABLE, REPORT) for path in held)
    return held == [unfinished] and not any(unfinished.iterdir())


def dropped(counted: Counter[str]) -> str:
    """How many photos were dropped for each reason, in words."""
    return ", ".join(f"{counted[reason]:,} {reason}" for reason in REASONS if counted[reason]) or "none"


def _read(
    people: Sequence[Person],
    words: dict[str, str],
    checks: Checks,
    cut: Cutter,
    report: Callable[[int], None] | None,
) -> Iterator[tuple[Person, list[Seen | _Read]]]:
    """Everybody with their photos, read on all cores."""
    for first in range(0, len(people), CHUNK):
        some = people[first : first + CHUNK]
        photos = [(person, photo) for person in some for photo in person.photos]
        done = iter(in_threads(lambda own: _checked(*own, words, checks, cut), photos))
        for person in some:
            yield person, [next(done) for _ in person.photos]
        if report is not None:
            report(len(some))


def _checked(person: Person, photo: Photo, words: dict[str, str], checks: Checks, cut: Cutter) -> Seen | _Read:
    seen = Seen(person.name, str(photo.path), "", 0, 0.0, None)
    try:
        picture = photo.whole()
        white = None if photo.mask is None else Photo(photo.mask).whole(ground="black")[:1]
    except HyperNetError:
        return seen._replace(reason="unreadable")
    seen = seen._replace(tile=resize_to_cover(picture[None], (_TILE, _TILE))[0])
    if white is not None:
        if not is_of_shape(white.shape[1:], picture.shape[1:]):
            return seen._replace(reason="mask of other shape")
        white = resize_to_cover(white[None], (picture.shape[1], picture.shape[2]))[0]
    try:
        square, mask = cut(picture)
    except Unusable as error:
        return seen._replace(reason=str(error))
    pixels, side = cut_out(picture, square), square.side
    tile = resize_to_cover(pixels[None], (_TILE, _TILE))[0]
    seen = seen._replace(side=side, sharpness=sharpness(pixels, checks.smallest), tile=tile)
    if side < checks.smallest:
        return seen._replace(reason="tiny")
    if seen.sharpness < checks.least_sharpness:
        return seen._replace(reason="blurred")
    original, size = read_bytes(photo.path), min(side, checks.size)
    is_whole = square == (0, 0, size) and picture.shape[-2:] == (size, size) and _is_upright(original)
    files = {_ending(photo.path): original} if is_whole else {".jpg": _encoded(pixels, size, "JPEG")}
    if said := photo.words or words.get(portable(seen.file), ""):
        files[WORDS] = f"{said}\n".encode()
    mask = mask if white is None else cut_out(white, square)[0]
    if mask is not None:
        files[MASK] = _encoded(mask.expand(3, -1, -1), size, "PNG")
    return _Read(seen, files, resize_to_cover(pixels[None], (SMALL, SMALL))[0], sha256(original).hexdigest())


def _names(people: Sequence[Person]) -> dict[str, str]:
    """What everybody is called on disk: names that stay inside of the folder and differ on every system."""
    found: dict[str, str] = {}
    taken = set[str]()
    for person in people:
        made = made_portable(person.name, _MOST_NAME)
        # "anna.mask.png" would be a mask, and a folder "anna.jpg" may be the name of anna's only photo.
        made += "_" if made.lower().endswith((".mask", WORDS, PREPARED, *SUFFIXES)) else ""
        names = (made if number == 1 else f"{made}_{number}" for number in count(1))
        found[person.name] = next(name for name in names if name.casefold() not in taken)
        taken.add(found[person.name].casefold())
    return found


def _keyed(name: str, person: Person, kept: Sequence[_Read]) -> list[Keyed]:
    """The photos of a person under the names they get."""
    if len(person.photos) == 1:
        return [(name, own.files) for own in kept]
    return [(f"{name}/{number:04}", own.files) for number, own in enumerate(kept)]


def _alike(one: Tensor, other: Tensor) -> bool:
    return float((one - other).abs().mean()) < DOUBLE


def _is_upright(contents: bytes) -> bool:
    with Image.open(io.BytesIO(contents)) as file:
        return file.getexif().get(ExifTags.Base.Orientation, 1) == 1


def _ending(place: Place) -> str:
    return PurePosixPath(place.name).suffix.lower()


def _encoded(pixels: Tensor, size: int, kind: str) -> bytes:
    """A square picture (3, S, S) reduced to a size, as a file."""
    small = resize_to_cover(pixels[None], (size, size))[0].movedim(0, -1)
    file = io.BytesIO()
    picture = Image.fromarray((255 * small).round().to(torch.uint8).numpy())
    if kind == "PNG":
        picture.convert("L").save(file, kind)
    else:
        picture.save(file, kind, quality=95, subsampling=0)
    return file.getvalue()


def _metadata(source: Path) -> dict[str, str]:
    """File, `portable`, → its words, of a folder's ``metadata.jsonl``, if there is one.

    Raises:
        HyperNetError: if it cannot be read.
    """
    path = source / METADATA
    if not path.is_file():
        return {}
    found = {}
    try:
        with io.TextIOWrapper(opened(path), encoding="utf-8-sig") as file:
            for line in file:  # splitlines knows further ends of lines
                if line.strip():
                    row = json.loads(line)
                    words = as_type(row.get("text", row.get("caption")), str | None, "text")
                    found[portable(str(source / row["file_name"]))] = require_text((words or "").strip())
    except (OSError, *GARBLED) as error:
        raise HyperNetError(
            f"{path} cannot be read ({reason(error)}): expected lines such as "
            '{"file_name": "anna/1.jpg", "text": "smiling"}. Correct or remove it.'
        ) from error
    return found


class _Sheet:
    """A contact sheet: a photo of each of the first people, then of those that were dropped, with the reason."""

    def __init__(self) -> None:
        self.kept: list[Seen] = []
        self.dropped: list[Seen] = []

    def add(self, seen: Seen) -> None:
        """Take a photo, if there is room."""
        columns, rows = _SHEET
        own = self.dropped if seen.reason else self.kept
        is_new = seen.reason or not own or own[-1].person != seen.person
        if is_new and seen.tile is not None and len(own) < columns * rows // 2:
            own.append(seen)

    def image(self) -> Image.Image:
        """The sheet."""
        columns = _SHEET[0]
        rows = [own[i : i + columns] for own in (self.kept, self.dropped) for i in range(0, len(own), columns)]
        sheet = Image.new("RGB", (columns * _TILE, max(1, len(rows)) * (_TILE + _LABEL)), _PAPER)
        draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
        for i, row in enumerate(rows):
            for j, seen in enumerate(row):
                if seen.tile is None:
                    continue
                pixels = (255 * seen.tile.movedim(0, -1)).round().to(torch.uint8)
                place = (j * _TILE, i * (_TILE + _LABEL))
                sheet.paste(Image.fromarray(pixels.numpy()), place)
                label, ink = (seen.reason, _DROPPED) if seen.reason else (seen.person[:18], _INK)
                draw.text((place[0] + 2, place[1] + _TILE), label, ink, font)
        return sheet
