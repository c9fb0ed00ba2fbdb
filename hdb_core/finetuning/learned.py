"""What a fine-tune has learned, measured while it runs, and when that is enough.

What a step teaches depends on the model, the learning rate, the basis and the photo; the part of the base model's error
that is gone is the same thing on all of them. The (noise, level) pairs that it is measured on are fixed, so that two
measurements differ by what was learned between them, and few pairs are enough.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from ..diffusion import Batch, Denoiser, answers
from .batches import BatchSampler
from .config import FinetuneConfig

PAIRS, CLASS_PAIRS = 4, 2  # with the photos' captions, and with the class prompt
SHARE = 0.1  # of a training's time, for all measurements
# Forward passes that a trained sample takes at least: the way back through frozen layers takes one, through attention two.
TRAINED_SAMPLE = 2.2
_SEED = 2026  # of the pairs, the same for everybody

Encode = Callable[[Sequence[str]], Any]  # prompts to conditioning


class Learned(NamedTuple):
    """What has changed, relative to the base model's squared error on the photos.

    Attributes:
        gained: the part of it that is gone where the photos are captioned: likeness.
        moved: the squared change of the answers to the class prompt. Where it exceeds `gained`, other prompts are
            disturbed more than the person is learned.
    """

    gained: float
    moved: float


class Meter:
    """Compares a model's answers with those of the base model, on fixed (noise, level) pairs of the photos.

    The levels that are trained are covered evenly and photos take turns. Every pair counts the same, by its own error:
    otherwise the noisiest ones would decide.

    Args:
        denoiser: the frozen model, with no person attached: its own answers are computed here.
        latents: (N, C, h, w) photos.
        config: of the training.
        mask: of the training.
        at_once: as many samples go through the model together.
    """

    def __init__(
        self, denoiser: Denoiser, latents: Tensor, config: FinetuneConfig, mask: Tensor | None, at_once: int
    ) -> None:
        sampler = BatchSampler(
            denoiser.sigmas(), latents, replace(config, batch_size=PAIRS, prior_weight=0.0, seed=_SEED), mask
        )
        self.denoiser, self.at_once = denoiser, at_once
        self.batch, self.captions = sampler.draw(0), sampler.prompts(0)
        self.middle = self.batch.sigma.argsort()[(PAIRS - CLASS_PAIRS) // 2 :][:CLASS_PAIRS]  # of the levels
        self.class_batch = Batch(*(tensor[self.middle] for tensor in self.batch))
        self.class_prompts = [config.class_prompt] * CLASS_PAIRS
        self.base_answer = self._answer(self.class_batch, self.class_prompts, denoiser.encode_prompts)
        self.base_error = self._error(self.batch, self._answer(self.batch, self.captions, denoiser.encode_prompts))

    def gained(self, encode: Encode) -> float:
        """`Learned.gained` of what is attached now; waits for the device once, as `moved` does."""
        error = self._error(self.batch, self._answer(self.batch, self.captions, encode))
        return 1 - (error / self.base_error).mean().item()

    def moved(self, encode: Encode) -> float:
        """`Learned.moved` of what is attached now."""
        answer = self._answer(self.class_batch, self.class_prompts, encode)
        change = self._error(self.class_batch._replace(latents=self.base_answer), answer)
        return (change / self.base_error[self.middle]).mean().item()

    def _answer(self, batch: Batch, prompts: Sequence[str], encode: Encode) -> Tensor:
        return answers(self.denoiser, batch, prompts, encode, self.at_once)

    def _error(self, batch: Batch, answer: Tensor) -> Tensor:
        """(B,): its squared error under the mask."""
        return ((answer - batch.latents).square() * batch.mask).flatten(1).mean(1)


class Watch:
    """Measures a training as often as `SHARE` allows, and ends it when enough is learned.

    A training that is too short for that is not measured.

    Args:
        meter: makes the meter; called here, if at all.
        samples: that are trained in a step.
        steps: that are trained at most.
        enough: `Learned.gained` at which the training ends; None for all steps.
    """

    def __init__(self, meter: Callable[[], Meter], samples: int, steps: int, enough: float | None) -> None:
        self.samples, self.steps, self.enough = samples, steps, enough
        self.gained: float | None = None
        self._passes = PAIRS + CLASS_PAIRS  # of the base model
        self._meter = meter() if self._affordable(steps) else None

    def ended(self, step: int, attached: Callable[[], Encode]) -> bool:
        """Whether the training ends with this step, counted from 1.

        Args:
            step: that is done.
            attached: attaches the factors as they are now, and gives what encodes prompts.
        """
        last = step == self.steps
        if self._meter is None or not (last or self.enough is not None) or not self._affordable(step):
            return last
        self._passes += PAIRS
        self.gained = self._meter.gained(attached())
        return last or (self.enough is not None and self.gained >= self.enough)

    def learned(self, attached: Callable[[], Encode]) -> Learned | None:
        """What was learned in the end, or None if it was not measured."""
        if self._meter is None or self.gained is None:
            return None
        return Learned(self.gained, self._meter.moved(attached()))

    def _affordable(self, step: int) -> bool:
        """Whether a measurement after so many steps, and the last one, keep to `SHARE`."""
        return self._passes + PAIRS + CLASS_PAIRS <= SHARE * TRAINED_SAMPLE * self.samples * step
