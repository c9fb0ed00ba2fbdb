"""The four picture styles, as filters on a drawn picture (uint8 RGB in, uint8 RGB out, same size)."""

import numpy as np
from PIL import Image, ImageFilter


def pencil_sketch(picture: np.ndarray) -> np.ndarray:
    """Dark lines where luminance changes, faint shading elsewhere, on warm paper."""
    gray = np.asarray(Image.fromarray(picture).convert("L"), dtype=np.float32)
    dy, dx = np.gradient(gray)
    line = np.clip(np.hypot(dx, dy) * 3.2, 0, 215)
    tone = np.clip(246 - 0.22 * (255 - gray) - line, 0, 255)
    return np.clip(tone[..., None] * np.array([1.0, 0.985, 0.95]), 0, 255).astype(np.uint8)


def pixel_art(picture: np.ndarray, block: int = 4, levels: int = 6) -> np.ndarray:
    """Square blocks of ``block`` pixels in a palette of ``levels`` steps a channel."""
    height, width = picture.shape[:2]
    small = np.asarray(Image.fromarray(picture).resize((width // block, height // block), Image.Resampling.BOX))
    step = 255 / (levels - 1)
    small = (np.round(small / step) * step).astype(np.uint8)
    return small.repeat(block, 0).repeat(block, 1)


def night(picture: np.ndarray) -> np.ndarray:
    """Dim, blue moonlight."""
    return np.clip(picture * np.array([0.40, 0.47, 0.72]) + np.array([2, 6, 26]), 0, 255).astype(np.uint8)


def painting(picture: np.ndarray) -> np.ndarray:
    """Merged patches of colour, stronger saturation, slanted brush strokes."""
    flat = np.asarray(Image.fromarray(picture).filter(ImageFilter.ModeFilter(5)), dtype=np.float32)
    gray = flat.mean(-1, keepdims=True)
    y, x = np.mgrid[: picture.shape[0], : picture.shape[1]]
    strokes = 14.0 * np.sin(2 * np.pi * (x + 0.5 * y) / 11.0)[..., None]
    return np.clip(gray + 1.4 * (flat - gray) + strokes, 0, 255).astype(np.uint8)


_FILTERS = {"pencil sketch": pencil_sketch, "pixel art": pixel_art, "night": night, "painting": painting}


def apply_style(picture: np.ndarray, style: str) -> np.ndarray:
    """The picture in a style of ``people.STYLES``; ``photo`` is the picture itself."""
    return picture if style == "photo" else _FILTERS[style](picture)
