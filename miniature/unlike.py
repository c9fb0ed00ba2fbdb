"""How often the shipped hypernetwork says that a photo is unlike those it was trained on: ``python -m miniature.unlike``.

Photos of people it has not seen, near misses of them, pictures of other kinds, and photographs of a folder.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from hdb_core.files import hypernet as hypernet_file
from hdb_core.hypernet import HyperNet, preprocess

from .checkpoint import HYPERNET_FILE
from .drawing import draw, photo
from .people import BACKGROUNDS, SPLITS, STYLES, Context, Person, sample_context, sample_person

WEIGHTS = Path(__file__).parent.parent / "weights"
SIDE = 128  # pixels of the pictures


def kinds(count: int, photographs: Path | None) -> Iterator[tuple[str, list[np.ndarray]]]:
    """Name and pictures, uint8 RGB, of each kind; ``count`` pictures of most."""
    shown = [(sample_person(seed), sample_context(seed, "photo")) for seed in SPLITS["test"][:count]]
    pictures = [photo(*one) for one in shown]
    yield "people it has not seen", pictures
    for style in STYLES[1:]:
        yield f"style: {style}", _changed(shown, style=style)
    yield "off centre by an eighth", _changed(shown, shift=(30.0, 0.0))
    yield "off centre by a quarter", _changed(shown, shift=(60.0, 0.0))
    yield "half as large", _changed(shown, scale=0.5)
    yield "half larger", _changed(shown, scale=1.5)
    yield "cut off above", _changed(shown, shift=(0.0, -90.0))
    yield "on its side", [np.rot90(picture).copy() for picture in pictures]
    pairs = [draw([one, other], one[1].background) for one, other in zip(shown, shown[::-1], strict=True)]
    yield "two faces in a square, squeezed", [np.asarray(Image.fromarray(pair).resize((SIDE, SIDE))) for pair in pairs]
    yield "two faces, the middle", [pair[:, SIDE // 2 : -SIDE // 2] for pair in pairs]
    yield "grey", [np.asarray(Image.fromarray(picture).convert("L").convert("RGB")) for picture in pictures]
    yield "no one", [draw([], background) for background in BACKGROUNDS]
    noise = np.random.default_rng(0)
    yield "noise", [noise.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8) for _ in range(count)]
    if photographs is not None:
        yield "photographs", [_photograph(path) for path in sorted(photographs.iterdir())]


def _changed(shown: list[tuple[Person, Context]], **changes: object) -> list[np.ndarray]:
    return [photo(person, replace(context, **changes)) for person, context in shown]


def _photograph(path: Path) -> np.ndarray:
    with Image.open(path) as file:
        return np.asarray(ImageOps.fit(ImageOps.exif_transpose(file).convert("RGB"), (SIDE, SIDE)))


@torch.no_grad()
def unlike(net: HyperNet, pictures: list[np.ndarray]) -> torch.Tensor:
    """`HyperNet.unlike` of pictures."""
    pixels = torch.stack([torch.from_numpy(picture.copy()).float() / 255 for picture in pictures])
    parts = [net.unlike(preprocess(some, net.config.encoder)) for some in pixels.split(50)]
    return torch.cat(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--photographs", type=Path, help="a folder of pictures")
    parser.add_argument("--hypernet", type=Path, default=WEIGHTS / HYPERNET_FILE)
    args = parser.parse_args()
    net = hypernet_file.load(args.hypernet)
    print("| pictures | number | unlike |\n| --- | ---: | ---: |")
    for name, pictures in kinds(args.count, args.photographs):
        share = (unlike(net, pictures) > 1).float().mean()
        print(f"| {name} | {len(pictures)} | {share:.0%} |", flush=True)


if __name__ == "__main__":
    main()
