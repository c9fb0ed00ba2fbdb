"""A picture of a person while they are trained."""

from __future__ import annotations

import torch
from torch import Tensor

from ..diffusion import Denoiser, euler
from .learned import Encode

STEPS = 12  # of the sampling: a picture takes as long as a training step of four samples, about


@torch.no_grad()
def sample(denoiser: Denoiser, encode: Encode, prompt: str, noise: Tensor) -> Tensor:
    """Latents of a picture of a prompt, by Euler's method and without guidance.

    Args:
        denoiser: the frozen model, with the person attached.
        encode: prompts to conditioning.
        prompt: of the picture.
        noise: (1, C, …, h, w), of variance 1; the same noise makes pictures that can be compared.
    """
    table, conditioning = denoiser.sigmas(), encode([prompt])
    levels = table[torch.linspace(len(table) - 1, 0, STEPS).round().long()].to(noise.device)
    return euler(denoiser, noise, levels, lambda noisy, sigma: denoiser.denoise(noisy, sigma.repeat(1), conditioning))
