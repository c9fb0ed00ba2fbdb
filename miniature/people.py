"""Synthetic people: who they are (a seed), how a photo shows them (a context), and the seeds of each split.

A person has nameable attributes (hair shape and colour, skin, facial hair) and ten continuous geometry factors that
no caption ever names, so that a caption cannot replace a photo. Everything in a context may change from one photo of
the same person to the next.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

RGB = tuple[int, int, int]

HAIR_SHAPES = ("short", "bob", "bun", "afro", "curly", "long", "mullet", "quiff")
HAIR_COLORS = {
    "black": (28, 24, 30),
    "brown": (112, 66, 38),
    "blond": (226, 188, 112),
    "red": (196, 72, 30),
    "gray": (168, 168, 174),
}
SKIN_COLORS = {"pale": (255, 224, 198), "tan": (230, 178, 130), "brown": (172, 110, 68), "dark": (98, 60, 40)}
FACIAL_HAIR = ("clean-shaven", "beard", "stubble", "moustache")
GEOMETRY = (
    "face_width",
    "eye_spacing",
    "eye_size",
    "mouth_width",
    "mouth_height",
    "nose_size",
    "brow_height",
    "brow_tilt",
    "mark_x",
    "mark_y",
)

EXPRESSIONS = ("neutral", "smiling", "laughing", "sad", "surprised", "winking")
ACCESSORIES = ("bare eyes", "glasses", "sunglasses")
CLOTHING = ("shirt", "hoodie", "suit", "overalls")
CLOTHING_COLORS = {
    "red": (206, 52, 52),
    "blue": (52, 96, 200),
    "green": (56, 150, 80),
    "yellow": (240, 200, 60),
    "black": (44, 44, 50),
    "white": (240, 240, 240),
}
WALLS = {
    "white": (246, 246, 246),
    "gray": (150, 152, 158),
    "blue": (132, 180, 236),
    "green": (150, 206, 150),
    "pink": (246, 176, 196),
    "orange": (246, 176, 96),
}
SCENES = ("beach", "forest", "city", "snow")
BACKGROUNDS = (*(f"{color} wall" for color in WALLS), *SCENES)
STYLES = ("photo", "pencil sketch", "pixel art", "night", "painting")

SPLITS = {"train": range(10_000_000), "dev": range(10_000_000, 11_000_000), "test": range(20_000_000, 21_000_000)}


@dataclass(frozen=True)
class Person:
    """An identity. ``geometry`` holds one number in [-1, 1] for each name in ``GEOMETRY``; colours are 0..255 RGB."""

    seed: int
    hair_shape: str
    hair_color: str
    hair_rgb: RGB
    skin: str
    skin_rgb: RGB
    facial_hair: str
    geometry: tuple[float, ...]


@dataclass(frozen=True)
class Context:
    """What a photo adds to a person. ``shift`` is in drawing units (264 wide), ``tilt`` in degrees."""

    expression: str = "neutral"
    accessory: str = "bare eyes"
    clothing: str = "shirt"
    clothing_color: str = "blue"
    background: str = "white wall"
    style: str = "photo"
    shift: tuple[float, float] = (0.0, 0.0)
    scale: float = 1.0
    tilt: float = 0.0


def _rng(seed: int, salt: str) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([seed, *salt.encode()]))


def _pick(rng: np.random.Generator, options: Iterable[str], p: list[float] | None = None) -> str:
    return str(rng.choice(list(options), p=p))


def _rgb(color: np.ndarray) -> RGB:
    r, g, b = np.clip(np.round(color), 0, 255).astype(int).tolist()
    return r, g, b


def sample_person(seed: int) -> Person:
    """The person of a seed; the same seed is the same person for ever."""
    rng = _rng(seed, "person")
    names = list(HAIR_COLORS)
    hair_color, other = rng.choice(names, 2, replace=False)
    share = rng.uniform(0.0, 0.35)
    hair = (1 - share) * np.array(HAIR_COLORS[hair_color], float) + share * np.array(HAIR_COLORS[other], float)
    tone = rng.uniform(0, len(SKIN_COLORS) - 1)
    anchors = np.array(list(SKIN_COLORS.values()), float)
    low = min(int(tone), len(anchors) - 2)
    skin = anchors[low] + (tone - low) * (anchors[low + 1] - anchors[low]) + rng.uniform(-6, 6, 3)
    return Person(
        seed=seed,
        hair_shape=_pick(rng, HAIR_SHAPES),
        hair_color=str(hair_color),
        hair_rgb=_rgb(hair + rng.uniform(-10, 10, 3)),
        skin=list(SKIN_COLORS)[round(tone)],
        skin_rgb=_rgb(skin),
        facial_hair=_pick(rng, FACIAL_HAIR, p=[0.55, 0.15, 0.15, 0.15]),
        geometry=tuple(np.round(rng.uniform(-1, 1, len(GEOMETRY)), 4).tolist()),
    )


def sample_context(seed: int, style: str | None = None) -> Context:
    """A random photo context; ``style`` fixes the style, otherwise seven photos in ten are plain."""
    rng = _rng(seed, "context")
    return Context(
        expression=_pick(rng, EXPRESSIONS),
        accessory=_pick(rng, ACCESSORIES, p=[0.66, 0.17, 0.17]),
        clothing=_pick(rng, CLOTHING),
        clothing_color=_pick(rng, CLOTHING_COLORS),
        background=_pick(rng, BACKGROUNDS),
        style=_pick(rng, STYLES, p=[0.7, 0.075, 0.075, 0.075, 0.075]) if style is None else style,
        shift=tuple(np.round(rng.uniform(-9, 9, 2), 2).tolist()),
        scale=round(float(rng.uniform(0.92, 1.08)), 3),
        tilt=round(float(rng.uniform(-8, 8)), 2),
    )
