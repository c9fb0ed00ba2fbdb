"""Face detectors that a user may have: YuNet's weights through kornia or OpenCV, and the cascades that OpenCV brings.

Nothing is downloaded and nothing is required. ComfyUI requires kornia, so that a YuNet file is enough; OpenCV is on many
machines. Boxes are those of `faces`, from the forehead to the chin, the best first.
Source: Wu et al., YuNet: A Tiny Millisecond-level Face Detector, Machine Intelligence Research 20, 2023.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from unittest.mock import patch

import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional

from .errors import FaceError
from .faces import Box, Detector, resized_to, without_doubles
from .files.reading import GARBLED, read_whole, reason, regular

LONGEST = 640  # pixels of the side that a photo is searched at; YuNet finds faces from 10 pixels on
CERTAIN = 0.8  # score of YuNet from which it is a face
STRIDE = 64  # of YuNet, pixels
# Cascades give a square from the brows to the chin. The median of 39 faces that they share with YuNet.
CASCADE = "haarcascade_frontalface_alt2.xml"
CASCADE_HEIGHT, CASCADE_WIDTH = 1.16, 0.84
# Of the yunet_final.pth that kornia publishes. A pickle of somebody else's can take all time and memory to be read.
PUBLISHED = "ee0a3035c5cbfc9484a31332223c9fd9c0ddcdb7c46b6a19e558ed393b6f2c67"


def has_opencv() -> bool:
    """Whether OpenCV is installed."""
    return find_spec("cv2") is not None


def yunet(path: Path) -> Detector:
    """YuNet of a file: ``.onnx`` through OpenCV, ``.safetensors`` or kornia's own ``.pth`` through kornia.

    Raises:
        FaceError: it cannot be read, or is another model.
    """
    try:
        kind = regular(path).suffix.lower()
        if not path.stat().st_size:
            raise ValueError("it is empty")
        if kind == ".onnx":
            return yunet_by_opencv(path)
        data = read_whole(path)
        if kind == ".safetensors":
            return yunet_by_kornia(safetensors.torch.load(data))
        if sha256(data).hexdigest() != PUBLISHED:
            raise ValueError("it is another one than kornia's")
        return yunet_by_kornia(dict(torch.load(BytesIO(data), map_location="cpu", weights_only=True)))
    except FaceError:
        raise
    except (OSError, AssertionError, *GARBLED) as error:
        why = f" ({reason(error)})" if isinstance(error, OSError) else ""
        raise FaceError(
            f"{path.name!r} is no YuNet file{why}. Take kornia's yunet_final.pth, YuNet's .onnx file, or weights of the former "
            "as .safetensors; or remove it."
        ) from error


def yunet_by_kornia(weights: Mapping[str, Tensor]) -> Detector:
    """YuNet in kornia's layout (``yunet_final.pth``).

    Raises:
        FaceError: kornia is not installed.
        RuntimeError: the weights are of another model.
    """
    try:
        from kornia.contrib import face_detection
    except ImportError as error:
        raise FaceError(
            "kornia, which reads this YuNet file, is not installed. Install it (pip install kornia), or take YuNet's .onnx file, "
            "which OpenCV reads."
        ) from error

    # Its constructor downloads weights unless the network is made without.
    make = face_detection.YuNet
    with patch.object(face_detection, "YuNet", lambda phase, pretrained: make(phase, pretrained=False)):
        detector = face_detection.FaceDetector(confidence_threshold=CERTAIN).eval()
    detector.model.load_state_dict(dict(weights))

    @torch.inference_mode()
    def find(picture: Tensor) -> list[Box]:
        small, factor = resized_to(picture.float().cpu(), LONGEST)
        height, width = small.shape[-2:]
        bgr = functional.pad(255 * small.flip(0), (0, -width % STRIDE, 0, -height % STRIDE))[None]
        rows = detector.postprocess(detector.model(bgr), *bgr.shape[-2:])[0]
        rows = rows[rows[:, 14] >= CERTAIN]
        corners = (factor * rows[rows[:, 14].argsort(descending=True), :4]).tolist()
        return without_doubles([Box(x, y, right - x, bottom - y) for x, y, right, bottom in corners])

    return find


def yunet_by_opencv(path: Path) -> Detector:
    """YuNet's ONNX file.

    Raises:
        FaceError: it is another model.
    """
    import cv2

    def find(picture: Tensor) -> list[Box]:
        small, factor = resized_to(picture, LONGEST)
        pixels = _bytes(small)
        detector.setInputSize((pixels.shape[1], pixels.shape[0]))
        _, rows = detector.detect(np.ascontiguousarray(pixels[..., ::-1]))
        found = [] if rows is None else sorted(rows.tolist(), key=lambda row: -row[14])
        return without_doubles([Box(*(factor * value for value in row[:4])) for row in found])

    try:
        detector = cv2.FaceDetectorYN.create(str(path), "", (LONGEST, LONGEST), CERTAIN)
        find(torch.zeros(3, STRIDE, STRIDE))  # another model is noticed when it runs
    except cv2.error as error:
        raise FaceError(f"OpenCV cannot read {path.name!r}. Take another YuNet file, or remove it.") from error
    return find


def cascade() -> Detector:
    """The cascade for faces from the front that OpenCV below 5 brings.

    Raises:
        FaceError: this OpenCV brings none.
    """
    import cv2

    path = Path(getattr(getattr(cv2, "data", None), "haarcascades", ""), CASCADE)
    if not hasattr(cv2, "CascadeClassifier") or not path.is_file():
        raise FaceError("The installed OpenCV brings no face cascades.")
    classifier = cv2.CascadeClassifier(str(path))

    def find(picture: Tensor) -> list[Box]:
        small, factor = resized_to(picture, LONGEST)
        grey = cv2.equalizeHist(cv2.cvtColor(_bytes(small), cv2.COLOR_RGB2GRAY))
        found, _, votes = classifier.detectMultiScale3(
            grey, scaleFactor=1.1, minNeighbors=5, minSize=(24, 24), outputRejectLevels=True
        )
        order = sorted(range(len(found)), key=lambda i: -float(votes[i]))
        return without_doubles([_of_cascade(*(factor * float(value) for value in found[i])) for i in order])

    return find


def _of_cascade(x: float, y: float, width: float, height: float) -> Box:
    tall, wide = CASCADE_HEIGHT * height, CASCADE_WIDTH * width
    return Box(x + (width - wide) / 2, y + (height - tall) / 2, wide, tall)


def _bytes(picture: Tensor) -> np.ndarray:
    return np.ascontiguousarray((255 * picture.clamp(0, 1)).round().byte().movedim(0, -1).cpu().numpy())
