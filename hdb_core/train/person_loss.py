"""The loss of the hypernetwork: predicted people denoise photos of theirs, and come close to fitted ones.

Source: HyperDreamBooth, arXiv 2307.06949, section 4.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..diffusion import Batch, NoiseLevels, draw, weighted_mean
from ..errors import HyperNetError
from ..lidb import Factors
from .data.faces import AUGMENTATIONS
from .data.people import stacked
from .loop import LoopConfig
from .predicted import PeopleInBase
from .regression import regression_loss
from .turns import Turn, turns_of


@dataclass(frozen=True)
class TrainConfig(LoopConfig):
    """The stage train.

    Attributes:
        steps: of training the hypernetwork. More for more people; the rate falls to zero over them.
        people: in the batch of a step, over all processes. Fewer are faster and noisier.
        regression_weight: of the L2 loss on the weights of fitted people, see ``fit.steps``.
        diffusion_weight: of the diffusion loss through the frozen base model.
        noise: part of the noise schedule that is drawn from, from its lower to its upper end, 0 to 1.
        rest: how much the places that a photo's mask leaves out count, where its white counts 1. At 0 nothing keeps a
            person out of them, and backgrounds suffer.
        max_photos: a person is predicted from 1 to so many photos.
        max_iterations: and with 1 to so many refinements.
        augment: change the photos that people are predicted from at random: some of crop, flip, color (needs
            torchvision). For people with a single photo.

    Raises:
        HyperNetError: if no loss would count, or a setting makes no sense.
    """

    regression_weight: float = 0.0
    diffusion_weight: float = 1.0
    noise: NoiseLevels = field(default_factory=lambda: NoiseLevels(0.1, 1.0))
    rest: float = 0.2
    max_photos: int = 1
    max_iterations: int = 2
    augment: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.regression_weight <= 0 and self.diffusion_weight <= 0:
            raise HyperNetError(
                "No loss would count. Set train.diffusion_weight or train.regression_weight to a number above 0."
            )
        if self.max_photos < 1 or self.max_iterations < 1 or not 0 <= self.rest <= 1:
            raise HyperNetError(
                "Expected train.max_photos and train.max_iterations of at least 1 and train.rest from 0 to 1, got "
                f"{self.max_photos}, {self.max_iterations} and {self.rest}."
            )
        if unknown := sorted(set(self.augment) - set(AUGMENTATIONS)):
            raise HyperNetError(f"Expected train.augment: some of {', '.join(AUGMENTATIONS)}, got {unknown[0]!r}.")


class PersonLoss:
    """The losses of a step, or of one process's part of it.

    Args:
        base: people and base model.
        config: settings.
        seed: of everything that is drawn.
        codes: (N, K), everybody's face code; None predicts it from the tokens.
    """

    def __init__(self, base: PeopleInBase, config: TrainConfig, seed: int = 0, codes: Tensor | None = None) -> None:
        self.base, self.config, self.seed = base, config, seed
        self.codes = None if codes is None else codes.to(base.device)

    def __call__(self, net: nn.Module, step: int, part: slice = slice(None)) -> dict[str, Tensor]:
        """The scalars ``loss``, which goes down, and unweighted ``regression`` and ``diffusion``, where they count.

        Args:
            net: a `FromFaces`, wrapped or not.
            step: counted from 0.
            part: of the global batch's people.
        """
        base, config = self.base, self.config
        turns, iterations, generator = turns_of(
            step, base.counts, config.people, self.seed, config.max_photos, config.max_iterations
        )
        own = turns[part]
        seeds = None
        if base.faces.augments:  # one for each photo of the whole batch, whoever takes it
            seeds = torch.randint(2**62, (len(turns), len(turns[0].seen)), generator=generator)[part]
        codes = None if self.codes is None else self.codes[[turn.person for turn in own]]
        predicted = Factors(*net(base.read_faces(own, seeds), iterations, codes))
        losses, total = {}, torch.zeros((), device=base.device)
        if config.regression_weight:
            losses["regression"] = self._regression(predicted, own)
            total = config.regression_weight * losses["regression"]
        if config.diffusion_weight:
            losses["diffusion"] = self._diffusion(predicted, turns, part, generator)
            total = total + config.diffusion_weight * losses["diffusion"]
        return {"loss": total, **losses}

    def _regression(self, predicted: Factors, turns: Sequence[Turn]) -> Tensor:
        if self.base.energy is None:
            raise HyperNetError("No person was fitted, so there is no L2 loss on weights.")
        targets = stacked([self.base.people[turn.person] for turn in turns], self.base.down)
        return regression_loss(predicted, targets, self.base.energy)

    def _diffusion(self, predicted: Factors, turns: Sequence[Turn], part: slice, generator: torch.Generator) -> Tensor:
        """The diffusion loss of a part, whose noise is drawn with that of the whole batch."""
        photos = [(turn.person, turn.denoised) for turn in turns]
        own = photos[part]
        weight = torch.full((len(photos),), 1 / len(own), device=self.base.device)
        levels = self.config.noise.of(self.base.denoiser.sigmas())
        batch = draw(levels, self.base.latents(photos), weight, generator)
        batch = Batch(*(tensor[part] for tensor in batch))._replace(mask=self.base.masks(own, self.config.rest))
        batch = self.config.noise.weighted(self.base.denoiser, batch)
        return weighted_mean(self.base.squared_error(predicted, batch, own), batch)
