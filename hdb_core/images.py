"""The one way in which photos are cut and resized, in training and in the nodes."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


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
    covering = [max(height, round(pixels.shape[-2] * scale)), max(width, round(pixels.shape[-1] * scale))]
    resized = functional.interpolate(pixels, covering, mode="bicubic", antialias=True)
    top, left = (covering[0] - height) // 2, (covering[1] - width) // 2
    return resized[..., top : top + height, left : left + width].clamp(0, 1)
