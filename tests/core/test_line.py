"""The straight line from the face code to a person's weights, by least squares."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from hdb_core.diffusion import NoiseLevels
from hdb_core.hypernet import EncoderConfig, HyperNet, HyperNetConfig
from hdb_core.prompt import CLASS_PROMPT
from hdb_core.train.beginning import learn_code
from hdb_core.train.data.faces import PhotoPixels
from hdb_core.train.data.people import EncodedPerson
from hdb_core.train.data.photos import find_people
from hdb_core.train.face_code import codes_of, ridge_weights
from hdb_core.train.line import LineConfig, LineStep, least_squares
from hdb_core.train.predicted import PeopleInBase

PEOPLE, CODE = 24, 2
CONFIG = LineConfig(rows=96, kept=96, looked=96, batch=PEOPLE, bins=2, ridge=0.01, noise=NoiseLevels(0.45, 0.65))


@pytest.fixture
def base(toy, recipe, tmp_path):
    """People who differ in their photos' brightness and colour, and their portraits' latents in as many patterns."""
    generator = torch.Generator().manual_seed(0)
    own, patterns = torch.rand(PEOPLE, CODE, generator=generator), torch.randn(CODE, 4, 1, 1, generator=generator)
    for person, (light, red) in enumerate((200 * own + 50).int().tolist()):
        (tmp_path / f"{person:02}").mkdir()
        for number in range(2):
            Image.new("RGB", (32, 32), (red, light, light)).save(tmp_path / f"{person:02}" / f"{number}.png")
    latents = torch.einsum("nk,kchw->nchw", own - own.mean(0), patterns.expand(-1, -1, 6, 6))
    photos = torch.stack([latents, torch.randn(PEOPLE, 4, 6, 6, generator=generator)], 1).half()
    people = [EncodedPerson(*row) for row in zip(find_people(tmp_path), photos, strict=True)]
    encoder = EncoderConfig(image_size=32, token_width=32, stem=((16, 1), (16, 1)), depth=1)
    config = HyperNetConfig(toy.layout, recipe, encoder, width=32, depth=1, code=CODE)
    return PeopleInBase(toy, people, config, PhotoPixels(encoder))


@pytest.fixture
def net(base):
    net = HyperNet.create(base.net)
    learn_code(net, base, codes_of(base.people, CODE))
    return net


def test_a_row_is_how_a_component_moves_with_the_weights(base, net):
    before = LineStep(net, base, CONFIG).answers(PEOPLE, base.net.prompt)
    change = 1e-2 * torch.randn(net.direct.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        net.direct += change
    after = LineStep(net, base, CONFIG).answers(PEOPLE, base.net.prompt)
    moved = (before.missed - after.missed).gather(1, before.of[:, None])[:, 0]
    weights = torch.einsum("nk,lko->nlo", before.code, change).flatten(1)
    assert moved.abs().max() > 1e-4
    assert_close((before.rows * weights).sum(1), moved, rtol=0.05, atol=1e-5)


def test_steps_teach_the_code_and_leave_the_class_prompt(base, net):
    def asked(prompt, count=PEOPLE):
        return LineStep(net, base, CONFIG, seed=7).answers(count, prompt, rows=False)

    def untaught():
        """How what is missed depends on the code."""
        answers = asked(base.net.prompt, 16 * PEOPLE)
        return ridge_weights(answers.code, answers.missed, 1.0).norm()

    def moved(config):
        """How far three steps move the answers to the class prompt."""
        net.direct.data.zero_()
        before, step = asked(CLASS_PROMPT).missed, LineStep(net, base, config)
        told = [step() for _ in range(3)]
        assert all(row["change"] > 0 and row["missed"] > 0 for row in told)
        return (asked(CLASS_PROMPT).missed - before).norm()

    first, free, kept = untaught(), moved(replace(CONFIG, kept=0)), moved(CONFIG)
    assert untaught() < 0.6 * first and kept < 0.6 * free


def test_least_squares_is_the_smallest_solution():
    generator = torch.Generator().manual_seed(0)
    rows, targets = torch.randn(5, 40, generator=generator), torch.randn(5, 3, generator=generator)
    found = least_squares(rows, targets, 1e-7)
    assert_close(rows @ found, targets, rtol=1e-3, atol=1e-3)
    assert_close(found, torch.linalg.pinv(rows) @ targets, rtol=1e-3, atol=1e-3)
    assert least_squares(rows, targets, 10.0).norm() < 0.2 * found.norm()
