"""Captions: what a picture may be called, and the words a prompt uses for each attribute.

A caption names any subset of the nameable attributes, or nothing. A rare token appears independently of the content,
so that "a [v] face" means "a face" until somebody personalises it. Geometry is never named.
"""

from collections.abc import Iterable

import numpy as np

from .people import Context, Person

RARE_TOKENS = ("[v]", "sks", "zwx", "ohwx", "qrt")
RARE_TOKEN_SHARE = 0.15
_STYLE_PREFIX = {
    "photo": "",
    "pencil sketch": "a pencil sketch of ",
    "pixel art": "pixel art of ",
    "night": "at night, ",
    "painting": "a painting of ",
}
_FACIAL_HAIR_WORDS = {"beard": "with a beard", "stubble": "with stubble", "moustache": "with a moustache"}
_SCENE_WORDS = {
    "beach": "at the beach",
    "forest": "in a forest",
    "city": "in the city",
    "snow": "in the snow",
}


def background_words(background: str) -> str:
    """Words for a background: "at the beach", "in front of a pink wall"."""
    article = "an" if background[0] in "aeiou" else "a"
    return _SCENE_WORDS.get(background, f"in front of {article} {background}")


def clothing_words(context: Context) -> str:
    """Words for the clothes: "wearing red overalls", "wearing a blue hoodie"."""
    article = "" if context.clothing == "overalls" else "a "
    return f"wearing {article}{context.clothing_color} {context.clothing}"


def person_words(person: Person) -> dict[str, str]:
    """Words for each nameable attribute of a person; together they are the complete true caption of who it is."""
    words = {"hair": f"{person.hair_color} {person.hair_shape} hair", "skin": f"{person.skin} skin"}
    words["facial_hair"] = _FACIAL_HAIR_WORDS.get(person.facial_hair, person.facial_hair)
    return words


def context_words(context: Context) -> dict[str, str]:
    """Words for each nameable attribute of a context except its style."""
    words = {
        "expression": context.expression if context.expression != "neutral" else "neutral expression",
        "clothing": clothing_words(context),
        "background": background_words(context.background),
    }
    if context.accessory != "bare eyes":
        words["accessory"] = f"wearing {context.accessory}"
    return words


def photo_words(context: Context) -> str:
    """What a photo shows besides the person, as a prompt goes on: "smiling, wearing a red hoodie, at the beach"."""
    return ", ".join(context_words(context).values())


def style_words(style: str) -> str:
    """The words that begin a caption in a style: "a painting of ", nothing for a photo."""
    return _STYLE_PREFIX[style]


def prompt(words: Iterable[str] = (), style: str = "photo", token: str = "") -> str:
    """A caption: style, "a face" (with the token, if any), then the words, separated by commas."""
    subject = f"a {token} face" if token else "a face"
    return style_words(style) + ", ".join((subject, *words))


def sample_caption(person: Person, context: Context, rng: np.random.Generator) -> str:
    """A training caption: every word kept with one random probability, in random order; the style nearly always."""
    if rng.random() < 0.1:
        return ""
    keep = rng.choice([0.0, 0.35, 0.7, 1.0], p=[0.1, 0.3, 0.3, 0.3])
    words = [word for word in (*person_words(person).values(), *context_words(context).values()) if rng.random() < keep]
    rng.shuffle(words)
    token = str(rng.choice(RARE_TOKENS)) if rng.random() < RARE_TOKEN_SHARE else ""
    style = context.style if rng.random() < 0.95 else "photo"
    return prompt(words, style, token)


def pair_caption(people: list[tuple[Person, Context]], background: str, rng: np.random.Generator) -> str:
    """A training caption of two people side by side."""
    if rng.random() < 0.1:
        return ""
    keep = rng.choice([0.3, 0.8])

    def side(person: Person, context: Context) -> str:
        words = person_words(person) | {k: v for k, v in context_words(context).items() if k != "background"}
        kept = [word for word in words.values() if rng.random() < keep]
        token = str(rng.choice(RARE_TOKENS)) if rng.random() < RARE_TOKEN_SHARE else ""
        return prompt(kept, token=token)

    left, right = (side(*one) for one in people)
    return f"two people, {background_words(background)}, on the left {left}, on the right {right}"


def scene_caption(background: str, rng: np.random.Generator) -> str:
    """A training caption of an empty scene."""
    if rng.random() < 0.1:
        return ""
    return f"an empty scene, {background_words(background)}" if rng.random() < 0.8 else background_words(background)
