"""What is read off linearly is what is there."""

import torch

from benchmarks.probe import ITEMS, explained, truth
from miniature.people import sample_person


def test_what_is_there_is_explained_and_what_is_not_is_not():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(800, 3, generator=generator)
    inputs = hidden[:, :2] @ torch.randn(2, 20, generator=generator) + 0.1 * torch.randn(800, 20, generator=generator)
    first, second, absent = explained(inputs, hidden).tolist()
    assert first > 0.95 and second > 0.95 and absent < 0.1


def test_every_item_has_a_truth():
    assert len(truth(sample_person(1))) == len(ITEMS)
