"""The nodes on the miniature: do they score on this device as they do on the CPU, and do they leave the host as it was?

People of the test split, as many as there is time for, are made as `bench hypernet` makes them and compared with the
scores that were kept on a CPU, person by person.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch

from devtools.environment import BASE, CHECKPOINT, ROOT
from hdb_core.finetune import STEPS_FROM_A_PREDICTION
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
from .part import Part
from .part import middle as middle_of

SCORES = ("identity", "retrieval", "edit", "joint")
REPEATED_STEPS = 4
NEAR = 2.0  # standard errors within which two means agree
ROWS = ("base", "hyper", f"hyper_{STEPS_FROM_A_PREDICTION}_described")


def methods() -> list[Method]:
    """Those of `ROWS`, of the same names and settings as in `bench hypernet`."""
    predicted = Predicted(ROWS[1], HYPERNET)
    return [Base(), predicted, FastFinetuning(ROWS[2], {"steps": STEPS_FROM_A_PREDICTION}, predicted, described=True)]


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


def compare(part: Part, bench: Bench, subjects: list[Subject]) -> None:
    """Scores of as many people as there is time for, against the kept ones."""
    key, judge = next((bench.kept.judges[name], judge) for name, judge in load_judges(ROOT / "weights").items())
    scorer, seconds = Scorer(judge), {}
    pairs: dict[tuple[str, str], list[tuple[float, float]]] = {}
    slowest = 0.0
    for subject in subjects:
        before = part.left
        for row, cell in made(bench, subject):
            kept = bench.kept.get(Place(row, bench.kept.key(row), subject.seed, key))
            base = bench.kept.get(Place("base", bench.kept.key("base"), subject.seed, key))
            readings = readings_of(base["class_readings"]) if base else None
            found = scorer.scored(subject, cell, readings)
            for name in SCORES if kept else ():
                pairs.setdefault((row, name), []).append((found["scores"][name], kept["scores"][name]))
            if "seconds" in cell.facts:
                seconds.setdefault(row, []).append(cell.facts["seconds"])
        slowest = max(slowest, before - part.left)
        if part.left < 1.3 * slowest + 10:
            break
    for (row, name), both in pairs.items():
        difference = mean_over_people(here - there for here, there in both)
        here, there = (mean_over_people(values).value for values in zip(*both, strict=True))
        agree = abs(difference.value) <= NEAR * difference.error if len(both) > 1 else None
        part.add(
            f"{row}: {name}", people=len(both), here=here, cpu=there, difference=difference.value,
            error=difference.error, agree=agree,
        )  # fmt: skip
    for row, values in seconds.items():
        part.add(f"{row}: seconds a person", people=len(values), **middle_of(values))


def repeated(studio: Studio, subject: Subject) -> dict[str, Any]:
    """Whether one seed gives one person, trained twice."""
    one, two = (studio.finetune(subject.photo[None], steps=REPEATED_STEPS, seed=1)[0] for _ in range(2))
    return {"equal": torch.equal(one.up, two.up), "largest_difference": (one.up - two.up).abs().max().item()}


def main() -> None:
    part = Part.from_arguments(__doc__)
    kept = KeptScores(RESULTS / KEPT, judge_keys(ROOT / "weights"))
    folder = ROOT / ".runs" / "gpu_nodes"
    sampling = Sampling(steps=1, bf16=False) if part.toy else Sampling()
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
