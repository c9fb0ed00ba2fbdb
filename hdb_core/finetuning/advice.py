"""What a fine-tune says at its end: how much was learned, and what to change."""

from __future__ import annotations

from ..recommended import RECOMMENDED
from .config import FinetuneConfig
from .learned import Learned
from .loop import FinetuneResult

LITTLE, MUCH = 0.6, 1.6  # of what is enough
WORSE = -0.2  # of the likeness: a training that has just begun may be a little below 0
DISTURBED = 1.2  # times the likeness that other prompts have moved; at the defaults it is 0.6 to 0.9


def report(result: FinetuneResult, config: FinetuneConfig) -> str:
    """ "56 steps: likeness gained 41 %, other prompts moved 22 %. …", with one sentence of advice."""
    about, learned = result.lidb.about, result.learned
    steps = "1 step" if len(result.losses) == 1 else f"{len(result.losses)} steps"
    if learned is None:
        return f"{steps}, too few to measure what was learned."
    numbers = f"likeness gained {100 * learned.gained:.0f} %, other prompts moved {100 * learned.moved:.0f} %"
    return f"{steps}: {numbers}. {advice(learned, config, about.photos, RECOMMENDED[about.made_from].enough)}"


def advice(learned: Learned, config: FinetuneConfig, photos: int, enough: float | None) -> str:
    """One sentence: what to change, the likeliest cause first.

    Args:
        learned: at the end.
        config: of the training; its steps are 0 if they were automatic.
        photos: how many there were.
        enough: `Learned.gained` that is recommended, if one is.
    """
    if learned.gained < WORSE:
        return "It fits the photos worse than the base model does: take a lower learning_rate."
    if not config.photo_words.strip():
        return "Describe in photo_words what else the photo shows: what is not named there becomes part of the person."
    if enough is not None and learned.gained < LITTLE * enough:
        if config.steps:
            return "That is little: take more steps, or 0 for automatic ones."
        return "That is little: try another photo, sharp and cropped to the face, or a higher learning_rate."
    if learned.moved > DISTURBED * max(learned.gained, 0.0):
        other = "another photo of the person besides this one" if photos == 1 else "photos that differ more"
        return f"Other prompts have changed more than the likeness has grown: take a lower learning_rate, fewer steps, or {other}."
    if enough is not None and learned.gained > MUCH * enough:
        return "That is much: if pictures ignore the prompt, take fewer steps."
    return "If pictures do not look like the person, take more steps; if they ignore the prompt, fewer."
