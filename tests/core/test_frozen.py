"""What version 1.0 promised: its files are read for ever, and mean the same people.

``frozen/`` was written by `make_frozen`; its ``expected.safetensors`` holds what each person does to each layer.
"""

from pathlib import Path

import pytest
import safetensors.torch
import torch

from .make_frozen import LAYOUT, LEARNED, PEOPLE, PREDICTED, changes, person, read

FROZEN = Path(__file__).with_name("frozen")
EXPECTED = safetensors.torch.load_file(FROZEN / "expected.safetensors")


@pytest.mark.parametrize("name", PEOPLE)
def test_a_person_does_what_they_did(name):
    one = read(FROZEN, name)
    assert one.layout == LAYOUT
    for layer, change in changes(one).items():
        assert change.norm() > 0.01
        torch.testing.assert_close(change, EXPECTED[f"{name}/{layer}"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", [name for name in PEOPLE if name != PREDICTED])
def test_a_person_says_what_they_said(name):
    one = read(FROZEN, name)
    assert one.about == person(one.basis).about
    assert one.basis.dims(LAYOUT.layers[0]) == (10, 6) and bool(one.basis.learned) == (name == LEARNED)


def test_a_prediction_says_what_it_said():
    about = read(FROZEN, PREDICTED).about
    assert (about.made_from, about.prompt, about.token, about.photos, about.steps) == ("a prediction", "a [v] face", "[v]", 2, 0)  # fmt: skip
