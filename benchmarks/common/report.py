"""From judged pictures to rows of a table: means over people, standard errors, paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import spearmanr

from miniature.judge import Judge, Readings
from miniature.scores import (
    Mean,
    PictureScore,
    ceilings,
    diversity,
    drift,
    mean_over_people,
    pull,
    score_pictures,
    summarise,
)

from .cells import Cell
from .files import rounded
from .subjects import CLASS_PROMPT, Subject

SCORES = ("identity", "retrieval", "adherence", "joint", "leak", "drift", "diversity")
EXTRA_SCORES = ("identity_raw", "pull")
SHOWN = (*SCORES[:-1], "pull", SCORES[-1])  # in the tables
FACTS = ("steps", "seconds", "bytes", "flops")
MADE_ON = "made_on"  # among the facts: device, card, versions
RESAMPLES = 2000
COSTS = ("steps", "seconds", "flops")
MAIN_REFERENCE = "dreambooth"
# How many times less than each reference a person should cost. Source: HyperDreamBooth, arXiv 2307.06949.
GOALS = {("dreambooth", "seconds"): 25, ("textual_inversion", "seconds"): 125, ("dreambooth", "bytes"): 10_000}


@dataclass
class Row:
    """Scores and facts of one row: by name, then by person."""

    name: str
    scores: dict[str, dict[int, float]] = field(default_factory=dict)
    kinds: dict[str, dict[str, dict[int, float]]] = field(default_factory=dict)
    facts: dict[str, list[float]] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)  # by card

    @property
    def people(self) -> list[int]:
        return sorted(self.scores.get("identity", {}))

    def add(self, person: int, scores: Mapping[str, float], kinds: Mapping[str, Mapping[str, float]],
            facts: Mapping[str, Any]) -> None:  # fmt: skip
        """One person's results."""
        for name, value in scores.items():
            self.scores.setdefault(name, {})[person] = value
        for kind, own in kinds.items():
            for name, value in own.items():
                self.kinds.setdefault(kind, {}).setdefault(name, {})[person] = value
        for name in FACTS:
            if name in facts:
                self.facts.setdefault(name, []).append(facts[name])
        if "seconds" in facts:
            self.seconds.setdefault(card_of(facts), []).append(facts["seconds"])

    def mean(self, score: str) -> Mean | None:
        """Over people, or None where the row has no such score."""
        return mean_over_people(self.scores[score].values()) if score in self.scores else None

    def fact(self, name: str) -> float | None:
        """Over people; seconds over those of one card."""
        values = self.seconds.get(self.timed_on) if name == "seconds" else self.facts.get(name)
        return float(np.mean(values)) if values else None

    @property
    def timed_on(self) -> str:
        """The card that most people's seconds are of; "" where none was noted."""
        return max(self.seconds, key=lambda card: len(self.seconds[card]), default="")


def card_of(facts: Mapping[str, Any]) -> str:
    """The card in a cell's facts, or "" in those from before it was noted, all of one machine's CPU."""
    return facts.get(MADE_ON, {}).get("card", "")


class Scorer:
    """Reads cells with a judge."""

    def __init__(self, judge: Judge) -> None:
        self.judge = judge
        self._ceilings: dict[Subject, np.ndarray] = {}

    def scored(self, subject: Subject, cell: Cell, before: Readings | None) -> dict[str, Any]:
        """The arguments of `Row.add` after the person for one cell.

        Args:
            before: of the base's pictures of the class prompt, from `class_readings`; None leaves out drift and pull.
        """
        prompts = subject.prompts
        seeds = cell.pictures.shape[1]
        readings = self._read(cell.pictures[: len(prompts)])
        repeated = [prompt for prompt in prompts for _ in range(seeds)]
        ceiling = np.repeat(self._ceiling(subject), seeds)
        pictures = score_pictures(readings, subject.person, subject.context, repeated, ceiling)
        scores = person_means(pictures)
        if seeds > 1:
            scores["diversity"] = diversity(readings, repeated)
        if before is not None and cell.facts["prompts"][-1] == CLASS_PROMPT:
            after = self._read(cell.pictures[-1:])
            scores |= {"drift": drift(before, after), "pull": pull(before, after, subject.person)}
        kinds = {p.kind: person_means([s for s in pictures if s.kind == p.kind]) for p in prompts}
        return {
            "scores": scores,
            "kinds": kinds,
            "facts": {name: cell.facts[name] for name in (*FACTS, MADE_ON) if name in cell.facts},
        }

    def class_readings(self, cell: Cell) -> dict[str, list]:
        """What `readings_of` makes readings of again: of the pictures of the class prompt."""
        readings = self._read(cell.pictures[-1:])
        return {"names": readings.names.tolist(), "factors": readings.factors.tolist()}

    def _read(self, pictures: np.ndarray) -> Readings:
        return self.judge.read(pictures.reshape(-1, *pictures.shape[2:]))

    def _ceiling(self, subject: Subject) -> np.ndarray:
        if subject not in self._ceilings:
            self._ceilings[subject] = ceilings(self.judge, subject.person, subject.prompts)
        return self._ceilings[subject]


def readings_of(kept: Mapping[str, list]) -> Readings:
    """Readings that `Scorer.class_readings` turned into lists."""
    return Readings(np.array(kept["names"], np.int64), np.array(kept["factors"], np.float32))


def person_means(scores: Sequence[PictureScore]) -> dict[str, float]:
    """One person's value of each score that its pictures have."""
    return {name: mean.value for name, mean in summarise(scores).items() if name != "ceiling"}


def difference(row: Row, other: Row, score: str) -> Mean | None:
    """The mean over the people of both rows of the score's difference."""
    mine, theirs = row.scores.get(score, {}), other.scores.get(score, {})
    common = sorted(mine.keys() & theirs.keys())
    return mean_over_people(mine[p] - theirs[p] for p in common) if common else None


def gain_share(row: Row, base: Row, reference: Row, score: str = "identity") -> Mean | None:
    """How much of the reference's gain over the base a row has: 1 all of it.

    A ratio of means over the people of all three rows; the standard error is a bootstrap over people.
    """
    columns = [r.scores.get(score, {}) for r in (row, base, reference)]
    common = sorted(set.intersection(*(set(column) for column in columns)))
    if len(common) < 2:
        return None
    mine, floor, top = (np.array([column[p] for p in common]) for column in columns)

    def share(picked: np.ndarray) -> float:
        return (mine[picked] - floor[picked]).mean() / (top[picked] - floor[picked]).mean()

    rng = np.random.default_rng(0)
    draws = [share(rng.integers(len(common), size=len(common))) for _ in range(RESAMPLES)]
    return Mean(float(share(np.arange(len(common)))), float(np.std(draws)))


def best_checkpoint(rows: Sequence[Row], name: str) -> Row | None:
    """The checkpoint of ``name`` with the best joint score, as a row of that name."""
    checkpoints = [(mean.value, row) for row in rows if row.name.startswith(f"{name}@") and (mean := row.mean("joint"))]
    if not checkpoints:
        return None
    _, best = max(checkpoints, key=lambda pair: pair[0])
    return replace(best, name=name)


class Equal(NamedTuple):
    """What a reference costs until it has a row's identity; ``reached`` is False where it had less at its last checkpoint."""

    steps: float
    seconds: float | None
    flops: float
    bytes: float
    reached: bool


def cost_of_equal(row: Row, rows: Sequence[Row], name: str) -> Equal | None:
    """When a reference first has the identity of a row, over the people of the row, the base and all checkpoints.

    Between two checkpoints, and from the base at no cost to the first one, identity and cost are taken to lie on a line:
    sparse checkpoints do not make a reference look slow. Seconds only where all are of one card.
    """
    base = [other for other in rows if other.name == "base"]
    checkpoints = sorted((r for r in rows if r.name.startswith(f"{name}@")), key=lambda r: r.fact("steps"))
    columns = [r.scores.get("identity", {}) for r in (*base, *checkpoints)]
    people = sorted(set(row.scores.get("identity", {})).intersection(*columns))
    if not base or not checkpoints or not people:
        return None
    target, *identities = (float(np.mean([column[p] for p in people])) for column in (row.scores["identity"], *columns))
    costs = [np.zeros(len(COSTS)), *(np.array([r.fact(c) for c in COSTS], float) for r in checkpoints)]
    size = checkpoints[-1].fact("bytes") or 0.0
    found, reached = costs[-1], False
    for (below, before), (identity, cost) in pairwise(zip(identities, costs, strict=True)):
        if identity >= target:
            found, reached = before + max(0.0, (target - below) / (identity - below)) * (cost - before), True
            break
    steps, seconds, flops = found.tolist()
    one_card = {r.timed_on for r in checkpoints} == {row.timed_on} and np.isfinite(seconds)
    return Equal(steps, seconds if one_card else None, flops, size, reached)


def times_less(row: Row, equal: Equal) -> dict[str, float | None]:
    """How many times less a row costs than a reference of the same identity, and from which step on that has it."""
    ratios = {}
    for cost in (*COSTS, "bytes"):
        own, theirs = row.fact(cost), getattr(equal, cost)
        ratios[cost] = theirs / own if own and theirs else None
    return {"at_step": equal.steps, "reached": equal.reached, **ratios}


def as_object(
    row: Row,
    base: Row | None,
    best: Mapping[str, Row],
    unsaved: Row | None,
    second: Row | None,
    equal: Mapping[str, Equal] | None = None,
) -> dict[str, Any]:
    """A row for JSON: scores, facts, standard errors, paired differences to other rows, the second judge, speed.

    Args:
        best: the best checkpoint of each reference by its name.
        equal: what each reference costs at the identity of the row.
    """

    def values(source: Row, names: Sequence[str]) -> dict[str, float | None]:
        return {name: mean.value if (mean := source.mean(name)) else None for name in names}

    def differences(other: Row | None) -> dict[str, list[float]] | None:
        if other is None or other is row:
            return None
        found = {name: difference(row, other, name) for name in SHOWN}
        return {name: [d.value, d.error] for name, d in found.items() if d} or None

    shares = {name: gain_share(row, base, other) for name, other in best.items()} if base and row is not base else {}
    errors = {name: mean.error for name in SHOWN if (mean := row.mean(name))}
    kinds = {kind: {name: mean_over_people(people.values()).value for name, people in own.items()}
             for kind, own in row.kinds.items()}  # fmt: skip
    return rounded({
        "row": row.name, **values(row, SCORES), **{name: row.fact(name) for name in FACTS},
        "timed_on": row.timed_on, "people": len(row.people), **values(row, EXTRA_SCORES), "errors": errors,
        "minus_base": differences(base), "minus_reference": differences(best.get(MAIN_REFERENCE)),
        "minus_unsaved": differences(unsaved),
        "share_of_gain": {name: [share.value, share.error] for name, share in shares.items() if share},
        "kinds": kinds, "second_judge": values(second, SCORES) if second else None,
        "times_less": {name: times_less(row, other) for name, other in equal.items()} if equal else None,
    })  # fmt: skip


def table(objects: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table: scores in percent with their standard errors, then what a row costs."""
    head = ["row", "people", *SHOWN, "share of gain", "steps", "seconds", "TFLOP", "KB"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for row in objects:
        lines.append([
            row["row"], str(row["people"]),
            *(percent(row[name], row["errors"].get(name)) for name in SHOWN),
            percent(*row["share_of_gain"].get(MAIN_REFERENCE, [None])),
            number(row["steps"]), number(row["seconds"]), number(row["flops"], 1e12), number(row["bytes"], 1e3),
        ])  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def short_table(text: str, objects: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown text whose table of chosen rows and scores, if it has one, has the values of a report.

    The table begins with the columns "" and "people", ends with "seconds", and names each row in the last `code` of its
    first column.

    Raises:
        KeyError: it names a row that the report lacks.
    """
    rows, lines = {row["row"]: row for row in objects}, text.split("\n")
    start = next((i for i, line in enumerate(lines) if line.startswith("| | people |")), len(lines))
    scores = [name.strip() for name in lines[start].split("|")[3:-2]] if start < len(lines) else []
    for i in range(start + 2, len(lines)):
        if not lines[i].startswith("|"):
            break
        title = lines[i].split("|")[1].strip()
        row = rows[title.split("`")[-2]]
        values = (percent(row[score], row["errors"].get(score)) for score in scores)
        lines[i] = f"| {' | '.join([title, str(row['people']), *values, number(row['seconds'])])} |"
    return "\n".join(lines)


def difference_table(objects: Sequence[Mapping[str, Any]], to: str) -> str:
    """A Markdown table of paired differences in points: ``to`` is "base", "reference" or "unsaved"."""
    lines = [["row", *SHOWN], ["---", *["---:"] * len(SHOWN)]]
    for row in objects:
        if found := row[f"minus_{to}"]:
            pairs = [found.get(name, (None, None)) for name in SHOWN]
            lines.append([row["row"], *(percent(value, error, sign=True) for value, error in pairs)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def speed_table(objects: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table: how many times less a row costs than each reference of its identity, beside the paper's claims."""
    references = sorted({name for row in objects for name in row["times_less"] or ()})
    head = ["row", "people", "identity", "steps", "seconds"]
    for name in references:
        head += [f"{name}: at step", "seconds: less", "FLOP: fewer", *["bytes: fewer"] * ((name, "bytes") in GOALS)]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for row in objects:
        if found := row["times_less"]:
            identity = percent(row["identity"], row["errors"].get("identity"))
            cells = [row["row"], str(row["people"]), identity, number(row["steps"]), number(row["seconds"])]
            for name in references:
                own = found.get(name, {})
                reached = own.get("reached", True)
                cells.append(against_goal(own.get("at_step"), None, reached))
                cells += [against_goal(own.get(c), GOALS.get((name, c)), reached) for c in COSTS[1:]]
                if goal := GOALS.get((name, "bytes")):
                    cells.append(against_goal(own.get("bytes"), goal))
            lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def with_table(text: str, made: str) -> str:
    """A Markdown text whose table that begins as another one does, with the same first two columns, is that other one."""
    lines, new = text.split("\n"), made.split("\n")
    begins = "|".join(new[0].split("|")[:4])
    start = next((i for i, line in enumerate(lines) if line.startswith(begins)), len(lines))
    end = next((i for i in range(start, len(lines)) if not lines[i].startswith("|")), len(lines))
    return "\n".join([*lines[:start], *(new if start < len(lines) else ()), *lines[end:]])


def against_goal(value: float | None, goal: float | None, reached: bool = True) -> str:
    """ "31 (≥ 25)", "12 (< 25)", without a goal the value alone, or nothing; if more was not reached, "> 31 (≥ 25)",
    "> 12 (25 is open)"."""
    if value is None:
        return ""
    more = "" if reached else "> "
    if goal is None:
        return more + number(value)
    if value >= goal:
        return f"{more}{number(value)} (≥ {goal:,})"
    return f"{more}{number(value)} ({f'< {goal:,}' if reached else f'{goal:,} is open'})"


def table_of_means(rows: Mapping[str, Mapping[str, Any]], title: str) -> list[str]:
    """The lines of a Markdown table in percent: row → score → {"value", "error"} of a `Mean`; every row has all scores."""
    columns = list(next(iter(rows.values())))
    lines = [f"| {title} | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for row, own in rows.items():
        lines.append(f"| {row} | " + " | ".join(percent(own[c]["value"], own[c]["error"]) for c in columns) + " |")
    return lines


def percent(value: float | None, error: float | None = None, sign: bool = False) -> str:
    """ "61.2 ± 1.4", or nothing."""
    if value is None:
        return ""
    return f"{100 * value:{'+' if sign else ''}.1f}" + (f" ± {100 * error:.1f}" if error is not None else "")


def number(value: float | None, unit: float = 1) -> str:
    """Three digits or whole numbers, or nothing."""
    return "" if value is None else f"{value / unit:,.0f}" if value >= 100 * unit else f"{value / unit:.3g}"


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's, or None where all values of a list are equal."""
    if len(set(first)) < 2 or len(set(second)) < 2:
        return None
    return float(spearmanr(first, second).statistic)
