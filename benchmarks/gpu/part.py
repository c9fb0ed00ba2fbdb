"""A part of a check: a process of its own that writes down every result as soon as it has it."""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import quantiles
from typing import Any

from devtools.device import add_option, made_on, synchronize

from ..common.files import rounded, write_json


class Part:
    """The results of a part, as rows in a JSON file.

    Args:
        path: of the file.
        device: that is measured.
        seconds: in which the part should be done.
        toy: at the smallest sizes, for a rehearsal on a CPU.
    """

    def __init__(self, path: Path, device: str, seconds: float, toy: bool) -> None:
        self.path, self.device, self.seconds, self.toy = path, device, seconds, toy
        self.rows: list[dict[str, Any]] = []
        self._started = time.monotonic()
        self._write()

    @classmethod
    def from_arguments(
        cls, description: str | None, *more: Callable[[argparse.ArgumentParser], Any]
    ) -> tuple[Part, argparse.Namespace]:
        """The part that this process's command line asks for, and its other options, which `more` adds."""
        parser = argparse.ArgumentParser(description=description)
        parser.add_argument("--json", type=Path, required=True, help="file of the results")
        parser.add_argument("--seconds", type=float, default=60.0, help="in which it should be done")
        parser.add_argument("--toy", action="store_true", help="the smallest sizes, for a rehearsal on a CPU")
        add_option(parser)
        for add in more:
            add(parser)
        args = parser.parse_args()
        return cls(args.json, args.device, args.seconds, args.toy), args

    @property
    def left(self) -> float:
        """Seconds until it should be done."""
        return self.seconds - (time.monotonic() - self._started)

    def add(self, what: str, **values: Any) -> None:
        """Keeps a result, in place of one of the same name, and prints it."""
        row = rounded({"what": what, "at_second": self.seconds - self.left, **values})
        self.rows = [*(other for other in self.rows if other["what"] != what), row]
        self._write()
        print(what, {name: value for name, value in row.items() if name not in ("what", "at_second")}, flush=True)

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Goes on after a failure, which becomes a result."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever breaks on a first visit is what the visit is for
            self.failed(what, error)

    def failed(self, what: str, error: Exception) -> None:
        """Keeps a failure as a result: its last line; the log has the rest."""
        traceback.print_exception(error)
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        self.add(what, failed=f"{type(error).__name__}: {' … '.join(dict.fromkeys([*lines[:1], *lines[-1:]]))[:300]}")

    def timed(self, work: Callable[[], Any]) -> float:
        """Seconds of some work, the device's included."""
        synchronize(self.device)
        start = time.perf_counter()
        work()
        synchronize(self.device)
        return time.perf_counter() - start

    def _write(self) -> None:
        write_json(self.path, {"made_on": made_on(self.device), "rows": self.rows})


def interleaved(part: Part, works: Mapping[str, Callable[[], list[float]]], rounds: int, until: float) -> None:
    """Measures all works once a round, so that a slow moment of the machine hits all of them; every value is a result
    at once.

    A first round is without warming up, and counts only until there is another. A work that fails is left out.

    Args:
        works: name → what gives numbers of seconds.
        rounds: at most.
        until: seconds that must be left for another round.
    """
    found: dict[str, list[list[float]]] = {name: [] for name in works}
    for _ in range(rounds):
        before = part.left
        for name in list(found):
            try:
                found[name].append(works[name]())
            except Exception as error:  # noqa: BLE001 - the others go on
                part.failed(name, error)
                del found[name]
                continue
            part.add(name, unit="s", **middle([value for values in found[name][1:] or found[name] for value in values]))
        if part.left - (before - part.left) < until:
            break


def middle(values: Sequence[float]) -> dict[str, float]:
    """Median, the quartiles around it, and how many."""
    lower, median, upper = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": median, "lower": lower, "upper": upper, "times": len(values)}
