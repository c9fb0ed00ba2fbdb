"""How fast generated photos of many people are prepared, listed and read for a training, and what they take in memory.

``python dev.py bench data`` writes ``data.json`` and ``data.md`` to ``benchmarks/results/``. No model is involved.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image

from hdb_core.basis import BasisRecipe
from hdb_core.hypernet import EncoderConfig
from hdb_core.layout import Layout
from hdb_core.train.ahead import read_ahead
from hdb_core.train.data.faces import PhotoPixels
from hdb_core.train.data.groups import missing_groups
from hdb_core.train.data.people import EncodedPerson, read_people
from hdb_core.train.data.photos import Person, find_people, in_threads
from hdb_core.train.data.prepare import Checks, prepare
from hdb_core.train.turns import turns_of

from .common.bench import RESULTS
from .common.files import rounded, write_json, write_text

SIDE = 256  # pixels
PHOTOS = 2  # of each person
BATCH, STEPS = 32, 20
GROUP = 32
SHARD_BYTES = 10**8
Result = TypeVar("Result")


def write_photos(folder: Path, number: int) -> None:
    """A person's photos: smooth colours under grain, no two alike."""
    target = folder / f"{number:06}"
    target.mkdir(parents=True)
    for photo in range(PHOTOS):
        generator = torch.Generator().manual_seed(PHOTOS * number + photo)
        coarse = Image.fromarray((255 * torch.rand(6, 6, 3, generator=generator)).byte().numpy()).resize((SIDE, SIDE))
        grain = Image.fromarray((255 * torch.rand(SIDE, SIDE, generator=generator)).byte().numpy()).convert("RGB")
        Image.blend(coarse, grain, 0.1).save(target / f"{photo}.jpg", quality=90)
        (target / f"{photo}.txt").write_text("smiling, at the beach\n")


def timed(work: Callable[[], Result]) -> tuple[float, Result]:
    """Seconds, and what came out."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def list_bytes(folder: Path) -> float:
    """Memory of a folder's people as they are listed."""
    tracemalloc.start()
    try:
        people = find_people(folder)
        gc.collect()
        return tracemalloc.get_traced_memory()[0] / len(people)
    finally:
        tracemalloc.stop()


def write_latents(folder: Path, people: list[Person]) -> None:
    """What precompute writes of them for SD 1.5, with random latents."""
    latents = torch.randn(GROUP * PHOTOS, 4, 64, 64).half()
    for group in missing_groups(folder, people, {"fit": None}, GROUP):
        count = len(group.people)
        group.write({"latents": latents[: count * PHOTOS], "counts": torch.full((count,), PHOTOS)})


def read_steps(people: list[EncodedPerson]) -> None:
    """What steps of a training read: a photo for the encoder and the latents of another one."""
    faces, counts = PhotoPixels(EncoderConfig()), [len(person.latents) for person in people]

    def read(step: int) -> None:
        turns = turns_of(step, counts, BATCH, 0)[0]
        faces.read([(people[turn.person].person, turn.seen[0]) for turn in turns])
        torch.stack([people[turn.person].latents[turn.denoised].float() for turn in turns])

    for _ in read_ahead(read, range(STEPS)):
        pass


def measure(count: int, work: Path) -> dict[str, Any]:
    """Everything, for so many people."""
    source, latents = work / "source", work / "latents"
    in_threads(partial(write_photos, source), range(count))
    found: dict[str, Any] = {"people": count, "photos": PHOTOS * count, "cores": len(os.sched_getaffinity(0))}
    for form, size in (("folder", 0), ("shards", SHARD_BYTES)):
        into = work / form
        seconds, counted = timed(partial(prepare, source, into, Checks(SIDE, SIDE), shard_bytes=size))
        listing, people = timed(partial(find_people, into / "photos"))
        if not latents.exists():
            write_latents(latents, people)
        encoded = list(read_people(latents, people, BasisRecipe(), Layout("sd1", ())))
        reading, _ = timed(partial(read_steps, encoded))
        found[form] = {
            "kept": counted["kept"], "files": sum(1 for path in (into / "photos").rglob("*") if path.is_file()),
            "prepared a second": found["photos"] / seconds, "seconds to list": listing,
            "bytes a person listed": list_bytes(into / "photos"),
            "samples read a second": BATCH * STEPS / reading,
        }  # fmt: skip
    found["bytes of latents a person"] = sum(path.stat().st_size for path in latents.iterdir()) / count
    return found


def text_of(found: dict[str, Any]) -> str:
    """The Markdown report."""
    rows = [f"| {name} | {found['folder'][name]:,} | {found['shards'][name]:,} |" for name in found["folder"]]
    head = (
        f"{found['people']:,} people with {PHOTOS} generated photos of {SIDE} × {SIDE} pixels each, on {found['cores']} cores "
        "that other work shared: the rates are the least to expect."
    )
    tail = (
        f"Latents on disk take {found['bytes of latents a person']:,} bytes a person. A training maps these files and reads "
        "what a step needs, so its own memory grows only by what is listed of a person."
    )
    return "\n".join([head, "", "| | folders | shards |", "|---|---:|---:|", *rows, "", tail, ""])


def main() -> None:
    options = argparse.ArgumentParser(
        prog="dev.py bench data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--people", type=int, default=10_000)
    options.add_argument("--results", type=Path, default=RESULTS)
    args = options.parse_args()
    with tempfile.TemporaryDirectory() as work:
        found = rounded(measure(args.people, Path(work)))
    text = text_of(found)
    print(text)
    write_json(args.results / "data.json", found)
    write_text(args.results / "data.md", text)


if __name__ == "__main__":
    main()
