"""Two people in one picture: what they are prompted with, and what a perfect judge says of right and of exchanged halves."""

import numpy as np
import pytest

from benchmarks.common.subjects import Subject
from benchmarks.pairs import ROWS, Pair, halves, scores, split, text_of
from miniature.drawing import photo
from miniature.judge import Readings, true_readings
from miniature.people import SPLITS

FIRST = SPLITS["dev"].start


@pytest.fixture
def pair():
    return Pair(Subject(FIRST), Subject(FIRST + 1))


def pictures_of(pair: Pair) -> np.ndarray:
    shown = zip(pair.subjects, pair.prompts, strict=True)
    return np.stack([photo(subject.person, prompt.context) for subject, prompt in shown])[:, None]


class PerfectJudge:
    """Knows people and their prompted contexts by the bytes of the picture."""

    def __init__(self, pair: Pair) -> None:
        shown = ((subject.person, prompt.context) for subject, prompt in zip(pair.subjects, pair.prompts, strict=True))
        self.truth = {photo(*one).tobytes(): one for one in shown}

    def read(self, pictures: np.ndarray) -> Readings:
        return true_readings([self.truth[picture.tobytes()] for picture in pictures])


def test_prompts_contradict_the_photos_and_share_a_background(pair):
    left, right = pair.prompts
    assert left.expected["background"] == right.expected["background"] == left.context.background
    assert left.text().count("[v]") == right.text().count("[v]") == 1
    for subject, prompt in zip(pair.subjects, pair.prompts, strict=True):
        assert prompt.judges_identity
        assert all(
            getattr(subject.context, name) != prompt.expected[name] for name in ("expression", "clothing", "background")
        )


def test_halves_that_show_the_right_people_and_exchanged_ones(pair):
    judge, pictures = PerfectJudge(pair), pictures_of(pair)
    right, wrong = scores(judge, pair, pictures), scores(judge, pair, pictures[::-1])
    assert (
        right["found"] == right["told apart"] == right["both"] == right["adherence"] == 1
        and right["the other found"] == 0
    )
    assert wrong["found"] == wrong["told apart"] == wrong["both"] == 0 and wrong["the other found"] == 1
    assert right["identity"] > 0.9
    assert right["of the other"] < 0.5


def test_masks_are_the_halves_that_are_judged():
    left, right = (mask[0].numpy() for mask in halves())
    assert np.array_equal(left + right, np.ones((128, 256)))
    judged = split(np.repeat(left[None, ..., None], 3, -1))
    assert judged.shape == (2, 1, 128, 128, 3) and judged[0].all() and not judged[1].any()


def test_the_table():
    text = text_of({row: {"identity": {"value": 0.5, "error": 0.01}} for row in ROWS}, 20, 2)
    assert text.count("50.0 ± 1.0") == len(ROWS) and "of 20 pairs" in text
