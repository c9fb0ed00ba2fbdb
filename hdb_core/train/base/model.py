"""What a training needs of a frozen base model, whoever loads it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ...diffusion import Denoiser


class BatchDenoiser(Denoiser, Protocol):
    """A `Denoiser` in which every sample of a batch may carry its own person, in the text encoders as well."""

    @property
    def device(self) -> torch.device:
        """Where the model computes."""

    def summaries(self, prompts: Sequence[str]) -> Tensor:
        """The text states (B, D) of the last token of each prompt, which has seen the whole of it."""


class BaseModel(Protocol):
    """A loaded base model: its denoiser and its VAE."""

    @property
    def identity(self) -> str:
        """What tells it from other models of the same layers, `local.identity_of`."""

    @property
    def denoiser(self) -> BatchDenoiser:
        """The frozen model."""

    def encode(self, pixels: Tensor) -> Tensor:
        """Model-space latents (N, C, h, w) float32 of pixels (N, 3, H, W) in 0..1, without a graph."""

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels (N, 3, H, W) float32 in 0..1 of model-space latents (N, C, h, w), without a graph."""
