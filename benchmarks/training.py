"""Ways to train the hypernetwork, each for the same short time, judged by people whom this training does not show.

``python dev.py bench training`` takes the fitted people of ``--folder`` (``python -m miniature.make diffusers fitted
precompute``) and the encoder of the shipped hypernetwork, which has learned to see people, these among them; the rest
begins anew. It trains every variant on them once, with the same seed, and writes ``benchmarks/results/training.json``
and ``training.md``. The error is that of v on the face in a photo that was not given, of people kept from training, with
the person's own prediction, the mean one, a stranger's, and of the base model; *outside* is the person's own and the base
model's beside the head. What a variant takes away more than ``diffusion`` is paired over the people, ± the standard error
over them. ``--masked`` holds the same photos with masks (``python -m miniature.photos --folder .runs/masked --people 384
--masks face``), ``--basis`` is the learned one (``python -m miniature.make basis``). Variants are trained in
``.runs/training`` and go on where they were stopped; finished ones are not trained again, and rows of other variants, or
of other numbers of steps, stay in the table.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from devtools.device import add_option, made_on
from hdb_core.files import hypernet as hypernet_file
from hdb_core.train.beginning import save_encoder
from miniature.scores import mean_over_people

from .common.bench import RESULTS, ROOT
from .common.files import rounded, write_json, write_text
from .common.report import percent
from .hypernet import HYPERNET
from .people import BASIS

MASKED = "MASKED"  # stands for the folder of the same photos with masks of the faces
LEARNED = "LEARNED"  # stands for the file of the learned basis
NARROW = ("basis.down_dim=25", "basis.up_dim=12")  # as narrow as the usual basis is on SD 1.5's layers
# Settings of hdb_core.train.
VARIANTS: Mapping[str, Sequence[str]] = {
    "diffusion": (),
    "regression": ("train.regression_weight=1", "train.diffusion_weight=0"),
    "both": ("train.regression_weight=1",),
    "diffusion, masked": (f"photos={MASKED}",),
    "diffusion, masked, the rest free": (f"photos={MASKED}", "train.rest=0"),
    "diffusion, one photo seen": ("train.max_photos=1",),
    "diffusion, k = 1": ("train.max_iterations=1",),
    "diffusion, rank 4": ("rank=4",),
    "diffusion, predicted down side": ("net.predict_down=true",),
    "diffusion, narrow basis": NARROW,
    "diffusion, narrow basis, predicted down side": (*NARROW, "net.predict_down=true"),
    "diffusion, learned basis": (f"basis.file={LEARNED}",),
}
COLUMNS = (
    "own",
    "base",
    "stranger",
    "mean",
    "own_outside",
    "base_outside",
    "regression",
    "mean_predictor",
    "own_of_each",
)


def trained(
    name: str, folder: Path, steps: int, options: Sequence[str], masked: Path, basis: Path = BASIS
) -> dict[str, Any]:
    """The row of a variant, trained and evaluated now unless it has been.

    Args:
        name: of the variant.
        folder: to train in.
        steps: of the training.
        options: of ``hdb_core.train``, for all variants.
        masked: the photos with masks beside them.
        basis: the file of a learned basis.

    Raises:
        subprocess.CalledProcessError: if its training or evaluation fails.
    """
    result = folder / "evaluation.json"
    if not result.exists():
        places = {MASKED: str(masked), LEARNED: str(basis)}
        variant = [f"{key}={places.get(value, value)}" for key, value in (o.split("=") for o in VARIANTS[name])]
        # Whatever a variant was trained on, all are judged by the same error.
        judged = ["--photos", str(masked), "--set", "evaluate.draws=4", "evaluate.photos=1"]
        trained_by = ["--steps", str(steps), *options, "--set", "pretrain.steps=0", *variant]
        for stage, own in (("train", trained_by), ("evaluate", judged)):
            command = [sys.executable, "-m", "hdb_core.train", str(folder), "--stage", stage]
            subprocess.run([*command, *own], cwd=ROOT, check=True)
    last = json.loads(result.read_text().splitlines()[-1])  # from one photo, at the most refinements
    return {"variant": name, "steps": steps, "options": shlex.join(VARIANTS[name]),
            **{column: last[column] for column in COLUMNS if column in last}}  # fmt: skip


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows in Markdown, with how much of the error a person's own prediction takes away."""
    lines = [
        "| variant | steps | own | mean person | stranger | base model | own below base, % | more than diffusion | outside (base) | regression (mean person) |",
        "|---|" + "---:|" * 9,
    ]
    diffusion = {(row["steps"], device_of(row)): row for row in rows if row["variant"] == "diffusion"}
    for row in rows:
        gain = percent(1 - row["own"] / row["base"])
        more = more_than(row, diffusion.get((row["steps"], device_of(row)), row))
        outside = f"{row['own_outside']:.4f} ({row['base_outside']:.4f})" if "own_outside" in row else ""
        fits = f"{row['regression']:.3f} ({row['mean_predictor']:.3f})" if "regression" in row else ""
        lines.append(f"| {row['variant']}{'' if device_of(row) == 'cpu' else ', ' + row['made_on']['card']} | {row['steps']} | {row['own']:.4f} | {row['mean']:.4f} | {row['stranger']:.4f} | {row['base']:.4f} | {gain} | {more} | {outside} | {fits} |")  # fmt: skip
    return "\n".join(lines) + "\n"


def more_than(row: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """How much more of the base model's error a row takes away, in points, paired over the people; "" for the same row."""
    if row is other:
        return ""
    pairs = zip(row["own_of_each"], other["own_of_each"], strict=True)
    less = mean_over_people((theirs - own) / row["base"] for own, theirs in pairs)
    return percent(less.value, less.error)


def device_of(row: Mapping[str, Any]) -> str:
    """That a row was trained on; the CPU where it was not noted."""
    return row.get("made_on", {}).get("device", "cpu")


def merged(rows: Sequence[Mapping[str, Any]], row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The rows with one more, or one made anew, by device, steps and in the order of the variants."""
    order = list(VARIANTS).index
    keyed = {(device_of(r), r["steps"], order(r["variant"])): r for r in [*rows, row] if r["variant"] in VARIANTS}
    return [keyed[key] for key in sorted(keyed)]


def encoder_of(hypernet: Path, folder: Path) -> Path:
    """The image encoder of a hypernetwork's file as a file of its own, which a training can begin with."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "encoder.safetensors"
    save_encoder(hypernet_file.load(hypernet).encoder.state_dict(), path)
    return path


def main() -> None:
    options = argparse.ArgumentParser(
        prog="dev.py bench training", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME", help=f"of: {'; '.join(VARIANTS)}")  # fmt: skip
    options.add_argument("--steps", type=int, default=60)
    options.add_argument("--folder", type=Path, default=ROOT / ".runs" / "regression", help="with fitted people")
    options.add_argument("--photos", type=Path, default=ROOT / ".runs" / "fitted")
    options.add_argument("--hypernet", type=Path, default=HYPERNET, help="whose encoder all variants begin with")
    options.add_argument(
        "--masked", type=Path, default=ROOT / ".runs" / "masked", help="the photos with masks of the faces"
    )
    options.add_argument("--basis", type=Path, default=BASIS, help="file of the learned basis")
    options.add_argument("--model", type=Path, default=ROOT / ".runs" / "diffusers")
    add_option(options)
    options.add_argument("--keep", metavar="NAME", help="name of the table, training_NAME, for other people")
    options.add_argument("--results", type=Path, default=RESULTS)
    args = options.parse_args()
    name_of_table = f"training_{args.keep}" if args.keep else "training"
    runs = ROOT / ".runs" / (name_of_table if args.device == "cpu" else f"{name_of_table}_{args.device}")
    path = args.results / f"{name_of_table}.json"
    encoder = encoder_of(args.hypernet, runs)
    shared = [
        *("--model", str(args.model.resolve()), "--photos", str(args.photos.resolve()), "--image-size", "128"),
        *(("--cpu",) if args.device == "cpu" else ()),
        *("--no-convolutions", "--set", f"precomputed={args.folder.resolve()}", f"begin_with={encoder}"),
        *("held_out=0.1", "net.depth=2", "net.predict_down=false", "train.warmup=20", "train.max_photos=2"),
        *("train.noise=[0.05,0.95]", "evaluate.noise=[0.05,0.95]", "samples.every=0"),
    ]
    rows: list[Mapping[str, Any]] = []
    for name in args.variants:
        folder = runs / f"{name.replace(', ', '_').replace(' ', '_')}_{args.steps}"
        made = trained(name, folder, args.steps, shared, args.masked.resolve(), args.basis.resolve())
        row = rounded(made | {"made_on": made_on(args.device)})
        rows = merged(json.loads(path.read_text()) if path.exists() else [], row)  # others may write, too
        write_json(path, rows)
        write_text(path.with_suffix(".md"), table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
