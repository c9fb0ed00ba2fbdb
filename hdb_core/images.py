"""The one way in which photos are cut and resized, in training and in the nodes."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional

from .errors import HDBError

MOST_COVERED = 16  # times a side: what a thin picture has more of is cut off before it is resized


def as_rgb(images: Tensor | None, error: type[HDBError]) -> Tensor:
    """Pictures (N, H, W, 1, 3 or 4) in 0..1, as ComfyUI's IMAGE, as RGB (N, 3, H, W) float32; transparent ones on white.

    Raises:
        HDBError: of the class `error`: there is no picture, or its shape or values cannot be used.
    """
    if images is None or images.numel() == 0:
        raise error("There is no photo: image is empty. Connect Load Image with the person's photo to it.")
    if images.ndim != 4 or images.shape[-1] not in (1, 3, 4):
        raise error(
            f"image must be (batch, height, width, 3), got {tuple(images.shape)}. Connect the IMAGE output of Load Image."
        )
    if not images.is_floating_point():
        raise error(f"image must hold numbers from 0 to 1, got {images.dtype}. Divide bytes by 255.")
    if not bool(images.isfinite().all()):
        raise error("The photo contains NaN or infinite values. Check the node that makes it.")
    pixels = images.movedim(-1, 1).float()
    if pixels.shape[1] == 4:
        alpha = pixels[:, 3:].clamp(0, 1)
        return pixels[:, :3] * alpha + (1 - alpha)
    return pixels.expand(-1, 3, -1, -1)


def resize_to_cover(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize pictures to cover a size and crop the centre; antialiased bicubic.

    To a square this is the cut of ComfyUI's ``clip_preprocess``.

    Args:
        pixels: (B, C, H, W) in 0..1.
        size: (height, width) of the result.

    Returns:
        (B, C, height, width) float32 in 0..1.
    """
    pixels, (height, width) = pixels.float(), size
    if pixels.shape[-2:] == (height, width):
        return pixels.clamp(0, 1)
    scale = max(height / pixels.shape[-2], width / pixels.shape[-1])
    most = (math.ceil(MOST_COVERED * side / scale) for side in size)
    top, left = (max(0, side - longest) // 2 for side, longest in zip(pixels.shape[-2:], most, strict=True))
    pixels = pixels[..., top : pixels.shape[-2] - top, left : pixels.shape[-1] - left]
    covering = [max(height, round(pixels.shape[-2] * scale)), max(width, round(pixels.shape[-1] * scale))]
    resized = functional.interpolate(pixels, covering, mode="bicubic", antialias=True)
    top, left = (covering[0] - height) // 2, (covering[1] - width) // 2
    return resized[..., top : top + height, left : left + width].clamp(0, 1)
