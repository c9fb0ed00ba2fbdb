"""The host's denoiser for batches in which every sample carries its own person, as a training has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...hdb_core.adapters import only_samples
from ...hdb_core.layout import Layout
from .denoiser import Conditioning, HostDenoiser


class ManyDenoiser:
    """`hdb_core.train.base.model.BatchDenoiser` over a `HostDenoiser`, which encodes equal prompts once."""

    def __init__(self, denoiser: HostDenoiser) -> None:
        self._denoiser = denoiser
        self.modules: Mapping[str, nn.Module] = denoiser.modules
        self.layout: Layout = denoiser.layout
        self.device: torch.device = denoiser.device
        self.sigmas, self.add_noise = denoiser.sigmas, denoiser.add_noise
        self.denoise, self.loss_weight, self.noise_ratio = denoiser.denoise, denoiser.loss_weight, denoiser.noise_ratio

    def encode_prompts(self, prompts: Sequence[str]) -> Any:
        """Conditioning for ``len(prompts)`` samples, each prompt through its own sample's adapters."""
        if not self._denoiser.trains_text:
            return self._denoiser.encode_prompts(prompts)
        parts = []
        for number, prompt in enumerate(prompts):
            with only_samples([number]):
                parts.append(self._denoiser.encode_prompts([prompt]))
        return Conditioning(tuple(prompt for own in parts for prompt in own.prompts), tuple(range(len(prompts))))

    def summaries(self, prompts: Sequence[str]) -> Tensor:
        """The text states (B, D) of the last token of each prompt, which has seen the whole of it."""
        return torch.cat([self._denoiser.encode_prompts([prompt]).prompts[0].text[:, -1] for prompt in prompts])
