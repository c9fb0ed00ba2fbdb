"""What a hypernetwork reads of photos while it is trained: preprocessed pixels, or the tokens of a frozen encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..hypernet import EncoderConfig, preprocess
from .photos import Person


class Faces(Protocol):
    """Photos as `loop.FromFaces` takes them."""

    def read(self, photos: Sequence[tuple[Person, int]]) -> Tensor:
        """(N, …) float32 on the CPU of N photos, each by its person and its number from 0."""


class PhotoPixels:
    """Pixels (N, 3, image_size, image_size), for the encoder that is trained with the hypernetwork."""

    def __init__(self, encoder: EncoderConfig) -> None:
        self.encoder = encoder

    def read(self, photos: Sequence[tuple[Person, int]]) -> Tensor:
        pixels = [person.photos[number].pixels(self.encoder.image_size) for person, number in photos]
        return preprocess(torch.stack(pixels), self.encoder)
