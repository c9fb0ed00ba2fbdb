"""Reads what the next steps of a training need while the present one is computed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Read = TypeVar("Read")
AHEAD = 4  # parts of steps that wait for their turn


def read_ahead(read: Callable[[Item], Read], items: Iterable[Item]) -> Generator[tuple[Item, Read], None, None]:
    """Each item with what ``read`` makes of it, in order; up to `AHEAD` are read beforehand, in a thread.

    Raises:
        Exception: what ``read`` raised, at the turn of its item.
    """
    waiting: deque[tuple[Item, Future[Read]]] = deque()
    pool = ThreadPoolExecutor(1)
    try:
        for item in items:
            waiting.append((item, pool.submit(read, item)))
            if len(waiting) > AHEAD:
                first, future = waiting.popleft()
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()
    finally:
        pool.shutdown(cancel_futures=True)
