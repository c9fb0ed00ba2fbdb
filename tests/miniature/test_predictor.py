"""Encoder and hypernetwork from people who are drawn while they train, on a tiny random diffusers model."""

import csv
import sys
from pathlib import Path

import pytest

from hdb_core.files import hypernet as hypernet_file
from hdb_core.hypernet import network
from miniature import checkpoint, crowd, predictor
from miniature.crowd import draw_group
from miniature.predictor import ENCODER_FILE, HYPERNET_FILE


@pytest.fixture
def trained(model, tmp_path, monkeypatch):
    """A function that trains by some arguments for a few steps, in which more people are drawn; its folder."""
    folder = tmp_path / "crowd"
    folder.mkdir()
    monkeypatch.setattr(crowd, "GROUP", 4)
    monkeypatch.setattr(crowd, "LOOK_EVERY", -1.0)
    for number in range(3):
        draw_group(folder, number)
    grow = crowd.Crowd.grow
    monkeypatch.setattr(crowd.Crowd, "grow", lambda self, groups: grow(self, 1))  # the third when a step is read
    common = ["--crowd", str(folder), "--model", str(model), "--minutes", "0.02", "--batch", "4", "--first", "8",
              "--width", "32"]  # fmt: skip

    def train(what, *options):
        run, looks = tmp_path / what, iter(range(100))
        monkeypatch.setattr(predictor.Clock, "__call__", lambda self: next(looks) / 12)
        monkeypatch.setattr(sys, "argv", ["predictor", what, *common, "--run", str(run), "--device", "cpu", *options])
        predictor.main()
        (row,) = csv.DictReader((run / "log.csv").open())
        assert float(row["people"]) == 12 and float(row["loss"]) > 0
        return run

    return train


def test_a_predictor_of_a_growing_crowd(trained, monkeypatch):
    monkeypatch.setattr(network, "SEEN", 2)  # directions, for few people
    monkeypatch.setattr(network, "FEWEST_SEEN", 4)
    encoder = trained("encoder") / ENCODER_FILE
    net = hypernet_file.load(trained("hypernet", "--encoder", str(encoder)) / HYPERNET_FILE)
    assert not net.config.predict_down and net.code_map.any()
    assert net.seen_limit > 0  # it knows how the photos of its training look


@pytest.mark.parametrize("made", [Path("hypernet") / HYPERNET_FILE, Path("token") / "hypernet.safetensors"])
def test_a_trained_hypernetwork_is_taken_over(tmp_path, made):
    weights = tmp_path / "weights"
    for folder in (weights, (tmp_path / made).parent):
        folder.mkdir()
    (tmp_path / made).write_bytes(b"trained")
    checkpoint._pack(tmp_path, weights)
    assert {path.name: path.read_bytes() for path in weights.iterdir()} == {HYPERNET_FILE: b"trained"}
