"""Settings of the fast fine-tune, or of a reference, compared on dev people with the short evaluation.

``python dev.py bench tune --set learning_rate=0.01,0.02 rank=1,4`` tries every combination; every other setting has its
default. ``--method hyper`` goes on from a prediction, ``--method predict`` is that alone, ``--method learned`` starts in a
learned basis, ``--method lora`` is LoRA-DreamBooth; ``--strengths 0.8,0.5,2 1,1,1`` applies each person
both ways. ``--method dreambooth --set rate=1e-5,3e-5`` and ``textual_inversion`` do the same for these references, at each
of their checkpoints. ``--keep NAME`` calls the table ``tune_NAME`` instead of ``tune``.
Finished cells stay in ``.runs/bench/cells``: earlier sweeps can be repeated at no cost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from hdb_core.recommended import AS_LORA, Strengths

from .common.bench import chosen_subjects, open_bench, parsed_settings, parser
from .common.dreambooth import DreamBoothConfig
from .common.methods import (
    Base,
    DreamBooth,
    FastFinetuning,
    LearnedBasis,
    LoRA,
    Method,
    Predicted,
    TextualInversion,
)
from .common.results import Table, add_options, make_and_report
from .common.settings import LORA, NodeConfig
from .common.studio import BASIS, HYPERNET
from .common.textual_inversion import TextualInversionConfig

REFERENCES: Mapping[str, tuple[type, Any]] = {
    "dreambooth": (DreamBooth, DreamBoothConfig()),
    "textual_inversion": (TextualInversion, TextualInversionConfig()),
}


def combinations(values: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every choice of one value for each setting, in order."""
    return [dict(zip(values, chosen, strict=True)) for chosen in product(*values.values())]


def row_name(settings: Mapping[str, Any]) -> str:
    """ "learning_rate=0.01 rank=4", or "defaults"."""
    return " ".join(f"{name}={value}" for name, value in settings.items()) or "defaults"


def parsed_strengths(text: str) -> Strengths:
    """ "0.8,0.5,2" as the strengths of the UNet, of the text encoder, and of guidance."""
    model, clip, guidance = map(float, text.split(","))
    return Strengths(model, clip, guidance)


def swept(
    method: str,
    pairs: Sequence[str],
    hypernet: Path,
    *,
    basis: Path = BASIS,
    checkpoints: Sequence[int] | None = None,
    described: bool = False,
    strengths: tuple[Strengths, ...] = (),
    masked: bool = False,
    photos: int = 1,
    own_answers: bool = False,
) -> list[Method]:
    """A method for each combination of settings; references with their own checkpoints unless some are given."""
    if method in REFERENCES:
        of, base = REFERENCES[method]
        base = replace(base, checkpoints=tuple(checkpoints)) if checkpoints else base
        chosen = combinations(parsed_settings(pairs, type(base)))
        return [of(replace(base, **own), row_name(own), described) for own in chosen]
    chosen = combinations(parsed_settings(pairs, NodeConfig))
    if method == "lora":
        return [LoRA(row_name(own), {**LORA, **own}, None, described, (AS_LORA,)) for own in chosen]
    predicted = Predicted("hyper", hypernet, photos=photos, strengths=strengths)
    if method == "predict":
        return [predicted]
    start = {"hyper": predicted, "learned": LearnedBasis(basis)}.get(method)
    how = (described, strengths, masked, photos, not own_answers)
    return [FastFinetuning(row_name(own), own, start, *how) for own in chosen]


def main() -> None:
    options = parser(__doc__, people=8, name="tune")
    options.add_argument(
        "--method", choices=("lidb", "learned", "hyper", "predict", "lora", *REFERENCES), default="lidb"
    )
    options.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE,…", help="settings to try")
    options.add_argument("--checkpoints", type=int, nargs="+", help="of a reference (default: its own)")
    options.add_argument("--hypernet", type=Path, default=HYPERNET, help="its file, for --method hyper")
    options.add_argument("--basis", type=Path, default=BASIS, help="its file, for --method learned")
    options.add_argument(
        "--described", action="store_true", help="caption the photo with what it shows besides the person"
    )
    options.add_argument(
        "--strengths", type=parsed_strengths, nargs="+", default=[], metavar="MODEL,CLIP,GUIDANCE",
        help="that a LiDB is applied with (default: as recommended for a prediction, or for several photos)",
    )  # fmt: skip
    options.add_argument("--masked", action="store_true", help="only the head of the photo is learned")
    options.add_argument(
        "--photos", type=int, default=1, help="of each person, that a LiDB is predicted and learned from"
    )
    options.add_argument(
        "--own-answers", action="store_true", help="a prior_weight without class pictures, which it has otherwise"
    )
    options.add_argument("--saved", action="store_true", help="each person after Save LiDB and Load LiDB, too")
    options.add_argument("--full", action="store_true", help="11 prompts instead of 6")
    options.add_argument(
        "--keep", metavar="NAME", help="name of the table, tune_NAME, so that others do not replace it"
    )
    add_options(options, grid_people=2)
    args = options.parse_args()
    chosen = swept(
        args.method, args.set, args.hypernet.resolve(), basis=args.basis.resolve(), checkpoints=args.checkpoints,
        described=args.described, strengths=tuple(args.strengths), masked=args.masked,
        photos=args.photos, own_answers=args.own_answers,
    )  # fmt: skip
    methods = [Base(), *chosen]
    rows = [row for method in methods for row in method.rows if args.saved or not row.endswith("_saved")]
    bench, subjects = open_bench(args, not args.full), chosen_subjects(args, not args.full)
    if args.keep:
        args.name = f"tune_{args.keep}"
    make_and_report(args, Table(bench, methods, rows, subjects), reference_people=len(subjects), keep=False)


if __name__ == "__main__":
    main()
