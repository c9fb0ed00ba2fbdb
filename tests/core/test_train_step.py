"""A step of training in parts gives the gradients of the whole."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from hdb_core.errors import FinetuneError, HyperNetError
from hdb_core.hypernet import EncoderConfig, HyperNet, HyperNetConfig
from hdb_core.lidb import Factors
from hdb_core.train.data.faces import PhotoPixels
from hdb_core.train.data.people import EncodedPerson
from hdb_core.train.data.photos import find_people
from hdb_core.train.encoder_loss import PhotoLoss, PretrainConfig
from hdb_core.train.evaluate import EvaluateConfig, evaluate
from hdb_core.train.loop import TrainingLoop, backward, parts_of
from hdb_core.train.person_loss import PersonLoss, TrainConfig
from hdb_core.train.predicted import FromFaces, PeopleInBase
from hdb_core.train.settings import Settings, changed


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True, mixed_precision="no")


@pytest.fixture
def loss_of(toy, recipe, tmp_path):
    """Five people with two photos each, some with a mask; six in a batch, each seen augmented."""
    for i in range(10):
        (tmp_path / str(i // 2)).mkdir(exist_ok=True)
        Image.effect_noise((32, 32), 20 + 20 * i).save(tmp_path / str(i // 2) / f"{i}.png")
        if i % 4 == 1:
            Image.linear_gradient("L").rotate(90 * i).save(tmp_path / str(i // 2) / f"{i}.mask.png")
    generator = torch.Generator().manual_seed(0)
    up = 0.1 * torch.randn(5, len(toy.layout.layers), recipe.up_dim, 1, generator=generator)
    latents = torch.randn(5, 2, 4, 6, 6, generator=generator)
    people = [EncodedPerson(*row) for row in zip(find_people(tmp_path), latents, up, strict=True)]
    encoder = EncoderConfig(image_size=32, token_width=32, stem=((16, 1), (16, 1)), depth=1)
    config = HyperNetConfig(toy.layout, recipe, encoder, width=32, depth=1)
    base = PeopleInBase(toy, people, config, PhotoPixels(config.encoder, ("crop", "flip")))
    return PersonLoss(base, TrainConfig(people=6, regression_weight=1))


def gradients(loss_of, accelerator, accumulate):
    net = FromFaces(HyperNet.create(loss_of.base.net))
    parts = [((3, part), loss_of.read(3, part)) for part in parts_of(6, accumulate, accelerator)]
    losses = backward(accelerator, loss_of, net, parts, accumulate)
    return losses, torch.cat([w.grad.flatten() for w in net.parameters() if w.grad is not None])


@pytest.mark.parametrize("accumulate", [2, 3, 6])
def test_parts_add_up_to_the_whole(loss_of, accelerator, accumulate):
    whole, parts = (gradients(loss_of, accelerator, n) for n in (1, accumulate))
    for name, loss in whole[0].items():
        torch.testing.assert_close(parts[0][name], loss, atol=0, rtol=1e-5)
    assert (parts[1] - whole[1]).norm() < 1e-5 * whole[1].norm()


def test_every_step_draws_other_people_and_noise(loss_of, monkeypatch):
    toy, drawn = loss_of.base.denoiser, []
    add_noise, net = toy.add_noise, FromFaces(HyperNet.create(loss_of.base.net))
    monkeypatch.setattr(toy, "add_noise", lambda latents, noise, s: drawn.append((latents, noise, s)) or add_noise(latents, noise, s))  # fmt: skip
    for step in (3, 4, 3):
        loss_of(net, step)
    first, second, again = drawn
    assert not any(torch.equal(*pair) for pair in zip(first, second, strict=True))
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))


def test_a_training_without_a_loss_is_refused():
    with pytest.raises(HyperNetError, match="Both losses are off"):
        TrainConfig(diffusion_weight=0.0)
    assert TrainConfig(warmup=0).rate(0) > 0


@pytest.mark.parametrize("section", ["train", "fit", "evaluate"])
@pytest.mark.parametrize("noise", [[0.8, 0.8], [0.0, 1.1]])
def test_noise_levels_that_make_no_sense_are_refused(section, noise):
    with pytest.raises(FinetuneError, match="min_timestep, max_timestep"):
        changed(Settings(), {f"{section}.noise": noise})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("train.step", 5, "no setting 'train.step'"), ("train", 5, "no setting 'train'"), ("rank.x", 1, "no setting 'rank.x'"),
     ("train.steps", "5", "train.steps: a whole number, got '5'"), ("cpu", 1, "cpu: true or false"),
     ("train.rest", "x", "train.rest: a number"), ("encoder.stem", 3, "encoder.stem: a list"), ("model", 3, "model: a text"),
     ("fit.noise", [0.1], "fit.noise: two numbers"), ("train.augment", ["tint"], "some of crop, flip, color, got 'tint'"),
     ("train.max_photos", 0, "at least 1"), ("train.rest", 1.5, "from 0 to 1"), ("train.people", 0, "people of at least 1"),
     ("rank", 0, "rank: at least 1"), ("image_size", 7, "image_size: at least 8 pixels"), ("held_out", 1.0, "held_out: a share"), ("overfit", -1, "overfit: from 0 to"),
     ("train.learning_rate", 1e308, "a learning_rate above 0"), ("pretrain.weight_decay", -0.1, "a weight_decay of at least 0"),
     ("train.max_grad_norm", -1.0, "a max_grad_norm above 0"), ("samples.steps", 0, "samples.steps: at least 1"), ("evaluate.draws", 0, "evaluate.draws: at least 1"),
     ("evaluate.photos", 10**9, "evaluate.photos: from 0 to 1,000"), ("train.max_photos", 10**9, "max_photos: from 0 to 1,000"),
     ("train.people", 10**9, "people: from 0 to 100,000"),
     ("samples.steps", 10**9, "samples.steps: from 0 to 1,000"), ("evaluate.draws", 10**9, "evaluate.draws: from 0 to 10,000"),
     ("fit.learning_rate", -1.0, "fit.learning_rate: above 0"), ("fit.learning_rate", 1e300, "above 0, at most 1000"),
     ("net.code", 0, "net.code: at least 1, got 0"), ("net.depth", 0, "net.depth: at least 1"), ("net.heads", 0, "net.heads: at least 1"),
     ("net.heads", 3, r"net.width: a multiple of net.heads \(3\), got 256"), ("encoder.heads", 0, "encoder.heads: at least 1"),
     ("basis.down_dim", 0, "basis.down_dim: at least 1"),
     ("mixed_precision", "fp8", "mixed_precision: no or bf16"), ("prediction_type", "x0", "prediction_type: epsilon")],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(name, value, message):
    with pytest.raises(HyperNetError, match=message):
        changed(Settings(), {name: value})


def test_augmentation_is_refused_behind_a_frozen_encoder():
    with pytest.raises(HyperNetError, match="augmented for a trained encoder only"):
        changed(Settings(), {"clip_vision": "encoder", "train.augment": ["flip"]})


@pytest.mark.parametrize("accumulate", [0, 4])
def test_parts_must_be_even(accelerator, accumulate):
    with pytest.raises(HyperNetError, match="6 people a step must be a multiple of 1 processes"):
        parts_of(6, accumulate, accelerator)


def test_masks_and_augmentations_count(loss_of, accelerator, tmp_path):
    first, _ = gradients(loss_of, accelerator, 1)
    base = loss_of.base
    plain = PersonLoss(
        PeopleInBase(base.denoiser, base.people, base.net, PhotoPixels(base.net.encoder)), loss_of.config
    )
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
    base = loss_of.base
    monkeypatch.setattr(base.denoiser, "denoise", lambda noisy, sigma, text: torch.zeros_like(noisy))
    people = left_halves_masked(base.people, tmp_path)

    def losses(rest, where=slice(0)):
        brighter = [replace(person, latents=person.latents.clone()) for person in people]
        for person in brighter:
            person.latents[..., where] *= 2
        own = PeopleInBase(base.denoiser, brighter, base.net, PhotoPixels(base.net.encoder))
        net = FromFaces(HyperNet.create(base.net))
        loss = PersonLoss(own, replace(loss_of.config, rest=rest))(net, 3)
        return loss["diffusion"].item(), evaluate(own, net, EvaluateConfig(), 1, 1)

    inside, outside = slice(0, 2), slice(4, 6)  # of six places, the middle ones being partly masked
    alone, little, alike = (losses(rest, outside)[0] - losses(rest)[0] for rest in (0.0, 0.2, 1.0))
    assert alone == 0 < little < alike / 2
    (_, before), (_, in_face), (_, beside) = losses(0.2), losses(0.2, inside), losses(0.2, outside)
    assert beside["own"] == before["own"] and beside["own_outside"] > before["own_outside"]
    assert in_face["own_outside"] == before["own_outside"] and in_face["own"] > before["own"]


def test_a_single_person_is_judged_without_others(loss_of):
    base = loss_of.base
    alone = PeopleInBase(base.denoiser, base.people[:1], base.net, PhotoPixels(base.net.encoder))
    row = evaluate(alone, FromFaces(HyperNet.create(base.net)), EvaluateConfig(draws=2), 1, 1)
    assert len(row["own_of_each"]) == 1 and "mean" not in row and "stranger" not in row
    assert row["own"] != row["base"]


def test_more_draws_judge_at_more_noise_levels(loss_of, monkeypatch):
    base, seen = loss_of.base, []
    add_noise = base.denoiser.add_noise
    monkeypatch.setattr(base.denoiser, "add_noise", lambda x, noise, s: seen.append(s) or add_noise(x, noise, s))
    evaluate(base, FromFaces(HyperNet.create(base.net)), EvaluateConfig(draws=3), 1, 1)
    assert len({tuple(sigma.tolist()) for sigma in seen}) == 3


def test_pretraining_does_not_predict_what_masks_leave_out(loss_of, tmp_path):
    base = loss_of.base
    found = left_halves_masked(base.people, tmp_path)

    def loss(places):
        shifted = [replace(person, latents=person.latents.clone()) for person in found]
        for number, person in enumerate(shifted):
            person.latents[:, :, :, places] += number
        faces = PhotoPixels(base.net.encoder)
        pretraining = PhotoLoss(base.denoiser, shifted, faces, "a face", PretrainConfig(people=4))
        count = len(pretraining.components.variance)
        return pretraining(lambda pixels, text: torch.ones(len(pixels), count), 0)["loss"]

    everywhere, right, nowhere = (loss(places) for places in (slice(None), slice(5, None), slice(0)))
    torch.testing.assert_close(right, nowhere)
    assert abs(everywhere - nowhere) > 1e-3


def test_the_class_prompt_is_kept_as_the_base_answers_it(loss_of, accelerator):
    base, config = loss_of.base, replace(loss_of.config, class_weight=2.0)
    kept = PersonLoss(base, config, class_prompt="a face")
    losses, slopes = gradients(kept, accelerator, 1)
    parts, summed = gradients(kept, accelerator, 3)  # the last of which keeps nothing
    torch.testing.assert_close(summed, slopes, atol=1e-6, rtol=1e-3)
    assert 0 < float(losses["class"]) < 1
    torch.testing.assert_close(parts["class"], losses["class"], atol=0, rtol=1e-4)
    without, others = gradients(loss_of, accelerator, 1)
    torch.testing.assert_close(losses["loss"], without["loss"] + 2 * losses["class"])
    assert not torch.allclose(slopes, others)


def test_whoever_changes_nothing_keeps_the_class_prompt(loss_of, monkeypatch):
    base, moved = loss_of.base, []
    find = base.moved_error

    def error(factors, batch, photos, prompt):
        moved.append(find(Factors(factors.down, torch.zeros_like(factors.up)), batch, photos, prompt))
        moved.append(find(factors, batch, photos, prompt))
        return moved[-1]

    monkeypatch.setattr(base, "moved_error", error)
    PersonLoss(base, replace(loss_of.config, class_weight=1.0))(FromFaces(HyperNet.create(base.net)), 0)
    nothing, something = moved
    assert nothing.mean() < 1e-8 * something.mean()  # rounding


def test_a_loss_reads_no_photos_by_itself(loss_of, monkeypatch):
    kept = PersonLoss(loss_of.base, replace(loss_of.config, class_weight=1.0))
    net = FromFaces(HyperNet.create(loss_of.base.net))
    given, expected = kept.read(2), kept(net, 2)
    for name in ("latents", "masks", "read_faces"):
        monkeypatch.setattr(kept.base, name, None)
    for name, loss in kept(net, 2, read=given).items():
        assert torch.equal(loss, expected[name])


def test_a_negative_class_weight_is_refused():
    with pytest.raises(HyperNetError, match="class_weight of 0 or more"):
        TrainConfig(class_weight=-1.0)


def test_a_clock_ends_a_training(loss_of, accelerator, tmp_path):
    steps = iter(range(100))
    net = FromFaces(HyperNet.create(loss_of.base.net))
    config = replace(loss_of.config, steps=0, warmup=1)
    loop = TrainingLoop(
        accelerator, net, config, tmp_path / "s", tmp_path / "log.csv", progress=lambda: next(steps) / 12
    )
    loop.run(loss_of, lambda: None)
    assert 2 <= loop.step < 12 and (tmp_path / "s").exists()
    assert config.rate(5, 0.5) == pytest.approx(config.learning_rate / 2)
    assert config.rate(5, 1.5) == pytest.approx(0)
