"""Sample pictures of a person while they are trained."""

from __future__ import annotations

import comfy.model_management
import numpy as np
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from PIL import Image
from torch import Tensor

from ...hdb_core.diffusion import Denoiser
from ...hdb_core.finetuning import FinetuneProgress, sample
from .memory import free_memory


class SamplePictures:
    """Makes a picture of the person's prompt every few steps, from the same noise, by the connected VAE.

    The VAE is used only where it fits beside the model: the host would make room by taking the model away, which is in use.

    Args:
        denoiser: of the training.
        model: the host's MODEL.
        vae: the host's VAE.
        latents: of the photos, (N, C, …, h, w); only their shape counts.
        prompt: of the pictures.
        seed: of the noise.
        every: so many steps.
    """

    def __init__(
        self, denoiser: Denoiser, model: ModelPatcher, vae: VAE, latents: Tensor, prompt: str, seed: int, every: int
    ) -> None:
        self.denoiser, self.model, self.vae, self.prompt, self.every = denoiser, model, vae, prompt, every
        generator = torch.Generator().manual_seed(seed)
        self.noise = torch.randn(1, *latents.shape[1:], generator=generator).to(latents.device)

    def after(self, progress: FinetuneProgress) -> Image.Image | None:
        """The picture after a step, if there is to be one and room for it."""
        due = progress.step % self.every == 0 or progress.step == progress.total
        if not due or progress.attached is None or not self._fits():
            return None
        latents = sample(self.denoiser, progress.attached(), self.prompt, self.noise)
        with torch.inference_mode():
            pixels = self.vae.decode(self.model.model.process_latent_out(latents))
        frame = pixels.reshape(-1, *pixels.shape[-3:])[0]
        return Image.fromarray((255 * frame.clamp(0, 1)).round().byte().cpu().numpy().astype(np.uint8))

    def _fits(self) -> bool:
        workspace = self.vae.memory_used_decode(self.noise.shape, self.vae.vae_dtype)
        needed = 1.1 * self.vae.patcher.model_size() + max(workspace, comfy.model_management.minimum_inference_memory())
        return needed < free_memory(self.denoiser.device)
