"""Whom a benchmark is about: a person, the one photo given, and the prompts that the person is judged with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from miniature.drawing import photo
from miniature.people import Context, Person
from miniature.prompts import EvaluationPrompt, evaluation_photo, evaluation_prompts

CLASS_PROMPT = "a face"


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

    @cached_property
    def renders(self) -> np.ndarray:
        """True pictures of the person in the prompted contexts, uint8 (prompts, 128, 128, 3)."""
        return np.stack([photo(self.person, prompt.context) for prompt in self.prompts])
