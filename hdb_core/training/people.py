"""What training reads of each person: photos, their latents, and the LiDB that was fitted to them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ..basis import BasisRecipe
from ..errors import HyperNetError
from ..lidb import Factors
from .base_model import BaseModel
from .fit import FitConfig, fit_people
from .groups import group_paths, missing_groups
from .photos import Person


@dataclass(frozen=True)
class FittedPerson:
    """Somebody whom `precompute` has seen.

    Attributes:
        person: with the photos on disk.
        latents: (N, C, h, w) float16 of the photos.
        up: (L, b, R) float32, fitted, the down side is the shared one; zero if the person was not fitted.
    """

    person: Person
    latents: Tensor
    up: Tensor


def precompute(
    base: BaseModel,
    people: Sequence[Person],
    folder: Path,
    config: FitConfig,
    image_size: int,
    group: int = 32,
    share: tuple[int, int] = (0, 1),
    report: Callable[[int, int], None] | None = None,
) -> None:
    """Encode the photos of all people and fit their LiDBs, ``group`` people at once; finished groups are left alone.

    Args:
        base: the frozen model.
        people: whom.
        folder: receives ``group_00000.safetensors`` and on.
        config: of the fit.
        image_size: side of the square that photos are cut to, pixels.
        group: people fitted together.
        share: (rank, processes): this process takes every processes-th group.
        report: called with finished people and all, after every group of this process.

    Raises:
        HyperNetError: if a photo cannot be read, or the folder holds groups of other settings.
    """
    settings = asdict(config) | {"basis": config.basis.fields(), "image_size": image_size, "group": group}
    settings["layout"] = base.denoiser.layout.hash
    for missing in missing_groups(folder, people, settings, group, share, report):
        latents = [encode(base, person, image_size) for person in missing.people]
        words = [[photo.words for photo in person.photos] for person in missing.people]
        masks = [regions(person, own) for person, own in zip(missing.people, latents, strict=True)]
        generator = torch.Generator().manual_seed(missing.number)
        up = fit_people(base.denoiser, latents, words, masks, config, generator)
        counts = torch.tensor([len(photos) for photos in latents])
        missing.write({"up": up, "latents": torch.cat(latents).half().cpu(), "counts": counts})


def read_people(folder: Path, people: Sequence[Person], basis: BasisRecipe) -> Iterator[FittedPerson]:
    """All that `precompute` wrote, in the order of the groups; people who were fitted in another basis as not fitted.

    Raises:
        HyperNetError: if nothing is there, or somebody is no longer among ``people``.
    """
    known = {person.name: person for person in people}
    paths = group_paths(folder)
    if not paths:
        raise HyperNetError(f"{folder} holds no fitted people. Run precompute first.")
    for path in paths:
        with safe_open(path, "pt") as file:
            names, settings = (json.loads(file.metadata()[name]) for name in ("names", "settings"))
            up, latents, counts = (file.get_tensor(name) for name in ("up", "latents", "counts"))
        if settings["basis"] != basis.fields():
            up = up.new_zeros(*up.shape[:2], basis.up_dim, 1)  # what was fitted in other coordinates says nothing here
        for name, own_up, own in zip(names, up, latents.split(counts.tolist()), strict=True):
            if name not in known or len(known[name].photos) != len(own):
                raise HyperNetError(
                    f"The photos of {name!r} have changed since precompute. Run it again in a new folder."
                )
            yield FittedPerson(known[name], own, own_up)


def stacked(people: Sequence[FittedPerson], down: Tensor) -> Factors:
    """The fitted factors of B people, with the shared down side (L, R, a)."""
    return Factors(down.expand(len(people), -1, -1, -1), torch.stack([person.up for person in people]).to(down))


def regions(person: Person, latents: Tensor) -> Tensor:
    """How much each place of somebody's photos counts, (N, 1, h, w) float32, beside their latents (N, C, h, w)."""
    return torch.stack([photo.region(*latents.shape[-2:]) for photo in person.photos]).to(latents.device)


def encode(base: BaseModel, person: Person, image_size: int) -> Tensor:
    """Somebody's photos as model-space latents (N, C, h, w) float32 on the model's device."""
    pixels = (photo.pixels(image_size).movedim(-1, 0)[None] for photo in person.photos)
    return torch.cat([base.encode(one) for one in pixels]).to(base.denoiser.device)  # a full VAE needs much memory
