"""Photos as a hypernetwork in training reads them: preprocessed pixels, or the tokens of a frozen encoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from threading import Lock
from typing import Any, Protocol

import torch
from torch import Tensor

from ...errors import HyperNetError
from ...hypernet import EncoderConfig, preprocess
from .photos import Person, in_threads

# Made from torchvision.transforms.v2, which nothing else needs, and the side of the photos in pixels.
AUGMENTATIONS: Mapping[str, Callable[[Any, int], Callable[[Tensor], Tensor]]] = {
    "crop": lambda v2, size: v2.RandomResizedCrop(size, scale=(0.6, 1.0), ratio=(0.9, 1.1), antialias=True),
    "flip": lambda v2, size: v2.RandomHorizontalFlip(),
    "color": lambda v2, size: v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.03),
}


_ONE_AT_A_TIME = Lock()  # augmentations draw from the global generator


class Faces(Protocol):
    """Photos as `predicted.FromFaces` takes them.

    Attributes:
        augments: whether a training reads them with seeds.
    """

    augments: bool

    def read(self, photos: Sequence[tuple[Person, int]], seeds: Sequence[int] | None = None) -> Tensor:
        """(N, …) float32 on the CPU of N photos, each by its person and its number from 0.

        Args:
            photos: which.
            seeds: one for each photo, of its augmentation; None shows the photos as they are.
        """


class PhotoPixels:
    """Pixels (N, 3, image_size, image_size), for the encoder that is trained with the hypernetwork.

    Args:
        encoder: what it is given.
        augmentations: some of `AUGMENTATIONS`, for photos that are read with seeds.

    Raises:
        HyperNetError: if there are some, and torchvision is not installed.
    """

    def __init__(self, encoder: EncoderConfig, augmentations: Sequence[str] = ()) -> None:
        self.encoder, self.augments = encoder, bool(augmentations)
        if augmentations:
            try:
                from torchvision.transforms import v2
            except ImportError as error:
                raise HyperNetError(
                    "train.augment needs torchvision, which is not installed. Install it, or leave train.augment out."
                ) from error

            self._transforms = [AUGMENTATIONS[name](v2, encoder.image_size) for name in augmentations]

    def read(self, photos: Sequence[tuple[Person, int]], seeds: Sequence[int] | None = None) -> Tensor:
        pixels = in_threads(lambda photo: photo[0].photos[photo[1]].pixels(self.encoder.image_size), photos)
        if seeds is not None:
            pixels = [self._augmented(own, seed) for own, seed in zip(pixels, seeds, strict=True)]
        return preprocess(torch.stack(pixels), self.encoder)

    def _augmented(self, pixels: Tensor, seed: int) -> Tensor:
        picture = pixels.movedim(-1, 0)
        with _ONE_AT_A_TIME, torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            for transform in self._transforms:
                picture = transform(picture)
        return picture.movedim(0, -1)
