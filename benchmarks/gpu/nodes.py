"""The nodes on the miniature: do they score on this device as they do on the CPU, and do they leave the host as it was?

People of the test split, as many as there is time for, are made as `bench hypernet` makes them and compared with the
scores that were kept on a CPU, person by person.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from devtools.environment import BASE, CHECKPOINT, ROOT
from hdb_core.recommended import FROM_PREDICTION, RECOMMENDED
from miniature.people import SPLITS
from miniature.scores import mean_over_people

from ..common.bench import KEPT, RESULTS, Bench, judge_keys, load_judges
from ..common.cells import Cell
from ..common.kept import KeptScores, Place
from ..common.methods import Base, FastFinetuning, Method, Predicted
from ..common.report import Scorer, readings_of
from ..common.studio import Sampling, Studio
from ..common.subjects import Subject
from ..hypernet import HYPERNET
from .part import Part, middle

SCORES = ("identity", "retrieval", "adherence", "joint")
REPEATED_STEPS = 4
ENDING = 15  # seconds for what follows the people
NEAR = 2.0  # standard errors within which two means agree
STEPS = RECOMMENDED[FROM_PREDICTION].steps
ROWS = ("base", "hyper", f"hyper_{STEPS}_described")


def methods() -> list[Method]:
    """Those of `ROWS`, of the same names and settings as in `bench hypernet`."""
    predicted = Predicted(ROWS[1], HYPERNET)
    return [Base(), predicted, FastFinetuning(ROWS[2], {"steps": STEPS}, predicted, described=True)]


def made(bench: Bench, subject: Subject) -> Iterator[tuple[str, Cell]]:
    """The cells of a person."""
    for method in methods():
        yield from (pair for pair in method.run(bench, subject, ROWS) if pair[0] in ROWS)


def fingerprint(studio: Studio) -> str:
    """Of all weights and buffers, patches taken out."""
    studio.pictures(studio.base, "a face", 0, 1)  # sampling the base makes the host take out what a person patched
    digest = hashlib.sha256()
    base = studio.base
    with torch.inference_mode():
        for root in (base.model.model, base.clip.cond_stage_model, base.vae.first_stage_model):
            for name, tensor in root.state_dict().items():
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


@dataclass
class Comparison:
    """Scores here and on the CPU, person by person, and the seconds that people took here."""

    scorer: Scorer
    kept: KeptScores
    judge: str  # its key
    pairs: dict[tuple[str, str], list[tuple[float, float]]] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def add(self, row: str, subject: Subject, cell: Cell) -> None:
        """One person's cell; a person of whom no scores are kept counts for the seconds only."""
        kept, base = (self._kept(name, subject) for name in (row, "base"))
        if kept and base:
            found = self.scorer.scored(subject, cell, readings_of(base["class_readings"]))["scores"]
            for name in SCORES:
                self.pairs.setdefault((row, name), []).append((found[name], kept["scores"][name]))
        if "seconds" in cell.facts:
            self.seconds.setdefault(row, []).append(cell.facts["seconds"])

    def _kept(self, row: str, subject: Subject) -> Mapping[str, Any] | None:
        return self.kept.get(Place(row, self.kept.key(row), subject.seed, self.judge))

    def report(self, part: Part) -> None:
        """All that is known so far."""
        for (row, name), both in self.pairs.items():
            part.add(f"{row}: {name}", **agreement(both))
        for row, values in self.seconds.items():
            part.add(f"{row}: seconds a person", **middle(values))


def agreement(pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Means of two columns, their paired difference, and whether it is within `NEAR` standard errors."""
    difference = mean_over_people(here - there for here, there in pairs)
    here, there = (mean_over_people(values).value for values in zip(*pairs, strict=True))
    agree = abs(difference.value) <= NEAR * difference.error if len(pairs) > 1 else "one person does not tell"
    return {"people": len(pairs), "here": here, "cpu": there, "difference": difference.value, "error": difference.error,
            "agree": agree}  # fmt: skip


def compare(part: Part, bench: Bench, subjects: Sequence[Subject]) -> None:
    """As many people as there is time for, with a report after each."""
    (name, judge), *_ = load_judges(ROOT / "weights").items()
    comparison, slowest = Comparison(Scorer(judge), bench.kept, bench.kept.judges[name]), 0.0
    for subject in subjects:
        before = part.left
        for row, cell in made(bench, subject):
            comparison.add(row, subject, cell)
        comparison.report(part)
        slowest = max(slowest, before - part.left)
        if part.left < 1.3 * slowest + ENDING:
            break


def repeated(studio: Studio, subject: Subject) -> dict[str, Any]:
    """Whether one seed gives one person, trained twice."""
    one, two = (studio.finetune(subject.photo[None], steps=REPEATED_STEPS, seed=1)[0] for _ in range(2))
    return {"equal": torch.equal(one.up, two.up), "largest_difference": (one.up - two.up).abs().max().item()}


def main() -> None:
    part, _ = Part.from_arguments(__doc__)
    kept = KeptScores(RESULTS / KEPT, judge_keys(ROOT / "weights"))
    folder = ROOT / ".runs" / "gpu_nodes"
    sampling = Sampling(steps=1) if part.toy else Sampling()
    checkpoint = BASE / "models" / "checkpoints" / CHECKPOINT
    bench = Bench(checkpoint, sampling, 1 if part.toy else 4, folder, kept, part.toy, part.device)
    people = SPLITS["test"][: 1 if part.toy else 100]
    before = fingerprint(bench.studio)
    part.add("the host", **bench.studio.made_on)
    with part.attempt("scores"):
        compare(part, bench, [Subject(seed, part.toy) for seed in people])
    with part.attempt("one seed, twice"):
        part.add("one seed, twice", **repeated(bench.studio, Subject(people[0])))
    part.add("the host afterwards", bit_identical=fingerprint(bench.studio) == before)


if __name__ == "__main__":
    main()
