"""Photos of synthetic people as a folder that the training of the hypernetwork reads: ``python -m miniature.photos``.

A sub-folder a person, a photo a file, and beside it the words that are true of that photo and not of the person. The
first is a portrait, in the same pose and context for everybody; the others have contexts of their own. People come from
the upper half of the training split, whom the base has never drawn.
"""

import argparse
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from hdb_core.train.data.photos import MASK

from .captions import photo_words
from .drawing import face_mask, head_mask, photo
from .people import SPLITS, Context, sample_context, sample_person

FIRST = SPLITS["train"][len(SPLITS["train"]) // 2]
MASKS = {"head": head_mask, "face": face_mask}
PHOTOS_OF_A_PERSON = 100  # seeds of contexts kept apart for each person


def photo_context(seed: int, index: int) -> Context:
    """The context of photo ``index`` of a person; that of the portrait is everybody's."""
    if index == 0:
        return Context()
    return sample_context(PHOTOS_OF_A_PERSON * seed + index, style="photo")


def training_photo(seed: int, index: int) -> np.ndarray:
    """Photo ``index`` of a person, as `write_person` writes it: uint8 RGB (128, 128, 3)."""
    return photo(sample_person(seed), photo_context(seed, index))


def write_person(folder: Path, seed: int, count: int, masks: str = "") -> None:
    """Writes ``count`` photos of a person, their words, and one of `MASKS`, into a sub-folder.

    A complete one is left alone.
    """
    person, target = sample_person(seed), folder / f"{seed:08}"
    if (target / f"{count - 1}.txt").exists():
        return
    target.mkdir(exist_ok=True)
    for index in range(count):
        context = photo_context(seed, index)
        Image.fromarray(photo(person, context)).save(target / f"{index}.png")
        if masks:
            Image.fromarray(MASKS[masks](person, context)).save(target / f"{index}{MASK}")
        (target / f"{index}.txt").write_text(photo_words(context) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(".runs/people"))
    parser.add_argument("--people", type=int, default=4000)
    parser.add_argument("--after", type=int, default=0, help="so many people, whom other folders hold")
    parser.add_argument("--photos", type=int, default=4, help="of each person")
    parser.add_argument("--masks", choices=MASKS, default="", help="beside the photos: what of them is learned")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    seeds = range(FIRST + args.after, FIRST + args.after + args.people)
    with ProcessPoolExecutor(args.workers) as pool:
        write = partial(write_person, args.folder, count=args.photos, masks=args.masks)
        done = pool.map(write, seeds, chunksize=20)
        for number, _ in enumerate(done, 1):
            if number % 500 == 0 or number == len(seeds):
                print(f"{number} / {len(seeds)} people", flush=True)


if __name__ == "__main__":
    main()
