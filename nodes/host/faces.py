"""Faces in the host: the detector that the user has, the boxes and masks that other nodes give, and what is said of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import folder_paths
import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ...hdb_core import detectors, faces
from ...hdb_core.errors import FaceError
from ...hdb_core.faces import Box, Detector, Square
from ...hdb_core.files.reading import GARBLED
from .folders import add_folders
from .lists import masks_of, of_each

FOLDER = "detection"  # the host's own name for models that find things; older hosts lack it
KORNIA, ONNX = (".pth", ".pt", ".safetensors"), (".onnx",)
SMALL_SHARE = 0.2  # of the picture: a face that takes less is worth a word; `faces.square_of` makes it about 0.4
SHOWN = 768  # pixels of the preview
PAINT = (
    "Mark it yourself: right click on the photo in Load Image, Open in Mask Editor, paint over the face, save, and connect "
    "the MASK of Load Image to the mask of Crop to Face."
)
MOST_PIXELS = 1e6  # of a box's place and size


class Found(NamedTuple):
    """The faces of a photo, in the order asked for, and who found them."""

    boxes: list[Box]
    by: str


class Cut(NamedTuple):
    """A face that was cut out.

    Attributes:
        pixels: (3, side, side).
        mask: (side, side), where the square shows the face.
        box: the square in the photo, as BOUNDING_BOX.
        shown: the photo with what was found drawn on it, (H, W, 3).
        text: what was found, in a sentence.
    """

    pixels: Tensor
    mask: Tensor
    box: dict[str, int]
    shown: Tensor
    text: str


def register_detectors() -> None:
    """Tell hosts that have no folder for detectors about models/detection, besides those of extra_model_paths.yaml."""
    add_folders(FOLDER, {*KORNIA, *ONNX})


def detector() -> tuple[str, Detector] | None:
    """The best detector that is here, and its name: a YuNet file, or the cascades of OpenCV; None without either.

    Raises:
        FaceError: there is a file with YuNet in its name that is none.
    """
    for path in _yunet_files():
        by_opencv = path.suffix.lower() in ONNX
        if not by_opencv or detectors.has_opencv():
            stat = path.stat()
            return f"YuNet, {path.name}", _loaded(path, (stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size))
    return ("OpenCV's cascade", _cascade()) if _has_cascade() else None


def _yunet_files() -> list[Path]:
    folders = [Path(folder) for folder in folder_paths.get_folder_paths(FOLDER)]
    files = [path for folder in folders for path in sorted(folder.rglob("*")) if os.path.isfile(path)]
    return [path for path in files if "yunet" in path.name.lower() and path.suffix.lower() in (*KORNIA, *ONNX)]


@lru_cache(maxsize=1)
def _loaded(path: Path, version: tuple[int, ...]) -> Detector:
    return detectors.yunet(path)


@lru_cache(maxsize=1)
def _cascade() -> Detector:
    return detectors.cascade()


@lru_cache(maxsize=1)
def _has_cascade() -> bool:
    try:
        return detectors.has_opencv() and bool(_cascade())
    except FaceError:
        return False


def find_faces(picture: Tensor, order: str, boxes: Sequence[Box] | None = None, mask: Tensor | None = None) -> Found:
    """The faces of a photo (3, H, W): the given boxes, or what a mask (H, W) marks, or what the detector finds.

    Raises:
        FaceError: there is none, or nothing to find one with.
    """
    size = picture.shape[-2:]
    if boxes is not None:
        found = Found(faces.in_order(boxes, order, *size), "bboxes")
    elif mask is not None:
        if mask.shape != size:
            raise FaceError(
                f"The photo has {size[1]} × {size[0]} pixels, the mask {mask.shape[1]} × {mask.shape[0]}. Connect the MASK of "
                "the node that loads the photo."
            )
        found = Found([faces.box_of_mask(mask)], "mask")
    else:
        if (available := detector()) is None:
            raise FaceError(
                f"There is no face detector here. {PAINT} Or connect the bboxes of a node that finds faces, or put a YuNet "
                f"file (https://github.com/kornia/data/raw/main/yunet_final.pth) into {_folders()}."
            )
        found = Found(faces.in_order(available[1](picture), order, *size), available[0])
    if not found.boxes:
        raise FaceError(
            f"No face was found ({found.by}). {PAINT} Or take a photo that shows it from the front, or cropped already."
        )
    return found


def _folders() -> str:
    return ", ".join(folder_paths.get_folder_paths(FOLDER))


def crop_faces(
    pictures: Sequence[Tensor],
    bboxes: Sequence[Any] | None,
    mask: Sequence[Tensor] | None,
    order: str,
    index: int,
    margin: float,
) -> list[Cut]:
    """Cut one face out of each photo (3, H, W).

    Args:
        bboxes: values of a BOUNDING_BOX wire; None looks at the mask.
        mask: values of a MASK wire; None, or one that marks nothing, asks the detector.
        order: one of `faces.ORDERS`.
        index: which of several faces in that order, from 0.
        margin: see `faces.square_of`.

    Raises:
        FaceError: a photo has no such face; the message says which, and what to do.
    """
    count = len(pictures)
    there = bboxes and bboxes[0] is not None
    boxes = [None] * count if not there else boxes_of(bboxes[0] if len(bboxes) == 1 else list(bboxes), count)
    masks = of_each(masks_of(mask, FaceError), count, FaceError) or [None] * count
    cuts = []
    for number, given in enumerate(zip(pictures, boxes, masks, strict=True), 1):
        try:
            cuts.append(_crop(*given, order, index, margin))
        except FaceError as error:
            raise FaceError(f"Photo {number} of {count}: {error}" if count > 1 else str(error)) from None
    return cuts


def _crop(
    picture: Tensor, boxes: Sequence[Box] | None, mask: Tensor | None, order: str, index: int, margin: float
) -> Cut:
    if mask is not None and not mask.any():
        mask = None  # that of Load Image where nothing was painted, which is of another size
    found = find_faces(picture, order, boxes, mask)
    if index >= len(found.boxes):
        raise FaceError(
            f"The faces are counted from 0, the last is {len(found.boxes) - 1}, and index is {index}. Set a smaller index."
        )
    face = found.boxes[index]
    square = faces.square_of(face, margin)
    by_mask = boxes is None and mask is not None
    shown = faces.cut_out(mask[None], square)[0] if by_mask else faces.oval(face, square)
    place = {"x": square.x, "y": square.y, "width": square.side, "height": square.side}
    preview = drawn(picture, found, index, square)
    return Cut(faces.cut_out(picture, square), shown, place, preview, words(picture, found, index))


def words(picture: Tensor, found: Found, index: int) -> str:
    """What was found in a photo, and what is unusual about the chosen face, in a sentence."""
    height, width = picture.shape[-2:]
    face = found.boxes[index]
    many = f"face {index} of {len(found.boxes)} (0 to {len(found.boxes) - 1})" if len(found.boxes) > 1 else "one face"
    said = [f"{many}, {face.share(height, width):.0%} of the photo, {round(face.height)} pixels high ({found.by})"]
    if face.height < 128:
        said.append("small: it will look blurred")
    if faces.reaches_beyond(face, height, width):
        said.append("cut off by the edge, which is repeated")
    return "; ".join(said)


def drawn(picture: Tensor, found: Found, index: int, square: Square) -> Tensor:
    """A small copy of a photo with the boxes, their numbers and the square, (H, W, 3), as IMAGE."""
    small, factor = faces.resized_to(picture, SHOWN)
    image = Image.fromarray((255 * small).round().byte().movedim(0, -1).cpu().numpy())
    pen = ImageDraw.Draw(image)
    for number, box in enumerate(found.boxes):
        colour = "lime" if number == index else "orange"
        corners = [value / factor for value in (box.x, box.y, box.x + box.width, box.y + box.height)]
        pen.rectangle(corners, outline=colour, width=3)
        pen.text((corners[0] + 5, corners[1] + 3), str(number), fill=colour, font_size=20)
    ends = (square.x, square.y, square.x + square.side, square.y + square.side)
    pen.rectangle([value / factor for value in ends], outline="white", width=2)
    return torch.from_numpy(np.asarray(image).astype(np.float32) / 255)


def paste_faces(photo: Tensor, new: Tensor, box: Any, mask: Tensor | None) -> Tensor:
    """Put new faces (N, 3, h, w) back into the photo (1, 3, H, W) that they were cut from: (N, 3, H, W).

    Args:
        box: a BOUNDING_BOX of one square, as `Cut.box`.
        mask: MASK, where they show; None is all of the square.

    Raises:
        FaceError: there are several photos, boxes or masks, or the box is none, not square, or too large.
    """
    boxes, masks = boxes_of(box, 1)[0], masks_of([mask], FaceError)
    if len(photo) != 1 or len(boxes) != 1 or len(masks) > 1:
        raise FaceError(
            f"Expected one photo, one box and at most one mask, got {len(photo)}, {len(boxes)} and {len(masks)}. Connect "
            "the photo and the outputs of one Crop to Face."
        )
    (place,) = boxes
    if place.width != place.height or place.width < 1:
        raise FaceError(
            f"The box is {place.width:g} × {place.height:g} and not square. Connect the box of Crop to Face."
        )
    square = Square(round(place.x), round(place.y), round(place.width))
    faces.require_side(square.side)
    return torch.stack([faces.paste(photo[0], one, square, masks[0] if masks else None) for one in new])


def boxes_of(value: Any, photos: int) -> list[list[Box]]:
    """The boxes of each photo of a BOUNDING_BOX: one box, a list for all photos, or a list for each.

    Raises:
        FaceError: it is something else, or of another number of photos.
    """
    try:
        frames = [[value]] if isinstance(value, dict) else list(value)
        frames = [frames] if frames and isinstance(frames[0], dict) else frames
        made = [[Box(*(float(box[key]) for key in Box._fields)) for box in frame] for frame in frames] or [[]]
        numbers = [number for frame in made for box in frame for number in box]
        sides = [side for frame in made for box in frame for side in box[2:]]
        if not all(abs(number) < MOST_PIXELS for number in numbers) or min(sides, default=0) < 0:  # NaN, too
            raise ValueError("no place in a picture")
    except GARBLED as error:
        raise FaceError(
            "The connected BOUNDING_BOX holds no boxes with x, y, width and height. Connect a node that finds faces."
        ) from error
    if len(made) not in (1, photos):
        raise FaceError(f"There are {photos} photos and boxes for {len(made)}. Find the faces in the same photos.")
    return made * photos if len(made) == 1 else made


def seen_in(pictures: Sequence[Tensor], cut: str = faces.CUTS[0]) -> list[str]:
    """What is unusual about each photo (3, H, W) that is to be learned, as far as there is a detector that sees it.

    Args:
        pictures: the photos.
        cut: how they are expected to be cut, one of `faces.CUTS`.
    """
    try:
        available = detector()
    except FaceError as error:
        return [str(error)]
    said = []
    for number, picture in enumerate(pictures, 1):
        found = (
            None if available is None else faces.in_order(available[1](picture), "largest first", *picture.shape[-2:])
        )
        line = _sight(picture, found, available[0] if available else "", cut)
        if line:
            said.append((f"photo {number}: " if len(pictures) > 1 else "") + line)
    return said


def _sight(picture: Tensor, found: Sequence[Box] | None, by: str, cut: str) -> str:
    """What is said of one photo, in which these faces were found; None if there was nothing to look for them."""
    size = picture.shape[-2:]
    uncut = cut == "face" and not faces.is_cut(found[0] if found else None, *size)
    parts, crop = [], uncut
    if found:
        others = faces.rivals(found)
        share = found[0].share(*size)
        parts.append(f"the face is {share:.0%} of the picture" + (f", of {1 + len(others)} faces" if others else ""))
        crop = crop or bool(others) or share < SMALL_SHARE
    elif found is not None:
        parts.append(f"no face found by {by}")
    if uncut:
        parts.append("this hypernetwork was trained on photos that were cut by Crop to Face, and this one is not")
    return "; ".join(parts) + (": put Crop to Face before this node" if crop else "")
