"""The loss curve of a fine-tune as a picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

SIZE = (512, 320)
MARGIN = 44
FONT_SIZE = 16
BACKGROUND, AXIS, RAW, SMOOTH = (24, 24, 28), (150, 150, 155), (70, 84, 110), (120, 190, 255)
SMOOTHING = 0.9


def smoothed(losses: Sequence[float]) -> list[float]:
    """Bias-corrected exponential mean: single steps draw other noise and jump."""
    mean, weight, curve = 0.0, 0.0, []
    for loss in losses:
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        curve.append(mean / weight)
    return curve


def loss_plot(losses: Sequence[float], steps: int) -> Image.Image:
    """Draw raw and smoothed losses (RGB, 512 × 320) over a run of ``steps`` steps."""
    image = Image.new("RGB", SIZE, BACKGROUND)
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = MARGIN, MARGIN, SIZE[0] - MARGIN, SIZE[1] - MARGIN
    highest = max(losses) or 1.0

    def points(values: Sequence[float]) -> list[tuple[float, float]]:
        xs = (left + (right - left) * i / max(steps - 1, 1) for i in range(len(values)))
        return [(x, bottom - (bottom - top) * value / highest) for x, value in zip(xs, values, strict=True)]

    draw.line([(left, top), (left, bottom), (right, bottom)], fill=AXIS)
    curve = smoothed(losses)
    for values, colour, width in ((losses, RAW, 1), (curve, SMOOTH, 3)):
        if len(values) > 1:
            draw.line(points(values), fill=colour, width=width)
        else:
            x, y = points(values)[0]
            draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=colour)
    font = ImageFont.load_default(FONT_SIZE)
    title = f"loss {curve[-1]:.4f} (smoothed), step {len(losses)} of {steps}"
    draw.text((left, top - 12), title, AXIS, font, anchor="ls")
    draw.text((left - 6, top), f"{highest:.2g}", AXIS, font, anchor="rm")
    draw.text((left - 6, bottom), "0", AXIS, font, anchor="rm")
    draw.text((right, bottom + 8), str(steps), AXIS, font, anchor="ra")
    return image


def beside(plot: Image.Image, picture: Image.Image | None) -> Image.Image:
    """A plot with a picture to its right, as high as the plot; the plot alone without one."""
    if picture is None:
        return plot
    width = max(1, round(picture.width * plot.height / picture.height))
    both = Image.new("RGB", (plot.width + width, plot.height))
    both.paste(plot)
    both.paste(picture.resize((width, plot.height), Image.Resampling.BICUBIC), (plot.width, 0))
    return both


def loss_image(losses: Sequence[float]) -> torch.Tensor:
    """`loss_plot` of a finished run as IMAGE (1, 320, 512, 3) float32 in 0..1."""
    pixels = np.array(loss_plot(losses, len(losses)), dtype=np.float32) / 255
    return torch.from_numpy(pixels)[None]
