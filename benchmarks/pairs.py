"""Two people in one picture, each in their half, beside each of them alone.

``python dev.py bench pairs --split test`` writes ``pairs.json``, ``pairs.md`` and ``pairs.png`` to ``benchmarks/results/``.
People are paired in the order of their seeds and predicted from one photo each. Both have prompts that contradict their
photos, and one background. The judge reads halves and single pictures alike, each of the size that it knows. Rows:

* ``alone``: each person by *Apply LiDB to Model*, in a picture of their own;
* ``together``: both by *LiDB Hook* and a mask for each half, in a picture twice as wide;
* ``applied twice``: both by *Apply LiDB to Model*, one behind the other, with the same prompts and masks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from miniature.captions import context_words
from miniature.judge import Judge, true_readings
from miniature.people import SCENES, Context
from miniature.prompts import CONTRADICTED, EvaluationPrompt
from miniature.scores import ceilings, gallery, identity, mean_over_people, shown, visible_items

from .common import grid
from .common.bench import Bench, chosen_subjects, load_judges, open_bench, parser
from .common.files import rounded, write_json, write_text
from .common.report import table_of_means
from .common.studio import HYPERNET, SIZE, Models, hash_or_missing, recommended_strengths
from .common.subjects import Subject

if TYPE_CHECKING:
    from hdb_core.lidb import LiDB

LEGEND = (
    "*Identity* and *of the other*: 0 a stranger, 100 a true picture, of whom the half should show and of the other one; "
    "*found*: of 1,000 people the right one is the nearest, *the other found*: the other one is; *told apart*: nearer to "
    "the right one than to the other, *both*: in both halves of a picture; *adherence*: all that is prompted is shown."
)
SHOWN_PAIRS = 4  # in the picture: the first ones


@dataclass(frozen=True)
class Pair:
    """Two people, left and right."""

    left: Subject
    right: Subject

    @property
    def subjects(self) -> tuple[Subject, Subject]:
        return self.left, self.right

    @property
    def seed(self) -> int:
        return self.left.seed

    @property
    def prompts(self) -> tuple[EvaluationPrompt, EvaluationPrompt]:
        """One for each: expression and clothes of their own, a background that neither photo shows."""
        shown = {subject.context.background for subject in self.subjects}
        background = next(scene for scene in SCENES if scene not in shown)
        left, right = (placed(subject, background) for subject in self.subjects)
        return left, right


def placed(subject: Subject, background: str) -> EvaluationPrompt:
    """The first prompt that judges a person's identity, before another background."""
    prompt = next(prompt for prompt in subject.prompts if prompt.judges_identity)
    context = replace(prompt.context, background=background)
    words = context_words(context)
    expected = {**prompt.expected, "background": background}
    return EvaluationPrompt(prompt.kind, tuple(words[name] for name in CONTRADICTED), expected, context)


# -- making -----------------------------------------------------------------------------------------------------------

Made = Callable[[Bench, Pair, "tuple[LiDB, LiDB]"], np.ndarray]  # uint8 (2, pictures, 128, 128, 3): left, right


def alone(bench: Bench, pair: Pair, people: tuple[LiDB, LiDB]) -> np.ndarray:
    own = zip(people, pair.prompts, strict=True)
    studio = bench.studio
    return np.stack(
        [studio.pictures(studio.apply(lidb, lidb.about.strengths), p.text(), pair.seed, bench.seeds) for lidb, p in own]
    )


def together(bench: Bench, pair: Pair, people: tuple[LiDB, LiDB]) -> np.ndarray:
    studio = bench.studio
    sides = zip(people, pair.prompts, halves(), strict=True)
    parts = (studio.masked(studio.hooked(lidb), prompt.text(), mask) for lidb, prompt, mask in sides)
    return split(studio.sampled(studio.base, list(chain.from_iterable(parts)), pair.seed, bench.seeds, 2 * SIZE))


def applied_twice(bench: Bench, pair: Pair, people: tuple[LiDB, LiDB]) -> np.ndarray:
    studio, run = bench.studio, bench.studio.host.run
    models: Models = studio.base
    for lidb in people:
        options = studio.strengths(lidb.about.strengths)
        model, clip = run("ApplyLiDBToModel", model=models.model, clip=models.clip, lidb=lidb, options=options)
        models = models._replace(model=model, clip=clip)
    parts = (studio.masked(models.clip, p.text(), mask) for p, mask in zip(pair.prompts, halves(), strict=True))
    models = models._replace(negative=studio.negative(studio.base.clip))
    return split(studio.sampled(models, list(chain.from_iterable(parts)), pair.seed, bench.seeds, 2 * SIZE))


ROWS: Mapping[str, Made] = {"alone": alone, "together": together, "applied twice": applied_twice}


def halves() -> tuple[torch.Tensor, torch.Tensor]:
    """The masks of the left and the right half of a picture twice as wide: float32 (1, 128, 256)."""
    left = torch.zeros(1, SIZE, 2 * SIZE)
    left[..., :SIZE] = 1
    return left, 1 - left


def split(pictures: np.ndarray) -> np.ndarray:
    """Pictures (N, 128, 256, 3) as their halves (2, N, 128, 128, 3)."""
    return np.stack(np.split(pictures, 2, axis=2))


def settings(pair: Pair) -> dict[str, Any]:
    """What decides the pictures of a pair, besides the row and what all benchmarks share."""
    texts = [prompt.text() for prompt in pair.prompts]
    people = [subject.seed for subject in pair.subjects]
    strengths = recommended_strengths(HYPERNET)._asdict()
    return {"hypernet": hash_or_missing(HYPERNET), "people": people, "prompts": texts, "strengths": strengths}


def make(bench: Bench, pair: Pair, report_only: bool) -> None:
    """Makes the cells of a pair that are not there yet; raises as `Bench.make`."""

    def predicted() -> tuple[LiDB, LiDB]:
        left, right = (bench.studio.predict(HYPERNET, subject.photo[None]).lidb for subject in pair.subjects)
        return left, right

    rows = dict.fromkeys(ROWS, settings(pair))
    bench.make(pair.seed, rows, report_only, predicted, lambda row, people: ROWS[row](bench, pair, people))


# -- judging ----------------------------------------------------------------------------------------------------------


class _Side(NamedTuple):
    """One person of a pair, and the other."""

    subject: Subject
    other: Subject
    prompt: EvaluationPrompt


def scores(judge: Judge, pair: Pair, pictures: np.ndarray) -> dict[str, float]:
    """Means over both halves of a pair's pictures, uint8 (2, N, 128, 128, 3)."""
    sides = zip(pair.subjects, pair.subjects[::-1], pair.prompts, strict=True)
    each = [half_scores(judge, _Side(*side), own) for side, own in zip(sides, pictures, strict=True)]
    means = {name: float(np.mean([own[name] for own in each])) for name in each[0]}
    return {**means, "both": float(np.mean(each[0]["told apart"] * each[1]["told apart"]))}


def half_scores(judge: Judge, side: _Side, pictures: np.ndarray) -> dict[str, np.ndarray]:
    """What a judge says of the pictures of one person, (N,) each.

    ``identity`` and ``of the other`` (0 a stranger, 1 a true picture), ``found`` (the person is the nearest of 1,000,
    the other one of the pair among them), ``the other found``, ``told apart`` (nearer to the person than to the other),
    ``adherence`` (shows all that is prompted).
    """
    prompts = [side.prompt] * len(pictures)
    readings, visible = judge.read(np.ascontiguousarray(pictures)), visible_items(prompts)
    other = true_readings([(side.other.person, Context())])
    near = identity(readings, gallery(side.subject.person), visible)
    own, far, strangers = near[:, 0], identity(readings, other, visible)[:, 0], near[:, 1:].max(1)
    ceiling = ceilings(judge, side.subject.person, [side.prompt])[0]
    followed = shown(readings, [prompt.expected for prompt in prompts])
    return {
        "identity": own / ceiling,
        "of the other": far / ceiling,
        "found": own > np.maximum(far, strangers),
        "the other found": far > np.maximum(own, strangers),
        "told apart": own > far,
        "adherence": np.array([all(row.values()) for row in followed]),
    }


def table(judge: Judge, bench: Bench, pairs: Sequence[Pair]) -> dict[str, dict[str, Any]]:
    """Row → score → mean over pairs and its standard error."""
    rows = {}
    for row in ROWS:
        each = [scores(judge, pair, pictures_of(bench, row, pair)) for pair in pairs]
        rows[row] = {name: asdict(mean_over_people(own[name] for own in each)) for name in each[0]}
    return rows


def pictures_of(bench: Bench, row: str, pair: Pair) -> np.ndarray:
    """The finished cell of a row and pair."""
    cell = bench.cells.read(row, settings(pair), pair.seed)
    assert cell is not None, "`make` comes first"
    return cell.pictures


def text_of(rows: Mapping[str, Mapping[str, Any]], pairs: int, pictures: int) -> str:
    """The Markdown table of the first judge."""
    counted = f"{pictures} pictures of each pair and row; means over pairs with standard errors, both halves of each."
    return "\n".join([*table_of_means(rows, f"%, of {pairs} pairs"), "", f"{counted} {LEGEND}", ""])


def sheet(bench: Bench, pairs: Sequence[Pair]) -> grid.Image.Image:
    """The photos of some pairs, and their first two pictures of each row."""
    lines = []
    for pair in pairs:
        photos = [np.concatenate([subject.photo for subject in pair.subjects], 1)]
        rows = (pictures_of(bench, row, pair) for row in ROWS)
        wide = [np.concatenate(list(pictures[:, i]), 1) for pictures in rows for i in range(min(2, pictures.shape[1]))]
        label = "; ".join(f"{side}: {p.text()}" for side, p in zip(("left", "right"), pair.prompts, strict=True))
        lines.append((label, photos + wide))
    each = (len(lines[0][1]) - 1) // len(ROWS)
    return grid.grid(lines, ["the photos", *(row for row in ROWS for _ in range(each))])


def main() -> None:
    options = parser(__doc__, people=40, name="pairs")
    args = options.parse_args()
    bench, people = open_bench(args), chosen_subjects(args)
    pairs = [Pair(left, right) for left, right in zip(people[::2], people[1::2], strict=True)]
    for pair in pairs:
        make(bench, pair, args.report_only)
    tables = {name: table(judge, bench, pairs) for name, judge in load_judges(args.weights).items()}
    text = text_of(next(iter(tables.values())), len(pairs), bench.seeds)
    print(text)
    result = {"pairs": len(pairs), "pictures": bench.seeds, "sampling": asdict(bench.sampling), "judges": tables}
    write_json(args.results / "pairs.json", rounded(result))
    write_text(args.results / "pairs.md", text)
    grid.save(sheet(bench, pairs[:SHOWN_PAIRS]), args.results / "pairs.png")


if __name__ == "__main__":
    main()
