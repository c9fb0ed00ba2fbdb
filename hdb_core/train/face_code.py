"""The face code: the principal components of a person's portrait, each in units of its standard deviation.

The small shapes of a face count in it as much as the colours. Training takes it from the portrait itself; the code of
any photo is predicted from its face tokens, linearly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import HyperNetError
from ..hypernet.encoder import initialised
from .data.people import EncodedPerson
from .data.photos import in_threads

RIDGES = (1.0, 10.0, 100.0, 1000.0, 10000.0)
MOST_PHOTOS = 8192  # that components and maps are found from
_COMPONENTS = 160
_LEAST_SPREAD = 1e-3  # of a component, as a share of the first one's


@dataclass(frozen=True)
class Components:
    """Principal components of photos.

    Attributes:
        mean: (P,) of the latents, flat.
        directions: (P, K), orthonormal columns, the largest number of each positive: a training that goes on finds
            the same codes as before, and not their opposites.
        variance: (K,), falling.
    """

    mean: Tensor
    directions: Tensor
    variance: Tensor

    @classmethod
    def of(cls, latents: Tensor) -> Components:
        """The components of photos (N, C, h, w); the global generator is left as it was.

        Raises:
            HyperNetError: if the latents are not finite.
        """
        flat = latents.cpu().float().flatten(1)  # where the seed counts
        if not bool(flat.isfinite().all()):
            raise HyperNetError(
                "The latents of some photos hold NaN or infinity. Delete the folder people, and give another model or VAE if "
                "it makes the same again."
            )
        mean, count = flat.mean(0), min(_COMPONENTS, *flat.shape)
        with initialised(0):
            _, singular, directions = torch.svd_lowrank(flat - mean, count, niter=4)
        directions = directions * directions.gather(0, directions.abs().argmax(0, keepdim=True)).sign()
        found = mean, directions, singular.square() / len(flat)
        return cls(*(tensor.to(latents.device) for tensor in found))

    def codes(self, latents: Tensor, count: int) -> Tensor:
        """The first ``count`` components (N, count) of photos (N, C, h, w), each in units of its standard deviation.

        Those beyond the number of components are zero, and so are those that only rounding moves: N photos differ in at
        most N - 1 components.
        """
        std = self.variance[:count].sqrt()
        live = std > _LEAST_SPREAD * std[0]
        found = self._of(latents)[:, :count] / torch.where(live, std, 1.0) * live
        return torch.nn.functional.pad(found, (0, count - found.shape[1]))

    def loss(self, predicted: Tensor, latents: Tensor) -> Tensor:
        """The error of components (B, K), each in units of its standard deviation, of photos (B, C, h, w).

        Predicting the mean photo costs 1. Components count alike, but for the smallest, which fade out.
        """
        middle = self.variance[len(self.variance) // 2].clamp(min=_LEAST_SPREAD**2 * self.variance[0])
        weight = 1 / (self.variance + middle)
        error = predicted * self.variance.sqrt() - self._of(latents)
        return (error.square() * weight).sum(1).mean() / (weight * self.variance).sum()

    def _of(self, latents: Tensor) -> Tensor:
        """All components (N, K) of photos (N, C, h, w)."""
        return (latents.float().flatten(1) - self.mean) @ self.directions


def shown_of(person: EncodedPerson, number: int) -> Tensor:
    """The latents (C, h, w) float32 of a photo, each place times the root of how much it counts."""
    latents = person.latents[number].float()
    return latents * person.person.photos[number].region(*latents.shape[-2:]).sqrt()


def codes_of(people: Sequence[EncodedPerson], count: int) -> Tensor:
    """The codes (N, count) float32 of everybody's first photo, which is a portrait where there are some."""
    components, codes = None, []
    for first in range(0, len(people), MOST_PHOTOS):
        shown = torch.stack(in_threads(lambda person: shown_of(person, 0), people[first : first + MOST_PHOTOS]))
        components = components or Components.of(shown)
        codes.append(components.codes(shown, count))
    return torch.cat(codes)


def fit_code(seen: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """The map from tokens to code, by ridge regression.

    Args:
        seen: (N, S), the summed face tokens of one photo of each of N people.
        codes: (N, K) of these people.

    Returns:
        mean (S,) and map (S, K) float32: the code of x is (x − mean) @ map.
    """
    targets = codes.double()
    mean, spread = seen.double().mean(0), seen.double().std(0, correction=0).clamp(min=1e-6)
    inputs = (seen.double() - mean) / spread
    kept = max(1, len(inputs) // 5)

    def error(ridge: float) -> float:
        weights = ridge_weights(inputs[kept:], targets[kept:], ridge)
        return float((inputs[:kept] @ weights - targets[:kept]).square().mean())

    best = ridge_weights(inputs, targets, min(RIDGES, key=error)) / spread[:, None]
    return mean.float(), best.float()


def ridge_weights(inputs: Tensor, targets: Tensor, ridge: float) -> Tensor:
    """The ridge regression (D, K) of centred targets (N, K) on centred inputs (N, D)."""
    if len(inputs) < inputs.shape[1]:
        gram = inputs @ inputs.mT
        return inputs.mT @ torch.linalg.solve(gram + ridge * torch.eye(len(gram)).to(gram), targets)
    gram = inputs.mT @ inputs
    return torch.linalg.solve(gram + ridge * torch.eye(len(gram)).to(gram), inputs.mT @ targets)
