"""Photos in the latent space of the base model, with what belongs to each: its own words and its mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..base.model import BaseModel
from .photos import Person


@dataclass(frozen=True)
class EncodedPhotos:
    """The photos of one person.

    Attributes:
        latents: (N, C, h, w) float32 in the model's latent space.
        words: what each photo shows besides the person.
        masks: (N, 1, h, w) float32, how much each place of a photo counts; of mean 1.
    """

    latents: Tensor
    words: Sequence[str]
    masks: Tensor

    def halves(self) -> tuple[EncodedPhotos, EncodedPhotos]:
        """Every other photo, and the rest; a single one twice."""
        even, odd = slice(0, None, 2), slice(1, None, 2)
        return self._some(even), self._some(odd if len(self.latents) > 1 else even)

    def _some(self, part: slice) -> EncodedPhotos:
        return EncodedPhotos(self.latents[part], self.words[part], self.masks[part])


def encode(base: BaseModel, person: Person, image_size: int) -> EncodedPhotos:
    """A person's photos on the model's device.

    Args:
        base: whose VAE encodes.
        person: with the photos on disk.
        image_size: side of the square that photos are cut to, pixels.

    Raises:
        HyperNetError: if a photo or a mask cannot be read.
    """
    pixels = (photo.pixels(image_size).movedim(-1, 0)[None] for photo in person.photos)
    # One at a time: a full VAE needs much memory.
    latents = torch.cat([base.encode(one) for one in pixels]).to(base.denoiser.device)
    regions = [photo.region(*latents.shape[-2:]) for photo in person.photos]
    return EncodedPhotos(latents, [photo.words for photo in person.photos], torch.stack(regions).to(latents.device))
