"""The image encoder: photos as the hypernetwork takes them, and a ViT that sums each of them up in face tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import HyperNetError
from ..faces import CUTS
from ..images import as_rgb, resize_to_cover
from .vit import ViT

_MIN_SIDE = 16  # pixels
NORM_GROUPS = 8  # of the channels of a residual block
SUMMED_WIDTH = 32  # of each place in a summary
MOST_PLACES = 65_536  # that the ViT compares with each other
# A file of few weights could ask for any number of these. CLIP ViT-bigG takes 4e11 operations and 4e5 numbers.
MOST_OPERATIONS = 3_000_000_000_000  # for a photo
MOST_NUMBERS = 1 << 25  # of a map; a few of them are in memory at once
_A_PAIR = 100  # operations that comparing two tokens takes besides the products of their numbers


@dataclass(frozen=True)
class EncoderConfig:
    """The image encoder and what it is given.

    Attributes:
        kind: ``vit``, trained with the hypernetwork and stored in its file, or ``clip_vision``, which the user loads.
        image_size: side of the square that photos are cut to, pixels.
        token_width: D of the face tokens.
        patch_size: of ``vit``, pixels; with a stem, of its first convolution.
        stem: of ``vit``: residual convolutions before it, as (width, blocks) of each stage; every stage after the first
            halves the map, and the ViT gets a token for each place of the last one. Empty: it sees the patches themselves.
        summary: tokens that ``vit`` sums a photo up in, and that are all the hypernetwork then sees of it; 0 gives it the
            token of every place instead.
        depth: layers of ``vit``.
        heads: attention heads of ``vit``.
        mean: of the pixels (0..1), by channel.
        std: of the pixels, by channel.
        name: of the checkpoint behind ``clip_vision``, for the message when another one is connected.
        num_tokens: T of ``clip_vision``.
        cut: how the photos that it was trained on were cut before `preprocess`, one of `faces.CUTS`: ``face`` is the square
            of `faces.square_of`; ``centre`` is not at all, and the central square is taken.
    """

    kind: str = "vit"
    image_size: int = 128
    token_width: int = 256
    patch_size: int = 4
    stem: tuple[tuple[int, int], ...] = ((64, 1), (128, 2), (256, 1))
    summary: int = 2
    depth: int = 2
    heads: int = 4
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    name: str = ""
    num_tokens: int = 0
    cut: str = "centre"

    def __post_init__(self) -> None:
        if self.kind not in ("vit", "clip_vision"):
            raise HyperNetError(f"Expected an encoder of kind vit or clip_vision, got {self.kind!r}. Update this pack.")
        if self.cut not in CUTS:
            raise HyperNetError(f"Expected photos cut by {' or '.join(CUTS)}, got {self.cut!r:.100}. Update this pack.")
        if min(self.image_size, self.token_width, self.patch_size, self.heads) < 1 or min(self.summary, self.depth) < 0:
            raise HyperNetError(f"There is no image encoder of these sizes: {self}.")
        if self.kind == "vit" and (self.image_size % self.stride or self.token_width % self.heads):
            raise HyperNetError(
                f"Expected an image_size that {self.stride} divides and a token_width that heads divide, got "
                f"{self.image_size} and {self.token_width} with {self.heads} heads."
            )
        if self.kind == "vit" and not 1 < self.places <= MOST_PLACES:
            raise HyperNetError(
                f"Expected an encoder of more than one and at most {MOST_PLACES:,} places, got {self.image_size} pixels a side with a place for "
                f"every {self.stride}. Make encoder.image_size smaller or encoder.patch_size larger."
            )
        if any(width < 1 or blocks < 0 or (blocks and width % NORM_GROUPS) for width, blocks in self.stem):
            raise HyperNetError(f"Expected stages of a width that {NORM_GROUPS} divides, got {self.stem}.")
        if self.kind == "vit":
            self._require_possible()

    def _require_possible(self) -> None:
        tokens = self.places + 1
        maps = [tokens * self.token_width]
        operations = self.depth * layer_operations(tokens, tokens, self.token_width, self.heads)
        channels, side, kernel = 3, self.image_size // self.patch_size, self.patch_size
        for width, blocks in self.stem:
            maps.append(side**2 * width)
            operations += side**2 * width * (channels * kernel**2 + 2 * blocks * width * 9)
            channels, side, kernel = width, side // 2, 3
        if max(maps) > MOST_NUMBERS or operations > MOST_OPERATIONS:
            raise HyperNetError(
                f"Expected an encoder that takes at most {MOST_OPERATIONS:,} operations a photo and maps of {MOST_NUMBERS:,} "
                f"numbers, got {operations:,} and {max(maps):,}. Make encoder.image_size, encoder.depth or encoder.stem smaller, "
                "or encoder.patch_size larger."
            )

    @property
    def stride(self) -> int:
        """Pixels of the photo, on a side, for each token of ``vit``."""
        return self.patch_size * 2 ** max(0, len(self.stem) - 1)

    @property
    def places(self) -> int:
        """Places of a photo that ``vit`` gets a token for."""
        return (self.image_size // self.stride) ** 2

    @property
    def tokens_of_photo(self) -> int:
        """T, the tokens of a photo that the hypernetwork sees."""
        return self.summary or self.places + 1 if self.kind == "vit" else self.num_tokens

    @property
    def sizes(self) -> dict[str, Any]:
        """What two encoders must share to be one, as fields; not the name, for the same may lie in another folder."""
        return asdict(replace(self, name=""))

    @property
    def num_features(self) -> int:
        """Channels of what is seen at each place of a photo: of the stem, or of the tokens where there is none."""
        return self.stem[-1][0] if self.kind == "vit" and self.stem else self.token_width

    @property
    def num_summed(self) -> int:
        """Tokens that a photo is summed up in: the summary of ``vit``, or 1, the mean of all tokens."""
        return max(1, self.summary) if self.kind == "vit" else 1


def layer_operations(tokens: int, seen: int, width: int, heads: int) -> int:
    """How many operations a layer of a transformer takes, of attention from so many tokens to so many, and of its MLP."""
    return width**2 * (10 * tokens + 2 * seen) + tokens * seen * (2 * width + _A_PAIR * heads)


def preprocess(images: Tensor, encoder: EncoderConfig) -> Tensor:
    """Photos as the encoder takes them: the central square, resized (antialiased bicubic) and normalised.

    Args:
        images: (N, H, W, 1, 3 or 4) in 0..1, as ComfyUI's IMAGE; any size from 16 pixels a side.
        encoder: whose size, mean and std count.

    Returns:
        (N, 3, image_size, image_size) float32.

    Raises:
        HyperNetError: if there is no photo, or its shape or values are unusable.
    """
    pixels = as_rgb(images, HyperNetError)
    if min(pixels.shape[-2:]) < _MIN_SIDE:
        raise HyperNetError(
            f"Expected photos of at least {_MIN_SIDE} pixels a side, got {pixels.shape[-1]} × {pixels.shape[-2]}. "
            "Connect a larger photo of the face to image."
        )
    square = resize_to_cover(pixels, (encoder.image_size, encoder.image_size))
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (encoder.mean, encoder.std))
    return (square - mean) / std


@contextmanager
def initialised(seed: int) -> Iterator[None]:
    """Modules made here get their weights from a seed; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False):
        torch.default_generator.manual_seed(seed)  # of the CPU alone, where modules are made
        yield


class PhotoEncoder(nn.Module):
    """A ViT, behind convolutions if the configuration has a stem, and before an MLP if it has a summary.

    Convolutions find where things are with far fewer photos than a ViT on bare patches; an MLP over all places at once
    then learns distances between them with far fewer photos than attention.
    Source: Xiao et al., Early Convolutions Help Transformers See Better, arXiv 2106.14881.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        channels, stride = 3, config.patch_size
        for width, blocks in config.stem:
            first = not stages
            kernel, padding, step = (config.patch_size, 0, config.patch_size) if first else (3, 1, 2)
            stages += [
                nn.Conv2d(channels, width, kernel, step, padding),
                *(ResidualBlock(width) for _ in range(blocks)),
            ]
            channels, stride = width, stride if first else 2 * stride
        self.stem = nn.Sequential(*stages)
        size, patch = (config.image_size // stride, 1) if stages else (config.image_size, config.patch_size)
        self.vit = ViT(channels, size, patch, config.token_width, config.depth, config.heads)
        self.tokens_of = config.summary, config.token_width
        width, places = config.summary * config.token_width, config.places + 1
        self.summary = nn.Sequential(
            nn.LayerNorm(config.token_width),
            nn.Linear(config.token_width, SUMMED_WIDTH),
            nn.Flatten(),
            nn.Linear(places * SUMMED_WIDTH, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
        ) if config.summary else None  # fmt: skip

    def features(self, pixels: Tensor) -> Tensor:
        """What it sees at each place, (N, P, C), of pixels (N, 3, image_size, image_size); C as `num_features`."""
        return self.stem(pixels).flatten(2).transpose(1, 2) if len(self.stem) else self.vit(pixels)

    def forward(self, pixels: Tensor) -> Tensor:
        """Tokens (N, T, token_width) of pixels (N, 3, image_size, image_size)."""
        tokens = self.vit(self.stem(pixels))
        return tokens if self.summary is None else self.summary(tokens).unflatten(1, self.tokens_of)


class ResidualBlock(nn.Module):
    """Two 3 × 3 convolutions beside an identity: (N, C, h, w) to the same shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(NORM_GROUPS, channels)
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(functional.silu(self.conv1(self.norm(x))))
