"""The diffusion loss of a frozen model: what the host of a training provides, noise levels, and a scaled backward pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .errors import FinetuneError, require
from .layout import Layout

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

    def noise_ratio(self, sigma: Tensor) -> Tensor:
        """(B,): how much noise noisy latents hold for each part of clean ones.

        σ where they are latents + σ · noise, σ/(1 − σ) where they are (1 − σ) · latents + σ · noise (flow models).
        """


class Batch(NamedTuple):
    """The (noise, timestep) pairs of one step."""

    latents: Tensor  # (B, C, h, w), or (B, C, 1, h, w) of a video model: one frame
    noise: Tensor  # as the latents
    sigma: Tensor  # (B,)
    mask: Tensor  # one channel of it, mean 1 for every sample
    weight: Tensor  # (B,), of each sample in the loss

    def under(self, mask: Tensor) -> Batch:
        """The same with a mask (B, 1, h, w) of mean 1."""
        return self._replace(mask=mask.view_as(self.latents[:, :1]))


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
        of_v = 1 + denoiser.noise_ratio(batch.sigma) ** -2
        return batch._replace(weight=batch.weight * of_v / denoiser.loss_weight(batch.sigma))


def draw(sigmas: Tensor, latents: Tensor, weight: Tensor, generator: torch.Generator) -> Batch:
    """One stratified noise level (T,) and one noise for each of the latents (B, C, …), without a mask."""
    count = len(latents)
    strata = torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)
    index = (strata / count * len(sigmas)).long().clamp(max=len(sigmas) - 1)
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    return Batch(latents, noise, sigmas[index.to(sigmas.device)], torch.ones_like(latents[:, :1]), weight)


def diffusion_loss(denoiser: Denoiser, batch: Batch, conditioning: Any) -> Tensor:
    """The weighted error of the model's native target, a scalar."""
    return weighted_mean(squared_error(denoiser, batch, conditioning), batch)


@torch.no_grad()
def answers(
    denoiser: Denoiser, batch: Batch, prompts: Sequence[str], encode: Callable[[Sequence[str]], Any], at_once: int
) -> Tensor:
    """The clean latents (B, C, …) float32 that the model predicts for a batch; without gradients.

    Args:
        denoiser: with whoever is attached.
        batch: of B samples.
        prompts: B.
        encode: prompts to conditioning.
        at_once: as many samples go through the model together.
    """
    noisy = denoiser.add_noise(batch.latents, batch.noise, batch.sigma)
    parts = (slice(first, first + at_once) for first in range(0, len(prompts), at_once))
    return torch.cat([denoiser.denoise(noisy[p], batch.sigma[p], encode(prompts[p])) for p in parts]).float()


def towards(denoiser: Denoiser, batch: Batch, latents: Tensor) -> Batch:
    """The same noisy latents with other clean ones (B, C, …), and the noise that is then in them."""
    nothing = torch.zeros_like(latents)
    noisy = denoiser.add_noise(batch.latents, batch.noise, batch.sigma)
    scale = denoiser.add_noise(nothing, torch.ones_like(latents), batch.sigma)
    noise = (noisy - denoiser.add_noise(latents, nothing, batch.sigma)) / scale
    return batch._replace(latents=latents, noise=noise)


@torch.no_grad()
def euler(denoiser: Denoiser, noise: Tensor, levels: Tensor, denoise: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Latents (B, C, …) float32 without noise, by Euler's method on the noise level, which is deterministic DDIM.

    Args:
        denoiser: the frozen model.
        noise: (B, C, …) of unit variance.
        levels: (S,) noise levels that the model is called at, from the highest down; none follows the last.
        denoise: noisy latents (B, C, …) and a level, a scalar, to clean ones.

    Source: Song et al., Denoising Diffusion Implicit Models, arXiv 2010.02502, with η = 0; in σ, Karras et al., Elucidating
    the Design Space of Diffusion-Based Generative Models, arXiv 2206.00364, appendix C.
    """
    latents = denoiser.add_noise(torch.zeros_like(noise), noise, levels[0].repeat(len(noise)))
    for sigma, following in pairwise([*levels, levels.new_zeros(())]):
        denoised = denoise(latents, sigma)
        latents = denoised + (latents - denoised) * (following / sigma)
    return latents


def squared_error(denoiser: Denoiser, batch: Batch, conditioning: Any) -> Tensor:
    """The squared error of the model's native target, float32 in the shape of the latents, without mask and weights."""
    noisy = denoiser.add_noise(batch.latents, batch.noise, batch.sigma)
    denoised = denoiser.denoise(noisy, batch.sigma, conditioning)
    weight = denoiser.loss_weight(batch.sigma).view(-1, *[1] * (denoised.ndim - 1))
    return weight * (denoised.float() - batch.latents).square()


def weighted_mean(error: Tensor, batch: Batch) -> Tensor:
    """The scalar of an error (B, C, …) under the batch's mask and weights."""
    return weighted_errors(error, batch).sum()


def weighted_errors(error: Tensor, batch: Batch) -> Tensor:
    """What each sample adds to `weighted_mean`, (B,)."""
    return batch.weight * (error * batch.mask).flatten(1).mean(1)


class Gradients(NamedTuple):
    """What came of a backward pass, on the CPU."""

    loss: float
    norm: float  # of all gradients together; not finite if one of them is not
    beside: list[float]  # the scalars that were to be read with them


class LossScale:
    """Backward passes of losses whose model may compute in float16, into gradients of float32 parameters.

    The losses are multiplied by a power of two, which is exact in float32 and bfloat16 and keeps float16 gradients above
    underflow. Where they overflow it is halved, and the same losses are computed again: no step is lost.
    Source: Micikevicius et al., Mixed Precision Training, arXiv 1710.03740, section 3.2.
    """

    def __init__(self, value: float = 2.0**16) -> None:
        self.value = value

    def backward(
        self, losses: Callable[[], Iterable[Tensor]], parameters: Sequence[Tensor], beside: Sequence[Tensor] = ()
    ) -> Gradients:
        """Fill the gradients of a sum of losses; one synchronisation with the device.

        Args:
            losses: computes them, each with a graph of its own.
            parameters: whose gradients are replaced.
            beside: scalars to be read off the device with the loss.
        """
        while True:
            found = self._backward(losses(), parameters, beside)
            if math.isfinite(found.norm) or not math.isfinite(found.loss) or self.value <= 1:
                return found
            self.value /= 2

    def _backward(self, losses: Iterable[Tensor], parameters: Sequence[Tensor], beside: Sequence[Tensor]) -> Gradients:
        for parameter in parameters:
            parameter.grad = None
        seen = []
        for loss in losses:
            (loss * self.value).backward()
            seen.append(loss.detach())
        gradients = [p.grad.div_(self.value) for p in parameters if p.grad is not None]
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        loss, norm_value, *others = torch.stack([torch.stack(seen).sum(), norm, *beside]).tolist()
        return Gradients(loss, norm_value, others)
