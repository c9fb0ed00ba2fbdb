"""A basis learned from people: the directions of weight changes that the photos of one person agree in.

At the base model, the gradient of the diffusion loss with respect to a layer's weight says what a photo asks of it.
What both halves of a person's photos ask for is the person; clothes, background and noise differ. Summed over people,
the products of the two are therefore the covariance of what persons ask for, and its principal directions, on the
input side and on the output side, are the basis. They are found by subspace iteration: the covariance is only ever
multiplied by a few vectors, and one pass over the people makes one iteration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from ..basis import orthonormal_columns
from ..diffusion import Batch, Denoiser, NoiseLevels, diffusion_loss, draw
from ..errors import BasisError
from ..layout import Layer
from ..prompt import caption
from .data.latents import EncodedPhotos

_LOSS_SCALE = 1024.0  # keeps float16 gradients of weights above underflow, and exact in all else
_OVERSAMPLING = 1.5  # vectors that are iterated, for each one that is kept


@dataclass(frozen=True)
class BasisConfig:
    """How a basis is learned.

    Attributes:
        down_dim: a.
        up_dim: b.
        draws: noise levels for each photo.
        passes: over the people, one iteration each.
        noise: the noise levels.
        prompt: of everybody, with the rare token; a photo's own words follow it.
        group: samples that go through the model at once; fewer need less memory, with the same result.
        seed: of the noise.
    """

    down_dim: int = 100
    up_dim: int = 50
    draws: int = 4
    passes: int = 2
    noise: NoiseLevels = field(default_factory=lambda: NoiseLevels(0.0, 0.8))
    prompt: str = "a [v] face"
    group: int = 32
    seed: int = 0


def learn_basis(
    denoiser: Denoiser, people: Sequence[EncodedPhotos], config: BasisConfig, callback: Callable[[], None] | None = None
) -> dict[str, tuple[Tensor, Tensor]]:
    """The principal directions of what people ask of every layer; see the module's text.

    The directions of a side are mixed by a frozen rotation: they span the same, but Adam, which moves every coordinate
    by about as much, then does not move the weakest direction as far as the strongest.

    Args:
        denoiser: the frozen model; encodes each prompt for its own sample.
        people: two photos of each, or more; of a single one the two halves differ only in their noise.
        config: settings.
        callback: called after every person of every pass.

    Returns:
        Layer name → (down_aux (a', in), up_aux (out, b')), orthonormal float32 on the CPU.

    Raises:
        BasisError: if there are no people, or a gradient is not finite.
    """
    if not people:
        raise BasisError("A basis cannot be learned without people. Set basis.learn_from to 1 or more.")
    layers = denoiser.layout.layers
    device = people[0].latents.device
    inputs = {layer.name: Directions(layer.in_features, config.down_dim, device) for layer in layers}
    outputs = {layer.name: Directions(layer.out_features, config.up_dim, device) for layer in layers}
    with trainable_weights(denoiser):
        for number in range(config.passes):
            for index, person in enumerate(people):
                one, other = (
                    _gradients(denoiser, half, config, 2 * index + i) for i, half in enumerate(person.halves())
                )
                for name, gradient in one.items():
                    inputs[name].add(gradient, other[name])
                    outputs[name].add(gradient.mT, other[name].mT)
                if callback is not None:
                    callback()
            if number + 1 < config.passes:
                for side in (*inputs.values(), *outputs.values()):
                    side.iterate()
    return {
        layer.name: (
            _mixed(inputs[layer.name], layer, "down").mT.contiguous(),
            _mixed(outputs[layer.name], layer, "up"),
        )
        for layer in layers
    }


def held_share(
    denoiser: Denoiser,
    people: Sequence[EncodedPhotos],
    bases: Sequence[Mapping[str, tuple[Tensor, Tensor]]],
    config: BasisConfig,
) -> list[float]:
    """How much of what people ask for each of some bases can give: 1 is all, of the layers together.

    Args:
        denoiser: as for `learn_basis`.
        people: of whom none was learned from.
        bases: each layer name → (down_aux, up_aux).
        config: settings of the noise.
    """
    held, total = [0.0] * len(bases), 0.0
    with trainable_weights(denoiser):
        for index, person in enumerate(people):
            one, other = (_gradients(denoiser, half, config, 2 * index + i) for i, half in enumerate(person.halves()))
            total += sum(float((one[name] * other[name]).sum()) for name in one)
            for i, basis in enumerate(bases):
                for name, (down_aux, up_aux) in basis.items():
                    first, second = (up_aux.T @ gradients[name] @ down_aux.T for gradients in (one, other))
                    held[i] += float((first * second).sum())
    return [value / total for value in held]


class Directions:
    """The principal directions of one side of a layer, by subspace iteration.

    Args:
        size: of the side.
        dim: how many are wanted; of a smaller side all.
        device: of the gradients.
    """

    def __init__(self, size: int, dim: int, device: torch.device) -> None:
        self.dim = min(size, dim)
        count = min(size, round(_OVERSAMPLING * dim))
        generator = torch.Generator().manual_seed(0)
        self.vectors = torch.linalg.qr(torch.randn(size, count, generator=generator))[0].to(device)
        self.product = torch.zeros_like(self.vectors)

    def add(self, one: Tensor, other: Tensor) -> None:
        """Add a person's part of the covariance times the vectors: of the gradients (…, size) of two halves."""
        self.product += one.mT @ (other @ self.vectors) + other.mT @ (one @ self.vectors)

    def iterate(self) -> None:
        """Go on with what the covariance made of the vectors."""
        if not bool(self.product.isfinite().all()):
            raise BasisError("A gradient is NaN or infinite. Check the photos and the model, or use float32.")
        self.vectors = torch.linalg.qr(self.product)[0]
        self.product = torch.zeros_like(self.vectors)

    def principal(self) -> Tensor:
        """(size, dim) float64 on the CPU, orthonormal, the strongest first (Rayleigh-Ritz)."""
        vectors, product = self.vectors.double().cpu(), self.product.double().cpu()
        small = vectors.mT @ product
        return vectors @ torch.linalg.eigh(small + small.mT)[1][:, -self.dim :].flip(1)


def adapted_weights(denoiser: Denoiser) -> dict[str, nn.Parameter]:
    """Layer name → its weight, of a linear layer or a convolution."""
    return {name: cast(nn.Parameter, module.weight) for name, module in denoiser.modules.items()}


@contextmanager
def trainable_weights(denoiser: Denoiser) -> Iterator[None]:
    """The adapted layers' weights get gradients within, and have none afterwards."""
    weights = adapted_weights(denoiser).values()
    try:
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(False)
            weight.grad = None


def _gradients(denoiser: Denoiser, photos: EncodedPhotos, config: BasisConfig, seed: int) -> Mapping[str, Tensor]:
    """Layer name → the gradient (out, in) float32 of the mean loss of some photos."""
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + seed)
    latents, masks = (t.repeat(config.draws, *[1] * (t.ndim - 1)) for t in (photos.latents, photos.masks))
    weight = torch.full((len(latents),), 1 / len(latents), device=latents.device)
    levels = config.noise.of(denoiser.sigmas())
    batch = config.noise.weighted(denoiser, draw(levels, latents, weight, generator).under(masks))
    prompts = [caption(config.prompt, words) for words in photos.words] * config.draws
    weights = adapted_weights(denoiser)
    for own in weights.values():
        own.grad = None
    for first in range(0, len(prompts), config.group):
        part = slice(first, first + config.group)
        loss = diffusion_loss(denoiser, Batch(*(t[part] for t in batch)), denoiser.encode_prompts(prompts[part]))
        (loss * _LOSS_SCALE).backward()
    return {name: own.grad.flatten(1).float() / _LOSS_SCALE for name, own in weights.items() if own.grad is not None}


def _mixed(directions: Directions, layer: Layer, side: str) -> Tensor:
    """(size, dim) float32: the principal directions, rotated among themselves."""
    rotation = orthonormal_columns(0, layer.name, f"mix {side}", directions.dim, directions.dim)
    return (directions.principal() @ rotation.double()).float()
