"""A person from one photo without training, and after a few steps: against references that train for long.

``python dev.py bench hypernet --split test --people 50 --reference-people 16`` writes ``hypernet.json`` (a row a line),
``hypernet.md`` and ``hypernet.png`` to ``benchmarks/results/``. Finished cells stay in ``.runs/bench/cells``: a second run
continues. Scores are kept in ``benchmarks/results/cells.jsonl``: once that is committed, another machine continues, too.
``--share 1/2`` and ``--share 2/2`` in two processes with OMP_NUM_THREADS=1 use two cores best. ``--rows`` makes and reports
only some. Rows:

* ``base``, ``caption``: the base with "a [v] face", and with the full true caption instead;
* ``hyper``: Predict LiDB; ``_3photos``: from two more photos of the person, each captioned;
* ``hyper_N``: FastFinetune with N steps from there, its rank relaxed, and ``lidb_N`` without a hypernetwork;
  ``_described``: the photo is captioned with what it shows besides the person; ``_saved`` (by ``--rows`` only): after
  Save LiDB and Load LiDB; ``_guided``: applied as a person from one photo, otherwise as a prediction
  (`hdb_core.recommended`); ``_as_lora``: applied as an ordinary LoRA, at strength 1; ``_narrow``: with a basis of 25 × 12, if
  ``python -m miniature.make hypernet_in_narrow_basis`` has made the hypernetwork;
* ``lora4``: LoRA-DreamBooth of rank 4;
* ``dreambooth@N``, ``dreambooth_described@N``, ``textual_inversion@N``: checkpoints; without a number the one with the
  best joint score;
* ``stranger``: the next person's prediction; ``photo``: the given photo itself; ``render``: true pictures of the prompts.
"""

from __future__ import annotations

import json
from pathlib import Path

from hdb_core.recommended import AS_LORA, FROM_PHOTO, FROM_PHOTOS, FROM_PREDICTION, RECOMMENDED

from .common.bench import ROOT, chosen_subjects, open_bench, parser
from .common.dreambooth import DreamBoothConfig
from .common.files import write_text
from .common.methods import (
    Base,
    Caption,
    DreamBooth,
    FastFinetuning,
    LoRA,
    Method,
    Predicted,
    RealPictures,
    Stranger,
    TextualInversion,
    chosen_rows,
)
from .common.report import short_table, speed_table, with_table
from .common.results import Table, add_options, make_and_report
from .common.settings import GUIDED, LORA
from .common.studio import HYPERNET, recommended_strengths

NARROW_HYPERNET = ROOT / ".runs" / "narrow" / "hypernet.safetensors"
FEW_AND_MANY = (RECOMMENDED[FROM_PREDICTION].steps, 40)
ONE, SEVERAL = RECOMMENDED[FROM_PHOTO].steps, RECOMMENDED[FROM_PHOTOS].steps


def all_methods(hypernet: Path, narrow: Path = NARROW_HYPERNET) -> list[Method]:
    """Every method, in the order of the table.

    Args:
        hypernet: the hypernetwork's file.
        narrow: file of a hypernetwork in a narrow basis.
    """
    predicted = Predicted("hyper", hypernet, strengths=(recommended_strengths(hypernet), AS_LORA))
    in_narrow = Predicted("hyper_narrow", narrow)

    def after(steps: int, start: Predicted, ending: str = "") -> FastFinetuning:
        return FastFinetuning(f"hyper_{steps}_described{ending}", {"steps": steps}, start, described=True)

    return [
        Base(), Caption(),
        predicted, Predicted("hyper_3photos", hypernet, photos=3), *(after(n, predicted) for n in FEW_AND_MANY),
        in_narrow, *(after(n, in_narrow, "_narrow") for n in FEW_AND_MANY),
        FastFinetuning(f"lidb_{ONE}_described_guided", {"steps": ONE}, described=True, strengths=(GUIDED,)),
        FastFinetuning(f"lidb_{SEVERAL}_3photos_described", {"steps": SEVERAL}, described=True, photos=3),
        LoRA("lora4", {**LORA, "rank": 4}, strengths=(AS_LORA,)),
        DreamBooth(), DreamBooth(DreamBoothConfig(rate=4e-5), "dreambooth_described", True), TextualInversion(),
        Stranger(predicted), RealPictures(),
    ]  # fmt: skip


def main() -> None:
    options = parser(__doc__, people=50, name="hypernet")
    options.add_argument("--rows", nargs="+", help="only these rows (default: all but the saved ones)")
    options.add_argument("--hypernet", type=Path, default=HYPERNET, help="its file")
    options.add_argument("--reference-people", type=int, default=16, help="how many get the slow references")
    options.add_argument("--short", action="store_true", help="6 prompts instead of 11")
    options.add_argument(
        "--readme", action="store_true", help="then bring the tables of README.md and docs/results.md up to the report"
    )
    add_options(options, grid_people=3)
    args = options.parse_args()
    if not args.hypernet.is_file():
        raise SystemExit(f"No hypernetwork {args.hypernet}: complete weights/, or name one with --hypernet.")
    methods = all_methods(args.hypernet.resolve())
    rows = chosen_rows(methods, args.rows, left_out="_saved")
    bench, subjects = open_bench(args, args.short), chosen_subjects(args, args.short)
    make_and_report(args, Table(bench, methods, rows, subjects), args.reference_people)
    if args.readme:
        pages = (ROOT / "README.md", ROOT / "docs" / "results.md")
        objects = json.loads((args.results / f"{args.name}.json").read_text(encoding="utf-8"))
        for page in pages:
            text = short_table(page.read_text(encoding="utf-8"), objects)
            write_text(page, with_table(text, speed_table(objects)))


if __name__ == "__main__":
    main()
