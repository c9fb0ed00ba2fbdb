"""The training pictures of the miniature, rendered once into memory-mapped files: ``python -m miniature.pictures``.

Picture i is a function of i alone: of every 25, two show a pair of people (two squares wide), one an empty scene.
Single squares and pairs are stored apart because their shapes differ.
"""

import argparse
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from hdb_core.files.atomic import replacing

from .captions import pair_caption, sample_caption, scene_caption
from .drawing import draw, photo
from .people import BACKGROUNDS, SPLITS, STYLES, Context, Person, sample_context, sample_person

CHUNK = 500
PERIOD = 25


def is_pair(index: int) -> bool:
    """Whether training picture ``index`` shows two people, side by side."""
    return index % PERIOD in (8, 16)


def subject(index: int) -> tuple[list[tuple[Person, Context]], str]:
    """Who training picture ``index`` shows, left to right, and the background of a pair or an empty scene."""
    rng = np.random.Generator(np.random.PCG64([index, *b"picture"]))
    seed = SPLITS["train"][2 * index]
    background = str(rng.choice(list(BACKGROUNDS)))
    style = str(rng.choice(list(STYLES), p=[0.7, 0.075, 0.075, 0.075, 0.075]))
    if is_pair(index):
        return [(sample_person(seed + i), sample_context(seed + i)) for i in range(2)], background
    if index % PERIOD == 24:
        return [], background
    return [(sample_person(seed), sample_context(seed, style))], background


def training_picture(index: int, render: bool = True, draw_index: int = 0) -> tuple[np.ndarray | None, str]:
    """Training picture ``index`` and a caption of it; the caption alone where ``render`` is False.

    Args:
        index: which picture.
        render: whether to draw it.
        draw_index: which of its many captions; the picture does not depend on it.

    Returns:
        uint8 RGB (128, 128, 3), or (128, 256, 3) for a pair; caption.
    """
    words = np.random.Generator(np.random.PCG64([index, draw_index, *b"caption"]))
    people, background = subject(index)
    if not people:
        return (draw([], background) if render else None), scene_caption(background, words)
    if len(people) == 2:
        return (draw(people, background) if render else None), pair_caption(people, background, words)
    return (photo(*people[0]) if render else None), sample_caption(*people[0], words)


def _render_chunk(folder: Path, chunk: int) -> int:
    singles = folder / f"singles_{chunk:04}.npy"
    if not singles.exists():
        pictures = [training_picture(i)[0] for i in range(chunk * CHUNK, (chunk + 1) * CHUNK)]
        for name, wide in (("pairs", True), ("singles", False)):
            stack = np.stack([p for p in pictures if (p.shape[1] == 256) == wide])
            with replacing(folder / f"{name}_{chunk:04}.npy") as partial, partial.open("wb") as file:
                np.save(file, stack)
    return chunk


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(".runs/pictures"))
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(args.workers) as pool:
        chunks = range(args.count // CHUNK)
        for done, _ in enumerate(pool.map(_render_chunk, [args.folder] * len(chunks), chunks), 1):
            print(f"{done * CHUNK} / {args.count} pictures", flush=True)


if __name__ == "__main__":
    main()
