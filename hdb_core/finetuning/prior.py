"""What a fine-tune is to leave as it was: the base model's own answers to the class prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..diffusion import Batch, Denoiser


@torch.no_grad()
def beside_own_answers(
    denoiser: Denoiser, batch: Batch, prompts: Sequence[str], weight: float, at_once: int | None
) -> Batch:
    """A batch, and behind it the same noisy photos, whose clean ones are what the base model makes of them.

    Args:
        denoiser: with no person attached.
        batch: of B samples.
        prompts: B, of the class.
        weight: of the samples that are added, relative to the others.
        at_once: as many samples go through the model together; None is all of them.
    """
    noisy = denoiser.add_noise(batch.latents, batch.noise, batch.sigma)
    each = at_once or len(prompts)
    parts = (slice(first, first + each) for first in range(0, len(prompts), each))
    answers = (denoiser.denoise(noisy[p], batch.sigma[p], denoiser.encode_prompts(prompts[p])) for p in parts)
    kept = towards(denoiser, batch, torch.cat(list(answers)).float())._replace(weight=weight * batch.weight)
    return Batch(*(torch.cat(pair) for pair in zip(batch, kept, strict=True)))


def towards(denoiser: Denoiser, batch: Batch, latents: torch.Tensor) -> Batch:
    """The same noisy latents with other clean ones (B, C, …), and the noise that is then in them."""
    nothing = torch.zeros_like(latents)
    noisy = denoiser.add_noise(batch.latents, batch.noise, batch.sigma)
    scale = denoiser.add_noise(nothing, torch.ones_like(latents), batch.sigma)
    noise = (noisy - denoiser.add_noise(latents, nothing, batch.sigma)) / scale
    return batch._replace(latents=latents, noise=noise)
