"""The fixed prompts that a personalised model is evaluated with: a function of the person's seed and photo alone.

Identity is judged only on prompts that contradict the photo's expression, clothing and background, so that a model
which repeats the photo gains nothing. The kinds, in their order:

* ``bare``: "a [v] face", for leak and diversity;
* ``expression``, ``clothing``, ``background``: one thing named, for adherence and leak;
* ``plain``: all three named, twice;
* ``accessory``: all three and glasses or sunglasses, whichever the photo does not show;
* each style of ``people.STYLES``: all three and the style.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle

import numpy as np

from .captions import context_words, person_words, prompt
from .people import (
    ACCESSORIES,
    BACKGROUNDS,
    CLOTHING,
    CLOTHING_COLORS,
    EXPRESSIONS,
    SCENES,
    STYLES,
    Context,
    Person,
    sample_context,
    sample_person,
)

CONTRADICTED = ("expression", "clothing", "background")


@dataclass(frozen=True)
class EvaluationPrompt:
    """A prompt and what a right picture of it shows.

    Attributes:
        kind: see the module.
        words: the words after "a [v] face".
        expected: each attribute that the words or the style name and a picture can show, with its value.
        context: of a real photo that fulfils the prompt, posed anew; eyes are bare unless the prompt covers them.
    """

    kind: str
    words: tuple[str, ...]
    expected: Mapping[str, str] = field(hash=False)
    context: Context

    @property
    def judges_identity(self) -> bool:
        """Whether the prompt contradicts all that the photo shows besides the person."""
        return all(attribute in self.expected for attribute in CONTRADICTED)

    def text(self, token: str = "[v]", extra: Sequence[str] = ()) -> str:
        """The prompt for a rare token, or for none (""); ``extra`` words come first, such as a person's description."""
        return prompt((*extra, *self.words), self.context.style, token)


def describe(person: Person) -> tuple[str, ...]:
    """The complete true caption of who a person is: all that words can say, none of the geometry."""
    return tuple(person_words(person).values())


def evaluation_photo(seed: int) -> tuple[Person, Context]:
    """The person of a seed and the one photo given of them: a plain photo, sunglasses taken off."""
    person, context = sample_person(seed), sample_context(seed, style="photo")
    return person, replace(context, accessory="bare eyes") if context.accessory == "sunglasses" else context


def _others(rng: np.random.Generator, values: Sequence[str], shown: str) -> Iterator[str]:
    """The values that the photo does not show, in random order, for ever."""
    return cycle([str(v) for v in rng.permutation([v for v in values if v != shown])])


def evaluation_prompts(person: Person, photo: Context, short: bool = False) -> list[EvaluationPrompt]:
    """The prompts of one person and photo: 11, or the 6 of a ``short`` evaluation.

    A short one has a single changed word and a single style; which ones, goes round from seed to seed.
    """
    rng = np.random.Generator(np.random.PCG64([person.seed, *b"prompts"]))
    options = {"expression": EXPRESSIONS, "clothing": CLOTHING, "clothing_color": tuple(CLOTHING_COLORS),
               "background": BACKGROUNDS, "accessory": ACCESSORIES[1:]}  # fmt: skip
    others = {name: _others(rng, values, getattr(photo, name)) for name, values in options.items()}
    scenes = _others(rng, SCENES, photo.background)

    def build(kind: str, *named: str, style: str = "photo") -> EvaluationPrompt:
        named = (*named, "clothing_color") if "clothing" in named else named
        expected = {name: next(others[name]) for name in named}
        if style != "photo":
            # A sketch of a gray wall is one of a white wall: what a style blurs is not asked for.
            expected |= {"style": style, "background": next(scenes)}
        pose = sample_context(int(rng.integers(2**31)), style)
        shown = replace(pose, **({"accessory": "bare eyes"} | expected))
        words = context_words(shown)
        if style != "photo":
            del expected["clothing_color"]
        return EvaluationPrompt(kind, tuple(words[name] for name in named if name in words), expected, shown)

    bare = [build("bare")]
    single = [build(name, name) for name in CONTRADICTED]
    full = [build("plain", *CONTRADICTED) for _ in range(2)] + [build("accessory", *CONTRADICTED, "accessory")]
    styles = [build(style, *CONTRADICTED, style=style) for style in STYLES[1:]]
    if short:
        single, styles = [single[person.seed % len(single)]], [styles[person.seed % len(styles)]]
    return [*bare, *single, *full, *styles]
