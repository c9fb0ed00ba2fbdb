"""What a fine-tune is to leave as it was: the base model's own answers to the class prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..diffusion import Batch, Denoiser, answers, towards


def beside_own_answers(
    denoiser: Denoiser,
    batch: Batch,
    prompts: Sequence[str],
    encode: Callable[[Sequence[str]], Any],
    weight: float,
    at_once: int | None,
) -> Batch:
    """A batch, and behind it the same noisy photos, whose clean ones are what the base model makes of them.

    Args:
        denoiser: with no person attached.
        batch: of B samples.
        prompts: B, of the class.
        encode: prompts to conditioning, as the base model has it.
        weight: of the samples that are added, relative to the others.
        at_once: as many samples go through the model together; None is all of them.
    """
    own = answers(denoiser, batch, prompts, encode, at_once or len(prompts))
    kept = towards(denoiser, batch, own)._replace(weight=weight * batch.weight)
    return Batch(*(torch.cat(pair) for pair in zip(batch, kept, strict=True)))
