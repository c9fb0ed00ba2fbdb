"""Photos of synthetic people on disk."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from PIL import Image

from hdb_core.train.data.photos import find_people
from miniature.captions import person_words
from miniature.drawing import face_mask, head_mask, photo
from miniature.people import BACKGROUNDS, SPLITS, sample_person
from miniature.photos import FIRST, photo_context, write_person
from miniature.pictures import subject


def test_training_finds_the_people(tmp_path):
    for seed in (FIRST, FIRST + 1):
        write_person(tmp_path, seed, 3)
    people = find_people(tmp_path)
    assert [len(person.photos) for person in people] == [3, 3]
    drawn = np.asarray(Image.open(people[1].photos[2].path))
    np.testing.assert_array_equal(drawn, photo(sample_person(FIRST + 1), photo_context(FIRST + 1, 2)))


def test_masks_show_the_head_and_nothing_else(tmp_path):
    write_person(tmp_path, FIRST, 2, "head")
    (person,) = find_people(tmp_path)
    assert len(person.photos) == 2
    who, context = sample_person(FIRST), photo_context(FIRST, 1)
    inside = np.asarray(Image.open(person.photos[1].mask)) == 255
    assert 0.1 < inside.mean() < 0.7
    background = next(b for b in BACKGROUNDS if b != context.background)
    elsewhere = photo(who, replace(context, background=background))
    np.testing.assert_array_equal(elsewhere[inside], photo(who, context)[inside])
    outside = photo(who, context)[~inside] != elsewhere[~inside]
    assert outside.any(-1).mean() > 0.3


def test_masks_of_faces_count_the_middle_most(tmp_path):
    who, context = sample_person(FIRST), photo_context(FIRST, 1)
    face, head = face_mask(who, context), head_mask(who, context)
    assert 0.02 < (face == 255).mean() < 0.2 and not face[head == 0].any()
    moved = face_mask(who, replace(context, shift=(context.shift[0] + 20, context.shift[1])))
    assert np.argwhere(moved == 255)[:, 1].mean() - np.argwhere(face == 255)[:, 1].mean() > 5


def test_words_are_of_the_photo_and_not_of_the_person(tmp_path):
    write_person(tmp_path, FIRST, 4)
    (person,) = find_people(tmp_path)
    words = [photo.words for photo in person.photos]
    assert len(set(words)) == 4 and all(words)
    own = person_words(sample_person(FIRST)).values()
    assert not any(phrase in text for phrase in own for text in words)


def test_the_base_never_drew_them():
    assert FIRST in SPLITS["train"]
    drawn = [person.seed for index in range(99_990, 100_000) for person, _ in subject(index)[0]]
    assert max(drawn) < FIRST
