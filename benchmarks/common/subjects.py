"""Whom a benchmark is about: a person, the one photo given, and the prompts that the person is judged with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from miniature.drawing import photo
from miniature.people import Context, Person
from miniature.photos import photo_context
from miniature.prompts import EvaluationPrompt, evaluation_photo, evaluation_prompts

CLASS_PROMPT = "a face"
FIRST_OTHER_PHOTO = 10  # of a person's contexts; the folders that hypernetworks are trained on hold those before it


@dataclass(frozen=True)
class Subject:
    """One person of a benchmark; ``short`` is the short evaluation."""

    seed: int
    short: bool = False

    @cached_property
    def _shown(self) -> tuple[Person, Context]:
        return evaluation_photo(self.seed)

    @property
    def person(self) -> Person:
        return self._shown[0]

    @property
    def context(self) -> Context:
        """Of the photo."""
        return self._shown[1]

    @cached_property
    def prompts(self) -> list[EvaluationPrompt]:
        return evaluation_prompts(*self._shown, short=self.short)

    @cached_property
    def photo(self) -> np.ndarray:
        """uint8 (128, 128, 3)."""
        return photo(*self._shown)

    def contexts(self, count: int) -> list[Context]:
        """Of the photo, and of others of the person, each of its own, eyes never covered."""
        others = [photo_context(self.seed, FIRST_OTHER_PHOTO + i) for i in range(count - 1)]
        bare = [replace(c, accessory="bare eyes") if c.accessory == "sunglasses" else c for c in others]
        return [self.context, *bare]

    def photos(self, count: int) -> np.ndarray:
        """The photo and others of the person, in their `contexts`: uint8 (count, 128, 128, 3)."""
        return np.stack([photo(self.person, context) for context in self.contexts(count)])

    @cached_property
    def renders(self) -> np.ndarray:
        """True pictures of the person in the prompted contexts, uint8 (prompts, 128, 128, 3)."""
        return np.stack([photo(self.person, prompt.context) for prompt in self.prompts])
