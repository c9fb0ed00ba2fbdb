"""Many people's LiDBs at once: one forward of the frozen model carries another person in every sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..adapters import attach
from ..basis import BasisRecipe, bases_of
from ..errors import FinetuneError
from ..finetune import Batch, Denoiser, backward, between, diffusion_loss, require_noise_levels, weighted
from ..lidb import expand_factors, start_down
from ..prompt import caption


@dataclass(frozen=True)
class FitConfig:
    """How people are fitted. The down side is the shared frozen one, so that people stay comparable.

    Attributes:
        steps: optimiser steps.
        rank: of the people.
        learning_rate: of the up side (Adam).
        weighting: of the noise levels, one of `finetune.WEIGHTINGS`.
        min_timestep: lower end of the noise levels, as a fraction of the schedule.
        max_timestep: upper end.
        prompt: of everybody, with the rare token; a photo's own words follow it.
        basis: of the people.
    """

    steps: int = 40
    rank: int = 1
    learning_rate: float = 0.05
    weighting: str = "v"
    min_timestep: float = 0.1
    max_timestep: float = 1.0
    prompt: str = "a [v] face"
    basis: BasisRecipe = field(default_factory=BasisRecipe)

    def __post_init__(self) -> None:
        require_noise_levels(self.weighting, self.min_timestep, self.max_timestep)


def fit_people(
    denoiser: Denoiser,
    latents: Sequence[Tensor],
    words: Sequence[Sequence[str]],
    masks: Sequence[Tensor],
    config: FitConfig,
    generator: torch.Generator,
    callback: Callable[[int, float], None] | None = None,
) -> Tensor:
    """Fit the up side of P people at once, one photo and noise level of each a step.

    A person's result does not depend on the others but through the noise that is drawn.

    Args:
        denoiser: the frozen model; must encode each prompt for its own sample.
        latents: of each person, (N, C, h, w) photos in the model's latent space; N may differ.
        words: of each person, one text a photo.
        masks: of each person, (N, 1, h, w), how much each place of a photo counts; of mean 1.
        config: settings.
        generator: on the CPU, for noise and noise levels.
        callback: called after every step with its number from 1 and the mean loss.

    Returns:
        up (P, L, b, R) float32 on the CPU.

    Raises:
        FinetuneError: if the loss is not finite.
    """
    count, layers = len(latents), denoiser.layout.layers
    device = latents[0].device
    up = torch.zeros(count, len(layers), config.basis.up_dim, config.rank, device=device, requires_grad=True)
    down = start_down(config.basis, denoiser.layout, config.rank).to(device).expand(count, -1, -1, -1)
    bases = bases_of(config.basis, denoiser.layout, device)
    optimizer = torch.optim.Adam([up], lr=config.learning_rate)
    weight = torch.ones(count, device=device)  # a sum over people: each is its own problem
    levels = between(denoiser.sigmas(), config.min_timestep, config.max_timestep)
    live: dict[str, tuple[Tensor, Tensor]] = {}
    with attach(denoiser.modules, live):
        for step in range(config.steps):
            turns = [step % len(photos) for photos in latents]
            chosen, mask = (torch.stack([p[t] for p, t in zip(own, turns, strict=True)]) for own in (latents, masks))
            batch = draw(levels, chosen, weight, generator)._replace(mask=mask)
            batch = weighted(denoiser, batch, config.weighting)
            live.update(expand_factors(bases, down, up))
            prompts = [caption(config.prompt, own[turn]) for own, turn in zip(words, turns, strict=True)]
            loss = diffusion_loss(denoiser, batch, denoiser.encode_prompts(prompts))
            backward([loss], [up])
            if not bool(loss.isfinite()):
                raise FinetuneError(f"Fitting diverged at step {step + 1}: the loss is {loss.item()}. Lower the rate.")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if callback is not None:
                callback(step + 1, loss.item() / count)
    return up.detach().cpu()


def draw(sigmas: Tensor, latents: Tensor, weight: Tensor, generator: torch.Generator) -> Batch:
    """One stratified noise level (T,) and one noise for each of the latents (B, C, h, w), all of which counts."""
    count = len(latents)
    strata = torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)
    index = (strata / count * len(sigmas)).long().clamp(max=len(sigmas) - 1)
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    return Batch(latents, noise, sigmas[index.to(sigmas.device)], torch.ones_like(latents[:, :1]), weight)
