"""Encoder and hypernetwork from people who are drawn while they train, on a tiny random diffusers model."""

import csv
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from hdb_core.files import hypernet as hypernet_file
from hdb_core.hypernet import network
from hdb_core.hypernet.encoder import PhotoEncoder
from hdb_core.train.beginning import load_encoder
from hdb_core.train.line import LineConfig
from miniature import checkpoint, crowd, predictor
from miniature.crowd import draw_group
from miniature.predictor import ENCODER_FILE, HYPERNET_FILE, turned


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


def test_a_predictor_goes_on_from_a_hypernetwork(trained, tmp_path, monkeypatch, capsys):
    path = trained("hypernet", "--encoder", str(trained("encoder") / ENCODER_FILE)) / HYPERNET_FILE
    net = hypernet_file.load(path)
    with torch.no_grad():
        net.offset += 5
        net.encoder.vit.layernorm.bias += 5
    hypernet_file.save(net, tmp_path / "known.safetensors", {})
    start = ["--start", str(tmp_path / "known.safetensors")]
    encoder = trained("encoder", *start) / ENCODER_FILE
    monkeypatch.setattr(predictor, "LineConfig", lambda: LineConfig(rows=8, kept=4, looked=8, batch=4, share=1e-3))
    line = ["--line-steps", "2"]
    gone_on = hypernet_file.load(trained("hypernet", *start, *line, "--encoder", str(encoder)) / HYPERNET_FILE)
    assert capsys.readouterr().out.count("missed ") == 2
    own = PhotoEncoder(gone_on.config.encoder)
    load_encoder(own, encoder)
    assert gone_on.config == net.config and (gone_on.offset - 5).abs().max() < 0.1
    assert (own.vit.layernorm.bias - 5).abs().max() < 0.1
    assert_close(dict(gone_on.encoder.state_dict()), dict(own.state_dict()), atol=1e-2, rtol=1e-2)  # halves in the file
    assert not torch.equal(gone_on.code_map, net.code_map)


def test_codes_are_turned_into_the_coordinates_of_others():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(400, 12, generator=generator)
    turn = torch.linalg.qr(torch.randn(12, 12, generator=generator))[0][:, :8]
    noise = torch.randn(400, 8, generator=generator)
    read = 0.5 * (codes @ turn) + 0.2 * noise + 3  # as an encoder that misses much
    assert (turned(codes, read) - codes @ turn).square().mean() < 0.01


@pytest.mark.parametrize("made", [Path("hypernet") / HYPERNET_FILE, Path("token") / "hypernet.safetensors"])
def test_a_trained_hypernetwork_is_taken_over(tmp_path, made):
    weights = tmp_path / "weights"
    for folder in (weights, (tmp_path / made).parent):
        folder.mkdir()
    (tmp_path / made).write_bytes(b"trained")
    checkpoint._pack(tmp_path, weights)
    assert {path.name: path.read_bytes() for path in weights.iterdir()} == {HYPERNET_FILE: b"trained"}
