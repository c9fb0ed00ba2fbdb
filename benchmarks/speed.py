"""Speed beside the floor: training steps, sampling steps, batched people, a whole person, and 200 people in a row.

``python dev.py bench speed`` measures models of random weights and keeps the results of each device in
``benchmarks/results/speed.json``; ``speed.md`` is their table. Rows are interleaved, and a table compares only what one
run measured. On a CPU seconds are those that one thread computed, so that other programs change them little.
``python dev.py gpu run memory_and_speed`` measures the same on a card.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from devtools.device import add_option, card, made_on
from devtools.environment import ROOT

from .common.bench import RESULTS
from .common.files import rounded, write_json, write_text
from .gpu.models import SIZES, opened, random_models
from .gpu.part import Part
from .gpu.speed import ROWS, Measured, measure, with_lora_training

RUNS = ROOT / ".runs" / "bench" / "speed"
ON_CPU = {"mini": 128, "sd15": 256, "sdxl": 256}  # pixels
GOALS = {"sampling, person with guidance": 1.02}  # times the base, on a CPU
BASES = {"step": "floor", "sampling": "base"}  # what the others are a multiple of


def kept(path: Path) -> dict[str, Any]:
    """Results by device, family and row."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def merged(before: Mapping[str, Any], device: str, label: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All results, those of a family and size on a device with new rows in place of old ones."""
    own = dict(before.get(device, {}))
    new = {row["what"].removeprefix(f"{label}, "): {k: v for k, v in row.items() if k not in UNKEPT} for row in rows}
    own[label] = {**own.get(label, {}), **new}
    return {**before, device: own}


UNKEPT = ("what", "at_second", "unit")


def compared(rows: Mapping[str, Mapping[str, Any]], name: str) -> float | None:
    """How many times the base of its kind a row takes."""
    kind = name.partition(", ")[0]
    base = rows.get(f"{kind}, {BASES.get(kind)}")
    return rows[name]["median"] / base["median"] if base and "median" in rows[name] else None


def table(results: Mapping[str, Any]) -> str:
    """Everything as Markdown."""
    lines = ["# Speed", "", *(__doc__ or "").split("\n\n")[1].splitlines(), ""]
    for device, labels in results.items():
        for label, rows in labels.items():
            lines += [
                f"## {label}, {device}",
                "",
                "| row | seconds | quartiles | ratio | operations | peak MiB | |",
                "|---|---|---|---|---|---|---|",
            ]
            for name, row in rows.items():
                ratio = compared(rows, name)
                seconds, spread = (
                    (f"{row['median']:.4f}", f"{row['lower']:.4f} – {row['upper']:.4f} ({row['times']})")
                    if "median" in row
                    else ("", "")
                )
                costs = [f"{row[cost]:.0f}" if cost in row else "" for cost in ("operations", "peak_mb")]
                shown = ("median", "lower", "upper", "times", "operations", "peak_mb", "gflop", "made_with")
                others = ", ".join(f"{key} {value}" for key, value in row.items() if key not in shown)
                cells = [name, seconds, spread, "" if ratio is None else f"{ratio:.3f}", *costs, others]
                lines.append(f"| {' | '.join(cells)} |")
            lines.append("")
    return "\n".join(lines)


def add_costs(part: Part, measured: Measured, label: str, rows: Sequence[str]) -> None:
    """Operations and memory beside the seconds of the rows that were measured."""
    for name, values in measured.costs(rows).items():
        what = f"{label}, {name}"
        before = next((row for row in part.rows if row["what"] == what), {})
        part.add(what, **{key: value for key, value in before.items() if key not in UNKEPT[:2]}, **values)


@torch.inference_mode()
def main() -> None:
    options = argparse.ArgumentParser(
        prog="dev.py bench speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--families", nargs="+", choices=tuple(SIZES), default=["mini", "sd15"])
    options.add_argument("--rows", nargs="+", choices=ROWS, default=["step", "sampling", "batch", "flat"])
    options.add_argument("--rounds", type=int, default=4, help="of all rows, one after another (default: %(default)s)")
    options.add_argument("--steps", type=int, default=4, help="in a run (default: %(default)s)")
    options.add_argument("--people", type=int, default=200, help="of the row flat (default: %(default)s)")
    options.add_argument("--no-costs", action="store_true", help="count neither operations nor memory")
    options.add_argument("--toy", action="store_true", help="the smallest sizes, for a rehearsal")
    options.add_argument("--results", type=Path, default=RESULTS)
    add_option(options)
    args = options.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(1)
    RUNS.mkdir(parents=True, exist_ok=True)
    host = opened(RUNS / "comfyui", args.device)
    with_lora_training(host)
    for family in args.families:
        pixels = 64 if args.toy else ON_CPU[family] if args.device == "cpu" else SIZES[family]
        label = f"{'toy ' if args.toy else ''}{family}, {pixels} px"
        part = Part(RUNS / f"{family}.json", args.device, 86_400.0, args.toy)
        measured = Measured(args.device, host, random_models(family, args.toy), pixels, args.steps)
        for row in args.rows:
            measure(part, measured, label, row, args.rounds, 0.0, args.people)
        if not args.no_costs:
            add_costs(part, measured, label, args.rows)
        path = args.results / "speed.json"
        made = made_on(args.device)
        results = merged(kept(path), f"{card(args.device)}, torch {made['torch']}", label, part.rows)
        write_json(path, rounded(results))
        write_text(args.results / "speed.md", table(results))
    print((args.results / "speed.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
