"""Files of a few people each: a kill loses at most one of them, and any number of processes can share the work."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import HyperNetError
from .photos import Person


@dataclass(frozen=True)
class Group:
    """A few people and their file.

    Attributes:
        number: from 0.
        people: whom.
        path: of the file.
        settings: with which it is made, as JSON.
    """

    number: int
    people: Sequence[Person]
    path: Path
    settings: str

    @property
    def header(self) -> dict[str, str]:
        """The metadata of the file."""
        return {"settings": self.settings, "names": json.dumps([person.name for person in self.people])}

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Write the file atomically."""
        partial = self.path.with_suffix(".partial")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, self.header)
        os.replace(partial, self.path)

    def check(self) -> None:
        """Compare the file that is there with what would be written.

        Raises:
            HyperNetError: if settings or people are others.
        """
        with safe_open(self.path, "pt") as file:
            found = file.metadata()
        if any(found.get(name) != value for name, value in self.header.items()):
            raise HyperNetError(
                f"{self.path} was made with other settings, people, or another base model or image encoder. Use another "
                "--folder, or delete it."
            )


def missing_groups(
    folder: Path,
    people: Sequence[Person],
    settings: Mapping[str, Any],
    group: int,
    share: tuple[int, int] = (0, 1),
    report: Callable[[int, int], None] | None = None,
) -> Iterator[Group]:
    """The groups that this process has still to make; finished ones are checked and left alone.

    Args:
        folder: receives ``group_00000.safetensors`` and on.
        people: everybody.
        settings: of all groups.
        group: people in each.
        share: (rank, processes): this process takes every processes-th group.
        report: called with finished people and all, after every group of this process.

    Raises:
        HyperNetError: if the folder holds groups of other settings or people.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stamp = json.dumps(settings, sort_keys=True)
    numbers = range(-(-len(people) // group))
    for number in numbers[share[0] :: share[1]]:
        own = people[number * group : (number + 1) * group]
        made = Group(number, own, folder / f"group_{number:05}.safetensors", stamp)
        if made.path.exists():
            made.check()
        else:
            yield made
        if report is not None:
            report(number * group + len(own), len(people))


def group_paths(folder: Path) -> list[Path]:
    """The finished files of a folder, in order."""
    return sorted(folder.glob("group_*.safetensors"))
