"""A step of training in parts gives the gradients of the whole."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from hdb_core.errors import FinetuneError, HyperNetError
from hdb_core.hypernet import EncoderConfig, HyperNet, HyperNetConfig
from hdb_core.training.faces import PhotoPixels
from hdb_core.training.fit import FitConfig
from hdb_core.training.loop import FromFaces, PersonLoss, TrainConfig
from hdb_core.training.people import FittedPerson
from hdb_core.training.photos import find_people
from hdb_core.training.pretrain import PhotoLoss
from hdb_core.training.trainer import backward, parts_of


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True, mixed_precision="no")


@pytest.fixture
def loss_of(toy, recipe, tmp_path):
    """Five people with two photos each, some with a mask; six in a batch, each seen augmented and denoised twice."""
    for i in range(10):
        (tmp_path / str(i // 2)).mkdir(exist_ok=True)
        Image.effect_noise((32, 32), 20 + 20 * i).save(tmp_path / str(i // 2) / f"{i}.png")
        if i % 4 == 1:
            Image.linear_gradient("L").rotate(90 * i).save(tmp_path / str(i // 2) / f"{i}.mask.png")
    generator = torch.Generator().manual_seed(0)
    up = 0.1 * torch.randn(5, len(toy.layout.layers), recipe.up_dim, 1, generator=generator)
    latents = torch.randn(5, 2, 4, 6, 6, generator=generator)
    people = [FittedPerson(*row) for row in zip(find_people(tmp_path), latents, up, strict=True)]
    encoder = EncoderConfig(image_size=32, token_width=32, stem=((16, 1), (16, 1)), depth=1)
    config = HyperNetConfig(toy.layout, recipe, encoder, width=32, depth=1)
    return PersonLoss(
        toy,
        people,
        config,
        TrainConfig(people=6, draws=2, regression_weight=1),
        PhotoPixels(config.encoder, ("crop", "flip")),
    )


def gradients(loss_of, accelerator, accumulate):
    net = FromFaces(HyperNet.create(loss_of.net))
    losses = backward(accelerator, loss_of, net, 3, parts_of(6, accumulate, accelerator))
    return losses, torch.cat([w.grad.flatten() for w in net.parameters() if w.grad is not None])


@pytest.mark.parametrize("accumulate", [2, 3, 6])
def test_parts_add_up_to_the_whole(loss_of, accelerator, accumulate):
    whole, parts = (gradients(loss_of, accelerator, n) for n in (1, accumulate))
    for name, loss in whole[0].items():
        torch.testing.assert_close(parts[0][name], loss, atol=0, rtol=1e-5)
    assert (parts[1] - whole[1]).norm() < 1e-5 * whole[1].norm()


def test_every_step_draws_other_people_and_noise(loss_of, monkeypatch):
    toy, drawn = loss_of.denoiser, []
    add_noise, net = toy.add_noise, FromFaces(HyperNet.create(loss_of.net))
    monkeypatch.setattr(toy, "add_noise", lambda latents, noise, s: drawn.append((latents, noise, s)) or add_noise(latents, noise, s))  # fmt: skip
    for step in (3, 4, 3):
        loss_of(net, step)
    first, second, again = drawn
    assert not any(torch.equal(*pair) for pair in zip(first, second, strict=True))
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))


@pytest.mark.parametrize(
    "settings", [{"diffusion_weight": 0.0}, {"diffusion_start": 5}, {"diffusion_weight": 0.0, "regression_weight": 0.0}]
)
def test_a_training_without_a_loss_is_refused(settings):
    with pytest.raises(HyperNetError, match="No loss would count at the first step"):
        TrainConfig(**settings)
    assert TrainConfig(warmup=0).rate(0) > 0


@pytest.mark.parametrize("config", [TrainConfig, FitConfig])
@pytest.mark.parametrize(
    "settings", [{"weighting": "x0"}, {"min_timestep": 0.8, "max_timestep": 0.8}, {"max_timestep": 1.1}]
)
def test_settings_that_make_no_sense_are_refused(config, settings):
    with pytest.raises(FinetuneError, match=next(iter(settings))):
        config(**settings)


@pytest.mark.parametrize("accumulate", [0, 4])
def test_parts_must_be_even(accelerator, accumulate):
    with pytest.raises(HyperNetError, match="--people 6 must be a multiple of 1 processes"):
        parts_of(6, accumulate, accelerator)


def test_masks_and_augmentations_count(loss_of, accelerator, tmp_path):
    first, _ = gradients(loss_of, accelerator, 1)
    plain = PersonLoss(loss_of.denoiser, loss_of.people, loss_of.net, loss_of.config, PhotoPixels(loss_of.net.encoder))
    assert gradients(plain, accelerator, 1)[0]["diffusion"] != first["diffusion"]
    for mask in tmp_path.glob("*/*.mask.png"):
        Image.new("L", (8, 8), 255).save(mask)
    unmasked, _ = gradients(loss_of, accelerator, 1)
    assert unmasked["diffusion"] != first["diffusion"] and unmasked["regression"] == first["regression"]


def left_halves_masked(people, folder):
    """The same people with masks that are white on the left half of every photo."""
    left = Image.new("L", (32, 32))
    left.paste(255, (0, 0, 16, 32))
    for photo in folder.glob("*/?.png"):
        left.save(photo.with_suffix(".mask.png"))
    return [replace(p, person=person) for p, person in zip(people, find_people(folder), strict=True)]


def test_what_a_mask_leaves_out_counts_less_and_is_measured(loss_of, tmp_path, monkeypatch):
    monkeypatch.setattr(loss_of.denoiser, "denoise", lambda noisy, sigma, text: torch.zeros_like(noisy))
    people = left_halves_masked(loss_of.people, tmp_path)

    def losses(rest, where=slice(0)):
        changed = [replace(person, latents=person.latents.clone()) for person in people]
        for person in changed:
            person.latents[..., where] *= 2
        config = replace(loss_of.config, rest=rest)
        loss = PersonLoss(loss_of.denoiser, changed, loss_of.net, config, PhotoPixels(loss_of.net.encoder))
        net = FromFaces(HyperNet.create(loss_of.net))
        return loss(net, 3)["diffusion"].item(), loss.evaluate(net, 1, 1)

    inside, outside = slice(0, 2), slice(4, 6)  # of six places, the middle ones being partly masked
    alone, little, alike = (losses(rest, outside)[0] - losses(rest)[0] for rest in (0.0, 0.2, 1.0))
    assert alone == 0 < little < alike / 2
    (_, before), (_, in_face), (_, beside) = losses(0.2), losses(0.2, inside), losses(0.2, outside)
    assert beside["own"] == before["own"] and beside["own_outside"] > before["own_outside"]
    assert in_face["own_outside"] == before["own_outside"] and in_face["own"] > before["own"]


def test_pretraining_does_not_predict_what_masks_leave_out(loss_of, tmp_path):
    found = left_halves_masked(loss_of.people, tmp_path)

    def loss(places):
        changed = [replace(person, latents=person.latents.clone()) for person in found]
        for number, person in enumerate(changed):
            person.latents[:, :, :, places] += number
        faces = PhotoPixels(loss_of.net.encoder)
        pretraining = PhotoLoss(loss_of.denoiser, changed, faces, "a face", TrainConfig(people=4))
        count = len(pretraining.components.variance)
        return pretraining(lambda pixels, text: torch.ones(len(pixels), count), 0)["loss"]

    everywhere, right, nowhere = (loss(places) for places in (slice(None), slice(5, None), slice(0)))
    torch.testing.assert_close(right, nowhere)
    assert abs(everywhere - nowhere) > 1e-3
