"""Computes the face tokens of all photos behind a frozen image encoder once, and reads them by photo.

A photo's tokens take T · D float16 numbers (CLIP ViT-H: 0.66 MB), so they are never all in memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import HyperNetError
from ...hypernet import EncoderConfig
from ..base.vision import VisionEncoder
from .groups import group_paths, missing_groups, opened, read_header
from .photos import Person, Photo

BATCH = 32  # photos encoded at once


def precompute_tokens(
    encoder: VisionEncoder,
    people: Sequence[Person],
    folder: Path,
    group: int = 32,
    share: tuple[int, int] = (0, 1),
) -> None:
    """Encode the photos of all people, ``group`` people a file; finished files are left alone.

    Args:
        encoder: frozen.
        people: whom.
        folder: receives ``group_00000.safetensors`` and on.
        group: people in each file.
        share: (rank, processes): this process takes every processes-th file.

    Raises:
        HyperNetError: if a photo cannot be read or encoded, or the folder holds tokens of another encoder.
    """
    settings = {"encoder": encoder.config.sizes, "weights of the encoder": encoder.weights}
    for missing in missing_groups(folder, people, settings, group, share):
        photos = [photo for person in missing.people for photo in person.photos]
        parts = [_encoded(encoder, photos[i : i + BATCH]) for i in range(0, len(photos), BATCH)]
        counts = torch.tensor([len(person.photos) for person in missing.people])
        missing.write({"tokens": torch.cat(parts), "counts": counts})


class PhotoTokens:
    """What `precompute_tokens` wrote.

    Args:
        folder: of the files.
        people: who must be there, with as many photos as then.
        encoder: that the tokens must be of.

    Raises:
        HyperNetError: if a person is missing, or the tokens are of another encoder.
    """

    def __init__(self, folder: Path, people: Sequence[Person], encoder: EncoderConfig) -> None:
        self._shape = encoder.num_tokens, encoder.token_width
        self._places: dict[str, tuple[Path, int]] = {}
        counts: dict[str, int] = {}
        for path in group_paths(folder):
            settings, names, _ = read_header(path)
            with opened(path) as file:
                photos = file.get_tensor("counts").tolist()
                _require_encoder(path, settings["encoder"], encoder)
                counts |= dict(zip(names, photos, strict=True))
                starts = accumulate(photos[:-1], initial=0)
                self._places |= {name: (path, start) for name, start in zip(names, starts, strict=True)}
        for person in people:
            if counts.get(person.name) != len(person.photos):
                raise HyperNetError(
                    f"{folder} holds tokens of {counts.get(person.name, 0)} photos of {person.name!r}, who has "
                    f"{len(person.photos)}. Run the stage precompute with --clip-vision, in a new run folder if photos have changed."
                )

    augments = False

    def read(self, photos: Sequence[tuple[Person, int]], seeds: Sequence[int] | None = None) -> Tensor:
        """The tokens (N, T, D) float32 of N photos, each by its person and its number from 0.

        Args:
            photos: which.
            seeds: without effect: these tokens were computed before.
        """
        found = []
        for person, number in photos:
            path, start = self._places[person.name]
            with opened(path) as file:
                own = file.get_slice("tokens")[start + number].float()
                if own.shape != self._shape or not own.isfinite().all():
                    raise ValueError("tokens of another shape, or NaN")
                found.append(own)
        return torch.stack(found)


def _encoded(encoder: VisionEncoder, photos: Sequence[Photo]) -> Tensor:
    """(N, T, D) float16 of a few photos."""
    tokens = encoder.encode([photo.whole() for photo in photos]).half().cpu()
    if not bool(tokens.isfinite().all()):
        raise HyperNetError(
            f"The image encoder {encoder.config.name!r} gives NaN or infinity for {photos[0].path} or one of the "
            f"{len(photos) - 1} photos after it. Its files may be damaged; download it again."
        )
    return tokens


def _require_encoder(path: Path, found: Mapping[str, Any], encoder: EncoderConfig) -> None:
    expected = json.loads(json.dumps(encoder.sizes))
    if found != expected:
        raise HyperNetError(
            f"{path} holds {found['num_tokens']} tokens of width {found['token_width']} a photo, but the encoder is "
            f"{encoder.name!r} with {encoder.num_tokens} of width {encoder.token_width}. Give --clip-vision the encoder of "
            "this run, or use another run folder."
        )
