"""Drawn people as the training of the hypernetwork takes them: photos, words and masks belong together, and more come."""

import numpy as np
import pytest
import torch

from hdb_core.hypernet import EncoderConfig
from miniature import crowd
from miniature.captions import photo_words
from miniature.crowd import PHOTOS, Crowd, draw_group
from miniature.drawing import photo
from miniature.people import sample_person
from miniature.photos import FIRST, photo_context


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("crowd")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(crowd, "GROUP", 2)
        for number in (0, 1):
            draw_group(made, number)
    return made


def encode(pixels):
    return pixels[:, :, ::8, ::8].repeat(1, 2, 1, 1)[:, :4]


@pytest.fixture
def people(folder, monkeypatch):
    monkeypatch.setattr(crowd, "LOOK_EVERY", -1.0)
    return Crowd(folder, encode, torch.device("cpu"))


def test_a_crowd_grows_by_groups(people):
    assert len(people.grow()) == 2 and len(people.grow(5)) == 2 and people.grow() == []
    assert [person.person.name for person in people.people] == ["0", "1", "2", "3"]


def test_photos_words_and_masks_are_those_of_the_person(people):
    people.grow(2)
    faces = people.faces(EncoderConfig(image_size=128))
    person, number = people.people[3], 2
    seed = FIRST + 3
    context = photo_context(seed, number)
    drawn = photo(sample_person(seed), context)
    read = faces.read([(person.person, number), (people.people[0].person, 0)])
    assert read.shape == (2, 3, 128, 128)
    assert torch.allclose((read[0].permute(1, 2, 0) + 1) * 127.5, torch.tensor(drawn).float(), atol=0.6)
    assert person.person.photos[number].words == photo_words(context)
    region = person.person.photos[number].region(16, 16)
    assert region.mean() == pytest.approx(1) and region[0, 5:9, 6:10].mean() > 3 * region[0, :2].mean()
    assert person.latents.shape == (PHOTOS, 4, 16, 16)
    assert np.allclose(person.latents[number, 0, 4].float(), drawn[32, ::8, 0] / 255, atol=1e-3)
    with pytest.raises(ValueError, match=r"asked for \(8, 8\)"):
        person.person.photos[number].region(8, 8)


def test_a_full_crowd_takes_nobody_up(people):
    people.most = 2
    people.grow(5)
    assert len(people.people) == 2


def test_portraits_alone_are_encoded(folder, people):
    portraits = Crowd(folder, encode, torch.device("cpu"), encoded=1)
    people.grow(2)
    portraits.grow(2)
    for own, whole in zip(portraits.people, people.people, strict=True):
        assert torch.equal(own.latents, whole.latents[:1]) and len(own.person.photos) == PHOTOS
