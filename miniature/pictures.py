"""The training pictures of the miniature, rendered once into memory-mapped files: ``python -m miniature.pictures``.

Picture i is a function of i alone: of every 25, two show a pair of people (two squares wide), one an empty scene.
Single squares and pairs are stored apart because their shapes differ, each with several captions as tokens. Trainings
read the folder while it grows.
"""

import argparse
import os
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import repeat
from pathlib import Path

import numpy as np

from devtools.device import cores

from .captions import pair_caption, sample_caption, scene_caption
from .drawing import draw, photo
from .people import BACKGROUNDS, SPLITS, STYLES, Context, Person, sample_context, sample_person

CHUNK = 250
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
    picture, captions = captioned_picture(index, render, range(draw_index, draw_index + 1))
    return picture, captions[0]


def captioned_picture(index: int, render: bool, draws: range) -> tuple[np.ndarray | None, list[str]]:
    """Training picture ``index`` as in `training_picture`, and several of its captions."""
    people, background = subject(index)
    streams = [np.random.Generator(np.random.PCG64([index, draw, *b"caption"])) for draw in draws]
    if not people:
        return (draw([], background) if render else None), [scene_caption(background, words) for words in streams]
    if len(people) == 2:
        captions = [pair_caption(people, background, words) for words in streams]
        return (draw(people, background) if render else None), captions
    return (photo(*people[0]) if render else None), [sample_caption(*people[0], words) for words in streams]


def chunk_indices(chunk: int, pairs: bool, size: int = CHUNK) -> list[int]:
    """The picture indices behind the rows of a chunk file."""
    return [i for i in range(chunk * size, (chunk + 1) * size) if is_pair(i) == pairs]


def chunk_paths(folder: Path, chunk: int, pairs: bool) -> tuple[Path, Path]:
    """The files of a chunk: pictures, uint8 (N, 128, 128 or 256, 3), and tokens, uint16 (N, captions, 77)."""
    name = f"{'pairs' if pairs else 'singles'}_{chunk:04}.npy"
    return folder / name, folder / f"tokens_{name}"


def drawn_chunks(folder: Path) -> list[int]:
    """The chunks that are complete, ascending."""
    return sorted(int(path.stem.split("_")[1]) for path in folder.glob("singles_*.npy"))


@cache
def _tokenizer() -> "CLIPTokenizer":  # noqa: F821 - what a process that draws no captions does not load
    from .text import load_tokenizer

    return load_tokenizer()


def _render_chunk(folder: Path, chunk: int, captions: int, size: int = CHUNK) -> int:
    if chunk_paths(folder, chunk, False)[0].exists():
        return chunk
    for pairs in (True, False):  # the file that tells of the chunk is the last
        drawn = [captioned_picture(i, True, range(captions)) for i in chunk_indices(chunk, pairs, size)]
        pictures, tokens = chunk_paths(folder, chunk, pairs)
        if captions:
            from .text import tokenize

            told = tokenize(_tokenizer(), [caption for _, own in drawn for caption in own])
            save_array(tokens, told.reshape(len(drawn), captions, -1).numpy().astype(np.uint16))
        save_array(pictures, np.stack([picture for picture, _ in drawn]))
    return chunk


def save_array(path: Path, array: np.ndarray) -> None:
    """Writes an array whole or not at all; unlike `replacing` it does not wait for the disk, for it can be drawn again."""
    partial = path.with_suffix(f".{os.getpid()}")
    with partial.open("wb") as file:
        np.save(file, array)
    partial.rename(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(".runs/pictures"))
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--captions", type=int, default=8, help="of each picture (default: %(default)s)")
    parser.add_argument("--chunk", type=int, default=CHUNK, help="pictures in a file (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=cores())
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(args.workers) as pool:
        chunks = range(args.count // args.chunk)
        for done, _ in enumerate(
            pool.map(_render_chunk, repeat(args.folder), chunks, repeat(args.captions), repeat(args.chunk)), 1
        ):
            print(f"{done * args.chunk} / {args.count} pictures", flush=True)


if __name__ == "__main__":
    main()
