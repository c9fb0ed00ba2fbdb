"""The drawn pictures on the device that trains, in whatever form it needs them, while more of them are drawn."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from .pictures import chunk_paths, drawn_chunks
from .training import to_device

AHEAD = 4  # chunks that are read before they are wanted
LOOK_EVERY = 1.0  # seconds, for new ones


class Rows:
    """A tensor that grows by rows, in a buffer that doubles."""

    def __init__(self) -> None:
        self._buffer, self.count = torch.empty(0), 0

    def add(self, rows: torch.Tensor) -> None:
        """Appends rows (N, …), all of one shape."""
        needed = self.count + len(rows)
        if needed > len(self._buffer):
            larger = rows.new_empty(max(needed, 2 * len(self._buffer)), *rows.shape[1:])
            if self.count:
                larger[: self.count] = self._buffer[: self.count]
            self._buffer = larger
        self._buffer[self.count : needed] = rows
        self.count = needed

    def __getitem__(self, rows: torch.Tensor) -> torch.Tensor:
        return self._buffer[rows]


class PicturePool:
    """All pictures that are drawn so far, and their captions.

    Args:
        folder: that ``miniature.pictures`` writes to.
        device: that keeps them.
        prepare: from uint8 RGB (N, H, W, 3) on the device to what is kept of each.
        kinds: of singles (False) and pairs (True).
        most: pictures that are kept.
    """

    def __init__(self, folder: Path, device: torch.device | str, prepare: Callable[[torch.Tensor], torch.Tensor],
                 kinds: Sequence[bool] = (False, True), most: int = 2_000_000) -> None:  # fmt: skip
        self.folder, self.device, self.prepare, self.most = folder, torch.device(device), prepare, most
        self._kept = {pairs: (Rows(), Rows()) for pairs in kinds}
        self._threads, self._reading, self._looked = ThreadPoolExecutor(AHEAD), list[Future[list]](), -LOOK_EVERY
        self._seen, self._next = set[int](), list[int]()

    def __len__(self) -> int:
        return sum(pictures.count for pictures, _ in self._kept.values())

    def grow(self, most: int = 2) -> None:
        """Takes up at most so many chunks that have been read; waits only while there is no picture at all."""
        while not self._grown(most) and not len(self):
            time.sleep(0.1)

    def _grown(self, most: int) -> int:
        if time.monotonic() - self._looked > LOOK_EVERY and len(self) < self.most:
            self._looked = time.monotonic()
            self._next += [chunk for chunk in drawn_chunks(self.folder) if chunk not in self._seen]
            self._seen.update(self._next)
        while self._next and len(self._reading) < AHEAD:
            self._reading.append(self._threads.submit(self._read, self._next.pop(0)))
        ready = [future for future in self._reading if future.done()][:most]
        for future in ready:
            self._reading.remove(future)
            for (pictures, captions), (pixels, tokens) in zip(self._kept.values(), future.result(), strict=True):
                pictures.add(self.prepare(to_device(pixels, self.device)))
                captions.add(to_device(tokens, self.device))
        return len(ready)

    def _read(self, chunk: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        read = []
        for pairs in self._kept:
            pixels, tokens = (np.load(path) for path in chunk_paths(self.folder, chunk, pairs))
            read.append((torch.from_numpy(pixels), torch.from_numpy(tokens.astype(np.int32))))
        return read

    def batch(self, count: int, generator: torch.Generator, pairs: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """What is kept of random pictures, (count, …), and a random caption of each as tokens (count, 77).

        Args:
            count: of the pictures.
            generator: of the device.
            pairs: of two people.
        """
        pictures, captions = self._kept[pairs]
        rows = torch.randint(pictures.count, (count,), generator=generator, device=self.device)
        own = captions[rows]
        draws = torch.randint(own.shape[1], (count,), generator=generator, device=self.device)
        return pictures[rows], own[torch.arange(count, device=self.device), draws].long()
