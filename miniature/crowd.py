"""Drawn people for the training of the predictor, new ones as it runs: ``python -m miniature.crowd`` draws them into files.

Each has several photos with their words and their masks. A file holds a group of people; a training takes up whatever
is drawn. Of the drawing it knows pictures, words, masks, and which photos are of one person.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from devtools.device import cores
from hdb_core.hypernet import EncoderConfig, preprocess
from hdb_core.train.data.people import EncodedPerson
from hdb_core.train.data.photos import Person, Photo

from .captions import photo_words
from .drawing import face_mask, photo
from .people import sample_person
from .photos import FIRST, photo_context
from .pictures import save_array
from .pool import LOOK_EVERY, Rows

GROUP = 32
PHOTOS = 4
MASK_SIZE = 16  # of the latents
AT_ONCE = 8  # photos that are encoded; more are slower on a CPU


def draw_group(folder: Path, number: int) -> int:
    """Draws a group of people into ``people_00000.npy``, ``masks_00000.npy`` and ``words_00000.json``; its number."""
    target = folder / f"people_{number:05}.npy"
    if target.exists():
        return number
    pixels, masks, words = [], [], []
    for seed in range(FIRST + number * GROUP, FIRST + (number + 1) * GROUP):
        person, contexts = sample_person(seed), [photo_context(seed, index) for index in range(PHOTOS)]
        pixels.append([photo(person, context) for context in contexts])
        masks.append([face_mask(person, context, MASK_SIZE) for context in contexts])
        words.append([photo_words(context) for context in contexts])
    (folder / f"words_{number:05}.json").write_text(json.dumps(words), encoding="utf-8")
    save_array(folder / f"masks_{number:05}.npy", np.array(masks))
    save_array(target, np.array(pixels))  # the file that tells of the group is the last
    return number


class DrawnPhoto(Photo):
    """A photo whose mask is in memory."""

    def __init__(self, words: str, white: Tensor) -> None:
        super().__init__(Path(), words, Path())
        object.__setattr__(self, "_white", white)

    def region(self, height: int, width: int) -> Tensor:
        """As `Photo.region`, at the size of the latents."""
        if self._white.shape[-2:] != (height, width):
            raise ValueError(f"masks are of {tuple(self._white.shape[-2:])}, asked for {(height, width)}")
        return self._white


class Crowd:
    """Everybody who has been drawn so far.

    Args:
        folder: of `draw_group`.
        encode: from pixels (N, 3, H, W) in 0..1 to latents (N, C, h, w).
        device: that keeps the photos.
        most: people who are kept.
        encoded: photos of each that latents are made of, the portrait first.

    Attributes:
        people: in the order in which they were taken up; it grows.
        augments: photos are read as they are.
    """

    augments = False

    def __init__(
        self, folder: Path, encode: Callable[[Tensor], Tensor], device: torch.device, most: int = 200_000,
        encoded: int = PHOTOS,
    ) -> None:  # fmt: skip
        self.folder, self.encode, self.device, self.most, self.encoded = folder, encode, device, most, encoded
        self.people: list[EncodedPerson] = []
        self._pixels, self._taken, self._next = Rows(), set[Path](), list[Path]()
        self._looked = -LOOK_EVERY

    def grow(self, groups: int = 1) -> list[EncodedPerson]:
        """Takes up at most so many new groups; who they are."""
        if time.monotonic() - self._looked > LOOK_EVERY and not self._next:
            self._looked = time.monotonic()
            self._next = sorted(set(self.folder.glob("people_*.npy")) - self._taken)
        new: list[EncodedPerson] = []
        while self._next and groups > 0 and len(self.people) + len(new) < self.most:
            path = self._next.pop(0)
            self._taken.add(path)
            new += self._read(path)
            groups -= 1
        self.people += new
        return new

    @torch.no_grad()
    def _read(self, path: Path) -> list[EncodedPerson]:
        pixels = torch.from_numpy(np.load(path)).to(self.device)
        masks = torch.from_numpy(np.load(path.with_name(path.name.replace("people", "masks")))).to(self.device)
        words = json.loads(path.with_name(path.name.replace("people", "words")).with_suffix(".json").read_text())
        first = self._pixels.count // PHOTOS
        self._pixels.add(pixels.flatten(0, 1))
        shown = pixels[:, : self.encoded].flatten(0, 1).permute(0, 3, 1, 2)
        latents = torch.cat([self.encode(part.float() / 255).half() for part in shown.split(AT_ONCE)])
        latents = latents.unflatten(0, (len(pixels), -1))
        white = masks.float()[:, :, None] / 255
        white = white / white.mean((2, 3, 4), keepdim=True)
        made = []
        for index, own in enumerate(latents):
            photos = tuple(DrawnPhoto(said, region) for said, region in zip(words[index], white[index], strict=True))
            made.append(EncodedPerson(Person(str(first + index), photos), own))
        return made

    def faces(self, encoder: EncoderConfig) -> "CrowdFaces":
        """Their photos as an encoder takes them."""
        return CrowdFaces(self._pixels, encoder)


class CrowdFaces:
    """`hdb_core.train.data.faces.Faces` of people in memory."""

    augments = False

    def __init__(self, pixels: Rows, encoder: EncoderConfig) -> None:
        self._pixels, self.encoder = pixels, encoder

    def read(self, photos: Sequence[tuple[Person, int]], seeds: Sequence[int] | None = None) -> Tensor:
        """(N, 3, image_size, image_size) on the device of the pixels."""
        rows = torch.tensor([int(person.name) * PHOTOS + number for person, number in photos])
        return preprocess(self._pixels[rows].float() / 255, self.encoder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(".runs/crowd"))
    parser.add_argument("--people", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=cores())
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    groups = range(-(-args.people // GROUP))
    with ProcessPoolExecutor(args.workers) as pool:
        for done, _ in enumerate(pool.map(draw_group, repeat(args.folder), groups), 1):
            print(f"{done * GROUP} / {args.people} people", flush=True)


if __name__ == "__main__":
    main()
