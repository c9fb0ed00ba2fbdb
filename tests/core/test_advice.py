"""What a fine-tune says at its end."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from hdb_core.finetuning import FinetuneConfig, FinetuneResult, Learned, report
from hdb_core.finetuning.advice import LITTLE
from hdb_core.lidb import About
from hdb_core.recommended import FROM_PHOTO, FROM_PHOTOS, IN_LEARNED_BASIS, RECOMMENDED

ROOT = Path(__file__).resolve().parents[2]
CONFIG = FinetuneConfig(photo_words="smiling")
ENOUGH = RECOMMENDED[FROM_PHOTO].enough


@pytest.fixture
def result(make_lidb):
    def make(gained=None, moved=0.0, about=None, steps=56):
        learned = None if gained is None else Learned(gained, moved)
        person = replace(make_lidb(0, 1), about=about or About(FROM_PHOTO))
        return FinetuneResult(person, (0.1,) * steps, 1.0, learned)

    return make


def test_both_numbers_and_one_sentence(result):
    said = report(result(ENOUGH, 0.061), CONFIG)
    assert said == (
        f"56 steps: likeness gained {100 * ENOUGH:.0f} %, other prompts moved 6 %. "
        "If pictures do not look like the person, take more steps; if they ignore the prompt, fewer."
    )
    assert report(result(-0.02, 0.0), CONFIG).startswith("56 steps: likeness gained -2 %, other prompts moved 0 %. ")


@pytest.mark.parametrize("steps", [1, 3])
def test_a_training_that_was_not_measured_says_so(result, steps):
    said = report(result(steps=steps), CONFIG)
    assert said == f"{steps} step{'s' * (steps > 1)}, too few to measure what was learned."


@pytest.mark.parametrize(
    ("config", "photos", "learned", "advice"),
    [
        ({"photo_words": " \n"}, 1, (ENOUGH, 0.1), "Describe in photo_words"),
        ({"photo_words": ""}, 1, (-15.0, 20.0), "take a lower learning_rate"),
        ({"steps": 20}, 1, (0.2 * ENOUGH, 0.0), "take more steps, or 0 for automatic"),
        ({}, 1, (0.2 * ENOUGH, 0.0), "try another photo"),
        ({}, 1, (-0.1, 0.2), "try another photo"),
        ({}, 1, (ENOUGH, 2 * ENOUGH), "a lower learning_rate, fewer steps, or another photo of the person besides"),
        ({}, 3, (ENOUGH, 2 * ENOUGH), "or photos that differ more"),
        ({"steps": 400}, 1, (2 * ENOUGH, 0.1), "That is much"),
    ],
)
def test_advice_names_the_likeliest_cause(result, config, photos, learned, advice):
    about = About(FROM_PHOTO, photos=photos)
    (_, _, said) = report(result(*learned, about), replace(CONFIG, **config)).partition("%. ")
    assert advice in said and said.count(".") == 1


def test_where_nothing_is_recommended_likeness_is_neither_little_nor_much(result):
    assert RECOMMENDED[IN_LEARNED_BASIS].enough is None
    for gained in (0.01, 0.9):
        assert "take more steps; if they ignore" in report(result(gained, 0.0, About(IN_LEARNED_BASIS)), CONFIG)


def test_what_is_enough_depends_on_what_the_person_is_made_from(result):
    few, more = sorted((FROM_PHOTO, FROM_PHOTOS), key=lambda source: RECOMMENDED[source].enough)
    gained = LITTLE * (RECOMMENDED[few].enough + RECOMMENDED[more].enough) / 2
    said = {source: report(result(gained, 0.0, About(source)), CONFIG) for source in (few, more)}
    assert "little" in said[more] and "little" not in said[few]


def test_the_help_page_says_what_is_recommended():
    page = (ROOT / "web" / "docs" / "FastFinetune.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+?) \| (not measured|\d+ %) \| (\d+) \| (\d+) \|$", page, re.MULTILINE)
    said = [(likeness, int(steps), int(most)) for _, likeness, steps, most in rows]
    enough = ["not measured" if r.enough is None else f"{100 * r.enough:.0f} %" for r in RECOMMENDED.values()]
    counts = [(r.steps, r.most_steps) for r in RECOMMENDED.values()]
    assert said == [(likeness, *steps) for likeness, steps in zip(enough, counts, strict=True)]
