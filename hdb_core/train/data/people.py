"""What the stage precompute keeps of each person: the photos' latents, and the LiDB that was fitted to them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...basis import BasisRecipe
from ...errors import HyperNetError
from ...layout import Layout
from ...lidb import Factors
from ..base.model import BaseModel
from ..fit import Fitter
from .groups import group_paths, missing_groups, opened, read_header, whole
from .latents import encode
from .photos import Person

IDENTITY = "identity of the base model"  # in a group's settings


@dataclass(frozen=True)
class EncodedPerson:
    """A person as the training has them in memory.

    Attributes:
        person: with the photos on disk.
        latents: (N, C, h, w) float16 of the photos.
        up: (L, b, R) float32, fitted on the shared down side; None if the person was not fitted.
    """

    person: Person
    latents: Tensor
    up: Tensor | None = None


def precompute(
    base: BaseModel,
    people: Sequence[Person],
    folder: Path,
    image_size: int,
    fitter: Fitter | None = None,
    group: int = 32,
    share: tuple[int, int] = (0, 1),
    report: Callable[[int], None] | None = None,
) -> None:
    """Encode the photos of all people and fit their LiDBs, a group of people at once; finished groups are left alone.

    Args:
        base: the frozen model.
        people: whom.
        folder: receives ``group_00000.safetensors`` and on.
        image_size: side of the square that photos are cut to, pixels.
        fitter: of the LiDBs; None fits no one, and takes groups with and without fits.
        group: people in a file, who are fitted together.
        share: (rank, processes): this process takes every processes-th group.
        report: called after every group of this process with the number of its people.

    Raises:
        HyperNetError: if a photo cannot be read, or the folder holds groups of other settings.
    """
    settings: dict[str, Any] = {"image_size": image_size, "group": group}
    settings["base model"] = base.denoiser.layout.without_convolutions().hash
    settings[IDENTITY] = base.identity
    settings["fit"] = None if fitter is None else fitter.fields()
    for missing in missing_groups(folder, people, settings, group, share, report):
        photos = [encode(base, person, image_size) for person in missing.people]
        tensors = {"latents": torch.cat([own.latents for own in photos]).half().cpu()}
        tensors["counts"] = torch.tensor([len(own.latents) for own in photos])
        if fitter is not None:
            tensors["up"] = fitter.fit(photos, torch.Generator().manual_seed(missing.number))
        missing.write(tensors)


def read_people(folder: Path, people: Sequence[Person], basis: BasisRecipe, layout: Layout) -> Iterator[EncodedPerson]:
    """All that `precompute` wrote, in the order of the groups; people fitted in another basis or layout as not fitted.

    Groups of other people are passed over: a run that shares the folder may have more of them.

    Raises:
        HyperNetError: if nothing is there, a file is damaged, or a person is no longer among ``people`` or there twice.
    """
    known = {person.name: person for person in people}
    paths, shapes, places = group_paths(folder), dict[str, torch.Size](), dict[str, Path]()
    if not paths:
        raise HyperNetError(f"{folder} holds no latents. Run the stage precompute first.")
    for path in paths:
        settings, names, _ = read_header(path)
        if known.keys().isdisjoint(names):
            continue
        with opened(path) as file:
            tensors, fit = whole(file), settings["fit"] or {}
            # What was fitted in other coordinates says nothing here.
            fits = (fit.get("basis"), fit.get("layout")) == (json.loads(json.dumps(basis.fields())), layout.hash)
            up: Any = tensors["up"] if fits else [None] * len(names)
            if fits and (up.ndim, *up.shape[1:3]) != (4, len(layout.layers), basis.up_dim):
                raise ValueError("fitted people of another shape")
            encoded = tensors["latents"]
            if encoded.ndim not in (4, 5) or encoded.dtype != torch.float16:  # 5 of a video model
                raise ValueError("latents of another shape or type")
            for what, own in (("latents", encoded), *((("fitted people", up),) if fits else ())):
                if 0 in own.shape or shapes.setdefault(what, own.shape[1:]) != own.shape[1:]:
                    raise ValueError(f"{what} of another shape than those of {paths[0].name}")
            latents = encoded.split(tensors["counts"].tolist())
            for name, own, fitted in zip(names, latents, up, strict=True):
                if name not in known or len(known[name].photos) != len(own):
                    raise HyperNetError(
                        f"The photos of {name!r} have changed since precompute. Start a new run folder."
                    )
                if places.setdefault(name, path) != path:
                    raise HyperNetError(
                        f"{path} holds {name!r}, and so does {places[name].name}. Move it elsewhere if it is a copy."
                    )
                yield EncodedPerson(known[name], own, fitted)


def are_fitted(people: Sequence[EncodedPerson]) -> bool:
    """Whether every one of them was fitted."""
    return all(person.up is not None for person in people)


def stacked(people: Sequence[EncodedPerson], down: Tensor) -> Factors:
    """The fitted factors of B people, with the shared down side (L, R, a); all of them must be fitted."""
    up = torch.stack([person.up for person in people if person.up is not None])
    return Factors(down.expand(len(people), -1, -1, -1), up.to(down))
