"""What a hypernetwork sees in a photo or several, what of it reaches the person that it predicts, and what pictures show.

``python dev.py bench probe`` reads the truth about drawn people whom no training saw off the face tokens and off the
predicted factors, each by a ridge regression on other such people, and off pictures of the predicted people with a judge.
It writes ``benchmarks/results/probe.json`` and ``probe.md``: of every shape and colour, the share of its variance that is
read (1 is all; 0, or less, is nothing). What tokens hold and predictions do not, training has not taught yet; what
predictions hold and pictures do not show, neither.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from devtools.device import add_option, made_on
from hdb_core.files import basis as basis_file
from hdb_core.files import hypernet as hypernet_file
from hdb_core.hypernet import HyperNet, preprocess
from hdb_core.train.face_code import RIDGES, ridge_weights
from miniature.drawing import photo
from miniature.judge import Judge
from miniature.people import GEOMETRY, Person, sample_person
from miniature.photos import FIRST, photo_context

from .common.bench import RESULTS, RUNS
from .common.files import rounded, write_json, write_text
from .common.report import percent
from .common.studio import Sampling, Studio
from .common.subjects import Subject
from .hypernet import HYPERNET
from .pairs import placed

PICTURES = 2  # of each person
UNSEEN = FIRST + 1_000_000  # far behind the people that hypernetworks are trained on
ITEMS = (*GEOMETRY, "hair", "skin")


def truth(person: Person) -> list[float]:
    """Every shape, and how bright hair and skin are."""
    return [*person.geometry, sum(person.hair_rgb) / 765, sum(person.skin_rgb) / 765]


@torch.no_grad()
def face_tokens(net: HyperNet, people: Sequence[Person], photos: int, batch: int = 64) -> Tensor:
    """Of so many photos of each of N people, none a portrait: (N, photos, T, D)."""
    parts = []
    for first in range(0, len(people), batch):
        some = people[first : first + batch]
        drawn = np.stack([photo(p, photo_context(p.seed, i)) for p in some for i in range(1, photos + 1)])
        pixels = torch.from_numpy(drawn).to(device_of(net)).float() / 255
        tokens = net.encode(preprocess(pixels, net.config.encoder))
        parts.append(tokens.unflatten(0, (len(some), photos)))
    return torch.cat(parts)


@torch.no_grad()
def seen(net: HyperNet, tokens: Tensor, batch: int = 64) -> tuple[Tensor, Tensor]:
    """What the face tokens (N, T, D) of N people sum up, and the predicted up side, (N, numbers) each."""
    summed, up = net.summed(tokens), torch.cat([net(part)[1].flatten(1) for part in tokens.split(batch)])
    return summed.cpu(), up.cpu()


def pictured(studio: Studio, hypernet: Path, judge: Judge, people: Sequence[Person]) -> Tensor:
    """`ITEMS` (N, K) as a judge reads them off pictures of N predicted people, the mean of `PICTURES` each."""
    read = []
    for subject in (Subject(person.seed) for person in people):
        lidb = studio.predict(hypernet, subject.photo[None]).lidb
        models = studio.apply(lidb, lidb.about.strengths)
        prompt = placed(subject, subject.context.background).text()
        factors = judge.read(studio.pictures(models, prompt, subject.seed, PICTURES)).factors.mean(0)
        shapes, colours = factors[: len(GEOMETRY)], factors[len(GEOMETRY) :].reshape(2, 3)  # of skin and hair
        read.append([*shapes, *colours.mean(1)[::-1]])
    return torch.tensor(np.array(read))


def correlated(readings: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The share of the variance of targets (N, K) that a line through readings (N, K) explains, and its error, (K,)."""
    both = torch.stack([readings.double(), targets.double()])
    both = (both - both.mean(1, keepdim=True)) / both.std(1, correction=0, keepdim=True)
    share = both.prod(0).mean(0).square()
    return share, 2 * share.sqrt() * (1 - share) / len(readings) ** 0.5


def device_of(net: HyperNet) -> torch.device:
    """Where its weights are."""
    return next(net.parameters()).device


def explained(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The share of the variance of targets (N, K) that a ridge regression on inputs (N, D) explains, (K,).

    Half of the people are regressed on, a quarter chooses the ridge, a quarter is judged, over whom the standard error
    is, (K,).
    """
    inputs, targets = inputs.double(), targets.double()
    half, rest = len(inputs) // 2, 3 * len(inputs) // 4
    inputs = (inputs - inputs[:half].mean(0)) / (inputs[:half].std(0) + 1e-9)
    mean = targets[:half].mean(0)

    def share(ridge: float, people: slice) -> tuple[Tensor, Tensor]:
        weights = ridge_weights(inputs[:half], targets[:half] - mean, ridge)
        error = (inputs[people] @ weights + mean - targets[people]).square()
        spread = (targets[people] - targets[people].mean(0)).square()
        unexplained = error.mean(0) / spread.mean(0)
        of_each = (error - unexplained * spread) / spread.mean(0)
        return 1 - unexplained, of_each.std(0) / len(of_each) ** 0.5

    best = max(RIDGES, key=lambda ridge: float(share(ridge, slice(half, rest))[0].mean()))
    return share(best, slice(rest, None))


def main() -> None:
    options = argparse.ArgumentParser(
        prog="dev.py bench probe", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--hypernet", type=Path, default=HYPERNET, help="its file")
    options.add_argument("--basis", type=Path, help="the file of its basis, if that is a learned one")
    options.add_argument("--people", type=int, default=1600)
    options.add_argument(
        "--pictured", type=int, default=100, help="of them whose pictures are read; 0 makes none, and needs no ComfyUI"
    )
    options.add_argument("--photos", type=int, nargs="+", default=[1, 3], help="of each of them that are read together")
    add_option(options)
    options.add_argument("--results", type=Path, default=RESULTS)
    args = options.parse_args()
    learned = None if args.basis is None else basis_file.load(args.basis)[1]
    people = [sample_person(UNSEEN + i) for i in range(args.people)]
    targets = torch.tensor([truth(person) for person in people])
    net = hypernet_file.load(args.hypernet, learned).to(args.device)
    rows: list[dict[str, Any]] = [{"of": item} for item in ITEMS]
    tokens, columns = face_tokens(net, people, max(args.photos)), list[str]()

    def add(column: str, shares: Tensor, errors: Tensor) -> None:
        columns.append(column)
        for row, share, error in zip(rows, shares, errors, strict=True):
            row |= {column: float(share), f"{column}, error": float(error)}

    for photos in args.photos:
        for name, inputs in zip(("tokens", "prediction"), seen(net, tokens[:, :photos].flatten(1, 2)), strict=True):
            add(f"{name}, {photos} photo{'s' if photos > 1 else ''}", *explained(inputs, targets))
    if args.pictured:
        studio = Studio.open(None, RUNS / "host", Sampling(), args.device)
        readings = pictured(studio, args.hypernet.resolve(), Judge.load("a"), people[: args.pictured])
        add("pictures, 1 photo", *correlated(readings, targets[: args.pictured]))
    lines = ["| of, % | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for row in rows:
        shares = (percent(row[column], row[f"{column}, error"]) for column in columns)
        lines.append(f"| {row['of'].replace('_', ' ')} | " + " | ".join(shares) + " |")
    lines += ["", f"Made on: {', '.join(made_on(args.device).values())}."]
    write_json(args.results / "probe.json", rounded(rows))
    write_text(args.results / "probe.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
