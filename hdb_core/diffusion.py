"""The diffusion loss of a frozen model: what the host of a training provides, noise levels, and a scaled backward pass."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .errors import FinetuneError, require
from .layout import Layout

# A power of two: exact in float32 and bfloat16, and keeps float16 gradients above underflow.
GRAD_SCALE = 1024.0
# native: by the error of what the model predicts, which for ε says little about a person where there is much noise.
# v: by the error of v, whatever the model predicts; the levels that decide on colours and shapes then have their part.
# Source of v: Salimans & Ho, Progressive Distillation, arXiv 2202.00512 (their SNR + 1 weighting).
WEIGHTINGS = ("native", "v")


class Denoiser(Protocol):
    """The frozen model, as the host side provides it. All calls run with autograd on and the adapters attached."""

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """Layer name → module, from `layout.find_targets`."""

    @property
    def layout(self) -> Layout:
        """`layout.layout_of` the same modules."""

    def encode_prompts(self, prompts: Sequence[str]) -> Any:
        """Conditioning for len(prompts) samples, differentiable with respect to the text layers' adapters.

        Prompts repeat: encode each distinct one once and repeat its rows.
        """

    def sigmas(self) -> Tensor:
        """The schedule table (T,), ascending, float32."""

    def add_noise(self, latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """The noisy latents (B, C, h, w) at `sigma` (B,); no argument is changed."""

    def denoise(self, noisy: Tensor, sigma: Tensor, conditioning: Any) -> Tensor:
        """The prediction of the clean latents (B, C, h, w), float32, in model space, differentiable."""

    def loss_weight(self, sigma: Tensor) -> Tensor:
        """(B,): turns the squared error of clean latents into that of the model's native target.

        1/σ² for ε and flow models, (σ² + σ_d²)/(σ² σ_d²) for v and EDM models, 1 for x0 models.
        """


class Batch(NamedTuple):
    """The (noise, timestep) pairs of one step."""

    latents: Tensor  # (B, C, h, w)
    noise: Tensor  # (B, C, h, w)
    sigma: Tensor  # (B,)
    mask: Tensor  # (B, 1, h, w), mean 1 for every sample
    weight: Tensor  # (B,), of each sample in the loss


@dataclass(frozen=True)
class NoiseLevels:
    """The noise levels that a training draws from, and how they count.

    Attributes:
        min_timestep: lower end, as a fraction of the schedule.
        max_timestep: upper end. Where there is nearly nothing but noise, a photo teaches its colours and its background
            rather than a face.
        weighting: one of `WEIGHTINGS`.

    Raises:
        FinetuneError: if there is no such weighting, or no part of the schedule between the two ends.
    """

    min_timestep: float = 0.0
    max_timestep: float = 1.0
    weighting: str = "v"

    def __post_init__(self) -> None:
        require(self.weighting in WEIGHTINGS, "weighting", " or ".join(WEIGHTINGS), self.weighting, FinetuneError)
        low, high = self.min_timestep, self.max_timestep
        require(0 <= low < high <= 1, "min_timestep, max_timestep", "0 ≤ min < max ≤ 1", (low, high), FinetuneError)

    def of(self, sigmas: Tensor) -> Tensor:
        """The levels of a schedule table (T,) between the two ends, at least one."""
        return sigmas[math.floor(self.min_timestep * len(sigmas)) : math.ceil(self.max_timestep * len(sigmas))]

    def weighted(self, denoiser: Denoiser, batch: Batch) -> Batch:
        """The batch with each sample weighted by its noise level."""
        if self.weighting == "native":
            return batch
        return batch._replace(weight=batch.weight * (1 + batch.sigma**-2) / denoiser.loss_weight(batch.sigma))


def draw(sigmas: Tensor, latents: Tensor, weight: Tensor, generator: torch.Generator) -> Batch:
    """One stratified noise level (T,) and one noise for each of the latents (B, C, h, w), without a mask."""
    count = len(latents)
    strata = torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)
    index = (strata / count * len(sigmas)).long().clamp(max=len(sigmas) - 1)
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    return Batch(latents, noise, sigmas[index.to(sigmas.device)], torch.ones_like(latents[:, :1]), weight)


def diffusion_loss(denoiser: Denoiser, batch: Batch, conditioning: Any) -> Tensor:
    """The weighted error of the model's native target, a scalar."""
    return weighted_mean(squared_error(denoiser, batch, conditioning), batch)


def squared_error(denoiser: Denoiser, batch: Batch, conditioning: Any) -> Tensor:
    """The squared error of the model's native target, (B, C, h, w) float32, without the batch's mask and weights."""
    noisy = denoiser.add_noise(batch.latents, batch.noise, batch.sigma)
    denoised = denoiser.denoise(noisy, batch.sigma, conditioning)
    return denoiser.loss_weight(batch.sigma)[:, None, None, None] * (denoised.float() - batch.latents).square()


def weighted_mean(error: Tensor, batch: Batch) -> Tensor:
    """The scalar of an error (B, C, h, w) under the batch's mask and weights."""
    return weighted_errors(error, batch).sum()


def weighted_errors(error: Tensor, batch: Batch) -> Tensor:
    """What each sample adds to `weighted_mean`, (B,)."""
    return batch.weight * (error * batch.mask).mean((1, 2, 3))


def backward(losses: Iterable[Tensor], parameters: Iterable[Tensor]) -> Tensor:
    """Fill the gradients of float32 parameters from the sum of losses whose model may compute in float16; that sum."""
    seen = []
    for loss in losses:
        (loss * GRAD_SCALE).backward()
        seen.append(loss.detach())
    for gradient in (p.grad for p in parameters if p.grad is not None):
        gradient.div_(GRAD_SCALE)
    return torch.stack(seen).sum()
