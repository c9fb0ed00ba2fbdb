"""Who takes part in a step of training, seen on which photos and denoised on which one.

Every draw is a function of the seed and the step for the whole global batch, of which each process takes its part: the
result does not depend on the number of processes, and a run resumes from its weights and its step number alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

# Everybody has a turn before anyone has another. People who stand side by side in files have theirs near each other, so
# that what is read lies together, on whatever disk: runs of people are shuffled, and then the people of some runs.
RUN = 256
RUNS = 16


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
    for place in range(step * people, (step + 1) * people):
        person = person_at(place, len(counts), seed)
        order = torch.randperm(counts[person], generator=generator).tolist()
        # At least one photo is not seen, unless there is only one.
        seen = [order[i % max(1, len(order) - 1)] for i in range(num_photos)]
        others = order[len(set(seen)) :] or seen
        turns.append(Turn(person, seen, others[integer(len(others))]))
    return turns, iterations, generator


def person_at(place: int, count: int, seed: int) -> int:
    """Who of ``count`` people has a turn; ``place`` counts all turns of a training from 0."""
    epoch, place = divmod(place, count)
    window, place = divmod(place, RUN * RUNS)
    return _people_of(window, epoch, count, seed)[place]


@lru_cache(4)
def _people_of(window: int, epoch: int, count: int, seed: int) -> list[int]:
    """The people of some shuffled runs, shuffled."""
    generator = torch.Generator().manual_seed(((seed * 1_000_003 + epoch) * 1_000_003 + window) % (1 << 64))
    runs = _shuffled_runs(epoch, count, seed)[window * RUNS : (window + 1) * RUNS]
    people = [person for run in runs for person in range(run * RUN, min(count, (run + 1) * RUN))]
    return [people[i] for i in torch.randperm(len(people), generator=generator).tolist()]


@lru_cache(2)
def _shuffled_runs(epoch: int, count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    runs = torch.randperm(-(-count // RUN), generator=generator).tolist()
    last = count // RUN  # shorter than the others, if it is there: it comes last, so that windows are of one length
    return [run for run in runs if run != last] + ([last] if count % RUN else [])


def ordinary(count: int, wanted: int) -> list[int]:
    """``wanted`` of a person's ``count`` photos, none of them the last, and the first only if there is no other."""
    first = 1 if count > 2 else 0
    return [first + n % max(1, count - 1 - first) for n in range(wanted)]
