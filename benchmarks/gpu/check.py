"""A check on a GPU in stages, each a process, within one command; ``python dev.py gpu run CHECK`` runs it.

A stage has a time limit, of its own or a share of all the time: one that fails or hangs stops no other. All that is known,
a table, the last preview and the packed files of trainings, in pieces that may travel (`devtools.parcel`), lie in ``--out``
from the first quarter of a minute on. ``--toy`` rehearses a check on a CPU.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from devtools import parcel
from devtools.device import add_option, made_on
from devtools.environment import ROOT

from ..common.files import write_json, write_text
from . import process

WORK = ROOT / ".runs" / "gpu"
RESULTS = "results.json"  # of a stage that measures, in its folder
STOPPING = 12.0  # seconds between the time that a measurement is given and that of its stage
STARTING = 25.0  # seconds from the start of a process to its first step
ENDING = 15.0  # from the last step of a training to the end of its process
RESERVE = 20.0  # seconds that all stages together leave
TOY_MINUTES = 0.5
RETRY = 60.0  # seconds that must be left for a training to be tried again


@dataclass(frozen=True)
class Context:
    """What a stage's command depends on.

    Attributes:
        device: to train on.
        toy: at the smallest sizes, for a rehearsal on a CPU.
        seconds: that the process has.
        folder: of the stage.
        attempt: how often it has failed before.
        go_on: whether a training begins with what was packed before.
    """

    device: str
    toy: bool
    seconds: float
    folder: Path
    attempt: int = 0
    go_on: bool = False

    @property
    def minutes(self) -> str:
        """Of a training, from its first step to its last; of a rehearsal, enough for a few steps."""
        if self.toy:
            return str(TOY_MINUTES)
        return f"{max(1.0, self.seconds - STARTING - ENDING) / 60:.3f}"

    @property
    def common(self) -> list[str]:
        """Options that all trainings take."""
        return ["--run", str(self.folder), "--minutes", self.minutes, "--device", self.device]


@dataclass(frozen=True)
class Stage:
    """A process of a visit.

    Attributes:
        name: also of its folder.
        command: a module and its options.
        share: of the time that is left when fixed times are taken off, relative to the other stages'.
        seconds: instead of a share.
        keeps: files of its folder that travel.
        again: whether a failed one is tried again.
    """

    name: str
    command: Callable[[Context], Sequence[str]]
    share: float = 0.0
    seconds: float = 0.0
    keeps: tuple[str, ...] = ()
    again: bool = False


def measured(name: str, module: str, seconds: float, *options: str) -> Stage:
    """A stage that runs a module of this folder, which is a `part.Part`."""

    def command(context: Context) -> Sequence[str]:
        given = ["--json", str(context.folder / RESULTS), "--seconds", str(context.seconds - STOPPING)]
        toy = ["--toy"] if context.toy else []
        return [f"benchmarks.gpu.{module}", *given, "--device", context.device, *toy, *options]

    return Stage(name, command, seconds=seconds)


class Visit:
    """The stages of a check, and what is known of them.

    Args:
        name: of the check.
        stages: in order.
        args: of `parser`.
        work: folder of the stages' folders.
    """

    def __init__(self, name: str, stages: Sequence[Stage], args: argparse.Namespace, work: Path = WORK) -> None:
        self.name, self.args, self.out, self.work = name, args, args.out, work
        wanted = [stage for stage in stages if not args.parts or stage.name in args.parts]
        self.stages = [replace(stage, seconds=args.slower * stage.seconds) for stage in wanted]
        length = 60 * args.minutes - RESERVE if args.minutes else sum(stage.seconds for stage in self.stages)
        self.until = time.monotonic() + length
        self.end = self.until + (RESERVE / 2 if args.minutes else 0)
        self.results: list[dict[str, Any]] = []
        self._packed: dict[Path, int] = {}
        for folder in (self.out, self.work):
            folder.mkdir(parents=True, exist_ok=True)
        results = (self.out / f"{name}.{ending}" for ending in ("json", "md", "log", "png"))
        if there := [path for path in (*parcel.pieces(self.out), *results) if path.exists()]:
            raise SystemExit(f"{there[0]} is of an earlier run: move its results, or choose another --out.")
        self.log = self.work / f"{name}.log"

    def run(self, beside: Sequence[str] = ()) -> int:
        """All stages; 0 if each finished.

        Args:
            beside: a module and its options, which runs until the last stage ends, with a log of its own.

        Raises:
            SystemExit: another check runs in the same folder.
        """
        try:
            with FileLock(self.work / "lock", timeout=0):
                return self._all(beside)
        except Timeout:
            raise SystemExit(f"Another check runs in {self.work}: wait until it ends.") from None

    def _all(self, beside: Sequence[str]) -> int:
        self.log.unlink(missing_ok=True)
        with self._beside(beside) if beside else nullcontext():
            for number, stage in enumerate(self.stages):
                shutil.rmtree(self.work / stage.name, ignore_errors=True)
                self._run(stage, seconds_of(self.stages[number:], self.until - time.monotonic()))
        self.publish()
        print(table(self.results))
        return 0 if all(result["end"] == "finished" for result in self.results) else 1

    @contextmanager
    def _beside(self, command: Sequence[str]) -> Iterator[None]:
        started = process.start([sys.executable, "-m", *command], self.work / f"{command[0].rpartition('.')[2]}.log")
        try:
            yield
        finally:
            process.stop(started)

    def _run(self, stage: Stage, seconds: float, attempt: int = 0) -> None:
        began, folder = time.monotonic(), self.work / stage.name
        context = Context(self.args.device, self.args.toy, seconds, folder, attempt, self.args.go_on)
        print(f"{stage.name}: {seconds:.0f} s …", flush=True)
        folder.mkdir(exist_ok=True)
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"\n== {stage.name}\n")
        result: dict[str, Any] = {"part": stage.name, "end": "running", "seconds": 0.0, "rows": []}
        self.results.append(result)

        def look() -> None:
            result.update(seconds=round(time.monotonic() - began, 1), rows=rows_of(folder))
            self.publish()

        try:
            command = [sys.executable, "-m", *stage.command(context)]
            result["end"] = process.run(command, self.log, min(seconds + RESERVE / 2, self.end - began), look)
        except Exception as error:  # noqa: BLE001 - the next stage goes on
            result["end"] = f"{type(error).__name__}: {error}"
        look()
        print(f"{stage.name}: {result['end']}, {result['seconds']} s", flush=True)
        left = seconds - (time.monotonic() - began)
        if result["end"].startswith("failed") and stage.again and attempt == 0 and left > RETRY:
            self._run(stage, left, attempt + 1)

    def publish(self) -> None:
        """Writes all that is known to the folder of the results; a full disk or the like stops no training."""
        try:
            self._publish()
        except Exception:  # noqa: BLE001 - it is tried again after the next quarter of a minute
            traceback.print_exc()

    def _publish(self) -> None:
        about = {"check": self.name, "commit": os.environ.get("HDB_COMMIT", ""), "toy": self.args.toy}
        about |= made_on(self.args.device)
        write_json(self.out / f"{self.name}.json", {**about, "parts": self.results})
        write_text(self.out / f"{self.name}.md", f"{', '.join(map(str, about.values()))}\n\n{table(self.results)}")
        shutil.copy(self.log, self.out / f"{self.name}.log")
        pictures = sorted(self.work.glob("*/*.png"), key=lambda path: path.stat().st_mtime)
        for picture in pictures[-1:]:
            shutil.copy(picture, self.out / f"{self.name}.png")
        self._pack([*(path for stage in self.stages for path in self._kept(stage)), *pictures])

    def _kept(self, stage: Stage) -> list[Path]:
        folder = self.work / stage.name
        return [*(folder / name for name in stage.keeps), *sorted(folder.glob("*.csv"))]

    def _pack(self, files: Sequence[Path]) -> None:
        """Makes the parcel again if a packed file has changed; logs and pictures alone are no reason."""
        changing = (path for path in files if path.is_file() and path.suffix not in (".csv", ".png"))
        kept = {path: path.stat().st_mtime_ns for path in changing}
        if (kept and kept != self._packed) or self.results[-1]["end"] != "running":
            if any(path.is_file() for path in files):
                parcel.pack({str(path.relative_to(self.work)): path for path in files}, self.out)
            self._packed = kept


def seconds_of(stages: Sequence[Stage], left: float) -> float:
    """Seconds of the first of the stages that are still to come."""
    first = stages[0]
    if first.seconds:
        return min(first.seconds, left)
    free = left - sum(stage.seconds for stage in stages)
    return max(0.0, free) * first.share / sum(stage.share for stage in stages)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """What a stage has written of itself: the last row of its logs, and results."""
    rows = []
    for path in sorted(folder.glob("*.csv")):
        with path.open(newline="") as file:
            found = list(csv.DictReader(file))
        rows += [{"what": path.stem, **found[-1]}] if found else []
    results = folder / RESULTS
    return rows + (json.loads(results.read_text(encoding="utf-8"))["rows"] if results.is_file() else [])


def table(parts: Sequence[Mapping[str, Any]]) -> str:
    """A line for each result."""
    lines = ["| part | what | result |", "|---|---|---|"]
    for part in parts:
        lines.append(f"| **{part['part']}** | {part['end']} | {part['seconds']} s |")
        for row in part["rows"]:
            values = ", ".join(f"{k} {shown(v)}" for k, v in row.items() if k not in ("what", "at_second"))
            lines.append(f"| | {row['what']} | {values} |")
    return "\n".join(lines) + "\n"


def shown(value: Any) -> str:
    """A number in three digits, anything else as it is."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def parser(name: str, description: str | None, stages: Sequence[Stage], minutes: float = 0) -> argparse.ArgumentParser:
    """The command line of a check; 0 minutes are those of its stages."""
    made = argparse.ArgumentParser(
        prog=f"dev.py gpu run {name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--out", type=Path, required=True, help="folder of the results")
    made.add_argument("--parts", nargs="+", choices=[stage.name for stage in stages], help="only these")
    taken = "%(default)s" if minutes else "what its parts take"
    made.add_argument("--minutes", type=float, default=minutes, help=f"for everything (default: {taken})")
    made.add_argument("--slower", type=float, default=1.0, help="fixed times times this, for a slow machine")
    if any(stage.keeps for stage in stages):
        made.add_argument("--go-on", action="store_true", help="from the weights that are there, at half the rate")
    made.add_argument("--toy", action="store_true", help="the smallest sizes, for a rehearsal on a CPU")
    made.set_defaults(go_on=False)
    add_option(made)
    return made


def run_check(name: str, stages: Sequence[Stage], description: str | None) -> int:
    """Runs a check by its command line; 0 if all stages finished.

    Args:
        name: of the check and of its results.
        stages: in their order.
        description: of the check, for its help.
    """
    return Visit(name, stages, parser(name, description, stages).parse_args()).run()
