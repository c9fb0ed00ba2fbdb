"""What a judge reads off the VAE and the base that check 2 has trained: words of the prompts, and the variety of faces.

Pictures are drawn by diffusers' DPM++ 2M with the settings of ``bench base``, in large batches: the stock KSampler's
scores come later, from ``bench base``. The second judge sees nothing yet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny
from PIL import Image

from benchmarks.base import Asked, context_prompts, identity_prompts, pair_prompts, shares_right, spread, style_prompts
from miniature.base import Base, load_base, sample
from miniature.drawing import photo
from miniature.judge import ATTRIBUTES, Judge, Readings, true_readings
from miniature.people import SPLITS, STYLES, sample_context, sample_person
from miniature.scores import shown
from miniature.text import load_tokenizer, tokenize
from miniature.vae import encode, load_vae, to_pictures

from ..common.studio import Sampling
from .part import Part
from .trained import BASE, VAE

BATCH = 256
SAMPLING = Sampling()


class Painter:
    """Base and VAE on a device, and the steps of the sampler."""

    def __init__(self, base: Base, vae: AutoencoderTiny, scale: float, steps: int) -> None:
        self.steps = steps
        self.base, self.vae, self.scale, self.tokenizer = base, vae, scale, load_tokenizer()
        self.device = next(vae.parameters()).device
        self.generator = torch.Generator(self.device).manual_seed(0)

    @torch.no_grad()
    def pictures(self, texts: Sequence[str], cfg: float = SAMPLING.cfg, squares: int = 1) -> np.ndarray:
        """uint8 (N, 128, 128 * squares, 3), a picture of each text."""
        made = []
        for first in range(0, len(texts), BATCH):
            tokens = tokenize(self.tokenizer, list(texts[first : first + BATCH])).to(self.device)
            latents = sample(self.base, tokens, self.generator, self.steps, cfg, squares)
            made.append(self.decoded(latents * self.scale))
        return np.concatenate(made)

    @torch.no_grad()
    def decoded(self, raw: torch.Tensor) -> np.ndarray:
        """Pictures of raw latents."""
        return to_pictures(self.vae.decoder(raw.to(next(self.vae.parameters()).dtype)))


def all_shown(readings: Readings, asked: Sequence[Asked]) -> float:
    """Share of pictures with everything that is prompted."""
    return float(np.mean([all(row.values()) for row in shown(readings, [one.expected for one in asked])]))


def reconstructions(part: Part, painter: Painter, judge: Judge, count: int) -> None:
    """Points that a judge loses on pictures that went through the VAE."""
    subjects = [(sample_person(seed), sample_context(seed, "photo")) for seed in SPLITS["dev"][:count]]
    drawn, truth = np.stack([photo(*one) for one in subjects]), true_readings(subjects)
    plain, coded = judge.read(drawn), judge.read(painter.decoded(encode(painter.vae, drawn)))
    lost = {name: float((plain.index(name) == truth.index(name)).mean() - (coded.index(name) == truth.index(name)).mean())
            for name in ATTRIBUTES}  # fmt: skip
    part.add("VAE, points lost", **{name: 100 * value for name, value in lost.items()}, pictures=count)


def words(part: Part, painter: Painter, judge: Judge, seeds: Sequence[int]) -> list[np.ndarray]:
    """Whether pictures show what is prompted; some of them."""
    some = []
    groups: Mapping[str, Sequence[Asked]] = {
        "context": context_prompts(seeds),
        "identity": identity_prompts(seeds),
        "style": style_prompts(seeds),
    }
    for group, asked in groups.items():
        pictures = painter.pictures([one.text for one in asked])
        readings = judge.read(pictures)
        part.add(group, all_words=all_shown(readings, asked), **shares_right(readings, asked), pictures=len(asked))
        for style in STYLES[1:] if group == "style" else ():
            rows = np.array([one.expected["style"] == style for one in asked])
            own = [one for one in asked if one.expected["style"] == style]
            part.add(style, **shares_right(readings[rows], own), pictures=len(own))
        some.append(pictures[:8])
    pairs = pair_prompts(seeds[: len(seeds) // 2])
    wide = painter.pictures([left.text for left, _ in pairs], squares=2)
    for side, half, asked in zip(
        ("left half", "right half"), np.split(wide, 2, 2), zip(*pairs, strict=True), strict=True
    ):
        readings = judge.read(np.ascontiguousarray(half))
        part.add(side, all_words=all_shown(readings, asked), **shares_right(readings, asked), pictures=len(asked))
    return [
        *some,
        np.concatenate([half for pair in wide[:4] for half in np.split(pair, 2, 1)]).reshape(-1, 128, 128, 3),
    ]


def faces(part: Part, painter: Painter, judge: Judge, count: int) -> list[np.ndarray]:
    """Whether unprompted faces are as varied as the data."""
    some = []
    for cfg in (SAMPLING.cfg, 1.0):
        pictures = painter.pictures(["a face"] * count, cfg)
        part.add(f"a face, cfg {cfg:g}", **spread(judge.read(pictures)), pictures=count)
        some.append(pictures[:8])
    return some


def sheet(rows: Sequence[np.ndarray], path: Path) -> None:
    """Rows of pictures as one PNG."""
    width = max(map(len, rows))
    padded = [np.pad(row, ((0, width - len(row)), *[(0, 0)] * 3)) for row in rows]
    Image.fromarray(np.concatenate([np.concatenate(list(row), 1) for row in padded])).save(path)


def main() -> None:
    part, _ = Part.from_arguments(__doc__)
    count, steps = (4, 2) if part.toy else (240, SAMPLING.steps)
    vae, scale = load_vae(VAE.found(), part.device)
    painter = Painter(load_base(BASE.found(), part.device), vae, scale, steps)
    judge, rows = Judge.load("a"), list[np.ndarray]()
    with part.attempt("VAE"):
        reconstructions(part, painter, judge, 2 * count)
    with part.attempt("words"):
        rows += words(part, painter, judge, SPLITS["dev"][:count])
    with part.attempt("faces"):
        rows += faces(part, painter, judge, 2 * count)
    with part.attempt("sheet"):
        sheet(rows, BASE.path.parent / "scores.png")


if __name__ == "__main__":
    main()
