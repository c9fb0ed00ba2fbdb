"""The reading task that the text encoder is trained on."""

from __future__ import annotations

import numpy as np
import pytest

from miniature.checkpoint import TOKEN_ROWS
from miniature.make import WEIGHTS
from miniature.packing import read_packed
from miniature.pictures import subject, training_picture
from miniature.text import LABELS, load_tokenizer, named, reading_batch, vocabulary


def test_labels_are_what_the_caption_says():
    caption = "a painting of a [v] face, wearing a blue hoodie, in front of a white wall"
    for index in range(2000):
        people, _ = subject(index)
        if len(people) == 1 and people[0][1].clothing == "hoodie" and people[0][1].clothing_color == "blue":
            said = named(index, "a face, wearing a blue hoodie")
            assert said == ["left clothing=hoodie", "left clothing_color=blue"]
            assert named(index, "") == []
            assert set(named(index, caption)) >= set(said)
            return
    raise AssertionError("nobody wears a blue hoodie")


@pytest.mark.parametrize("index", [8, 16, 24])
def test_pairs_and_scenes_are_told_apart(index):
    captions = [training_picture(index, False, draw)[1] for draw in range(40)]
    pair = len(subject(index)[0]) == 2
    for caption in filter(None, captions):
        said = named(index, caption)
        assert ("pair" in said) == pair
        assert any(name.startswith("left background=") for name in said)
    assert any(name.startswith("right ") for c in captions for name in named(index, c)) == pair


def test_batches_are_labelled_and_repeatable():
    captions, truth = reading_batch(64, np.random.default_rng(0))
    again, _ = reading_batch(64, np.random.default_rng(0))
    assert captions == again
    assert truth.shape == (64, len(LABELS))
    nothing_said = [not caption or caption in ("a face",) for caption in captions]
    assert all(row.sum() == 0 for row, nothing in zip(truth, nothing_said, strict=True) if nothing)
    assert truth.sum(1).max() > 8


def test_few_captions_tell_the_vocabulary():
    packed, _ = read_packed(WEIGHTS / "miniature_base.safetensors")
    assert vocabulary(load_tokenizer()).tolist() == packed[TOKEN_ROWS].tolist()
