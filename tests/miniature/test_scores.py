"""The scores on readings whose right answer is known: the truth itself, strangers, the photo, constants."""

from dataclasses import replace

import numpy as np
import pytest

from miniature.judge import ATTRIBUTES, Readings, true_readings
from miniature.people import GEOMETRY, SPLITS, Context, sample_context, sample_person
from miniature.prompts import evaluation_photo, evaluation_prompts
from miniature.scores import (
    GALLERY_SIZE,
    ITEMS,
    diversity,
    drift,
    gallery,
    identity,
    pull,
    random_errors,
    score_pictures,
    summarise,
    variety,
    visible_items,
)

SEEDS = SPLITS["dev"][:60]


def _random_pictures(count, first=5000):
    seeds = SPLITS["dev"][first : first + count]
    return true_readings([(sample_person(s), sample_context(s + 1)) for s in seeds])


def _perfect(person, prompts):
    return true_readings([(person, prompt.context) for prompt in prompts])


def test_expected_errors_of_random_people():
    errors = dict(zip(ITEMS, random_errors(), strict=True))
    assert all(errors[name] == pytest.approx(2 / 3, abs=0.02) for name in GEOMETRY)
    assert errors["hair_shape"] == pytest.approx(7 / 8, abs=0.01)
    assert errors["facial_hair"] == pytest.approx(1 - 0.55**2 - 3 * 0.15**2, abs=0.03)


def test_identity_is_one_for_the_truth_and_zero_for_strangers():
    people = _random_pictures(300)
    scores = identity(people, people)
    np.testing.assert_allclose(np.diag(scores), 1, atol=1e-6)
    assert scores[~np.eye(300, dtype=bool)].mean() == pytest.approx(0, abs=0.02)


def test_the_average_face_gets_a_quarter_of_the_geometry():
    people = _random_pictures(1000)
    average = replace(people, factors=np.zeros_like(people.factors))
    geometry = np.zeros((1000, len(ITEMS)), bool)
    geometry[:, : len(GEOMETRY)] = True
    assert np.diag(identity(average, people, geometry)).mean() == pytest.approx(0.25, abs=0.02)


def test_hidden_items_do_not_count():
    person, photo = evaluation_photo(SEEDS[0])
    prompts = evaluation_prompts(person, photo)
    readings = _perfect(person, prompts)
    for i, prompt in enumerate(prompts):
        hidden = np.flatnonzero(~visible_items([prompt])[0])
        assert {ITEMS[k] for k in hidden} == (
            ({"skin_rgb", "hair_rgb"} if prompt.context.style != "photo" else set())
            | ({"eye_spacing", "eye_size"} if prompt.context.accessory == "sunglasses" else set())
        )
        spoiled = readings.factors.copy()
        for k in hidden:
            spoiled[i, [10, 11, 12] if ITEMS[k] == "skin_rgb" else [13, 14, 15] if ITEMS[k] == "hair_rgb" else [k]] = -9
        truth = true_readings([(person, photo)])
        scores = identity(replace(readings, factors=spoiled)[i : i + 1], truth, visible_items([prompt]))
        assert scores[0, 0] == pytest.approx(1)


def test_the_gallery_holds_the_person_once():
    for seed in (SPLITS["dev"][0], SPLITS["dev"][-5], SPLITS["test"][3], 77_000_000):
        person = sample_person(seed)
        people = gallery(person)
        own = true_readings([(person, Context())])
        assert len(people) == GALLERY_SIZE
        assert np.flatnonzero((people.factors == own.factors).all(1)).tolist() == [0]


def test_perfect_pictures_score_one_and_strangers_nothing():
    perfect, strange = [], []
    for seed in SEEDS:
        person, photo = evaluation_photo(seed)
        prompts = evaluation_prompts(person, photo)
        perfect += score_pictures(_perfect(person, prompts), person, photo, prompts)
        strange += score_pictures(_perfect(sample_person(seed + 900), prompts), person, photo, prompts)
    best, floor = summarise(perfect), summarise(strange)
    assert all(best[name].value == 1 for name in ("retrieval", "adherence", "joint"))
    assert best["identity"].value == pytest.approx(1)
    assert floor["identity"].value == pytest.approx(0, abs=4 * floor["identity"].error)
    assert floor["adherence"].value == 1 and floor["retrieval"].value <= 0.01 and floor["joint"].value <= 0.01
    # Perfect pictures are posed and dressed anew, so what they share with the photo is chance.
    assert best["leak"].value == pytest.approx(0, abs=4 * best["leak"].error)


def test_repeating_the_photo_is_all_identity_and_leak_but_no_adherence():
    rows = []
    for seed in SEEDS[:10]:
        person, photo = evaluation_photo(seed)
        prompts = evaluation_prompts(person, photo)
        rows += score_pictures(true_readings([(person, photo)] * len(prompts)), person, photo, prompts)
    scores = {name: mean.value for name, mean in summarise(rows).items()}
    assert scores["identity"] == pytest.approx(1) and scores["leak"] == pytest.approx(1)
    assert scores["adherence"] == 0 and scores["joint"] == 0 and scores["retrieval"] == 1


def test_identity_is_relative_to_the_ceiling():
    person, photo = evaluation_photo(SEEDS[0])
    prompts = evaluation_prompts(person, photo)
    readings = _perfect(person, prompts)
    shifted = replace(readings, factors=readings.factors + np.float32(0.1))
    raw = score_pictures(shifted, person, photo, prompts)
    relative = score_pictures(shifted, person, photo, prompts, [0.9] * len(prompts))
    assert summarise(relative)["identity"].value == pytest.approx(summarise(raw)["identity"].value / 0.9)
    assert summarise(relative)["identity_raw"] == summarise(raw)["identity_raw"]
    with pytest.raises(ValueError, match="10 prompts"):
        score_pictures(readings, person, photo, prompts[:10])


def test_standard_errors_are_over_people_not_pictures():
    person, photo = evaluation_photo(SEEDS[0])
    prompts = evaluation_prompts(person, photo)
    right = score_pictures(_perfect(person, prompts), person, photo, prompts)
    wrong = score_pictures(_perfect(sample_person(1), prompts), person, photo, prompts)
    pairs = [*right, *[replace(row, seed=row.seed + 1) for row in wrong]]
    assert summarise(right)["identity"].error == 0
    assert summarise(pairs)["retrieval"].error == pytest.approx(0.5)


def test_drift_and_pull():
    before, after = _random_pictures(300), _random_pictures(300, first=9000)
    person = sample_person(SEEDS[0])
    own = true_readings([(person, sample_context(i)) for i in range(300)])
    assert drift(before, before) == 0 and pull(before, before, person) == 0
    assert drift(before, after) == pytest.approx(1, abs=0.05)
    assert pull(before, after, person) == pytest.approx(0, abs=0.05)
    assert pull(before, own, person) == pytest.approx(1, abs=0.05)


def test_diversity_is_one_for_the_world_and_zero_for_copies():
    person, photo = evaluation_photo(SEEDS[0])
    prompts = evaluation_prompts(person, photo)
    bare = [prompts[0]] * 400
    varied = true_readings([(person, sample_context(i)) for i in range(400)])
    assert diversity(varied, bare) == pytest.approx(1, abs=0.05)
    assert diversity(true_readings([(person, photo)] * 400), bare) == 0
    with pytest.raises(ValueError, match="two seeds"):
        diversity(varied[:11], prompts)


def test_variety_of_the_world_and_of_one_person():
    world = variety(_random_pictures(2000))
    assert all(world[name] < 0.06 for name in ATTRIBUTES)
    assert all(world[name] == pytest.approx(1, abs=0.06) for name in GEOMETRY)
    one = variety(Readings(*(np.repeat(x[:1], 50, 0) for x in vars(_random_pictures(1)).values())))
    assert one["hair_shape"] > 0.8 and one["face_width"] == pytest.approx(0, abs=1e-5)
