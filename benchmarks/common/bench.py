"""One benchmark run from its command line: the base, the people, the finished cells, the judges."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from devtools import device
from devtools.environment import BASE, CHECKPOINT, ROOT
from miniature.judge import ARCHITECTURES, Judge
from miniature.people import SPLITS

from . import settings
from .cells import Cell, Cells
from .kept import KeptScores
from .studio import MISSING, Sampling, Studio, file_hash
from .subjects import Subject

RUNS = ROOT / ".runs" / "bench"
RESULTS = ROOT / "benchmarks" / "results"
KEPT = "cells.jsonl"

_Prepared = TypeVar("_Prepared")

# Raised whenever the same pictures would score otherwise.
SCORES_VERSION = 1


@dataclass(frozen=True)
class Bench:
    """What methods work with. The host starts when a method first needs it.

    Attributes:
        checkpoint: the base model.
        sampling: of every picture.
        seeds: pictures for each prompt.
        folder: takes cells and whatever the host writes.
        kept: scores of cells that may have been made elsewhere.
        short: the short evaluation.
        device: that the host computes on. What is made on another than the CPU has keys of its own.
    """

    checkpoint: Path
    sampling: Sampling
    seeds: int
    folder: Path
    kept: KeptScores
    short: bool = False
    device: str = "cpu"

    @cached_property
    def cells(self) -> Cells:
        settings = {"checkpoint": file_hash(self.checkpoint), "sampling": asdict(self.sampling), "seeds": self.seeds}
        kind = self.device.partition(":")[0]
        own = {} if kind == "cpu" else {"device": kind}
        return Cells(self.folder / "cells", settings | {"short": self.short} | own)

    def finished(self, row: str, settings: Mapping[str, Any], person: int) -> bool:
        """Whether a cell is here, or its scores are kept."""
        here = self.cells.path(row, settings, person).exists()
        return here or self.kept.has(row, self.key(row, settings), person)

    def key(self, row: str, settings: Mapping[str, Any]) -> str:
        """Of a row's settings; where a file is missing that they name, the one that most of the row's people have."""
        return self.kept.key(row) if self.misses_file(settings) else self.cells.key(settings)

    def make(
        self, person: int, rows: Mapping[str, Mapping[str, Any]], report_only: bool,
        prepare: Callable[[], _Prepared], draw: Callable[[str, _Prepared], np.ndarray],
    ) -> None:  # fmt: skip
        """Makes the cells of a person, or of a pair, that are not here yet.

        Args:
            person: the seed.
            rows: name → settings, ``prompts`` among them.
            report_only: nothing new is to be made.
            prepare: what the rows share, such as the prediction; called once, if a cell is missing.
            draw: a row's pictures, uint8 (prompts, seeds, H, W, 3).

        Raises:
            SystemExit: some are missing, and nothing new is to be made.
        """
        missing = [row for row in rows if not self.cells.path(row, rows[row], person).exists()]
        if missing and report_only:
            raise SystemExit(f"The pictures of {person} are not made yet: {', '.join(missing)}.")
        if not missing:
            return
        prepared = prepare()
        for row in missing:
            with torch.inference_mode():
                pictures = draw(row, prepared)
            cell = Cell(pictures, {"prompts": rows[row]["prompts"], "made_on": self.studio.made_on})
            self.cells.write(row, rows[row], person, cell)
            print(f"{row}: {person}", flush=True)

    @staticmethod
    def misses_file(settings: Mapping[str, Any]) -> bool:
        """Whether a row cannot be made here, but reported from its kept scores."""
        return any(
            value == MISSING or (isinstance(value, Mapping) and Bench.misses_file(value)) for value in settings.values()
        )

    @cached_property
    def studio(self) -> Studio:
        return Studio.open(self.checkpoint, self.folder / "comfyui", self.sampling, self.device)


def parser(description: str | None, people: int, name: str) -> argparse.ArgumentParser:
    """The options that all benchmarks share."""
    options = argparse.ArgumentParser(
        prog=f"dev.py bench {name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.set_defaults(name=name)
    options.add_argument("--split", choices=("dev", "test"), default="dev")
    options.add_argument("--people", type=int, default=people, help="how many (default: %(default)s)")
    options.add_argument("--first-seed", type=int, help="of the first person (default: the split's first)")
    options.add_argument("--seeds", type=int, nargs="+", help="exactly these people instead")
    options.add_argument("--seeds-per-prompt", type=int, default=4)
    options.add_argument("--checkpoint", type=Path, default=BASE / "models" / "checkpoints" / CHECKPOINT)
    options.add_argument("--weights", type=Path, default=ROOT / "weights", help="folder of the judges")
    options.add_argument("--runs", type=Path, default=RUNS, help="folder of finished cells")
    options.add_argument("--results", type=Path, default=RESULTS)
    device.add_option(options)
    options.add_argument("--report-only", action="store_true", help="make nothing new, report what is there")
    defaults = Sampling()
    options.add_argument("--sampler", default=defaults.sampler_name)
    options.add_argument("--scheduler", default=defaults.scheduler)
    options.add_argument("--sampler-steps", type=int, default=defaults.steps)
    options.add_argument("--cfg", type=float, default=defaults.cfg)
    return options


def open_bench(args: argparse.Namespace, short: bool = False) -> Bench:
    """The run that the options describe.

    Raises:
        SystemExit: there is no checkpoint.
    """
    if not args.checkpoint.is_file():
        raise SystemExit(f"No checkpoint {args.checkpoint}: complete weights/, or name one with --checkpoint.")
    sampling = Sampling(args.sampler, args.scheduler, args.sampler_steps, args.cfg)
    kept = KeptScores(args.results / KEPT, judge_keys(args.weights))
    return Bench(
        args.checkpoint.resolve(), sampling, args.seeds_per_prompt, args.runs.resolve(), kept, short, args.device
    )


def chosen_subjects(args: argparse.Namespace, short: bool = False) -> list[Subject]:
    """The people that the options name."""
    first = SPLITS[args.split].start if args.first_seed is None else args.first_seed
    return [Subject(seed, short) for seed in args.seeds or range(first, first + args.people)]


def judge_files(folder: Path) -> dict[str, Path]:
    """The weights of the judges of a folder by architecture."""
    files = {architecture: folder / f"judge_{architecture}.safetensors" for architecture in ARCHITECTURES}
    return {architecture: path for architecture, path in files.items() if path.is_file()}


def judge_keys(folder: Path) -> dict[str, str]:
    """What stands for each judge of a folder, and for what its scores mean: "a-1-0123abcd"."""
    return {name: f"{name}-{SCORES_VERSION}-{file_hash(path)[:8]}" for name, path in judge_files(folder).items()}


def load_judges(folder: Path) -> dict[str, Judge]:
    """The judges of a folder by architecture; the first is the one that reports.

    Raises:
        SystemExit: there is none.
    """
    judges = {architecture: Judge.load(architecture, folder) for architecture in judge_files(folder)}
    if not judges:
        raise SystemExit(f"No judge_*.safetensors in {folder}. Train one with python -m miniature.judge.")
    return judges


def parsed_settings(pairs: Sequence[str], config: type) -> dict[str, list[Any]]:
    """``name=value,value`` with the names and types of a dataclass's fields, those of noise levels among them.

    Raises:
        SystemExit: an unknown name or a value of another type.
    """
    types = settings.types(config)
    readers: dict[str, Callable[[str], Any]] = {
        "int": int,
        "float": float,
        "bool": lambda text: {"true": True, "false": False}[text.lower()],
    }
    found = {}
    for pair in pairs:
        name, _, values = pair.partition("=")
        kind = types.get(name, "").removesuffix(" | None")
        if kind not in readers and kind != "str":
            known = ", ".join(n for n, t in types.items() if t.removesuffix(" | None") in (*readers, "str"))
            raise SystemExit(f"{pair}: expected NAME=VALUE,… with NAME one of {known}.")
        try:
            found[name] = [readers.get(kind, str)(value) for value in values.split(",")]
        except (ValueError, KeyError):
            raise SystemExit(f"{pair}: expected values of type {kind}.") from None
    return found
