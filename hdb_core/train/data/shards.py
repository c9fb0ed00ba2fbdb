"""Writes people's photos, a folder for each person or into shards; `photos.find_people` reads both."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

from ...files.atomic import naming
from .photos import SHARD

Files = Mapping[str, bytes]  # ending → contents, of a photo
Keyed = tuple[str, Files]  # "anna/0000", and its files


class FolderWriter(AbstractContextManager["FolderWriter"]):
    """A folder for each person, and single photos.

    Args:
        folder: receives them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __exit__(self, *_: object) -> None:
        pass

    def add(self, photos: Sequence[Keyed]) -> None:
        """Write the photos of a person."""
        for key, files in photos:
            for ending, contents in files.items():
                path = self.folder / f"{key}{ending}"
                with naming(path):
                    path.parent.mkdir(exist_ok=True)
                    path.write_bytes(contents)


class ShardWriter(AbstractContextManager["ShardWriter"]):
    """Shards ``shard_00000.tar`` and on; all files of a person are in one, side by side, as webdataset has them.

    Args:
        folder: receives them.
        size: from which a shard is full, bytes.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size, self.number = folder, size, 0
        self._shard: tarfile.TarFile | None = None

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._shard is not None:
            with naming(self._partial):
                self._shard.close()
            if kind is None:
                self._finish()

    def add(self, photos: Sequence[Keyed]) -> None:
        """Add the photos of a person."""
        if not photos:
            return
        with naming(self._partial):
            self._add(photos)

    def _add(self, photos: Sequence[Keyed]) -> None:
        if self._shard is None:
            self._shard = tarfile.open(self._partial, "w")  # noqa: SIM115 - it is filled by many calls
        for key, files in photos:
            for ending, contents in sorted(files.items()):
                header = tarfile.TarInfo(f"{key}{ending}")
                header.size = len(contents)
                self._shard.addfile(header, io.BytesIO(contents))
        if self._shard.offset >= self.size:
            self._shard.close()
            self._finish()

    @property
    def _partial(self) -> Path:
        return self.folder / f"shard_{self.number:05}.partial"

    def _finish(self) -> None:
        self._partial.replace(self._partial.with_suffix(SHARD))
        self._shard, self.number = None, self.number + 1
