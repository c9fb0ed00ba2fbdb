"""The settings of a fast fine-tune.

The defaults were chosen on people of the miniature, without a hypernetwork and from a prediction alike: the most identity
on prompts that contradict the photo, with prompt adherence about that of the base model. They count on `photo_words`:
without, so much freedom learns the photo's clothes and background as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ..basis import BasisRecipe
from ..diffusion import NoiseLevels
from ..errors import FinetuneError, require
from ..prompt import CLASS_PROMPT, MOST_CHARACTERS, caption, rare_token


@dataclass(frozen=True)
class FinetuneConfig:
    """Settings of one fine-tune.

    Attributes:
        steps: optimiser steps; 0 ends when what `recommended.RECOMMENDED` says is learned.
        rank: of the result, or that of the given LiDB if it is higher; columns beyond the given LiDB's rank start with
            no effect (relaxed rank).
        learning_rate: of the up side (Adam).
        down_rate: of the down side, relative to `learning_rate`; 0 keeps it at its start, which all people share if
            they begin without a prediction.
        batch_size: (noise, timestep) pairs per step.
        noise: the noise levels.
        prompt: what the person is called, with the rare token.
        photo_words: captions, what the photos show besides the person, a line for each photo or one for all. What is
            named does not become part of the person.
        class_prompt: describes the class, without the token.
        prior_weight: of the class-prior preservation loss, on pictures of the class or, without any, on the base
            model's own answers to `class_prompt` on the photos; 0 turns it off.
        train_text_encoder: whether the text layers are trained too. On the miniature that costs half as much as the
            UNet and brings a point or two of identity by itself, and with `prior_weight` a token that alone means the
            person; those of a given LiDB act in any case.
        basis: of a start without a prediction; a given LiDB brings its own.
        seed: of noise and timesteps.

    Raises:
        FinetuneError: if a setting makes no sense.
    """

    steps: int = 0
    rank: int = 4
    learning_rate: float = 0.03
    down_rate: float = 0.1
    batch_size: int = 4
    noise: NoiseLevels = field(default_factory=lambda: NoiseLevels(max_timestep=0.8))
    prompt: str = "a [v] face"
    photo_words: str = ""
    class_prompt: str = CLASS_PROMPT
    prior_weight: float = 0.0
    train_text_encoder: bool = False
    basis: BasisRecipe = field(default_factory=BasisRecipe)
    seed: int = 0

    def __post_init__(self) -> None:
        _require(self.steps >= 0, "steps", "0 for automatic, or more", self.steps)
        _require(1 <= self.rank <= self.basis.max_rank, "rank", f"1 to {self.basis.max_rank}", self.rank)
        _require(self.batch_size >= 1, "batch_size", "at least 1", self.batch_size)
        _require(0 < self.learning_rate < math.inf, "learning_rate", "a positive number", self.learning_rate)
        for name in ("down_rate", "prior_weight"):
            value = getattr(self, name)
            _require(0 <= value < math.inf, name, "0 or a positive number", value)
        _require(bool(self.prompt.strip()), "prompt", "some words such as 'a [v] face'", self.prompt)
        for name in ("prompt", "photo_words", "class_prompt"):
            text = getattr(self, name)  # half of a character cannot be encoded
            _require(text.encode(errors="ignore").decode() == text, name, "whole characters", text)
        for name in ("prompt", "class_prompt"):
            length = len(getattr(self, name))
            _require(length <= MOST_CHARACTERS, name, f"at most {MOST_CHARACTERS:,} characters", length)
        needs_class = self.prior_weight > 0
        _require(not needs_class or bool(self.class_prompt.strip()), "class_prompt", "some words", self.class_prompt)

    @property
    def token(self) -> str:
        """What means the person in the prompt: ``[v]``."""
        return rare_token(self.prompt, self.class_prompt)

    def captions(self, count: int) -> list[str]:
        """The captions of so many photos.

        As many lines as photos are one each, blank ones, too; blank lines beyond those at the end do not count.

        Raises:
            FinetuneError: if `photo_words` has neither one line nor one for each photo, or a line longer than a prompt.
        """
        lines = [line.strip() for line in self.photo_words.split("\n")]
        while len(lines) > 1 and not lines[-1] and len(lines) != count:
            lines.pop()
        if len(lines) not in (1, count):
            raise FinetuneError(
                f"Expected one line of photo_words or one for each of the {count} photos, got {len(lines)}. "
                "Give every photo its line, or describe what all of them show in one."
            )
        longest = max(map(len, lines))
        _require(longest <= MOST_CHARACTERS, "photo_words", f"lines of at most {MOST_CHARACTERS:,} characters", longest)
        return [caption(self.prompt, words) for words in (lines * count if len(lines) == 1 else lines)]


def _require(holds: bool, name: str, expected: str, got: object) -> None:
    require(holds, name, expected, got, FinetuneError)
