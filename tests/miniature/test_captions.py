"""Captions name what they may, never the geometry, and the rare tokens say nothing about the picture."""

from dataclasses import fields, replace
from itertools import combinations

import numpy as np
import pytest

from miniature.captions import RARE_TOKENS, context_words, person_words, prompt, sample_caption
from miniature.judge import ATTRIBUTES
from miniature.people import Context, sample_context, sample_person

CONTEXT_FIELDS = {f.name for f in fields(Context)}


def _captions(count):
    rng = np.random.default_rng(0)
    return [sample_caption(sample_person(i), sample_context(i), rng) for i in range(count)]


def test_rare_tokens_appear_in_some_captions_whatever_the_picture():
    captions = [c for c in _captions(3000) if c]
    with_token = [c for c in captions if any(f"a {token} face" in c for token in RARE_TOKENS)]
    assert 0.12 < len(with_token) / len(captions) < 0.18
    share_of_glasses = [np.mean(["glasses" in c for c in group]) for group in (with_token, captions)]
    assert abs(share_of_glasses[0] - share_of_glasses[1]) < 0.05


def test_captions_name_everything_something_or_nothing():
    captions = _captions(2000)
    lengths = [c.count(",") for c in captions]
    assert "" in captions and "a face" in captions
    assert min(lengths) == 0 and max(lengths) >= 6


def test_geometry_changes_no_word():
    person, context = sample_person(3), sample_context(3)
    other = replace(person, geometry=tuple(-g for g in person.geometry), skin_rgb=(1, 2, 3), hair_rgb=(4, 5, 6))
    assert person_words(person) == person_words(other)
    seeds = [np.random.default_rng(9) for _ in range(2)]
    assert sample_caption(person, context, seeds[0]) == sample_caption(other, context, seeds[1])


@pytest.mark.parametrize("attribute", [a for a in ATTRIBUTES if a not in ("style",)])
def test_each_value_has_words_of_its_own(attribute):
    def words(value):
        person, context = sample_person(0), Context()
        if attribute in CONTEXT_FIELDS:
            return tuple(context_words(replace(context, **{attribute: value})).values())
        return tuple(person_words(replace(person, **{attribute: value})).values())

    for one, other in combinations(ATTRIBUTES[attribute], 2):
        assert words(one) != words(other)


def test_a_prompt_is_a_style_a_subject_and_words():
    assert prompt() == "a face"
    assert prompt(("smiling", "at the beach"), "painting", "[v]") == "a painting of a [v] face, smiling, at the beach"
