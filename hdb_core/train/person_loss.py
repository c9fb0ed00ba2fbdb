"""The loss of the hypernetwork: predicted people denoise photos of theirs, and come close to fitted ones.

Source: HyperDreamBooth, arXiv 2307.06949, section 4.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..diffusion import Batch, NoiseLevels, draw, weighted_mean
from ..errors import HyperNetError
from ..lidb import Factors
from ..prompt import CLASS_PROMPT
from .data.faces import AUGMENTATIONS
from .data.people import stacked
from .loop import LoopConfig
from .predicted import PeopleInBase, PhotoOf
from .regression import regression_loss
from .turns import Turn, turns_of

KEEPERS = 4  # one person in so many keeps the class prompt: what moves it is much the same for everybody


@dataclass(frozen=True)
class TrainConfig(LoopConfig):
    """The stage train.

    Attributes:
        steps: training steps of the hypernetwork. Take more for more people; the rate falls to zero over them.
        people: people in a step, over all processes. Fewer are faster and noisier.
        regression_weight: weight of the L2 loss on the weights of fitted people, see ``fit.steps``.
        diffusion_weight: weight of the diffusion loss through the frozen base model.
        class_weight: weight of the loss that keeps the base model's answers to the class prompt, the one without the
            token, so that other people can be drawn while a person is applied. It is computed for one person in four; the base
            model then computes 1.4 times as much. 0 is off.
        noise: part of the noise schedule that is trained on, its lower and its upper end, 0 to 1.
        rest: weight of what a photo's mask leaves out; the white part counts 1. At 0 the person spreads into the rest, and
            backgrounds suffer.
        max_photos: predict each person from 1 to this many photos.
        max_iterations: predict with 1 to this many refinements.
        augment: random changes of the photos that people are predicted from: some of crop, flip, color (needs
            torchvision). For people with a single photo.

    Raises:
        HyperNetError: if no loss would count, or a setting makes no sense.
    """

    regression_weight: float = 0.0
    diffusion_weight: float = 1.0
    class_weight: float = 0.0
    noise: NoiseLevels = field(default_factory=lambda: NoiseLevels(0.1, 1.0))
    rest: float = 0.2
    max_photos: int = 1
    max_iterations: int = 2
    augment: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.regression_weight <= 0 and self.diffusion_weight <= 0:
            raise HyperNetError(
                "Both losses are off. Set train.diffusion_weight or train.regression_weight to a number above 0."
            )
        for name in ("diffusion_weight", "regression_weight", "class_weight"):
            if getattr(self, name) < 0:
                raise HyperNetError(f"Expected train.{name} of 0 or more, got {getattr(self, name)}.")
        if self.max_photos < 1 or self.max_iterations < 1 or not 0 <= self.rest <= 1:
            raise HyperNetError(
                "Expected train.max_photos and train.max_iterations of at least 1 and train.rest from 0 to 1, got "
                f"{self.max_photos}, {self.max_iterations} and {self.rest}."
            )
        if unknown := sorted(set(self.augment) - set(AUGMENTATIONS)):
            raise HyperNetError(f"Expected train.augment: some of {', '.join(AUGMENTATIONS)}, got {unknown[0]!r}.")


class Shown(NamedTuple):
    """What a part of a step needs of the disk, and everything that was drawn for it.

    Attributes:
        turns: of its people.
        iterations: k.
        faces: (B, N, …), what the hypernetwork sees.
        batch: the photos to be denoised, with noise; None without the diffusion loss.
        others: a turn of another person for each of those who keep the class prompt, the first of ``turns``.
        kept: the others' photos, with noise, on which it is kept; None if there are none.
    """

    turns: list[Turn]
    iterations: int
    faces: Tensor
    batch: Batch | None
    others: list[Turn]
    kept: Batch | None


class PersonLoss:
    """The losses of a step, or of one process's part of it.

    Args:
        base: people and base model.
        config: settings.
        seed: of everything that is drawn.
        codes: (N, K), everybody's face code; None predicts it from the tokens.
        class_prompt: what any person is called, without the token.
    """

    def __init__(
        self,
        base: PeopleInBase,
        config: TrainConfig,
        seed: int = 0,
        codes: Tensor | None = None,
        class_prompt: str = CLASS_PROMPT,
    ) -> None:
        self.base, self.config, self.seed, self.class_prompt = base, config, seed, class_prompt
        self.codes = None if codes is None else codes.to(base.device)

    def read(self, step: int, part: slice = slice(None)) -> Shown:
        """What a part of the global batch of a step, counted from 0, needs; its draws are those of the whole batch."""
        base, config = self.base, self.config
        turns, iterations, generator = turns_of(
            step, base.counts, config.people, self.seed, config.max_photos, config.max_iterations
        )
        seeds = None
        if base.faces.augments:  # one for each photo of the whole batch, whoever takes it
            seeds = torch.randint(2**62, (len(turns), len(turns[0].seen)), generator=generator)[part]
        faces = base.read_faces(turns[part], seeds)
        batch = kept = None
        if config.diffusion_weight:
            batch = self._batch(turns, part, generator)
            batch = batch.under(base.masks(_denoised(turns[part]), config.rest))
        others = [*turns[1:], turns[0]][: -(-len(turns) // KEEPERS)]
        if config.class_weight and others[part]:
            kept = self._batch(others, part, generator)
            # The mean over all parts is the mean over all keepers.
            share = len(others[part]) / len(others) * len(turns) / len(turns[part])
            kept = kept._replace(weight=share * kept.weight)
        return Shown(turns[part], iterations, faces, batch, others[part], kept)

    def __call__(
        self, net: nn.Module, step: int, part: slice = slice(None), read: Shown | None = None
    ) -> dict[str, Tensor]:
        """The scalars ``loss``, which goes down, and the unweighted losses that it is made of, where they count.

        Args:
            net: a `FromFaces`, wrapped or not.
            step: counted from 0.
            part: of the global batch's people.
            read: what `read` gives; None reads it now.
        """
        config, shown = self.config, read or self.read(step, part)
        codes = None if self.codes is None else self.codes[[turn.person for turn in shown.turns]]
        predicted = Factors(*net(shown.faces, shown.iterations, codes))
        losses, total = {}, torch.zeros((), device=self.base.device)
        if config.regression_weight:
            losses["regression"] = self._regression(predicted, shown.turns)
            total = config.regression_weight * losses["regression"]
        if shown.batch is not None:
            batch = config.noise.weighted(self.base.denoiser, shown.batch)
            error = self.base.squared_error(predicted, batch, _denoised(shown.turns))
            losses["diffusion"] = weighted_mean(error, batch)
            total = total + config.diffusion_weight * losses["diffusion"]
        if config.class_weight:
            losses["class"] = self._class(predicted, shown)
            total = total + config.class_weight * losses["class"]
        return {"loss": total, **losses}

    def _class(self, predicted: Factors, shown: Shown) -> Tensor:
        """How far the keepers of a part move the base model's answers to the class prompt; 0 if there are none."""
        if shown.kept is None:
            return torch.zeros((), device=self.base.device)
        batch = self.config.noise.weighted(self.base.denoiser, shown.kept)
        count = len(shown.others)
        keepers = Factors(predicted.down[:count], predicted.up[:count])
        error = self.base.moved_error(keepers, batch, _denoised(shown.others), self.class_prompt)
        return weighted_mean(error, batch)

    def _batch(self, turns: Sequence[Turn], part: slice, generator: torch.Generator) -> Batch:
        """The photos of a part, whose noise is drawn with that of the whole batch; no others are read."""
        own = _denoised(turns[part])
        latents = self.base.latents(own)
        weight = torch.full((len(turns),), 1 / len(own), device=self.base.device)
        levels = self.config.noise.of(self.base.denoiser.sigmas())
        batch = draw(levels, latents[:1].expand(len(turns), *latents.shape[1:]), weight, generator)
        return Batch(*(tensor[part] for tensor in batch))._replace(latents=latents)

    def _regression(self, predicted: Factors, turns: Sequence[Turn]) -> Tensor:
        if self.base.energy is None:
            raise HyperNetError("No person was fitted, so there is no L2 loss on weights.")
        targets = stacked([self.base.people[turn.person] for turn in turns], self.base.down)
        return regression_loss(predicted, targets, self.base.energy)


def _denoised(turns: Sequence[Turn]) -> list[PhotoOf]:
    return [(turn.person, turn.denoised) for turn in turns]
