"""What is read off linearly is what is there."""

from statistics import fmean, stdev

import pytest
import torch

from benchmarks.probe import ITEMS, correlated, explained, truth
from miniature.people import sample_person


def test_what_is_there_is_explained_and_what_is_not_is_not():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(800, 3, generator=generator)
    inputs = hidden[:, :2] @ torch.randn(2, 20, generator=generator) + 0.1 * torch.randn(800, 20, generator=generator)
    (first, second, absent), errors = explained(inputs, hidden)
    assert first > 0.95 and second > 0.95 and absent < 0.1
    assert 0 < errors[0] < 0.01 and errors[:2].max() < errors[2]


def test_the_standard_error_is_the_spread_over_samples_of_people():
    found, said = [], []
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(400, 4, generator=generator)
        targets = inputs[:, :1] + torch.randn(400, 1, generator=generator)
        share, error = explained(inputs, targets)
        found.append(float(share))
        said.append(float(error))
    assert 0.75 < fmean(said) / stdev(found) < 1.33


def test_what_a_line_through_readings_explains():
    generator = torch.Generator().manual_seed(0)
    targets = torch.rand(500, 3, generator=generator)
    noise = torch.rand(500, 3, generator=generator)
    shares, errors = correlated(-2 * targets + torch.tensor([0.0, 2.0, 1e3]) * noise, targets)
    assert shares[0] == pytest.approx(1) and abs(shares[1] - 0.5) < 3 * errors[1] and shares[2] < 0.02
    assert errors[0] == pytest.approx(0, abs=1e-9) and 0.01 < errors[1] < 0.05


def test_every_item_has_a_truth():
    assert len(truth(sample_person(1))) == len(ITEMS)
