"""The rare token of a prompt, one rule for both ways in which a person is made."""

from __future__ import annotations

import pytest

from hdb_core.finetuning import FinetuneConfig
from hdb_core.prompt import rare_token


@pytest.mark.parametrize(
    ("prompt", "class_prompt", "token"),
    [
        ("a [v] face", "a face", "[v]"),
        ("a photo of a [v] face, smiling", "a face", "[v]"),
        ("a [v], [w] face", "a face", "[v] [w]"),
        ("a [v]'s face", "a face", "[v]"),
        ("a [v] dog", "a [v] dog", "[v]"),
        ("a sks face", "a face", "sks"),
        ("a photo of ohwx woman", "a photo of woman", "ohwx"),
        ("a face", "a face", ""),
        ("a [] face", "a face", "[]"),
        ("", "a face", ""),
    ],
)
def test_rare_token(prompt, class_prompt, token):
    assert rare_token(prompt, class_prompt) == token


def test_a_fine_tune_uses_it():
    assert FinetuneConfig(prompt="a photo of a [v] face").token == "[v]"
    assert FinetuneConfig(prompt="a sks dog", class_prompt="a dog").token == "sks"
