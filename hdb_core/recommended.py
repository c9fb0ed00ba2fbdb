"""When a person's steps end and how strongly they are applied, by what they were made from: the one place for it.

The numbers were chosen on people of the miniature's dev split (``python dev.py bench tune``): the most identity on
prompts that contradict the photo, with prompt adherence about that of the base model.
"""

from __future__ import annotations

from typing import NamedTuple

FROM_PREDICTION, FROM_PHOTO, FROM_PHOTOS = "a prediction", "one photo", "several photos"
IN_LEARNED_BASIS = "photos in a learned basis"


class Strengths(NamedTuple):
    """How a person is applied.

    In the picture that guidance makes, a person counts ``model · guidance`` times. Less of them in the prompt's own
    pass leaves it more of its words; guidance then leads to the person, too.

    Attributes:
        model: of the change of the UNet.
        clip: of the change of the text encoder.
        guidance: how much of the UNet's change guidance makes; 1 is as much as of an ordinary LoRA.
    """

    model: float
    clip: float
    guidance: float

    def scaled(self, strength: float) -> Strengths:
        """The same person more or less strongly: 0 is not at all, 1 leaves the strengths as they are."""
        return Strengths(self.model * strength, self.clip * strength, 1 + strength * (self.guidance - 1))


class Recommendation(NamedTuple):
    """What suits a person who was made from something.

    Attributes:
        steps: of the fast fine-tune, about, at the default rate on the miniature.
        strengths: of the application.
        enough: `Learned.gained` at which automatic steps end; None takes `steps`.
    """

    steps: int
    strengths: Strengths
    enough: float | None = None

    @property
    def most_steps(self) -> int:
        """At which automatic steps end in any case."""
        return self.steps if self.enough is None else MOST * self.steps


AS_LORA = Strengths(1.0, 1.0, 1.0)
# Where a training of the text encoder had to leave the class prompt as it was, the token alone means the person, and half
# of the text encoder's change would be half of the token. More guidance costs a fine-tune likeness, and gives it to a
# prediction; still more moves other faces.
BY_TOKEN, PREDICTED_BY_TOKEN = AS_LORA, Strengths(1.0, 1.0, 1.5)
MOST = 2  # times the steps that it usually takes: automatic steps end there, whatever was learned
# A prediction needs few steps. From several photos many steps do no harm: what only one of them shows is hardly learned.
# From one photo, little of the person in the prompt's own pass and more by guidance keeps the prompt's words.
# What is enough is what these steps gained at the default rate; several photos have more in them that stays unexplained.
RECOMMENDED = {
    FROM_PREDICTION: Recommendation(14, Strengths(0.7, 0.5, 2.5), 0.25),
    FROM_PHOTO: Recommendation(56, Strengths(0.35, 0.5, 4.5), 0.4),
    FROM_PHOTOS: Recommendation(100, Strengths(0.7, 0.5, 2.5), 0.33),
    # More steps soon repeat the photo there.
    IN_LEARNED_BASIS: Recommendation(8, Strengths(0.7, 0.5, 2.5)),
}


def made_from(photos: int, predicted: bool, learned: bool) -> str:
    """The key of `RECOMMENDED` for a person from so many photos.

    Args:
        photos: how many.
        predicted: whether the fine-tune began with a prediction.
        learned: whether the bases are learned ones.
    """
    if predicted:
        return FROM_PREDICTION
    if learned:
        return IN_LEARNED_BASIS
    return FROM_PHOTO if photos == 1 else FROM_PHOTOS
