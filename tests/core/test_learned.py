"""What a fine-tune has learned, and automatic steps that end by it."""

from dataclasses import replace

import pytest
import torch

from hdb_core import recommended
from hdb_core.adapters import attach
from hdb_core.diffusion import NoiseLevels
from hdb_core.finetuning import FinetuneConfig, MemoryPlan, finetune, learned
from hdb_core.finetuning.learned import CLASS_PAIRS, PAIRS, SHARE, TRAINED_SAMPLE, Learned, Meter, Watch
from hdb_core.lidb import LiDB, expand
from hdb_core.recommended import FROM_PHOTO, FROM_PREDICTION, Recommendation

close = torch.testing.assert_close
RATE = 0.004
CONFIG = FinetuneConfig(rank=2, noise=NoiseLevels(), learning_rate=RATE)


@pytest.fixture
def config(recipe):
    return replace(CONFIG, basis=recipe)


@pytest.fixture
def ends_at(monkeypatch):
    """Automatic steps from one photo: (share that is enough, the most steps)."""

    def recommend(enough, steps):
        strengths = recommended.RECOMMENDED[FROM_PHOTO].strengths
        for source in (FROM_PHOTO, FROM_PREDICTION):
            monkeypatch.setitem(recommended.RECOMMENDED, source, Recommendation(steps, strengths, enough))
        monkeypatch.setattr(recommended, "MOST", 1)

    return recommend


@pytest.fixture
def passes(toy, monkeypatch):
    """How many samples went through the model, by whether they were trained."""
    counted, sound = {True: [], False: []}, toy.denoise

    def denoise(noisy, *others):
        counted[torch.is_grad_enabled()].append(len(noisy))
        return sound(noisy, *others)

    monkeypatch.setattr(toy, "denoise", denoise)
    return counted


def test_a_training_at_double_the_rate_ends_earlier(toy, latents, config, ends_at):
    ends_at(0.25, 400)
    slow, fast = (finetune(toy, latents, replace(config, learning_rate=rate)) for rate in (RATE, 2 * RATE))
    assert len(fast.losses) < 0.75 * len(slow.losses) and len(slow.losses) < 400
    for result in (slow, fast):
        assert 0.25 <= result.learned.gained < 0.32
        assert result.lidb.about.steps == len(result.losses)


def test_a_training_that_learns_nothing_takes_the_most_steps(toy, latents, config, ends_at):
    ends_at(0.25, 50)
    result = finetune(toy, latents, replace(config, learning_rate=1e-6))
    assert len(result.losses) == 50 == result.lidb.about.steps
    assert abs(result.learned.gained) < 0.01


def test_without_a_share_that_is_enough_all_steps_are_taken(toy, latents, config, ends_at):
    ends_at(None, 30)
    result = finetune(toy, latents, config)
    assert len(result.losses) == 30 and result.learned.gained > 0.01


def test_an_automatic_training_is_the_same_again(toy, latents, config, ends_at):
    ends_at(0.25, 400)
    first, again = finetune(toy, latents, config), finetune(toy, latents, config)
    assert torch.equal(first.lidb.up, again.lidb.up) and torch.equal(first.lidb.down, again.lidb.down)
    assert first.losses == again.losses and first.learned == again.learned


@pytest.mark.parametrize("text", [False, True])
def test_measuring_does_not_change_a_training(toy, latents, config, ends_at, monkeypatch, text):
    """Neither one of a number of steps, nor an automatic one until it ends."""
    ends_at(0.25, 400)
    config = replace(config, train_text_encoder=text)
    automatic = finetune(toy, latents, config)
    same = replace(config, steps=len(automatic.losses))
    measured = finetune(toy, latents, same)
    monkeypatch.setattr(learned, "SHARE", 0.0)
    alone = finetune(toy, latents, same)
    assert alone.learned is None and measured.learned == automatic.learned
    for result in (automatic, measured):
        assert result.losses == alone.losses
        assert torch.equal(result.lidb.up, alone.lidb.up) and torch.equal(result.lidb.down, alone.lidb.down)


@pytest.mark.parametrize("batch_size", [1, 4, 12])
@pytest.mark.parametrize("enough", [0.02, 2.0])
def test_measuring_takes_no_more_than_its_share(toy, latents, config, ends_at, passes, batch_size, enough):
    ends_at(enough, 80)
    result = finetune(toy, latents, replace(config, batch_size=batch_size))
    assert sum(passes[True]) == batch_size * len(result.losses)
    assert 0 < sum(passes[False]) <= SHARE * TRAINED_SAMPLE * sum(passes[True])


@pytest.mark.parametrize("steps", [1, 5])
def test_a_short_training_is_not_measured(toy, latents, config, passes, steps):
    assert finetune(toy, latents, replace(config, steps=steps)).learned is None
    assert passes[False] == []


def test_a_given_number_of_steps_is_measured_at_its_end(toy, latents, config, passes):
    result = finetune(toy, latents, replace(config, steps=30))
    assert len(result.losses) == 30 and result.learned.gained > 0.01
    assert sum(passes[False]) == 2 * (PAIRS + CLASS_PAIRS)


def test_measured_samples_go_through_as_many_at_once_as_trained_ones(toy, latents, config, ends_at, passes):
    ends_at(0.1, 400)
    whole, parts = (finetune(toy, latents, config, memory=MemoryPlan(count)) for count in (None, 1))
    assert set(passes[False][-3:]) == {1}
    close(torch.tensor(parts.learned), torch.tensor(whole.learned), atol=1e-4, rtol=1e-3)


def error(toy, batch, prompt, target=None):
    noisy = toy.add_noise(batch.latents, batch.noise, batch.sigma)
    answer = toy.denoise(noisy, batch.sigma, toy.encode_prompts([prompt] * PAIRS))
    return ((answer - (batch.latents if target is None else target)).square() * batch.mask).mean((1, 2, 3)), answer


def test_it_is_the_error_that_is_gone_and_the_change_of_other_answers(toy, latents, make_lidb, config):
    """Against the model without the person, each pair by its own error, under the mask."""
    mask = torch.zeros(6, 6)
    mask[:4] = 1
    config = replace(config, photo_words="smiling", class_prompt="a dog")
    meter = Meter(toy, latents, config, mask, at_once=2)
    person, batch = make_lidb(0, 1), meter.batch
    assert len(batch.sigma.unique()) == PAIRS == len(batch.noise.flatten(1).unique(dim=0))
    (before, _), (_, other) = error(toy, batch, "a [v] face, smiling"), error(toy, batch, "a dog")
    with attach(toy.modules, expand(LiDB(person.layout, person.basis, person.down, person.up * 0.2))):
        (after, _), (change, _) = error(toy, batch, "a [v] face, smiling"), error(toy, batch, "a dog", other)
        found = Learned(meter.gained(toy.encode_prompts), meter.moved(toy.encode_prompts))
    middle = [i for i, sigma in enumerate(batch.sigma) if batch.sigma.min() < sigma < batch.sigma.max()]
    close(torch.tensor(found), torch.stack([(1 - after / before).mean(), (change / before)[middle].mean()]))
    assert abs(found.gained) > 0.01 and found.moved > 0.01


def test_a_start_from_a_person_is_measured_against_the_model_without(toy, latents, config, ends_at):
    """Going on from a person who has enough already ends at the first look."""
    trained = finetune(toy, latents, replace(config, steps=300)).lidb
    ends_at(0.2, 400)
    goes_on = finetune(toy, latents, replace(config, learning_rate=1e-4), init=trained)
    assert goes_on.learned.gained > 0.2 and len(goes_on.losses) < 30


def test_text_layers_that_are_trained_are_measured(toy, latents, config):
    meter_of = replace(config, train_text_encoder=True, steps=60)
    result = finetune(toy, latents, meter_of)
    meter = Meter(toy, latents, meter_of, None, at_once=4)
    with attach(toy.modules, expand(result.lidb)):
        found = Learned(meter.gained(toy.encode_prompts), meter.moved(toy.encode_prompts))
    close(torch.tensor(found), torch.tensor(result.learned), atol=1e-5, rtol=1e-4)


def test_progress_tells_what_was_learned_and_the_last_step(toy, latents, config, ends_at):
    ends_at(0.25, 400)
    seen = []
    result = finetune(toy, latents, config, callback=seen.append)
    assert {p.total for p in seen[:-1]} == {400} and seen[-1].total == seen[-1].step == len(result.losses)
    assert seen[0].gained is None and seen[-1].gained == result.learned.gained
    assert {p.enough for p in seen} == {0.25}


def test_a_watch_makes_no_meter_that_it_cannot_use():
    def fail():
        raise AssertionError("made a meter")

    watch = Watch(fail, samples=4, steps=3, enough=0.1)
    assert [watch.ended(step, None) for step in (1, 2, 3)] == [False, False, True]
    assert watch.learned(None) is None
