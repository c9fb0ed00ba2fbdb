"""Does a person pass through a ControlNet: is the pose that of the control picture, and the person still the same?

``python dev.py bench control --split test`` writes ``control.json``, ``control.md`` and ``control.png`` to
``benchmarks/results/``. People are predicted from one photo each. Their prompt contradicts the photo and names a plain
wall, from which the person in a picture is told by colour; the control picture is the silhouette of another photo of
the same person, or of the next person. Everything goes through the stock nodes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from devtools.environment import ROOT
from miniature.checkpoint import CONTROL_FILE
from miniature.drawing import photo, silhouette
from miniature.judge import Judge
from miniature.people import WALLS
from miniature.prompts import EvaluationPrompt
from miniature.scores import ceilings, mean_over_people, score_pictures, summarise

from .common import grid
from .common.bench import Bench, chosen_subjects, load_judges, open_bench, parser
from .common.files import rounded, write_json, write_text
from .common.report import table_of_means
from .common.studio import HYPERNET, Models, Studio, as_image, file_hash, hash_or_missing, recommended_strengths
from .common.subjects import Subject
from .pairs import placed

if TYPE_CHECKING:
    from hdb_core.lidb import LiDB

BACKGROUNDS = "green wall", "pink wall"  # of which a photo shows one at most
SCORES = "identity", "retrieval", "adherence"
APART = 25  # of 255, in the channel that differs most: more is another colour
SHOWN = 8  # people in the picture: the first ones
LEGEND = (
    "*Pose*: what the person and the silhouette cover together, as a share of what either covers; *identity*: 0 a "
    "stranger, 100 a true picture; *retrieval*: of 1,000 people the right one is the nearest; *adherence*: all that is "
    "prompted is shown. *Controlled* is by the person's own silhouette in another pose, or by that of *another* person. *A "
    "true picture* is a drawing of the person that the own silhouette was made of."
)


def prompt_of(subject: Subject) -> EvaluationPrompt:
    """Expression, clothes and wall, none of which the photo shows, in a pose of its own."""
    return placed(subject, next(wall for wall in BACKGROUNDS if wall != subject.context.background))


def overlap(pictures: np.ndarray, subject: Subject, shape: np.ndarray) -> np.ndarray:
    """Intersection over union (N,) of the figures in pictures uint8 (N, H, W, 3), all that has not the wall's colour, with
    a silhouette uint8 (H, W)."""
    wall = np.array(WALLS[prompt_of(subject).expected["background"].removesuffix(" wall")])
    inside, figure = shape > 127, (np.abs(pictures - wall) > APART).any(3)
    return (figure & inside).sum((1, 2)) / (figure | inside).sum((1, 2))


def shape_of(subject: Subject) -> np.ndarray:
    """A person's silhouette as prompted: uint8 (128, 128), 255 inside."""
    return silhouette(subject.person, prompt_of(subject).context)


# -- making -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """The pictures of one row.

    Attributes:
        name: in the table.
        person: whether the person is applied.
        control: the file of a ControlNet; None goes without.
        another: whether the control picture shows the next person.
    """

    name: str
    person: bool
    control: Path | None = None
    another: bool = False

    def shape(self, subject: Subject) -> np.ndarray:
        """The control picture, or what it would be: uint8 (128, 128)."""
        return shape_of(Subject(subject.seed + 1) if self.another else subject)

    def settings(self, subject: Subject) -> dict[str, Any]:
        """What decides the pictures, besides what all benchmarks share."""
        own: dict[str, Any] = {"prompts": [prompt_of(subject).text()]}
        if self.person:
            own |= {"hypernet": hash_or_missing(HYPERNET), "strengths": recommended_strengths(HYPERNET)._asdict()}
        if self.control:
            own |= {"control": file_hash(self.control)}
        return own | ({"another": True} if self.another else {})

    def made(self, bench: Bench, subject: Subject, lidb: LiDB) -> np.ndarray:
        """uint8 (pictures, 128, 128, 3) of a person, whose prediction is used if the row applies it."""
        studio = bench.studio
        models = studio.apply(lidb, lidb.about.strengths) if self.person else studio.base
        positive = studio.host.run("CLIPTextEncode", clip=models.clip, text=prompt_of(subject).text())[0]
        if self.control:
            positive, models = controlled(studio, models, positive, self.control, self.shape(subject))
        return studio.sampled(models, positive, subject.seed, bench.seeds)

    def pictures(self, bench: Bench, subject: Subject) -> np.ndarray:
        """Those of the finished cell."""
        cell = bench.cells.read(self.name, self.settings(subject), subject.seed)
        assert cell is not None, "`make` comes first"
        return cell.pictures[0]


def rows_of(control: Path) -> list[Row]:
    """Base and person, without and with a ControlNet."""
    return [
        *(Row("base", False), Row("base, controlled", False, control)),
        *(Row("person", True), Row("person, controlled", True, control)),
        Row("person, controlled by another", True, control, another=True),
    ]


def make(bench: Bench, rows: Sequence[Row], subject: Subject, report_only: bool) -> None:
    """Makes the cells of a person that are not there yet; raises as `Bench.make`."""
    by_name = {row.name: row for row in rows}
    bench.make(
        subject.seed,
        {row.name: row.settings(subject) for row in rows},
        report_only,
        lambda: bench.studio.predict(HYPERNET, subject.photo[None]).lidb,
        lambda row, lidb: by_name[row].made(bench, subject, lidb)[None],
    )


@cache
def loaded(studio: Studio, control: Path) -> Any:
    """The ControlNet of a file, as the stock loader reads it."""
    studio.host.folder_paths.add_model_folder_path("controlnet", str(control.parent))
    return studio.host.run("ControlNetLoader", control_net_name=control.name)[0]


def controlled(studio: Studio, models: Models, positive: Any, control: Path, shape: np.ndarray) -> tuple[Any, Models]:
    """Positive conditioning, and the models with the negative one, behind the stock ControlNet nodes."""
    net = loaded(studio, control)
    image = as_image(shape[None, :, :, None].repeat(3, 3))
    given = {"positive": positive, "negative": models.negative or studio.negative(models.clip), "control_net": net}
    strength = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0}
    positive, negative = studio.host.run("ControlNetApplyAdvanced", **given, image=image, **strength)
    return positive, models._replace(negative=negative)


# -- judging ----------------------------------------------------------------------------------------------------------


def scores(judge: Judge, subject: Subject, pictures: np.ndarray, shape: np.ndarray) -> dict[str, float]:
    """Means over the pictures uint8 (N, 128, 128, 3) of a person, whose pose should be that of a silhouette."""
    prompts = [prompt_of(subject)] * len(pictures)
    ceiling = np.repeat(ceilings(judge, subject.person, prompts[:1]), len(pictures))
    readings = judge.read(np.ascontiguousarray(pictures))
    means = summarise(score_pictures(readings, subject.person, subject.context, prompts, ceiling))
    return {"pose": float(overlap(pictures, subject, shape).mean())} | {name: means[name].value for name in SCORES}


def table(judge: Judge, bench: Bench, rows: Sequence[Row], subjects: Sequence[Subject]) -> dict[str, dict[str, Any]]:
    """Row → score → mean over people and its standard error; the last row is of true pictures."""
    each = {row.name: [scores(judge, s, row.pictures(bench, s), row.shape(s)) for s in subjects] for row in rows}
    drawn = [photo(subject.person, prompt_of(subject).context)[None] for subject in subjects]
    each["a true picture"] = [scores(judge, s, own, shape_of(s)) for s, own in zip(subjects, drawn, strict=True)]
    return {
        name: {score: asdict(mean_over_people(one[score] for one in own)) for score in own[0]}
        for name, own in each.items()
    }


def text_of(rows: Mapping[str, Mapping[str, Any]], people: int, pictures: int) -> str:
    """The Markdown table of the first judge."""
    counted = f"{pictures} pictures of each person and row; means over people with standard errors."
    return "\n".join([*table_of_means(rows, f"%, of {people} people"), "", f"{counted} {LEGEND}", ""])


def main() -> None:
    options = parser(__doc__, people=40, name="control")
    options.add_argument("--control", type=Path, default=ROOT / "weights" / CONTROL_FILE, help="the ControlNet")
    args = options.parse_args()
    if not args.control.is_file():
        raise SystemExit(f"No ControlNet {args.control}: make one with python -m miniature.control.")
    bench, subjects, rows = open_bench(args), chosen_subjects(args), rows_of(args.control.resolve())
    for subject in subjects:
        make(bench, rows, subject, args.report_only)
    tables = {name: table(judge, bench, rows, subjects) for name, judge in load_judges(args.weights).items()}
    text = text_of(next(iter(tables.values())), len(subjects), bench.seeds)
    print(text)
    result = {"people": len(subjects), "pictures": bench.seeds, "sampling": asdict(bench.sampling), "judges": tables}
    write_json(args.results / "control.json", rounded(result))
    write_text(args.results / "control.md", text)
    lines = []
    for one in subjects[:SHOWN]:
        shapes = [row.shape(one)[:, :, None].repeat(3, 2) for row in rows[-2:]]
        pictures = [row.pictures(bench, one)[0] for row in rows]
        lines.append((prompt_of(one).text(), [one.photo, shapes[0], *pictures[:-1], shapes[1], pictures[-1]]))
    names = [row.name for row in rows]
    columns = ["the photo", "own silhouette", *names[:-1], "another's silhouette", names[-1]]
    grid.save(grid.grid(lines, columns), args.results / "control.png")


if __name__ == "__main__":
    main()
