"""Makes the cells of some methods and people, and reports whatever is there."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from miniature.judge import Judge, Readings

from . import grid
from .bench import Bench, load_judges
from .cells import Cell
from .files import write_json, write_text
from .kept import Place
from .methods import LoRA, Method, Reference, fill
from .report import (
    SCORES,
    Equal,
    Row,
    Scorer,
    as_object,
    best_checkpoint,
    cost_of_equal,
    difference_table,
    rank_correlation,
    readings_of,
    speed_table,
    table,
)
from .subjects import Subject

GRID_KINDS = ("bare", "expression", "plain", "accessory", "pencil sketch", "pixel art", "night", "painting")


class Table:
    """Reads finished cells of some methods, or their kept scores, and reports them."""

    def __init__(
        self, bench: Bench, methods: Sequence[Method], rows: Sequence[str], subjects: Sequence[Subject]
    ) -> None:
        self.bench, self.methods, self.rows, self.subjects = bench, methods, rows, subjects
        self.settings = {row: made for method in methods for row, made in method.rows.items() if row in rows}

    def cell(self, row: str, subject: Subject) -> Cell | None:
        return self.bench.cells.read(row, self.settings[row], subject.seed)

    def place(self, row: str, subject: Subject, judge: str) -> Place:
        return Place(row, self.bench.key(row, self.settings[row]), subject.seed, judge)

    def judged(self, key: str, judge: Judge) -> list[Row]:
        """All rows that have a cell or scores, with the best checkpoint of each reference as its row.

        Args:
            key: of the judge.
        """
        scorer, rows = Scorer(judge), {name: Row(name) for name in self.rows}
        for subject in self.subjects:
            for name, values in self.scored(key, scorer, subject):
                rows[name].add(subject.seed, values["scores"], values["kinds"], values["facts"])
        found = [row for row in rows.values() if row.people]
        return [
            *found,
            *(best for name in references(row.name for row in found) if (best := best_checkpoint(found, name))),
        ]

    def scored(self, key: str, scorer: Scorer, subject: Subject) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """The rows of a person that have a cell or scores, with these."""
        base = self._scored(scorer, self.place("base", subject, key), subject, None)
        before = readings_of(base["class_readings"]) if base else None
        for name in self.rows:
            values = base
            if name != "base":
                values = self._scored(scorer, self.place(name, subject, key), subject, before)
            if values is not None:
                yield name, values

    def _scored(
        self, scorer: Scorer, place: Place, subject: Subject, before: Readings | None
    ) -> Mapping[str, Any] | None:
        """The scores of a cell, kept ones or new ones; None where there are neither."""
        kept = self.bench.kept.get(place)
        if kept is not None or (cell := self.cell(place.row, subject)) is None:
            return kept
        values = scorer.scored(subject, cell, before)
        if place.row == "base":
            values["class_readings"] = scorer.class_readings(cell)
        elif before is None:  # incomplete until the base is there
            return values
        return self.bench.kept.add(place, values)

    def objects(self, judges: Mapping[str, Judge]) -> list[dict[str, Any]]:
        """Every row for JSON, by the first judge with the second beside it; ``judges`` by their keys."""
        rows, *others = ({row.name: row for row in self.judged(key, judge)} for key, judge in judges.items())
        second = others[0] if others else {}
        every = list(rows.values())
        best = {name: rows[name] for name in references(rows)}
        fast = {row for method in self.methods if not isinstance(method, (Reference, LoRA)) for row in method.rows}

        def equal(row: Row) -> dict[str, Equal]:
            compared = best if row.fact("flops") and row.name in fast else ()
            return {name: cost for name in compared if (cost := cost_of_equal(row, every, name))}

        return [
            as_object(row, rows.get("base"), best, rows.get(name.removesuffix("_saved")), second.get(name), equal(row))
            for name, row in rows.items()
        ]

    def text(self, objects: Sequence[dict[str, Any]]) -> str:
        """The Markdown report."""
        parts = [table(objects), "Differences to the base, in points", difference_table(objects, "base")]
        for other, title in (
            ("reference", "Differences to full DreamBooth"),
            ("unsaved", "Saved and loaded, against not"),
        ):
            if any(row[f"minus_{other}"] for row in objects):
                parts += [f"{title}, in points", difference_table(objects, other)]
        if any(row["times_less"] for row in objects):
            title = (
                "From which step on a reference has the identity of a row (>: less at its last checkpoint), and how many times less "
                "the row costs; in brackets the paper's ratio"
            )
            parts += [title, speed_table(objects)]
        # The best checkpoint of a reference is there a second time, and true pictures say little of made ones.
        left_out = {"photo", "render", *references(row["row"] for row in objects)}
        agreeing = [row for row in objects if row["second_judge"] and row["row"] not in left_out]
        if len(agreeing) > 2:
            pairs = {s: ([r[s] for r in agreeing], [r["second_judge"][s] for r in agreeing]) for s in SCORES[:4]}
            ranked = {score: rank_correlation(*pair) for score, pair in pairs.items()}
            listed = ", ".join(f"{score} {value:.2f}" for score, value in ranked.items() if value is not None)
            parts.append(f"Rank correlation of the rows between the two judges: {listed}.")
        if timed_on := sorted({row["timed_on"] for row in objects} - {""}):
            parts.append(f"Seconds, each a mean over one card: {'; '.join(timed_on)}.")
        parts.append(f"Sampling: {asdict(self.bench.sampling)}, {self.bench.seeds} seeds for each prompt.")
        return "\n\n".join(parts) + "\n"

    def shown(self, subject: Subject) -> list[str]:
        """The rows of a person whose pictures are here."""
        paths = {row: self.bench.cells.path(row, made, subject.seed) for row, made in self.settings.items()}
        return [row for row in self.rows if paths[row].exists()]

    def grid(self, subjects: Sequence[Subject]) -> grid.Image.Image | None:
        """Some people's photos, and one picture of each row and kind of prompt."""
        present = {prompt.kind for subject in subjects for prompt in subject.prompts}
        columns = [kind for kind in GRID_KINDS if kind in present]
        lines: list[tuple[str, list[np.ndarray | None]]] = []
        for subject in subjects:
            places = {prompt.kind: i for i, prompt in enumerate(subject.prompts)}
            lines.append((f"person {subject.seed}, the photo", [subject.photo]))
            for row in self.rows:
                if row != "photo" and (cell := self.cell(row, subject)) is not None:
                    pictures = [cell.pictures[places[kind], 0] if kind in places else None for kind in columns]
                    lines.append((row, pictures))
        return grid.grid(lines, columns) if lines else None


def references(rows: Iterable[str]) -> list[str]:
    """The names that have checkpoints."""
    return list(dict.fromkeys(name.split("@")[0] for name in rows if "@" in name))


def add_options(options: argparse.ArgumentParser, grid_people: int) -> None:
    """The options of `make_and_report`."""
    options.add_argument(
        "--share", type=share, default=(0, 1), metavar="I/N", help="make every Nth person's cells only"
    )
    options.add_argument("--grid-people", type=int, default=grid_people)


def share(text: str) -> tuple[int, int]:
    """ "2/3" as (1, 3).

    Raises:
        ValueError: it is nothing of the kind.
    """
    part, parts = (int(number) for number in text.split("/"))
    if not 1 <= part <= parts:
        raise ValueError(text)
    return part - 1, parts


def report(made: Table, args: argparse.Namespace, judges: Mapping[str, Judge]) -> None:
    """Prints the table and writes JSON, Markdown and the grid under the benchmark's name.

    A grid that shows every row is not replaced by one of fewer, when some pictures were made elsewhere.
    """
    objects = made.objects(judges)
    if not objects:
        print(f"{args.name} stays as it is: there is nobody's score yet.")
        return
    text = made.text(objects)
    print(text)
    args.results.mkdir(parents=True, exist_ok=True)
    write_json(args.results / f"{args.name}.json", objects)
    write_text(args.results / f"{args.name}.md", text)
    path = args.results / f"{args.name}.png"
    subjects = sorted(made.subjects, key=lambda subject: -len(made.shown(subject)))[: args.grid_people]
    everything = {row["row"] for row in objects if row["row"] in made.rows}
    if path.exists() and not (subjects and everything <= set(made.shown(subjects[0]))):
        print(f"{path.name} stays as it is: nobody's pictures of all rows are on this machine.")
    elif (sheet := made.grid(subjects)) is not None:
        grid.save(sheet, path)


def make_and_report(args: argparse.Namespace, made: Table, reference_people: int, keep: bool = True) -> None:
    """Fills in what is missing, person by person, judges and keeps it, and reports; with --share its part of the people,
    and no report.

    Args:
        made: names rows, methods and people.
        reference_people: how many of them, from the first, get the slow references: DreamBooth, Textual Inversion, LoRA.
        keep: write the scores to the file that other machines read.
    """
    if missing := [row for row, settings in made.settings.items() if made.bench.misses_file(settings)]:
        print(f"Not made, as a file is not on this machine, and reported as far as kept: {', '.join(missing)}.")
    part, parts = args.share
    keys = made.bench.kept.judges
    judges = {keys[name]: judge for name, judge in load_judges(args.weights).items()}
    scorers = {key: Scorer(judge) for key, judge in judges.items()}
    for i, subject in enumerate(() if args.report_only else made.subjects):
        if i % parts == part:
            own = [m for m in made.methods if i < reference_people or not isinstance(m, (Reference, LoRA))]
            fill(made.bench, own, made.rows, subject, lambda line: print(line, flush=True))
            for key, scorer in scorers.items():
                for _ in made.scored(key, scorer, subject):
                    pass
            if keep:
                made.bench.kept.save()
    if parts == 1:
        report(made, args, judges)
        if keep:
            made.bench.kept.save()
