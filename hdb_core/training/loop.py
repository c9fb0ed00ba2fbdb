"""The training of a hypernetwork on people whom `precompute` has fitted.

Every draw of a step (who, which photos, which noise) is a function of the seed and the step for the whole global batch,
of which each process takes its part: the result does not depend on the number of processes, and a run resumes from its
weights and its step number alone, on any number of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..adapters import attach
from ..basis import bases_of
from ..errors import HyperNetError
from ..finetune import (
    Batch,
    Denoiser,
    between,
    require_noise_levels,
    squared_error,
    weighted,
    weighted_errors,
    weighted_mean,
)
from ..hypernet import HyperNet, HyperNetConfig
from ..lidb import Factors, expand_factors, start_down
from ..prompt import caption
from .faces import Faces
from .fit import draw
from .losses import layer_energy, mean_predictor_loss, regression_loss
from .people import FittedPerson, stacked
from .photos import in_threads


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training.

    Attributes:
        steps: optimiser steps; the rate falls to zero over them as a cosine.
        people: in the global batch.
        draws: noise levels and photos that each of them is denoised at, a step.
        learning_rate: peak, of AdamW.
        warmup: steps until the peak.
        weight_decay: of AdamW.
        regression_weight: of the regression onto the fitted people, at the start.
        regression_steps: over which it falls to zero in a straight line; 0 keeps it.
        diffusion_weight: of the diffusion loss through the frozen base model.
        diffusion_start: step from which the diffusion loss counts; before it, it is not computed.
        weighting: of its noise levels, one of `finetune.WEIGHTINGS`.
        min_timestep: lower end of its noise levels, as a fraction of the schedule.
        max_timestep: upper end.
        rest: how much the places that a photo's mask leaves out count, where its white counts 1. At 0 nothing keeps a
            person out of them, and backgrounds suffer.
        max_photos: a person is predicted from 1 to so many photos.
        max_iterations: and with k from 1 to so many refinements.
        same_photo: denoise the photo that the person was predicted from, even if there are others.
        max_grad_norm: of the clipped gradient.
        down_rate: of the down side that all people share, as a multiple of the learning rate.
        encoder_rate: of the encoder, likewise; at 0 it stays as it is.
        direct_rate: of the straight line from the face code, likewise.
        seed: of everything that is drawn.

    Raises:
        FinetuneError: if the noise levels make no sense.
        HyperNetError: if there is nothing to train by at the first step.
    """

    steps: int = 3000
    people: int = 32
    draws: int = 1
    learning_rate: float = 1e-3
    warmup: int = 100
    weight_decay: float = 0.01
    regression_weight: float = 0.0
    regression_steps: int = 0
    diffusion_weight: float = 1.0
    diffusion_start: int = 0
    weighting: str = "v"
    min_timestep: float = 0.1
    max_timestep: float = 1.0
    rest: float = 0.2
    max_photos: int = 1
    max_iterations: int = 2
    same_photo: bool = False
    max_grad_norm: float = 1.0
    down_rate: float = 3.0
    encoder_rate: float = 0.0
    direct_rate: float = 3.0
    seed: int = 0

    def __post_init__(self) -> None:
        require_noise_levels(self.weighting, self.min_timestep, self.max_timestep)
        from_the_start = self.diffusion_weight if self.diffusion_start == 0 else 0
        if self.regression_weight <= 0 and from_the_start <= 0:
            raise HyperNetError(
                "No loss would count at the first step. Give --regression-weight above 0, or --diffusion-weight above 0 "
                "with --diffusion-start 0."
            )

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        cosine = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / self.steps)).item())
        return self.learning_rate * min(1.0, (step + 1) / max(1, self.warmup)) * cosine

    def regression(self, step: int) -> float:
        """The weight of the regression at a step."""
        fall = 1 - step / self.regression_steps if self.regression_steps else 1.0
        return self.regression_weight * max(0.0, fall)


class Turn(NamedTuple):
    """Somebody in a step: the photos to predict from, and the photo to denoise at each draw."""

    person: int
    seen: list[int]
    denoised: list[int]


def turns_of(step: int, counts: Sequence[int], config: TrainConfig) -> tuple[list[Turn], int, torch.Generator]:
    """Who takes part in a step, and k; of the whole global batch.

    Args:
        step: counted from 0.
        counts: how many photos everybody has.
        config: settings.

    Returns:
        The turns, k, and the generator that goes on to draw the noise.
    """
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)

    def integer(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    num_photos, iterations = 1 + integer(config.max_photos), 1 + integer(config.max_iterations)
    turns = []
    for person in torch.randint(len(counts), (config.people,), generator=generator).tolist():
        order = torch.randperm(counts[person], generator=generator).tolist()
        # At least one photo is kept from sight, unless there is only one.
        seen = [order[i % max(1, len(order) - 1)] for i in range(num_photos)]
        others = seen if config.same_photo else order[len(set(seen)) :] or seen
        turns.append(Turn(person, seen, [others[integer(len(others))] for _ in range(config.draws)]))
    return turns, iterations, generator


def ordinary(count: int, wanted: int) -> list[int]:
    """``wanted`` of somebody's ``count`` photos, none of them the last, and the first only if there is no other."""
    first = 1 if count > 2 else 0
    return [first + n % max(1, count - 1 - first) for n in range(wanted)]


class PersonLoss:
    """The losses of a step, or of one process's part of it.

    Args:
        denoiser: the frozen model; encodes each prompt for its own sample.
        people: everybody.
        net: whose layers, basis, prompt and preprocessing count.
        config: settings.
        faces: what the hypernetwork reads of the photos.
        codes: (N, K), everybody's face code, if the hypernetwork starts from one; `evaluate` does without.

    Raises:
        HyperNetError: if the people were fitted to other layers.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        people: Sequence[FittedPerson],
        net: HyperNetConfig,
        config: TrainConfig,
        faces: Faces,
        codes: Tensor | None = None,
    ) -> None:
        self.denoiser, self.people, self.net, self.config, self.faces = denoiser, people, net, config, faces
        device = denoiser.sigmas().device
        if len(people[0].up) != len(net.layout.layers):
            raise HyperNetError(
                f"The people were precomputed for {len(people[0].up)} layers, but {len(net.layout.layers)} are trained. "
                "Give --convolutions to both stages or to none; for another choice, use another --folder."
            )
        self.down = start_down(net.basis, net.layout, people[0].up.shape[-1]).to(device)
        self.codes = None if codes is None else codes.to(device)
        self.bases = bases_of(net.basis, net.layout, device)
        fitted = any(bool(person.up.any()) for person in people)
        self.energy = layer_energy(stacked(people, self.down)) if fitted else torch.zeros(len(self.down), device=device)
        self.counts = [len(person.latents) for person in people]

    def __call__(self, net: nn.Module, step: int, part: slice = slice(None)) -> dict[str, Tensor]:
        """Scalars: ``loss``, which goes down, and unweighted ``regression`` and ``diffusion``, where they count.

        Args:
            net: a `FromFaces`, wrapped or not.
            step: counted from 0.
            part: of the global batch's people.
        """
        config = self.config
        turns, iterations, generator = turns_of(step, self.counts, config)
        own = turns[part]
        seeds = None
        if self.faces.augments:  # one for each photo of the whole batch, whoever takes it
            seeds = torch.randint(2**62, (len(turns), len(turns[0].seen)), generator=generator)[part]
        codes = None if self.codes is None else self.codes[[turn.person for turn in own]]
        predicted = Factors(*net(self._faces(own, seeds), iterations, codes))
        losses, total = {}, torch.zeros((), device=self.down.device)
        if config.regression_weight:
            targets = stacked([self.people[turn.person] for turn in own], self.down)
            losses["regression"] = regression_loss(predicted, targets, self.energy)
            total = config.regression(step) * losses["regression"]
        if config.diffusion_weight and step >= config.diffusion_start:
            losses["diffusion"] = self._diffusion(predicted, turns, part, generator)
            total = total + config.diffusion_weight * losses["diffusion"]
        return {"loss": total, **losses}

    def _diffusion(self, predicted: Factors, turns: Sequence[Turn], part: slice, generator: torch.Generator) -> Tensor:
        """The diffusion loss of a part, whose noise is drawn with that of the whole batch."""
        denoised = [(turn.person, turn.denoised[d]) for d in range(self.config.draws) for turn in turns]
        latents = torch.stack([self.people[person].latents[photo].float() for person, photo in denoised]).to(self.down)
        rows = [d * len(turns) + i for d in range(self.config.draws) for i in range(len(turns))[part]]
        weight = torch.full((len(denoised),), 1 / len(rows), device=self.down.device)
        batch = draw(self._levels(), latents, weight, generator)
        own = [denoised[row] for row in rows]
        batch = Batch(*(tensor[rows] for tensor in batch))._replace(mask=self._masks(own, self.config.rest))
        batch = weighted(self.denoiser, batch, self.config.weighting)
        words = [self.people[person].person.photos[photo].words for person, photo in own]
        repeated = Factors(*(factor.repeat(self.config.draws, 1, 1, 1) for factor in predicted))
        return weighted_mean(self._error(repeated, batch, words), batch)

    def _levels(self) -> Tensor:
        return between(self.denoiser.sigmas(), self.config.min_timestep, self.config.max_timestep)

    def _error(self, factors: Factors, batch: Batch, words: Sequence[str]) -> Tensor:
        """(B, C, h, w) of a batch whose samples carry these people."""
        with attach(self.denoiser.modules, expand_factors(self.bases, *factors)):
            text = self.denoiser.encode_prompts([caption(self.net.prompt, w) for w in words])
            return squared_error(self.denoiser, batch, text)

    @torch.no_grad()
    def evaluate(self, net: nn.Module, photos: int, iterations: int, seed: int = 0) -> dict[str, Any]:
        """Losses on everybody's last photo, with the person predicted from ``photos`` of the others.

        The first photo, which may be a portrait, is one of them only if there is no third.

        The diffusion loss on the same noise with their ``own`` prediction, the ``mean`` one and a ``stranger``'s, where
        there are others, and ``nobody``'s; ``own_outside`` and so on, where masks are black; ``own_of_each``, a number
        for each of them; and if they were fitted, ``regression`` beside that of the ``mean_predictor``.
        """
        generator = torch.Generator().manual_seed(seed)
        turns = [
            Turn(i, ordinary(count, photos), [count - 1] * self.config.draws) for i, count in enumerate(self.counts)
        ]
        parts = [turns[i : i + self.config.people] for i in range(0, len(turns), self.config.people)]
        predicted = Factors(
            *(torch.cat(f) for f in zip(*(net(self._faces(p), iterations) for p in parts), strict=True))
        )
        chosen = {"own": predicted, "nobody": Factors(predicted.down, torch.zeros_like(predicted.up))}
        if len(turns) > 1:
            chosen["mean"] = Factors(*(factor.mean(0, keepdim=True).expand_as(factor) for factor in predicted))
            chosen["stranger"] = Factors(*(factor.roll(1, 0) for factor in predicted))
        masks = {"": self._masks([(i, -1) for i in range(len(self.people))], rest=0.0)}
        outside = (masks[""] == 0).float()
        if bool(outside.any()):
            masks["_outside"] = outside / outside.mean()  # of everybody: photos count by how much of them is outside
        each = {name + where: torch.zeros(len(turns)) for where in masks for name in chosen}
        for _ in range(self.config.draws):
            for first in range(0, len(turns), self.config.people):
                rows = slice(first, first + self.config.people)
                own = self.people[rows]
                latents = torch.stack([person.latents[-1] for person in own]).to(self.down)
                weight = torch.full((len(own),), 1 / len(turns) / self.config.draws, device=self.down.device)
                batch = weighted(self.denoiser, draw(self._levels(), latents, weight, generator), self.config.weighting)
                words = [person.person.photos[-1].words for person in own]
                for name, factors in chosen.items():
                    error = self._error(Factors(*(f[rows] for f in factors)), batch, words)
                    for where, mask in masks.items():
                        each[name + where][rows] += weighted_errors(error, batch._replace(mask=mask[rows])).cpu()
        losses: dict[str, Any] = {name: float(errors.sum()) for name, errors in each.items()}
        losses["own_of_each"] = [round(float(error) * len(turns), 5) for error in each["own"]]
        if not bool(self.energy.any()):
            return losses
        targets = stacked(self.people, self.down)
        return {"regression": float(regression_loss(predicted, targets, self.energy)),
                "mean_predictor": float(mean_predictor_loss(targets, self.energy)), **losses}  # fmt: skip

    def _masks(self, photos: Sequence[tuple[int, int]], rest: float) -> Tensor:
        """(B, 1, h, w) of mean 1, how much each place counts of some photos, each by its person and its number."""

        def region(photo: tuple[int, int]) -> Tensor:
            person, number = self.people[photo[0]], photo[1]
            return person.person.photos[number].region(*person.latents.shape[-2:])

        masks = torch.stack(in_threads(region, photos)).to(self.down)
        masks = masks.maximum(rest * masks.amax((1, 2, 3), keepdim=True))
        return masks / masks.mean((1, 2, 3), keepdim=True)

    def _faces(self, turns: Sequence[Turn], seeds: Tensor | None = None) -> Tensor:
        """(B, N, …) of the photos to predict from, augmented if there are seeds (B, N)."""
        photos = [(self.people[turn.person].person, i) for turn in turns for i in turn.seen]
        faces = self.faces.read(photos, None if seeds is None else seeds.flatten().tolist())
        return faces.to(self.down.device).unflatten(0, (len(turns), -1))


class FromFaces(nn.Module):
    """The hypernetwork from photos to factors in one call, which is what DDP wraps."""

    def __init__(self, net: HyperNet) -> None:
        super().__init__()
        self.net = net

    def forward(
        self, faces: Tensor, iterations: int | None = None, code: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Factors of B people from pixels (B, N, 3, H, W), or from the tokens (B, N, T, D) of a frozen encoder."""
        photos = faces.flatten(0, 1)
        tokens = photos if self.net.encoder is None else self.net.encode(photos)
        return self.net(tokens.unflatten(0, faces.shape[:2]).flatten(1, 2), iterations, code)
