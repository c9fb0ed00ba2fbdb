"""Files in one zip archive, cut into pieces of a size that may travel, and back: ``python -m devtools.parcel FROM TO``.

Standard library only. The archive's own checksums tell of a piece that is missing or damaged.
"""

from __future__ import annotations

import argparse
import io
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

NAME = "parcel.zip"
PIECE = 15 * 2**20  # bytes


def pack(files: Mapping[str, Path], folder: Path, piece: int = PIECE) -> list[Path]:
    """Writes ``parcel.zip.0`` and on, in place of those that are there; the pieces.

    Args:
        files: name in the archive → file; those that are not there are left out.
        folder: of the pieces.
        piece: bytes of each at most.
    """
    made, parcel = [], io.BytesIO()
    with zipfile.ZipFile(parcel, "w", zipfile.ZIP_STORED) as archive:  # weights do not shrink
        for name, path in files.items():
            if path.is_file():
                archive.write(path, name)
    content = parcel.getbuffer()
    for number, first in enumerate(range(0, len(content), piece)):
        made.append(folder / f"{NAME}.{number}.partial")
        made[-1].write_bytes(content[first : first + piece])
    for old in pieces(folder):
        old.unlink()
    return [path.rename(path.with_suffix("")) for path in made]


def pieces(folder: Path) -> list[Path]:
    """The pieces in a folder, in order."""
    return sorted(folder.glob(f"{NAME}.*[0-9]"), key=lambda path: int(path.suffix[1:]))


def unpack(folder: Path, target: Path) -> list[str]:
    """Puts the files of a parcel back, below a folder; their names.

    Raises:
        FileNotFoundError: there is no piece.
        zipfile.BadZipFile: a piece is missing or damaged.
    """
    found = pieces(folder)
    if not found:
        raise FileNotFoundError(f"No {NAME}.0 in {folder}.")
    try:
        with zipfile.ZipFile(io.BytesIO(b"".join(path.read_bytes() for path in found))) as archive:
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"{damaged} is damaged.")
            archive.extractall(target)
            return archive.namelist()
    except (ValueError, zipfile.BadZipFile) as error:  # the first is of an archive that is shorter than it says
        raise zipfile.BadZipFile(f"A piece in {folder} is missing or damaged: copy them again ({error}).") from error


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="FROM", help="folder of the pieces")
    parser.add_argument("target", type=Path, metavar="TO", help="folder of the files")
    args = parser.parse_args()
    try:
        print("\n".join(unpack(args.source, args.target)))
        return 0
    except (OSError, zipfile.BadZipFile) as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
