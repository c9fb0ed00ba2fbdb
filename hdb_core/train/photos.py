"""Prepare photos for a training: ``python -m hdb_core.train.photos FOLDER --into DATA``.

FOLDER holds a sub-folder of photos for each person, single photos, or shards. What can be used is written to DATA/photos,
which is the --photos of ``python -m hdb_core.train``. DATA/report.png shows what was kept and dropped, DATA/photos.csv
has a line for each photo. Words beside a photo (1.txt, or metadata.jsonl in FOLDER) and masks (1.mask.png) are kept.

With ``--cut face``, photos are cut to the face as *Crop to Face* does, and one without a mask gets one: an oval around
the face. Photos without a face, or with a second one that is more than half as high, are dropped. The training, and with
it the hypernetwork, then knows how photos are to be cut. This takes YuNet's file, or OpenCV below 5 with its cascades.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from .. import detectors
from ..errors import FaceError, HDBError
from ..faces import CUTS, Detector
from .data.prepare import Checks, dropped, prepare

MEGABYTE = 10**6


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepare photos; the exit code."""
    args = parser().parse_args(arguments)
    try:
        checks = Checks(args.size, args.smallest, args.least_sharpness)
        detector = find_detector(args.yunet) if args.cut == "face" else None
        with tqdm(unit="person") as bar:
            counted = prepare(args.folder, args.into, checks, detector, args.shards * MEGABYTE, bar.update)
    except (HDBError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\nStopped. The same command begins again.\n")
        return 130  # as a shell gives it
    sys.stdout.write(
        f"{counted['kept']:,} photos of {counted['people']:,} people are in {args.into / 'photos'}.\n"
        f"Dropped: {dropped(counted)}. Look at {args.into / 'report.png'} and {args.into / 'photos.csv'}.\n"
        f"They are cut to the {args.cut}. A training on them sets encoder.cut itself.\n"
    )
    return 0


def find_detector(yunet: Path | None) -> Detector:
    """YuNet of a file, or the cascade of OpenCV.

    Raises:
        FaceError: there is none, or the file is another.
    """
    if (yunet is None or yunet.suffix.lower() == ".onnx") and not detectors.has_opencv():
        raise FaceError("There is no OpenCV to find faces with. Give --yunet a YuNet file for kornia, yunet_final.pth.")
    return detectors.cascade() if yunet is None else detectors.yunet(yunet)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="hdb_core.train.photos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    defaults = Checks()
    made.add_argument("folder", type=Path, metavar="FOLDER", help="with a sub-folder for each person, single photos or shards")  # fmt: skip
    made.add_argument("--into", type=Path, required=True, metavar="DATA", help="a new folder")
    made.add_argument("--cut", choices=CUTS, default=CUTS[0], help="what is kept of a photo: its central square, or the square around the face; default %(default)s")  # fmt: skip
    made.add_argument("--yunet", type=Path, metavar="FILE", help="YuNet's weights for --cut face, yunet_final.pth or .onnx; without, OpenCV's cascades, which find fewer faces")  # fmt: skip
    made.add_argument("--size", type=int, default=defaults.size, help="larger photos are reduced to this side, pixels: what the base model is trained at; default %(default)s")  # fmt: skip
    made.add_argument("--smallest", type=int, default=defaults.smallest, help="photos whose square is smaller are dropped; default %(default)s")  # fmt: skip
    made.add_argument("--least-sharpness", type=float, default=defaults.least_sharpness, help="photos with a smaller share of contrast in their finest details, a column of photos.csv, are dropped as blurred; default %(default)s, 0 keeps all")  # fmt: skip
    made.add_argument("--shards", type=int, default=0, metavar="MB", help="write .tar files of about this size instead of a folder for each person; from some 10,000 people on; default %(default)s is none")  # fmt: skip
    return made


if __name__ == "__main__":
    sys.exit(main())
