"""The shipped judges read people they never saw, through light damage, and only from pictures of the right form."""

from pathlib import Path

import numpy as np
import pytest
import torch

from miniature.drawing import photo
from miniature.judge import (
    ARCHITECTURES,
    ATTRIBUTES,
    FACTORS,
    NUM_OUTPUTS,
    Judge,
    damage,
    judge_loss,
    split_outputs,
    true_readings,
)
from miniature.people import GEOMETRY, SPLITS, sample_context, sample_person
from miniature.scores import gallery, identity

WEIGHTS = Path(__file__).parents[2] / "weights"
SUBJECTS = [(sample_person(s), sample_context(s + 500, "photo")) for s in SPLITS["dev"][30_000:30_120]]


@pytest.fixture(scope="module")
def pictures():
    return np.stack([photo(*subject) for subject in SUBJECTS])


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def judge(request):
    return Judge.load(request.param)


def test_true_readings_are_what_was_drawn():
    person, context = SUBJECTS[0]
    truth = true_readings(SUBJECTS[:3])
    assert [truth.value(name)[0] for name in ATTRIBUTES] == [
        getattr(person if hasattr(person, name) else context, name) for name in ATTRIBUTES
    ]
    np.testing.assert_allclose(truth.factors[0, : len(GEOMETRY)], person.geometry, rtol=1e-6)
    np.testing.assert_allclose((truth.factors[0, 10:] + 1) * 127.5, [*person.skin_rgb, *person.hair_rgb], atol=1e-3)
    assert len(true_readings([])) == 0


def test_reads_unseen_people(judge, pictures):
    readings, truth = judge.read(pictures), true_readings(SUBJECTS)
    right = (readings.names == truth.names).mean(0)
    accuracy = dict(zip(ATTRIBUTES, right, strict=True))
    # A skin between two names may carry either: even its exact RGB tells the word of only 97 %.
    assert accuracy.pop("skin") > 0.88
    assert min(accuracy.values()) > 0.95, accuracy
    error = np.abs(readings.factors - truth.factors).mean(0)
    assert error[: len(GEOMETRY)].mean() < 0.2 and error[len(GEOMETRY) :].mean() < 0.06
    hits = [identity(readings[i : i + 1], gallery(p))[0].argmax() == 0 for i, (p, _) in enumerate(SUBJECTS[:40])]
    assert np.mean(hits) > 0.95


def test_reads_damaged_pictures_nearly_as_well(judge, pictures):
    truth = true_readings(SUBJECTS)
    clean = (judge.read(pictures).names == truth.names).mean()
    damaged = (judge.read(damage(pictures, np.random.default_rng(1))).names == truth.names).mean()
    assert damaged > clean - 0.04


def test_reading_does_not_depend_on_the_batch(judge, pictures):
    together, alone = judge.read(pictures[:5]), judge.read(pictures[:5], batch=1)
    np.testing.assert_allclose(together.factors, alone.factors, atol=1e-4)
    assert len(judge.read(pictures[:0])) == 0


def test_refuses_other_pictures(judge, pictures):
    for wrong in (pictures[0], pictures[:, ::2], pictures.astype(np.float32)):
        with pytest.raises(ValueError, match="expected uint8"):
            judge.read(wrong)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_weights_are_small_halves(architecture):
    file = WEIGHTS / f"judge_{architecture}.safetensors"
    parameters = sum(p.numel() for p in ARCHITECTURES[architecture]().parameters())
    assert 2 * parameters < file.stat().st_size < 4_000_000


def test_the_loss_is_lowest_at_the_truth():
    truth = true_readings(SUBJECTS[:4])
    names, factors = torch.from_numpy(truth.names), torch.from_numpy(truth.factors)
    logits = [
        20.0 * torch.nn.functional.one_hot(names[:, i], len(values)) for i, values in enumerate(ATTRIBUTES.values())
    ]
    right = torch.cat([*logits, factors], 1)
    assert right.shape == (4, NUM_OUTPUTS) and split_outputs(right)[1].shape == (4, len(FACTORS))
    assert judge_loss(right, names, factors) < 1e-3
    assert judge_loss(right.roll(1, 0), names, factors) > 10


def test_damage_is_light_and_repeatable(pictures):
    damaged = damage(pictures[:40], np.random.default_rng(5))
    assert damaged.shape == (40, 128, 128, 3) and damaged.dtype == np.uint8
    np.testing.assert_array_equal(damaged, damage(pictures[:40], np.random.default_rng(5)))
    error = np.abs(damaged.astype(int) - pictures[:40]).mean((1, 2, 3))
    assert 1 < error.mean() < 12 and error.max() < 20
