"""Fits the LiDBs of many people at once: one forward of the frozen model carries another person in every sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..adapters import Adapters, Factors, attach
from ..diffusion import Batch, Denoiser, LossScale, NoiseLevels, diffusion_loss, draw
from ..errors import FinetuneError, HyperNetError, require
from ..lidb import start_down
from ..prompt import caption
from .data.latents import EncodedPhotos
from .loop import MOST_RATE


@dataclass(frozen=True)
class FitConfig:
    """People fitted in precompute, for the L2 loss on their weights beside the diffusion loss, as in the paper.

    Attributes:
        steps: optimiser steps for each person; the paper's way is 40, with ``train.regression_weight`` 1. 0 is off.
        learning_rate: learning rate of the up side (Adam).
        noise: part of the noise schedule that is trained on, its lower and its upper end, 0 to 1.

    Raises:
        HyperNetError: if the learning rate makes no sense.
    """

    steps: int = 0
    learning_rate: float = 0.05
    noise: NoiseLevels = field(default_factory=lambda: NoiseLevels(0.1, 1.0))

    def __post_init__(self) -> None:
        holds, expected = 0 < self.learning_rate <= MOST_RATE, f"above 0, at most {MOST_RATE:g}"
        require(holds, "fit.learning_rate", expected, self.learning_rate, HyperNetError)


class Fitter:
    """Fits the up side of people. The down side is the shared frozen one, so that people stay comparable.

    Args:
        denoiser: the frozen model; must encode each prompt for its own sample.
        adapters: the bases, on the model's device.
        config: settings.
        rank: R of the people.
        prompt: of everybody, with the rare token; a photo's own words follow it.
    """

    def __init__(
        self, denoiser: Denoiser, adapters: Adapters, config: FitConfig, rank: int = 1, prompt: str = "a [v] face"
    ) -> None:
        self.denoiser, self.adapters, self.config, self.rank, self.prompt = denoiser, adapters, config, rank, prompt

    def fields(self) -> dict[str, Any]:
        """What decides the result besides the photos, as JSON takes it."""
        space = {"basis": self.adapters.recipe.fields(), "layout": self.adapters.layout.hash}
        noise = [self.config.noise.min_timestep, self.config.noise.max_timestep]
        return {**space, "steps": self.config.steps, "learning_rate": self.config.learning_rate, "noise": noise,
                "rank": self.rank, "prompt": self.prompt}  # fmt: skip

    def fit(
        self,
        people: Sequence[EncodedPhotos],
        generator: torch.Generator,
        callback: Callable[[int, float], None] | None = None,
    ) -> Tensor:
        """Fit P people, one photo and noise level of each a step.

        A person's result does not depend on the others but through the noise that is drawn.

        Args:
            people: the photos of each; their numbers may differ.
            generator: on the CPU, for noise and noise levels.
            callback: called after every step with its number from 1 and the mean loss.

        Returns:
            up (P, L, b, R) float32 on the CPU.

        Raises:
            FinetuneError: if the loss is not finite.
        """
        recipe, layout, device = self.adapters.recipe, self.adapters.layout, self.adapters.device
        up = torch.zeros(len(people), len(layout.layers), recipe.up_dim, self.rank, device=device, requires_grad=True)
        down = start_down(recipe, layout, self.rank).to(device).expand(len(people), -1, -1, -1)
        optimizer = torch.optim.Adam([up], lr=self.config.learning_rate)
        live: dict[str, Factors] = {}
        scale = LossScale()
        with attach(self.denoiser.modules, live):
            for step in range(self.config.steps):
                batch, prompts = self._batch(people, step, generator)
                found = scale.backward(partial(self._losses, batch, prompts, live, down, up), [up])
                if not math.isfinite(found.loss + found.norm):
                    raise FinetuneError(
                        f"Fitting diverged at step {step + 1}: the loss is {found.loss}, the norm of its gradient "
                        f"{found.norm}. Lower fit.learning_rate."
                    )
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                if callback is not None:
                    callback(step + 1, found.loss / len(people))
        return up.detach().cpu()

    def _losses(
        self, batch: Batch, prompts: Sequence[str], live: dict[str, Factors], down: Tensor, up: Tensor
    ) -> Iterator[Tensor]:
        live.update(self.adapters.expand(down, up))
        yield diffusion_loss(self.denoiser, batch, self.denoiser.encode_prompts(prompts))

    def _batch(self, people: Sequence[EncodedPhotos], step: int, generator: torch.Generator) -> tuple[Batch, list[str]]:
        """The photos whose turn it is, one of each person, with noise, and their captions."""
        turns = [(photos, step % len(photos.latents)) for photos in people]
        latents = torch.stack([photos.latents[turn] for photos, turn in turns])
        weight = torch.ones(len(people), device=latents.device)  # a sum over people: each is a problem of its own
        batch = draw(self.config.noise.of(self.denoiser.sigmas()), latents, weight, generator)
        batch = batch.under(torch.stack([photos.masks[turn] for photos, turn in turns]))
        prompts = [caption(self.prompt, photos.words[turn]) for photos, turn in turns]
        return self.config.noise.weighted(self.denoiser, batch), prompts
