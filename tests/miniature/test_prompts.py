"""Evaluation prompts contradict the photo, say what they expect, and never change."""

import pytest

from miniature.captions import context_words
from miniature.people import SPLITS, STYLES
from miniature.prompts import CONTRADICTED, describe, evaluation_photo, evaluation_prompts

SEEDS = [*SPLITS["dev"][:40], *SPLITS["test"][:5]]


@pytest.mark.parametrize("short", [False, True])
def test_identity_is_judged_only_where_the_photo_is_contradicted(short):
    for seed in SEEDS:
        person, photo = evaluation_photo(seed)
        prompts = evaluation_prompts(person, photo, short)
        for prompt in prompts:
            assert all(value != getattr(photo, name) for name, value in prompt.expected.items())
            if prompt.judges_identity:
                assert all(getattr(prompt.context, name) != getattr(photo, name) for name in CONTRADICTED)
        assert next(p.kind for p in prompts if not p.judges_identity) == "bare"
        assert sum(p.judges_identity for p in prompts) == (4 if short else 7)


def test_words_and_expectation_agree():
    for seed in SEEDS:
        for prompt in evaluation_prompts(*evaluation_photo(seed)):
            words = context_words(prompt.context)
            assert prompt.words == tuple(words[name] for name in words if words[name] in prompt.words) or set(
                prompt.words
            ) == {words[name] for name in words if name in prompt.expected}
            assert all(getattr(prompt.context, name) == value for name, value in prompt.expected.items())
            assert prompt.text().count("a [v] face") == 1 and "[v]" not in prompt.text(token="")


def test_a_short_list_is_a_part_and_goes_round():
    kinds = set()
    for seed in SEEDS:
        subject = evaluation_photo(seed)
        full, short = evaluation_prompts(*subject), evaluation_prompts(*subject, short=True)
        assert set(short) <= set(full) and len(full) == 11 and len(short) == 6
        kinds |= {p.kind for p in short}
    assert kinds >= {*STYLES[1:], *CONTRADICTED}


def test_the_same_person_has_the_same_prompts_and_photo():
    seed = SPLITS["dev"][3]
    assert evaluation_prompts(*evaluation_photo(seed)) == evaluation_prompts(*evaluation_photo(seed))
    assert evaluation_photo(seed)[1].style == "photo"
    assert all(evaluation_photo(s)[1].accessory != "sunglasses" for s in SPLITS["dev"][:100])


def test_the_complete_caption_comes_before_the_scene():
    person, photo = evaluation_photo(SPLITS["dev"][0])
    prompt = evaluation_prompts(person, photo)[3]
    assert prompt.text("", describe(person)) == "a face, red long hair, brown skin, clean-shaven, in the city"
