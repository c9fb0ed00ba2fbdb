"""The losses of a hypernetwork on people whom its training has not seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..diffusion import NoiseLevels, draw, weighted_errors
from ..lidb import Factors
from .data.people import stacked
from .predicted import PeopleInBase
from .regression import mean_predictor_loss, regression_loss
from .turns import Turn, ordinary

BATCH = 32  # people at once


@dataclass(frozen=True)
class EvaluateConfig:
    """The stage evaluate.

    Attributes:
        photos: predict people from 1 to this many of their photos.
        draws: noise levels on which each person is measured; more are more exact.
        noise: part of the noise schedule that is measured on, its lower and its upper end, 0 to 1.
    """

    photos: int = 1
    draws: int = 1
    noise: NoiseLevels = field(default_factory=lambda: NoiseLevels(0.1, 1.0))


@torch.no_grad()
def evaluate(
    base: PeopleInBase, net: nn.Module, config: EvaluateConfig, photos: int, iterations: int, seed: int = 0
) -> dict[str, Any]:
    """Losses on everybody's last photo, with the person predicted from others.

    The first photo, which may be a portrait, is one of them only if there is no third.

    Args:
        base: people and base model.
        net: a `FromFaces`.
        config: settings of noise.
        photos: so many to predict from.
        iterations: k.
        seed: of the noise.

    Returns:
        The diffusion loss on the same noise with people's ``own`` prediction, the ``mean`` one and a ``stranger``'s,
        where there are others, and of the ``base`` model alone; ``own_outside`` and so on, where masks are black;
        ``own_of_each``, a number for each person; and if they were fitted, ``regression`` beside that of the
        ``mean_predictor``.
    """
    predicted = _predictions(base, net, photos, iterations)
    chosen = {"own": predicted, "base": Factors(predicted.down, torch.zeros_like(predicted.up))}
    if len(base.people) > 1:
        chosen["mean"] = Factors(*(factor.mean(0, keepdim=True).expand_as(factor) for factor in predicted))
        chosen["stranger"] = Factors(*(factor.roll(1, 0) for factor in predicted))
    each = _errors_of_each(base, chosen, config, torch.Generator().manual_seed(seed))
    losses: dict[str, Any] = {name: float(errors.sum()) for name, errors in each.items()}
    losses["own_of_each"] = [round(float(error) * len(base.people), 5) for error in each["own"]]
    if base.energy is None or base.mean is None:
        return losses
    targets = stacked(base.people, base.down)
    return {"regression": float(regression_loss(predicted, targets, base.energy)),
            "mean_predictor": float(mean_predictor_loss(base.mean, base.energy)), **losses}  # fmt: skip


def _predictions(base: PeopleInBase, net: nn.Module, photos: int, iterations: int) -> Factors:
    """The factors of everybody, predicted in batches."""
    turns = [Turn(i, ordinary(count, photos), count - 1) for i, count in enumerate(base.counts)]
    parts = [turns[i : i + BATCH] for i in range(0, len(turns), BATCH)]
    made = [net(base.read_faces(part), iterations) for part in parts]
    return Factors(*(torch.cat(factors) for factors in zip(*made, strict=True)))


def _errors_of_each(
    base: PeopleInBase, chosen: dict[str, Factors], config: EvaluateConfig, generator: torch.Generator
) -> dict[str, Tensor]:
    """What each person adds to each loss, (people,)."""
    photos = [(i, count - 1) for i, count in enumerate(base.counts)]
    masks = _masks(base, photos)
    each = {name + where: torch.zeros(len(photos)) for where in masks for name in chosen}
    levels = config.noise.of(base.denoiser.sigmas())
    for _ in range(config.draws):
        for first in range(0, len(photos), BATCH):
            rows = slice(first, first + BATCH)
            own = photos[rows]
            weight = torch.full((len(own),), 1 / len(photos) / config.draws, device=base.device)
            batch = config.noise.weighted(base.denoiser, draw(levels, base.latents(own), weight, generator))
            for name, factors in chosen.items():
                error = base.squared_error(Factors(*(f[rows] for f in factors)), batch, own)
                for where, mask in masks.items():
                    each[name + where][rows] += weighted_errors(error, batch.under(mask[rows])).cpu()
    return each


def _masks(base: PeopleInBase, photos: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
    """Suffix of a loss → how much each place counts in it, (people, 1, h, w): the face, and what is outside of masks."""
    masks = {"": base.masks(photos, rest=0.0)}
    outside = (masks[""] == 0).float()
    if bool(outside.any()):
        masks["_outside"] = outside / outside.mean()  # of everybody: photos count by how much of them is outside
    return masks
