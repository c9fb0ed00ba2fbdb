"""Files of a few people each: a kill loses at most one of them, and any number of processes can share the work."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ...errors import HDBError, HyperNetError
from ...files.atomic import write_bytes
from ...files.container import checksum
from ...files.reading import GARBLED, reason, regular
from .photos import Person, Place


@dataclass(frozen=True)
class Group:
    """A few people and their file.

    Attributes:
        number: from 0.
        people: whom.
        path: of the file.
        settings: with which it is made, as JSON takes them; None is one that does not matter.
    """

    number: int
    people: Sequence[Person]
    path: Path
    settings: Mapping[str, Any]

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Write the file atomically."""
        names = [person.name for person in self.people]
        header = {
            "settings": json.dumps(self.settings, sort_keys=True),
            "names": json.dumps(names),
            "photos": self._photos(),
        }
        stored = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        header["checksum"] = checksum(header, stored)
        write_bytes(self.path, save(stored, header))

    def check(self) -> None:
        """Compare the file that is there with what would be written.

        Raises:
            HyperNetError: if settings or people are others.
        """
        settings, names, photos = read_header(self.path)
        wanted = {name: value for name, value in self.settings.items() if value is not None}
        other = differing(wanted, {name: settings.get(name) for name in wanted})
        if names != [person.name for person in self.people]:
            other.append("people")
        if photos != self._photos():
            other.append("photos")
        if other:
            raise HyperNetError(
                f"{self.path} was made with other settings: {', '.join(other)}. Give the settings that it was "
                "made with, or use another run folder."
            )

    def _photos(self) -> str:
        """A checksum of the names and sizes of the photos' files, whether in folders or in shards."""
        files = [
            (PurePosixPath(photo.path.name).name, _size(photo.path))
            for person in self.people
            for photo in person.photos
        ]
        return sha256(json.dumps(files).encode()).hexdigest()


def _size(place: Place) -> int:
    """The bytes of a file; 0 if there is none, which whoever reads it says."""
    if isinstance(place, Path):
        return place.stat().st_size if place.is_file() else 0
    return place.size


def missing_groups(
    folder: Path,
    people: Sequence[Person],
    settings: Mapping[str, Any],
    group: int,
    share: tuple[int, int] = (0, 1),
    report: Callable[[int], None] | None = None,
) -> Iterator[Group]:
    """The groups that this process has still to make; finished ones are checked and left alone.

    Args:
        folder: receives ``group_00000.safetensors`` and on.
        people: everybody.
        settings: of all groups; those of None are not compared with finished ones.
        group: people in each.
        share: (rank, processes): this process takes every processes-th group.
        report: called after every group of this process with the number of its people.

    Raises:
        HyperNetError: if the folder holds groups of other settings or people.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(-(-len(people) // group))[share[0] :: share[1]]:
        own = people[number * group : (number + 1) * group]
        made = Group(number, own, folder / f"group_{number:05}.safetensors", settings)
        if made.path.exists():
            made.check()
        else:
            yield made
        if report is not None:
            report(len(own))


def group_paths(folder: Path) -> list[Path]:
    """The finished files of a folder, in order."""
    return sorted(folder.glob("group_[0-9]*.safetensors"))


def read_header(path: Path) -> tuple[dict[str, Any], list[str], str]:
    """The settings that a file was made with, its people's names, and the checksum of their photos.

    Raises:
        HyperNetError: if it is no such file.
    """
    with opened(path) as file:
        header = file.metadata()
        settings, names = dict(json.loads(header["settings"])), list(json.loads(header["names"]))
        if not all(isinstance(name, str) for name in names):
            raise ValueError("names that are no text")
        return settings, names, header["photos"]


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A finished file as `safe_open` gives it.

    Raises:
        HyperNetError: if it cannot be read, or holds something else than what is asked of it.
    """
    try:
        with safe_open(regular(path), "pt") as file:
            yield file
    except HDBError:
        raise
    except (OSError, *GARBLED) as error:
        raise HyperNetError(
            f"{path} cannot be read ({reason(error)}). Delete it: the next run makes it again."
        ) from error


def whole(file: Any) -> dict[str, Tensor]:
    """All tensors of an `opened` file; they stay on the disk.

    Raises:
        LookupError, ValueError: if they are not those that were written.
    """
    header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if checksum(header, tensors) != header["checksum"]:
        raise ValueError("its contents do not match its checksum")
    return tensors


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The names under which two settings hold other values, as JSON keeps them."""
    both = [json.loads(json.dumps(settings)) for settings in (one, other)]
    return sorted(name for name in {**both[0], **both[1]} if both[0].get(name) != both[1].get(name))
