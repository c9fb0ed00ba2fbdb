"""A person from one photo without training, and after a few steps: against references that train for long.

``python dev.py bench hypernet --split test --people 50 --reference-people 16`` writes ``hypernet.json`` (a row a line),
``hypernet.md`` and ``hypernet.png`` to ``benchmarks/results/``. Cells, scores and ``--share`` are those of
``bench people``, whose rows of the same settings are not made again. ``--rows`` makes and reports only some. Rows:

* ``base``, ``caption``: the base with "a [v] face", and with the full true caption instead;
* ``hyper``: Predict LiDB; ``_3photos``: from two more photos of the person, each captioned;
* ``hyper_N``: FastFinetune with N steps from there, its rank relaxed, and ``lidb_N`` without a hypernetwork;
  ``_described``: the photo is captioned with what it shows besides the person; ``_saved`` (by ``--rows`` only): after
  Save LiDB and Load LiDB; ``_guided``: applied as a person from one photo, otherwise as a prediction
  (`hdb_core.recommended`); ``_as_lora``: applied as an ordinary LoRA, at strength 1; ``_narrow``: with a basis of 25 × 12, if
  ``python -m miniature.make hypernet_in_narrow_basis`` has made the hypernetwork;
* ``lora1``, ``lora4``: LoRA-DreamBooth of rank 1 and 4;
* ``dreambooth@N``, ``dreambooth_described@N``, ``textual_inversion@N``: checkpoints; without a number the one with the
  best joint score; ``_base_negative``: the negative prompt encoded as before the training;
  ``dreambooth_adapted_described@N`` (by ``--rows`` only): of no layers but those that a LiDB adapts;
* ``stranger``: the next person's prediction; ``photo``: the given photo itself; ``render``: true pictures of the prompts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hdb_core.recommended import AS_LORA, FROM_PREDICTION, RECOMMENDED

from .common.bench import ROOT, chosen_subjects, open_bench, parsed_settings, parser
from .common.dreambooth import DreamBoothConfig
from .common.files import write_text
from .common.methods import (
    WITHOUT_HYPERNET,
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
from .common.report import short_table
from .common.results import Table, add_options, make_and_report
from .common.settings import LORA, NodeConfig
from .common.studio import HYPERNET, recommended_strengths
from .common.textual_inversion import TextualInversionConfig

NARROW_HYPERNET = ROOT / ".runs" / "narrow" / "hypernet.safetensors"
FEW = RECOMMENDED[FROM_PREDICTION].steps
STEPS = sorted({5, 10, 20, 40, FEW})
FEW_AND_MANY = (FEW, 40)
COLD_STEPS = (24, 40, 400)
RANKS = (1, 4)  # of LoRA


def all_methods(
    hypernet: Path,
    settings: Mapping[str, Any],
    dreambooth: DreamBoothConfig,
    inversion: TextualInversionConfig,
    narrow: Path = NARROW_HYPERNET,
) -> list[Method]:
    """Every method, in the order of the table.

    Args:
        hypernet: the hypernetwork's file.
        settings: fields of NodeConfig that are not at their default when going on from a prediction.
        dreambooth: of full DreamBooth.
        inversion: of Textual Inversion.
        narrow: file of a hypernetwork in a narrow basis.
    """
    predicted = Predicted("hyper", hypernet, strengths=(recommended_strengths(hypernet), AS_LORA))
    several, in_narrow = Predicted("hyper_3photos", hypernet, photos=3), Predicted("hyper_narrow", narrow)

    def after(steps: int, start: Predicted, name: str = "_described", **how: Any) -> FastFinetuning:
        return FastFinetuning(f"hyper_{steps}{name}", {**settings, "steps": steps}, start, "described" in name, **how)

    return [
        Base(), Caption(),
        predicted, several,
        *(after(n, predicted) for n in STEPS), after(FEW, predicted, ""),
        *(after(n, several, "_3photos_described", photos=3) for n in FEW_AND_MANY),
        in_narrow, *(after(n, in_narrow, "_described_narrow") for n in FEW_AND_MANY),
        *(FastFinetuning(f"lidb_{n}_described", {"steps": n}, described=True) for n in COLD_STEPS),
        *WITHOUT_HYPERNET, FastFinetuning(f"lidb_{COLD_STEPS[0]}", {"steps": COLD_STEPS[0]}),
        *(LoRA(f"lora{rank}", {**LORA, "rank": rank}, strengths=(AS_LORA,)) for rank in RANKS),
        DreamBooth(dreambooth), DreamBooth(dreambooth, "dreambooth_described", True, base_negative=True),
        TextualInversion(inversion), Stranger(predicted), RealPictures(),
    ]  # fmt: skip


def single_settings(pairs: Sequence[str]) -> dict[str, Any]:
    """``name=value`` of NodeConfig.

    Raises:
        SystemExit: several values, an unknown name, a value of another type, or the steps, which the row's name says.
    """
    found = parsed_settings(pairs, NodeConfig)
    if wrong := [name for name, values in found.items() if len(values) != 1 or name == "steps"]:
        raise SystemExit(f"--set {', '.join(wrong)}: expected one value, and no steps: they are in the row's name.")
    return {name: value for name, (value,) in found.items()}


def main() -> None:
    options = parser(__doc__, people=50, name="hypernet")
    dreambooth, inversion = DreamBoothConfig(), TextualInversionConfig()
    options.add_argument("--rows", nargs="+", help="only these rows (default: all but the saved ones)")
    options.add_argument("--hypernet", type=Path, default=HYPERNET, help="its file")
    options.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings of hyper_N")
    options.add_argument("--reference-people", type=int, default=16, help="how many get the slow references")
    options.add_argument("--reference-rate", type=float, default=dreambooth.rate, help="of DreamBooth")
    options.add_argument("--reference-steps", type=int, nargs="+", default=list(dreambooth.checkpoints))
    options.add_argument("--inversion-rate", type=float, default=inversion.rate, help="of Textual Inversion")
    options.add_argument("--inversion-steps", type=int, nargs="+", default=list(inversion.checkpoints))
    options.add_argument("--short", action="store_true", help="6 prompts instead of 11")
    options.add_argument(
        "--readme", action="store_true", help="then bring the tables of README.md and docs/results.md up to the report"
    )
    add_options(options, grid_people=3)
    args = options.parse_args()
    if not args.hypernet.is_file():
        raise SystemExit(f"No hypernetwork {args.hypernet}: complete weights/, or name one with --hypernet.")
    methods = all_methods(
        args.hypernet.resolve(),
        single_settings(args.set),
        DreamBoothConfig(rate=args.reference_rate, checkpoints=tuple(args.reference_steps)),
        TextualInversionConfig(rate=args.inversion_rate, checkpoints=tuple(args.inversion_steps)),
    )
    rows = chosen_rows(methods, args.rows, left_out="_saved")
    bench, subjects = open_bench(args, args.short), chosen_subjects(args, args.short)
    make_and_report(args, Table(bench, methods, rows, subjects), args.reference_people)
    if args.readme:
        pages = (ROOT / "README.md", ROOT / "docs" / "results.md")
        objects = json.loads((args.results / f"{args.name}.json").read_text(encoding="utf-8"))
        for page in pages:
            write_text(page, short_table(page.read_text(encoding="utf-8"), objects))


if __name__ == "__main__":
    main()
