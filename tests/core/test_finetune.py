"""The fast fine-tune on a real, small optimisation."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from hdb_core.adapters import Adapters, attach
from hdb_core.basis import BasisRecipe
from hdb_core.diffusion import Batch, LossScale, NoiseLevels, diffusion_loss, weighted_errors
from hdb_core.errors import FinetuneError, LayoutError
from hdb_core.finetuning import FinetuneConfig, FinetuneDiverged, MemoryPlan, finetune, sample
from hdb_core.finetuning.batches import BatchSampler, latent_mask
from hdb_core.finetuning.factors import TrainableFactors, start_factors
from hdb_core.finetuning.prior import beside_own_answers
from hdb_core.layout import Layout
from hdb_core.lidb import About, LiDB, core, expand, norm, start_down
from hdb_core.recommended import (
    BY_TOKEN,
    FROM_PHOTO,
    FROM_PHOTOS,
    FROM_PREDICTION,
    PREDICTED_BY_TOKEN,
    RECOMMENDED,
)

close = torch.testing.assert_close
CONFIG = FinetuneConfig(steps=3, rank=2, batch_size=3, noise=NoiseLevels(), train_text_encoder=True)


@pytest.fixture
def config(recipe):
    return replace(CONFIG, basis=recipe)


def loss_with(toy, lidb, latents, config):
    """The mean loss over many fixed (noise, timestep) pairs."""
    sampler = BatchSampler(toy.sigmas(), latents, replace(config, batch_size=64, seed=99))
    with torch.no_grad(), attach(toy.modules, expand(lidb)):
        return diffusion_loss(toy, sampler.draw(0), toy.encode_prompts(sampler.prompts(0))).item()


def frozen_state(toy):
    return {name: tensor.clone() for name, tensor in toy.net.state_dict().items()}


def test_v_weighting_is_the_error_of_v(toy, latents, config):
    """v = (noise − σ · latents) / √(σ² + 1), so its error is that of the latents times (σ² + 1) / σ²."""
    batch = BatchSampler(toy.sigmas(), latents, config).draw(0)
    noisy = toy.add_noise(batch.latents, batch.noise, batch.sigma)
    conditioning = toy.encode_prompts([config.prompt] * len(batch.sigma))
    denoised, s = toy.denoise(noisy, batch.sigma, conditioning), batch.sigma.view(-1, 1, 1, 1)
    v, predicted = ((noisy - x) / s / (s**2 + 1).sqrt() - s * x / (s**2 + 1).sqrt() for x in (batch.latents, denoised))
    loss = diffusion_loss(toy, NoiseLevels().weighted(toy, batch), conditioning)
    close(loss, (v - predicted).square().mean())
    assert NoiseLevels(weighting="native").weighted(toy, batch) is batch


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"noise": NoiseLevels(weighting="native")},
        {"train_text_encoder": False},
        {"down_rate": 0.0},
        {"down_rate": 1.0},
        {"noise": NoiseLevels(0.3, 0.9)},
        {"rank": 1, "batch_size": 1},
        {"basis": BasisRecipe(3, 28, 26)},  # wider than the text layers
    ],
    ids=str,
)
def test_the_loss_falls_and_the_model_stays(toy, latents, config, options):
    config = replace(config, steps=60, **options)
    before = frozen_state(toy)
    result = finetune(toy, latents, config)
    assert len(result.losses) == 60 and all(map(math.isfinite, result.losses))
    assert result.lidb.rank == config.rank
    empty = LiDB(toy.layout, config.basis, result.lidb.down, torch.zeros_like(result.lidb.up))
    assert loss_with(toy, result.lidb, latents, config) < 0.9 * loss_with(toy, empty, latents, config)
    assert all(torch.equal(tensor, before[name]) for name, tensor in toy.net.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in toy.net.parameters())
    assert not any(module._forward_hooks for module in toy.modules.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_activations_train_float32_factors(toy_of_dtype, latents, config, dtype):
    result = finetune(toy_of_dtype(dtype), latents, replace(config, steps=40))
    assert result.lidb.up.dtype == torch.float32
    assert sum(result.losses[-10:]) < 0.9 * sum(result.losses[:10])


def test_an_overflow_halves_the_loss_scale_and_loses_no_step(toy_of_dtype, latents, config):
    """A model that multiplies its gradient by 256 on the way, which float16 bears only at a low scale."""

    class Steep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * 256

    toy = toy_of_dtype(torch.float16)
    expected = finetune(toy, latents, replace(config, steps=3))
    toy.net["project_out"].register_forward_pre_hook(lambda _, given: (Steep.apply(given[0]),))
    result = finetune(toy, latents, replace(config, steps=3))
    # Adam's steps do not depend on the gradients' size.
    close(torch.tensor(result.losses), torch.tensor(expected.losses), rtol=2e-2, atol=1e-2)
    scale, up = LossScale(2.0**14), torch.zeros(3, requires_grad=True)
    found = scale.backward(lambda: [(up.half() * 8).sum().float() * 100], [up])
    assert found == (0.0, pytest.approx(800 * 3**0.5), []) and 1 < scale.value <= 2**7
    assert not math.isfinite(scale.backward(lambda: [up.sum() * math.inf], [up]).loss)


def limited(toy, samples):
    """The toy on a device whose memory ends behind so many samples, or so many blocks of one that keep their insides."""
    denoise = toy.denoise

    def out_of_memory(noisy, sigma, conditioning):
        toy.tried.append(len(noisy))
        recomputed = any("forward" in block.__dict__ for block in toy.net["blocks"])
        if len(noisy) > samples * (4 if recomputed else 1):
            held.append(torch.zeros(1))
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return denoise(noisy, sigma, conditioning)

    held, toy.tried, toy.denoise = [], [], out_of_memory
    return toy


def test_out_of_memory_takes_fewer_samples_at_once(toy, latents, config):
    config = replace(config, batch_size=5, steps=2)
    whole = finetune(toy, latents, config)
    parts = finetune(limited(toy, 2), latents, config)
    assert toy.tried == [5, 3, 2, 2, 1, 2, 2, 1]
    close(core(parts.lidb), core(whole.lidb), atol=1e-4, rtol=1e-3)


def test_out_of_memory_with_one_sample_computes_blocks_twice(toy, latents, config):
    blocks, config = list(toy.net["blocks"]), replace(config, batch_size=2, steps=2)
    whole = finetune(toy, latents, config)
    parts = finetune(limited(toy, 0.5), latents, config, memory=MemoryPlan(blocks=blocks))
    assert toy.tried == [2, 1, 1, 1, 1, 1]
    close(core(parts.lidb), core(whole.lidb), atol=1e-4, rtol=1e-3)
    assert not any("forward" in block.__dict__ for block in blocks)
    toy.tried.clear()
    finetune(toy, latents, config, memory=MemoryPlan(recompute=True, blocks=blocks))
    assert toy.tried == [2, 2]


def test_what_does_not_fit_at_all_is_said(toy, latents, config):
    blocks = list(toy.net["blocks"])
    plan = MemoryPlan(blocks=blocks, what_fits="384 pixels would fit.")
    with pytest.raises(FinetuneError, match=r"Out of memory.*384 pixels would fit\.$") as error:
        finetune(limited(toy, 0), latents, config, memory=plan)
    assert error.value.__context__ is None and toy.tried == [3, 2, 1, 1]
    assert not any("forward" in block.__dict__ for block in blocks)
    assert not any(module._forward_hooks for module in toy.modules.values())


def test_every_up_factor_has_a_gradient_at_the_first_step(toy, latents, config):
    factors = TrainableFactors(Adapters(config.basis, toy.layout), config)
    sampler = BatchSampler(toy.sigmas(), latents, config)
    with attach(toy.modules, factors()):
        diffusion_loss(toy, sampler.draw(0), toy.encode_prompts(sampler.prompts(0))).backward()
    assert (factors.up.grad[:, :, 0].norm(dim=1) > 0).all()


def test_steps_draw_different_noise_and_timesteps(toy, latents, config):
    sampler = BatchSampler(toy.sigmas(), latents, config)
    first, second = sampler.draw(0), sampler.draw(1)
    assert (first.noise - second.noise).abs().mean() > 0.1
    assert set(first.sigma.tolist()).isdisjoint(second.sigma.tolist())
    assert len(first.noise.unique()) == first.noise.numel()


@pytest.mark.parametrize("span", [(0.0, 1.0), (0.25, 0.5), (0.999, 1.0)])
def test_timesteps_cover_their_range_evenly(toy, latents, span):
    config = replace(CONFIG, batch_size=4, noise=NoiseLevels(*span))
    table = toy.sigmas()
    sampler = BatchSampler(table, latents, config)
    drawn = torch.cat([sampler.draw(step).sigma for step in range(50)])
    index = torch.searchsorted(table, drawn) / len(table)
    assert span[0] - 1 / len(table) <= index.min() and index.max() < span[1]
    if span[1] - span[0] > 0.1:
        quarters = ((index - span[0]) / (span[1] - span[0]) * 4).long()
        assert torch.bincount(quarters, minlength=4).tolist() == pytest.approx([50] * 4, abs=2)


def test_photos_take_turns_at_all_noise_levels(toy):
    photos = torch.arange(2.0).reshape(2, 1, 1, 1).expand(2, 4, 6, 6)
    sampler = BatchSampler(toy.sigmas(), photos, replace(CONFIG, batch_size=2))
    middle = toy.sigmas().median()
    low = {photo: 0 for photo in (0.0, 1.0)}
    for step in range(40):
        batch = sampler.draw(step)
        assert sorted(batch.latents[:, 0, 0, 0].tolist()) == [0.0, 1.0]
        for photo, sigma in zip(batch.latents[:, 0, 0, 0].tolist(), batch.sigma, strict=True):
            low[photo] += bool(sigma <= middle)
    assert min(low.values()) > 10


def test_same_seed_same_person(toy, latents, config):
    first, again, other = (finetune(toy, latents, replace(config, seed=seed)) for seed in (4, 4, 5))
    assert torch.equal(first.lidb.up, again.lidb.up) and torch.equal(first.lidb.down, again.lidb.down)
    assert first.losses == again.losses
    assert not torch.equal(first.lidb.up, other.lidb.up)


def test_the_global_generator_is_not_touched(toy, latents, config):
    state = torch.get_rng_state()
    finetune(toy, latents, config)
    assert torch.equal(torch.get_rng_state(), state)


def test_adapters_of_another_basis_are_refused(toy, latents, make_lidb, config):
    person = make_lidb(0, 2)
    other = Adapters(replace(person.basis, seed=person.basis.seed + 1), toy.layout)
    with pytest.raises(FinetuneError, match="adapters are of another basis"):
        finetune(toy, latents, config, init=person, adapters=other)


def test_a_warm_start_is_exactly_the_given_person(toy, make_lidb):
    init = make_lidb(0, 2)
    down, up = start_factors(init.basis, toy.layout, 4, init)
    assert torch.equal((up[:, :, :2, None] * down[:, None, :2]), (init.up[..., None] * init.down[:, None]))
    assert up[:, :, 2:].abs().sum() == 0
    assert torch.equal(down[:, 2:], start_down(init.basis, toy.layout, 4)[:, 2:])
    length = down[:, :2].norm(dim=2)
    assert (length > 0.7).all() and (length < 1.42).all()


def test_a_warm_start_goes_on_where_the_person_is(toy, latents, make_lidb, config):
    init = make_lidb(0, 1)
    init = LiDB(init.layout, init.basis, init.down * 0.1, init.up * 0.1, About(FROM_PREDICTION))
    result = finetune(toy, latents, replace(config, rank=3, learning_rate=1e-6), init=init)
    assert result.lidb.rank == 3
    assert (core(result.lidb) - core(init)).norm() < 1e-3 * norm(init)
    assert result.lidb.about.made_from == FROM_PREDICTION
    empty = finetune(toy, latents, replace(config, rank=3, learning_rate=1e-6))
    assert abs(result.losses[0] - empty.losses[0]) > 1e-4


def test_a_zero_person_is_a_cold_start(toy, latents, config):
    zero = torch.zeros(len(toy.layout.layers), 1, config.basis.down_dim)
    init = LiDB(toy.layout, config.basis, zero, torch.zeros(len(zero), config.basis.up_dim, 1))
    result = finetune(toy, latents, replace(config, rank=1), init=init)
    assert torch.equal(result.lidb.up, finetune(toy, latents, replace(config, rank=1)).lidb.up)
    assert (result.lidb.up != 0).any()


def test_frozen_sides_and_layers_do_not_move(toy, latents, config):
    frozen = finetune(toy, latents, replace(config, down_rate=0.0)).lidb
    assert torch.equal(frozen.down, start_down(config.basis, toy.layout, 2))
    free = finetune(toy, latents, config).lidb
    assert (free.down - frozen.down).abs().max() > 1e-4
    unet_only = finetune(toy, latents, replace(config, train_text_encoder=False)).lidb
    text = torch.tensor([layer.is_text for layer in toy.layout.layers])
    assert unet_only.up[text].abs().sum() == 0
    assert (unet_only.up[~text].abs().sum((1, 2)) > 0).all()
    assert torch.equal(unet_only.down[text], frozen.down[text])


def test_text_is_encoded_once_per_step_or_once_in_all(toy, latents, config):
    finetune(toy, latents, replace(config, steps=4))
    assert toy.encoded == [["a [v] face"] * 3] * 4
    toy.encoded.clear()
    finetune(toy, latents, replace(config, steps=4, train_text_encoder=False))
    assert len(toy.encoded) == 1


def test_every_photo_is_captioned_with_its_own_words(toy, config):
    latents = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    finetune(toy, latents, replace(config, steps=2, photo_words="smiling \n in a red shirt\n"))
    smiling, red = "a [v] face, smiling", "a [v] face, in a red shirt"
    assert toy.encoded == [[smiling, red, smiling], [red, smiling, red]]


@pytest.mark.parametrize("count", [1, 3])
def test_one_line_of_words_is_for_all_photos(config, count):
    assert replace(config, photo_words="smiling\n").captions(count) == ["a [v] face, smiling"] * count
    assert config.captions(count) == ["a [v] face"] * count


def test_as_many_lines_as_photos_are_one_each_blank_ones_too(config):
    red = "a [v] face, in a red shirt"
    assert replace(config, photo_words="in a red shirt\n\n").captions(3) == [red, "a [v] face", "a [v] face"]
    assert replace(config, photo_words="in a red shirt\n").captions(2) == [red, "a [v] face"]
    assert replace(config, photo_words="in a red shirt\n\n\n").captions(3) == [red, "a [v] face", "a [v] face"]


def test_a_photo_without_words_has_an_empty_line(config):
    words = replace(config, photo_words="\nsmiling\n\nat the beach\n\n")
    assert words.captions(4) == ["a [v] face", "a [v] face, smiling", "a [v] face", "a [v] face, at the beach"]
    with pytest.raises(FinetuneError, match="one for each of the 2 photos, got 4"):
        words.captions(2)
    with pytest.raises(FinetuneError, match="photo_words: lines of at most 2,000 characters, got 2001"):
        replace(config, photo_words=f"smiling\n{'x' * 2001}").captions(2)  # each step would encode them


def test_frozen_text_layers_of_a_given_person_still_act(toy, latents, make_lidb, config):
    init = make_lidb(0, 1)
    text = torch.tensor([layer.is_text for layer in toy.layout.layers])
    silent = LiDB(init.layout, init.basis, init.down, init.up * ~text[:, None, None])
    config = replace(config, steps=1, train_text_encoder=False)
    acting = finetune(toy, latents, config, init=init).losses[0]
    assert abs(acting - finetune(toy, latents, config, init=silent).losses[0]) > 1e-4


def test_class_prior_preservation_adds_its_weighted_samples(toy, latents, config):
    prior = torch.randn(5, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    sampler = BatchSampler(toy.sigmas(), latents, replace(config, prior_weight=0.5), prior_latents=prior)
    batch = sampler.draw(0)
    assert sampler.prompts(0) == ["a [v] face"] * 3 + ["a face"] * 3
    assert torch.equal(batch.latents, torch.cat([latents.expand(3, -1, -1, -1), prior[:3]]))
    close(batch.weight, torch.tensor([1 / 3] * 3 + [0.5 / 3] * 3))
    result = finetune(toy, latents, replace(config, prior_weight=0.5), prior_latents=prior)
    assert toy.encoded[0] == sampler.prompts(0)
    assert not torch.equal(result.lidb.up, finetune(toy, latents, config).lidb.up)


def class_answer(toy, latents, config, lidb=None):
    """What the toy, or a person on it, makes of noisy photos under the class prompt."""
    batch = BatchSampler(toy.sigmas(), latents, replace(config, seed=9)).draw(0)
    noisy = toy.add_noise(batch.latents, batch.noise, batch.sigma)
    factors = {} if lidb is None else expand(lidb)
    with torch.no_grad(), attach(toy.modules, factors):
        return toy.denoise(noisy, batch.sigma, toy.encode_prompts(["a face"] * len(noisy)))


def test_own_answers_are_the_same_noisy_photos_as_the_base_model_denoises_them(toy, latents, config):
    batch = BatchSampler(toy.sigmas(), latents, config).draw(0)
    both = beside_own_answers(toy, batch, ["a face"] * 3, toy.encode_prompts, 0.5, at_once=2)
    own = Batch(*(tensor[3:] for tensor in both))
    assert all(torch.equal(tensor[:3], first) for tensor, first in zip(both, batch, strict=True))
    noisy = toy.add_noise(batch.latents, batch.noise, batch.sigma)
    close(toy.add_noise(own.latents, own.noise, own.sigma), noisy, atol=1e-4, rtol=1e-4)
    close(own.latents, toy.denoise(noisy, batch.sigma, toy.encode_prompts(["a face"] * 3)))
    close(own.weight, batch.weight / 2)


@pytest.mark.parametrize("text", [True, False])
def test_without_pictures_the_class_prompt_keeps_the_base_models_own_answers(toy, latents, config, text):
    config = replace(config, steps=30, learning_rate=0.02, train_text_encoder=text)
    base = class_answer(toy, latents, config)
    free, kept = (finetune(toy, latents, replace(config, prior_weight=weight)) for weight in (0.0, 20.0))
    assert kept.losses[0] == pytest.approx(free.losses[0])  # a person without effect moves nothing
    moved = [(class_answer(toy, latents, config, result.lidb) - base).square().mean() for result in (free, kept)]
    assert moved[1] < 0.5 * moved[0]


def test_own_answers_are_those_without_a_person_to_begin_with(toy, latents, make_lidb, config):
    init = make_lidb(0, 1)
    config = replace(config, steps=30, learning_rate=0.02, prior_weight=1000.0)
    base, before = class_answer(toy, latents, config), class_answer(toy, latents, config, init)
    after = class_answer(toy, latents, config, finetune(toy, latents, config, init=init).lidb)
    assert (after - base).square().mean() < 0.5 * (before - base).square().mean()


@pytest.mark.parametrize("text", [True, False])
def test_a_step_in_parts_is_the_whole_step(toy, latents, config, text):
    prior = torch.randn(5, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    config = replace(config, steps=5, prior_weight=0.5, train_text_encoder=text)
    whole = finetune(toy, latents, config, prior_latents=prior)
    toy.encoded.clear()
    parts = finetune(toy, latents, config, prior_latents=prior, memory=MemoryPlan(4))
    assert list(map(len, toy.encoded)) == [4, 2] * (5 if text else 1)
    close(torch.tensor(parts.losses), torch.tensor(whole.losses))
    close(core(parts.lidb), core(whole.lidb), atol=1e-4, rtol=1e-3)


def test_only_the_masked_region_counts(toy, latents, config):
    mask = torch.zeros(48, 48)
    mask[:24] = 1
    changed = latents.clone()
    sampler = BatchSampler(toy.sigmas(), changed, config, mask)
    batch = sampler.draw(0)
    assert batch.mask[:, :, 3:].abs().sum() == 0
    close(batch.mask.mean((1, 2, 3)), torch.ones(3))
    conditioning = toy.encode_prompts(sampler.prompts(0))
    toy.denoise = lambda noisy, sigma, conditioning: torch.zeros_like(noisy)
    loss = diffusion_loss(toy, batch, conditioning)
    outside = batch.latents.clone()
    outside[:, :, 3:] += 7
    close(diffusion_loss(toy, batch._replace(latents=outside), conditioning), loss)
    expected = (batch.latents[:, :, :3].square().mean((1, 2, 3)) / batch.sigma**2).mean()
    close(loss, expected)


def test_v_weighting_of_a_flow_model(toy, latents, config):
    """Noisy latents (1 − σ) · latents + σ · noise hold σ/(1 − σ) parts of noise, whose error counts 1/σ²."""
    toy.noise_ratio = lambda sigma: sigma / (1 - sigma)
    batch = BatchSampler(torch.linspace(0.1, 0.9, 9), latents, config).draw(0)
    s = batch.sigma
    close(NoiseLevels().weighted(toy, batch).weight, batch.weight * ((1 - s) ** 2 + s**2))


def test_one_frame_of_a_video_model_counts_as_a_picture(toy, latents, config):
    mask = torch.zeros(48, 48)
    mask[:, :24] = 1
    picture = BatchSampler(toy.sigmas(), latents, config, mask).draw(0)
    frame = BatchSampler(toy.sigmas(), latents[:, :, None], config, mask).draw(0)
    assert frame.latents.shape == (len(frame.sigma), *latents.shape[1:2], 1, *latents.shape[2:])
    error = torch.rand(picture.latents.shape, generator=torch.Generator().manual_seed(0))
    close(weighted_errors(error[:, :, None], frame), weighted_errors(error, picture))


@pytest.mark.parametrize("shape", [(48, 48), (1, 48, 48), (2, 48, 48), (2, 1, 12, 12)])
def test_masks_of_every_shape(shape):
    mask = latent_mask(torch.ones(shape), torch.zeros(2, 4, 6, 6))
    assert torch.equal(mask, torch.ones(2, 1, 6, 6))


def test_progress_is_reported_after_every_step(toy, latents, config):
    seen = []
    result = finetune(toy, latents, config, callback=seen.append)
    assert [p.step for p in seen] == [1, 2, 3]
    assert {p.total for p in seen} == {3}
    assert tuple(p.loss for p in seen) == result.losses
    assert seen[0].seconds <= seen[1].seconds <= seen[2].seconds <= result.seconds
    assert seen[-1].remaining_seconds == 0 < seen[0].remaining_seconds


@pytest.mark.parametrize("stop_at", [1, 2])
def test_an_interruption_passes_through_and_leaves_the_model_as_it_was(toy, latents, config, stop_at):
    class Interrupted(BaseException):
        pass

    def interrupt(progress):
        if progress.step == stop_at:
            raise Interrupted

    before = frozen_state(toy)
    with pytest.raises(Interrupted):
        finetune(toy, latents, config, callback=interrupt)
    assert all(torch.equal(tensor, before[name]) for name, tensor in toy.net.state_dict().items())
    assert not any(module._forward_hooks for module in toy.modules.values())


def test_the_person_so_far_is_the_one_that_training_went_through(toy, latents, config):
    """Of rank, steps and numbers of a training that ends there; one that goes on is not disturbed by looking."""
    seen = []
    result = finetune(toy, latents, config, callback=lambda progress: seen.append(progress.person()))
    shorter = finetune(toy, latents, replace(config, steps=2)).lidb
    assert torch.equal(seen[1].up, shorter.up) and torch.equal(seen[1].down, shorter.down)
    assert [lidb.about.steps for lidb in seen] == [1, 2, 3] and seen[1].about == shorter.about
    assert torch.equal(result.lidb.up, finetune(toy, latents, config).lidb.up)


def test_a_sample_picture_shows_the_person_as_they_are(toy, latents, config):
    """It starts from the noise that it is given, follows the person, and does not disturb the training."""
    noise, pictures = torch.randn(1, *latents.shape[1:], generator=torch.Generator().manual_seed(8)), []
    config = replace(config, learning_rate=0.1)

    def look(progress):
        pictures.append(sample(toy, progress.attached(), config.prompt, noise))

    base = sample(toy, toy.encode_prompts, config.prompt, noise)
    result = finetune(toy, latents, config, callback=look)
    assert torch.equal(result.lidb.up, finetune(toy, latents, config).lidb.up)
    assert all(picture.shape == noise.shape and bool(picture.isfinite().all()) for picture in pictures)
    steps = [(after - before).norm() for before, after in pairwise([base, *pictures])]
    assert min(steps) > 0
    with attach(toy.modules, expand(result.lidb)), torch.no_grad():
        torch.testing.assert_close(sample(toy, toy.encode_prompts, config.prompt, noise), pictures[-1])


def test_nan_stops_and_keeps_the_last_good_person(toy, latents, config):
    sound, calls = toy.denoise, []

    def nan_at_the_third_step(*args):
        calls.append(1)
        return sound(*args) * (math.nan if len(calls) == 3 else 1)

    toy.denoise = nan_at_the_third_step
    with pytest.raises(FinetuneDiverged, match=r"step 3 of 5.*Lower learning_rate") as error:
        finetune(toy, latents, replace(config, steps=5))
    assert error.value.step == 3 and len(error.value.losses) == 2
    toy.denoise = sound
    assert torch.equal(error.value.lidb.up, finetune(toy, latents, replace(config, steps=1)).lidb.up)


def test_much_noise_is_no_explosion(toy, latents, config):
    """Single noise levels in turn: an error of v is up to 200 times that of ε, where there is much noise."""
    config = replace(config, steps=20, batch_size=1, learning_rate=1e-6)
    losses = finetune(toy, latents, config).losses
    assert max(losses) > 10 * max(1, losses[0])


def test_an_exploding_loss_stops_before_it_is_infinite(toy, latents, config):
    losses = []
    with pytest.raises(FinetuneDiverged, match=r"its loss is \d") as error:
        finetune(toy, latents, replace(config, steps=40, learning_rate=20.0), callback=lambda p: losses.append(p.loss))
    assert error.value.losses == tuple(losses) and max(losses) < 100
    assert error.value.lidb.up.isfinite().all()


def test_works_inside_inference_mode(toy, latents, config):
    expected = finetune(toy, latents, config)
    with torch.inference_mode():
        given = latents.clone()
        init = LiDB(toy.layout, config.basis, expected.lidb.down.clone(), expected.lidb.up.clone())
        result = finetune(toy, given, config, mask=torch.ones(6, 6), init=init)
    assert result.lidb.rank == 2 and not result.lidb.up.is_inference()


def test_the_person_says_how_it_was_made(toy, latents, config):
    made = finetune(toy, latents, replace(config, prompt="a sks face")).lidb.about
    assert made == About(FROM_PHOTO, "a sks face", "sks", 1, 3, RECOMMENDED[FROM_PHOTO].strengths)
    several = finetune(toy, latents.repeat(2, 1, 1, 1), config).lidb.about
    assert (several.made_from, several.photos) == (FROM_PHOTOS, 2)
    assert several.strengths == RECOMMENDED[FROM_PHOTOS].strengths


@pytest.mark.parametrize(("text", "weight"), [(True, 1.0), (True, 0.0), (False, 1.0)])
def test_whom_the_token_alone_means_is_applied_as_a_lora(toy, latents, config, text, weight):
    config = replace(config, train_text_encoder=text, prior_weight=weight)
    alone, usual = BY_TOKEN, RECOMMENDED[FROM_PHOTO].strengths
    assert finetune(toy, latents, config).lidb.about.strengths == (alone if text and weight else usual)


@pytest.mark.parametrize("strengths", [BY_TOKEN, PREDICTED_BY_TOKEN])
def test_whom_the_token_means_stays_so_in_further_steps(toy, latents, make_lidb, config, strengths):
    predicted = replace(make_lidb(0, 1), about=About(FROM_PREDICTION, strengths=strengths))
    assert finetune(toy, latents, config, init=predicted).lidb.about.strengths == strengths


def test_a_person_who_goes_on_keeps_the_name_and_counts_all_steps(toy, latents, config):
    first = finetune(toy, latents, config).lidb
    named = replace(first, about=replace(first.about, name="Anna"))
    about = finetune(toy, latents, config, init=named).lidb.about
    assert (about.name, about.steps, about.made_from) == ("Anna", 6, FROM_PHOTO)


@pytest.mark.parametrize(("photos", "source"), [(1, FROM_PHOTO), (3, FROM_PHOTOS), (1, FROM_PREDICTION)])
def test_automatic_steps_are_the_recommended_ones(toy, latents, make_lidb, config, photos, source):
    """Those of what the person is made from: until enough is learned, and no more than its most."""
    start = make_lidb(0, 1)
    init = replace(start, up=start.up * 0.01, about=About(source)) if source == FROM_PREDICTION else None
    config = replace(config, steps=0, batch_size=4, train_text_encoder=False)
    photos = latents.repeat(photos, 1, 1, 1)
    learns = finetune(toy, photos, config, init=init)
    slowly = finetune(toy, photos, replace(config, learning_rate=1e-7), init=init)
    advised = RECOMMENDED[source]
    assert learns.learned.gained >= advised.enough > slowly.learned.gained
    assert learns.lidb.about.steps < slowly.lidb.about.steps == advised.most_steps
    assert learns.lidb.about.strengths == advised.strengths


@pytest.mark.parametrize(
    "setting",
    [
        {"steps": -1},
        {"rank": 0},
        {"rank": 51},
        {"batch_size": 0},
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"learning_rate": math.inf},
        {"down_rate": -1.0},
        {"down_rate": math.nan},
        {"prior_weight": -0.1},
        {"prompt": "  "},
        {"prompt": "a \ud83d face"},
        {"photo_words": "\ud83d"},
        {"prompt": "face " * 401},
        {"class_prompt": "", "prior_weight": 1.0},
    ],
    ids=str,
)
def test_settings_that_make_no_sense(setting):
    with pytest.raises(FinetuneError, match=next(iter(setting))):
        FinetuneConfig(**setting)


@pytest.mark.parametrize(
    ("levels", "message"),
    [((0.5, 0.5), "min_timestep"), ((0.0, 1.1), "max_timestep"), ((0.0, 1.0, "snr"), "weighting")],
)
def test_noise_levels_that_make_no_sense(levels, message):
    with pytest.raises(FinetuneError, match=message):
        NoiseLevels(*levels)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"latents": torch.zeros(0, 4, 6, 6)}, "at least one photo"),
        ({"latents": torch.zeros(4, 6, 6)}, "shape"),
        ({"latents": torch.full((1, 4, 6, 6), math.nan)}, "NaN"),
        ({"mask": torch.zeros(48, 48)}, "mask is empty"),
        ({"mask": torch.ones(3, 48, 48)}, "1 photos and 3 masks"),
        ({"mask": torch.full((48, 48), math.nan)}, "mask contains NaN"),
        ({"prior_weight": 1.0, "prior_latents": torch.zeros(1, 4, 8, 8)}, "width and height"),
    ],
)
def test_inputs_that_make_no_sense(toy, latents, config, arguments, message):
    config = replace(config, prior_weight=arguments.get("prior_weight", 0.0))
    inputs = {"latents": latents} | {name: value for name, value in arguments.items() if name != "prior_weight"}
    with pytest.raises(FinetuneError, match=message):
        finetune(toy, config=config, **inputs)
    assert toy.encoded == []


def test_a_person_of_higher_rank_keeps_its_rank(toy, latents, make_lidb, config):
    init = make_lidb(0, 3)
    result = finetune(toy, latents, replace(config, rank=1, learning_rate=1e-6), init=init).lidb
    assert result.rank == 3
    assert (core(result) - core(init)).norm() < 1e-3 * norm(init)


def test_a_rank_above_the_persons_basis_or_another_model_is_refused_early(toy, latents, make_lidb, config):
    rank = config.basis.max_rank + 1
    with pytest.raises(FinetuneError, match=f"at most {config.basis.max_rank}.* got {rank}"):
        finetune(toy, latents, replace(config, rank=rank, basis=BasisRecipe()), init=make_lidb(0, 3))
    init = make_lidb(0, 1)
    wider = tuple(replace(layer, in_features=layer.in_features + 1) for layer in init.layout.layers)
    stranger = LiDB(Layout("sdxl", wider), init.basis, init.down, init.up)
    with pytest.raises(LayoutError, match="SDXL"):
        finetune(toy, latents, config, init=stranger)
    assert toy.encoded == []
