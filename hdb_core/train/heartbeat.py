"""Signs of life between the processes of a training: one that dies or hangs ends the others within two minutes.

The processes wait hours for a slow one, such as the one that learns a basis. So that they do not wait as long for a dead
one, each counts up a number of its own in the store that torch.distributed was begun with, and watches those
of the others.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta

from torch.distributed import DistError, TCPStore

EVERY = 5.0  # seconds between two signs
PATIENCE = 60.0  # seconds without one
GO_ON = "Give the same command again: the training goes on from the last state that was written."
_ENDED = 1 << 40  # added to the number of a process that has ended well
_LEAVING = 10.0  # seconds in which a process may end after the one that holds the store


class Heartbeat:
    """Threads that end this process when another one is dead; for use in a ``with`` block.

    A process leaves the block without an error when it needs the others no more, and with one when it fails: then the
    others end as well.

    Args:
        rank: of this process.
        count: of all processes.
        address: host and port of the store.
        every: seconds between two signs of life.
        patience: seconds without one after which a process counts as dead.
    """

    def __init__(
        self, rank: int, count: int, address: tuple[str, int], every: float = EVERY, patience: float = PATIENCE
    ) -> None:
        self.rank, self.count, self.every, self.patience = rank, count, every, patience
        self._store = TCPStore(*address, is_master=False, timeout=timedelta(seconds=patience))
        self._over = threading.Event()
        self._seen = {other: (0, time.monotonic()) for other in range(count) if other != rank}
        self._rounds = 0
        self._beating = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._watching = threading.Thread(target=self._watch_store, name="heartbeat of the store", daemon=True)

    def __enter__(self) -> None:
        self._beating.start()
        self._watching.start()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._over.set()
        self._beating.join(self.patience)
        if kind is None and not self._beating.is_alive():
            with suppress(RuntimeError):  # the process that holds the store has ended before
                self._store.add(_key(self.rank), _ENDED)

    def _beat(self) -> None:
        while not self._over.wait(self.every):
            try:
                self._store.add(_key(self.rank), 1)
                silent = [other for other in self._seen if self._is_silent(other)]
            except RuntimeError:  # nobody holds the store any more
                if self._over.wait(_LEAVING):
                    return
                silent = [0]
            if silent:
                self._end(silent[0])
            self._rounds += 1

    def _watch_store(self) -> None:
        """A store in a process that hangs does not answer, and a call to it does not end."""
        before, same = -1, 0
        while not self._over.wait(self.every):
            before, same = self._rounds, same + 1 if self._rounds == before else 0
            if same * self.every > self.patience:
                self._end(0)

    def _is_silent(self, other: int) -> bool:
        signs, now = self._store.add(_key(other), 0), time.monotonic()
        before, since = self._seen[other]
        if signs != before:
            self._seen[other] = (signs, now)
            return False
        return signs < _ENDED and now - since > self.patience

    def _end(self, other: int) -> None:
        """The main thread may wait in a call that nothing interrupts, so that this ends the process as a kill would."""
        sys.stderr.write(
            f"Process {other} of {self.count} has ended or hangs, so process {self.rank} ends, too. {GO_ON}\n"
        )
        sys.stderr.flush()
        os._exit(1)


def lost_another(error: RuntimeError) -> bool:
    """Whether torch says with an error that another process is gone; it may notice that before a heartbeat does."""
    return isinstance(error, DistError) or "gloo" in str(error)


def _key(rank: int) -> str:
    return f"hdb_heartbeat/{rank}"


def address() -> tuple[str, int]:
    """Where torchrun and accelerate have put the store."""
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
