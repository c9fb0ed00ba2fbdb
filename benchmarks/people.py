"""One photo in, that person's pictures out: the fast fine-tune against full DreamBooth, words, and the photo itself.

``python dev.py bench people --split test --people 50 --reference-people 16`` writes ``people.json`` (a row a line),
``people.md`` and ``people.png`` to ``benchmarks/results/``. Finished cells stay in ``.runs/bench/cells``: a second run
continues. Scores are kept in ``benchmarks/results/cells.jsonl``: once that is committed, another machine continues, too. ``--share 1/2`` and ``--share 2/2`` in two processes with OMP_NUM_THREADS=1 use two cores best. Rows:

* ``base``, ``caption``: the base with "a [v] face", and with the full true caption instead;
* ``lidb_N``: FastFinetune with N steps, without a hypernetwork; ``_saved``: after Save LiDB and Load LiDB;
  ``_described``: the photo is captioned with what it shows besides the person; without, for the smallest N;
  ``_guided``: applied as a person from one photo, otherwise as a prediction (`hdb_core.recommended`); ``_3photos``: from
  two more photos of the person, each captioned; ``_prior``: with class-prior preservation, and ``_narrow``: with a basis of 25 × 12, both for the smallest
  N; ``_learned``: in a basis learned from people, if ``python -m miniature.make basis`` has made it;
* ``dreambooth@N``: checkpoints of full DreamBooth; ``dreambooth``: the one with the best joint score, the reference;
* ``stranger``: the next person's LiDB; ``photo``: the given photo itself; ``render``: true pictures of the prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .common.bench import ROOT, chosen_subjects, open_bench, parser
from .common.dreambooth import DreamBoothConfig
from .common.methods import (
    WITHOUT_HYPERNET,
    Base,
    Caption,
    DreamBooth,
    FastFinetuning,
    LearnedBasis,
    Method,
    RealPictures,
    Stranger,
    chosen_rows,
)
from .common.results import Table, add_options, make_and_report

BASIS = ROOT / ".runs" / "basis" / "basis.safetensors"  # python -m miniature.make basis
LEARNED_STEPS = 8  # bring about as much as three times as many in a random basis
NARROW = {"down_dim": 25, "up_dim": 12}


def all_methods(steps: Sequence[int], reference: DreamBoothConfig, basis: Path = BASIS) -> list[Method]:
    """Every method, in the order of the table.

    Args:
        steps: of FastFinetune without a hypernetwork, a row each.
        reference: of full DreamBooth.
        basis: file of the learned basis.
    """
    persons = [FastFinetuning(f"lidb_{n}_described", {"steps": n}, described=True) for n in steps]
    fewest = {"steps": min(steps)}
    narrow = FastFinetuning(f"lidb_{min(steps)}_described_narrow", {**fewest, "basis": NARROW}, described=True)
    undescribed = FastFinetuning(f"lidb_{min(steps)}", fewest)
    prior = FastFinetuning(f"lidb_{min(steps)}_described_prior", {**fewest, "prior_weight": 1.0}, described=True)
    learned = FastFinetuning(
        f"lidb_{LEARNED_STEPS}_described_learned", {"steps": LEARNED_STEPS}, LearnedBasis(basis), described=True
    )
    return [
        Base(),
        Caption(),
        *persons,
        *WITHOUT_HYPERNET,
        undescribed,
        prior,
        narrow,
        learned,
        DreamBooth(reference),
        Stranger(persons[0]),
        RealPictures(),
    ]


def main() -> None:
    options = parser(__doc__, people=50, name="people")
    reference = DreamBoothConfig()
    options.add_argument("--rows", nargs="+", help="only these rows (default: all)")
    options.add_argument("--steps", type=int, nargs="+", default=[24, 40, 150, 400], help="of FastFinetune")
    options.add_argument("--reference-people", type=int, default=16, help="how many get full DreamBooth")
    options.add_argument("--reference-rate", type=float, default=reference.rate)
    options.add_argument("--reference-steps", type=int, nargs="+", default=list(reference.checkpoints))
    options.add_argument("--short", action="store_true", help="6 prompts instead of 11")
    add_options(options, grid_people=3)
    args = options.parse_args()
    config = DreamBoothConfig(rate=args.reference_rate, checkpoints=tuple(args.reference_steps))
    methods = all_methods(args.steps, config)
    rows = chosen_rows(methods, args.rows, left_out=("_narrow_saved", "_prior_saved", "_learned_saved"))
    bench, subjects = open_bench(args, args.short), chosen_subjects(args, args.short)
    make_and_report(args, Table(bench, methods, rows, subjects), args.reference_people)


if __name__ == "__main__":
    main()
