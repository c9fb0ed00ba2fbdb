"""Finds, chooses and cuts out faces, so that a hypernetwork is given photos that are cut like those it was trained on.

A face is a box from the forehead to the chin; whoever finds it in another way says so in such boxes. The rule `CUT` makes
a square of it. Everything is in whole pixels of the photo: nothing is resized here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .errors import FaceError, require

# The square of FFHQ and CelebA-HQ, upright. Theirs hangs on eyes and mouth; in boxes of YuNet it is this, the median of
# 45 faces of 31 photographs (10th to 90th percentile: side 1.28 to 1.44, rise 0.05 to 0.11).
# Source: Karras et al., Progressive Growing of GANs, arXiv 1710.10196, appendix C.
SIDE = 1.34  # of the square, in heights of the face
RISE = 0.07  # of the square's centre above the face's, in heights of the face
CUTS = ("centre", "face")  # what a hypernetwork's file may say: its photos were not cut, or cut by `square_of`
MIN_FACE = 32  # pixels of height: fewer show a colour and no features
MAX_SIDE = 16_384  # pixels of a square, the largest picture of the host
CUT_OFF = 0.15  # of a face beyond the photo's edge, from which that is said
SQUARE = 1.02  # the longer side of a picture to the shorter, at most, to be a square
ALIKE = 0.6  # of two squares, at least: what they have in common to what they cover together
ORDERS = ("largest first", "left to right", "most central first")


class Box(NamedTuple):
    """A rectangle in a photo, in pixels from its upper left corner."""

    x: float
    y: float
    width: float
    height: float

    @property
    def area(self) -> float:
        return self.width * self.height

    @property
    def centre(self) -> tuple[float, float]:
        return self.x + self.width / 2, self.y + self.height / 2

    def share(self, height: int, width: int) -> float:
        """The share of a picture of a size that the rectangle takes."""
        inside = self.within(height, width)
        return max(0.0, inside.width) * max(0.0, inside.height) / (height * width)

    def within(self, height: int, width: int) -> Box:
        """The part that lies inside a picture of a size."""
        left, top = max(0.0, self.x), max(0.0, self.y)
        right, bottom = min(float(width), self.x + self.width), min(float(height), self.y + self.height)
        return Box(left, top, right - left, bottom - top)


Detector = Callable[[Tensor], Sequence[Box]]  # faces of an RGB picture (3, H, W) in 0..1


class Square(NamedTuple):
    """What is cut out of a photo, in whole pixels; it may reach beyond the edges."""

    x: int
    y: int
    side: int


def in_order(faces: Sequence[Box], order: str, height: int, width: int) -> list[Box]:
    """Faces of a picture of a size in one of `ORDERS`.

    Raises:
        FaceError: there is no such order.
    """
    require(order in ORDERS, "order", " or ".join(ORDERS), order, FaceError)

    def off_centre(face: Box) -> float:
        x, y = face.centre
        return (x - width / 2) ** 2 + (y - height / 2) ** 2

    keys: dict[str, Callable[[Box], float]] = {
        "largest first": lambda face: -face.area,
        "left to right": lambda face: face.centre[0],
        "most central first": off_centre,
    }
    return sorted(faces, key=keys[order])


def rivals(faces: Sequence[Box]) -> list[Box]:
    """Of faces in the order "largest first", those beside the first that are as likely to be the person: half as high."""
    return [face for face in faces[1:] if face.area > faces[0].area / 4]


def without_doubles(faces: Sequence[Box]) -> list[Box]:
    """Boxes, the best first, without those that share more than a third of the smaller one with a better one, and those
    that are nowhere."""
    kept: list[Box] = []
    for face in faces:
        if all(map(math.isfinite, face)) and not any(
            _common(other, face) > min(other.area, face.area) / 3 for other in kept
        ):
            kept.append(face)
    return kept


def _common(one: Box, other: Box) -> float:
    width = min(one.x + one.width, other.x + other.width) - max(one.x, other.x)
    height = min(one.y + one.height, other.y + other.height) - max(one.y, other.y)
    return max(0.0, width) * max(0.0, height)


def square_of(face: Box, margin: float = 0.0) -> Square:
    """The rule of the cut ``face``: the square around a face.

    Args:
        face: its box.
        margin: more on each side, as a share of the square.

    Raises:
        FaceError: the face has less than `MIN_FACE` pixels, or the square more than `MAX_SIDE`.
    """
    height = max(face.width, face.height)  # of a face that is cut off below or above, too
    if height < MIN_FACE:
        raise FaceError(
            f"The face has {round(face.width)} × {round(face.height)} pixels; at least {MIN_FACE} are needed. "
            "Take a larger photo, or one taken closer."
        )
    side = round(SIDE * height * (1 + 2 * margin))
    require_side(side)
    x, y = face.centre
    return Square(round(x - side / 2), round(y - RISE * height - side / 2), side)


def require_side(side: int) -> None:
    """Refuse squares that would fill the memory.

    Raises:
        FaceError: it has more than `MAX_SIDE` pixels.
    """
    if side > MAX_SIDE:
        raise FaceError(
            f"The square has {side:,} × {side:,} pixels; at most {MAX_SIDE:,} are possible. Lower margin, or connect the box "
            "of a face in this photo."
        )


def cut_out(pixels: Tensor, square: Square) -> Tensor:
    """A square of a picture (C, H, W), (C, side, side); beyond the edges, the edge is repeated."""
    height, width = pixels.shape[-2:]
    rows = torch.arange(square.y, square.y + square.side).clamp(0, height - 1)
    columns = torch.arange(square.x, square.x + square.side).clamp(0, width - 1)
    return pixels[:, rows[:, None].to(pixels.device), columns.to(pixels.device)]


def paste(picture: Tensor, face: Tensor, square: Square, mask: Tensor | None = None) -> Tensor:
    """A picture with a face put back to where it was cut out.

    Args:
        picture: (3, H, W), that `square` lies in.
        face: (3, h, w) of any size; it is resized to the square.
        square: where to; what reaches beyond the edges is dropped.
        mask: (h, w) in 0..1 of any size, where the face shows; None is all of the square.

    Returns:
        (3, H, W) float32.
    """
    size = (square.side, square.side)
    whole = torch.ones(1, *size, device=picture.device) if mask is None else mask[None]
    new, shows = (
        functional.interpolate(one[None].float(), size, mode="bicubic", antialias=True)[0].clamp(0, 1)
        for one in (face, whole)
    )
    height, width = picture.shape[-2:]
    top, left = max(0, square.y), max(0, square.x)
    bottom, right = min(height, square.y + square.side), min(width, square.x + square.side)
    pasted = picture.float().clone()
    if top < bottom and left < right:
        rows, columns = slice(top - square.y, bottom - square.y), slice(left - square.x, right - square.x)
        there = pasted[:, top:bottom, left:right]
        pasted[:, top:bottom, left:right] = there.lerp(
            new[:, rows, columns].to(there), shows[:, rows, columns].to(there)
        )
    return pasted


def oval(face: Box, square: Square) -> Tensor:
    """Where a square shows the face, (side, side) float32: 1 inside an ellipse around its box, 0 outside, soft between."""
    (x, y), half_width, half_height = face.centre, 0.58 * face.width, 0.58 * face.height
    places = torch.arange(square.side) + 0.5
    across = (places + (square.x - x)) / half_width
    down = (places + (square.y - y)) / half_height
    radius = (across.square() + down.square()[:, None]).sqrt()
    return ((1.1 - radius) / 0.2).clamp(0, 1)


def box_of_mask(mask: Tensor) -> Box:
    """The box around what a mask (H, W) in 0..1 marks.

    Raises:
        FaceError: it marks nothing, or the edge without the middle.
    """
    marked = mask > 0.5
    if not bool(marked.any()):
        raise FaceError("The mask is empty. Paint the face in the Mask Editor of Load Image, or connect no MASK.")
    if leaves_out_the_middle(mask):
        raise FaceError(
            "The mask marks the edge of the photo and leaves out its middle, as that of a cut-out PNG does. Put Invert Mask "
            "between, or connect no MASK."
        )
    rows, columns = (marked.any(axis).nonzero().flatten() for axis in (1, 0))
    top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
    return Box(left, top, right - left, bottom - top)


def leaves_out_the_middle(mask: Tensor) -> bool:
    """Whether a mask (H, W) marks most of the photo's edge and little of its middle, as one that is inverted."""
    height, width = mask.shape
    middle = mask[height // 4 : height - height // 4, width // 4 : width - width // 4]
    upper = mask[: max(1, height // 2)]  # clothes reach the lower edge
    edge = torch.cat([mask[0], upper[:, 0], upper[:, -1]])
    return bool(middle.mean() < 0.5 < edge.mean())


def is_cut(face: Box | None, height: int, width: int) -> bool:
    """Whether a picture is about what `square_of` makes of its face; of one that nobody has found, whether it is square."""
    if max(height, width) > SQUARE * min(height, width):
        return False
    if face is None:
        return True
    whole, side = Box(0, 0, width, height), SIDE * max(face.width, face.height)
    (x, y), rise = face.centre, RISE * face.height
    square = Box(x - side / 2, y - rise - side / 2, side, side)
    common = _common(whole, square)
    return common > ALIKE * (whole.area + square.area - common)


def reaches_beyond(face: Box, height: int, width: int) -> bool:
    """Whether a face is cut off by the edge of its picture."""
    inside = face.within(height, width)
    return inside.area < (1 - CUT_OFF) * face.area


def resized_to(pixels: Tensor, longest: int) -> tuple[Tensor, float]:
    """A picture (3, H, W) whose longer side has at most so many pixels, and by what its sides were divided."""
    factor = max(1.0, max(pixels.shape[-2:]) / longest)
    if factor == 1:
        return pixels, 1.0
    size = [max(1, round(side / factor)) for side in pixels.shape[-2:]]
    return functional.interpolate(pixels[None], size, mode="bilinear", antialias=True)[0].clamp(0, 1), factor
