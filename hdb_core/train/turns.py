"""Who takes part in a step of training, seen on which photos and denoised on which one.

Every draw is a function of the seed and the step for the whole global batch, of which each process takes its part: the
result does not depend on the number of processes, and a run resumes from its weights and its step number alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Turn(NamedTuple):
    """A person in a step.

    Attributes:
        person: their number.
        seen: photos that they are predicted from.
        denoised: the photo that the loss is on.
    """

    person: int
    seen: list[int]
    denoised: int


def turns_of(
    step: int, counts: Sequence[int], people: int, seed: int, most_photos: int = 1, most_iterations: int = 1
) -> tuple[list[Turn], int, torch.Generator]:
    """The whole global batch of a step.

    Args:
        step: counted from 0.
        counts: how many photos each person has.
        people: in the batch.
        seed: of everything that is drawn.
        most_photos: each person is seen on 1 to so many.
        most_iterations: k is drawn from 1 to this.

    Returns:
        The turns, k, and the generator that goes on to draw the noise.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)

    def integer(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    num_photos, iterations = 1 + integer(most_photos), 1 + integer(most_iterations)
    turns = []
    for person in torch.randint(len(counts), (people,), generator=generator).tolist():
        order = torch.randperm(counts[person], generator=generator).tolist()
        # At least one photo is not seen, unless there is only one.
        seen = [order[i % max(1, len(order) - 1)] for i in range(num_photos)]
        others = order[len(set(seen)) :] or seen
        turns.append(Turn(person, seen, others[integer(len(others))]))
    return turns, iterations, generator


def ordinary(count: int, wanted: int) -> list[int]:
    """``wanted`` of a person's ``count`` photos, none of them the last, and the first only if there is no other."""
    first = 1 if count > 2 else 0
    return [first + n % max(1, count - 1 - first) for n in range(wanted)]
