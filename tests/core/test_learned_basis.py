"""A basis learned from people: what it finds, and its file."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

from hdb_core.basis import BasisRecipe, layer_basis
from hdb_core.errors import BasisError, BasisFileError, LiDBFileError
from hdb_core.files import basis as basis_file
from hdb_core.files import container
from hdb_core.files import lidb as lidb_file
from hdb_core.finetuning import FinetuneConfig, finetune
from hdb_core.layout import Layer, Layout
from hdb_core.lidb import LiDB, core, delta_weight, nobody, norm, start_down
from hdb_core.recommended import IN_LEARNED_BASIS, RECOMMENDED
from hdb_core.train.basis import BasisConfig, Directions, _gradients, held_share, learn_basis, trainable_weights
from hdb_core.train.data.latents import EncodedPhotos

DIMS = {"down_dim": 6, "up_dim": 4}
FILE = "basis.safetensors"


def people(count, first=0, photos=2):
    """Everybody's photos share a picture of their own."""
    generator = torch.Generator().manual_seed(first)
    shared = torch.randn(count, 1, 4, 6, 6, generator=generator)
    latents = shared + 0.3 * torch.randn(count, photos, 4, 6, 6, generator=generator)
    words = ["smiling", "at the beach", "", "at night"][:photos]
    return [EncodedPhotos(own, words, torch.ones_like(own[:, :1])) for own in latents]


def bases_of(recipe, layout):
    return {layer.name: layer_basis(recipe, layer) for layer in layout.layers}


@pytest.fixture
def learned(toy):
    return learn_basis(toy, people(6), BasisConfig(**DIMS))


@pytest.fixture
def path(toy, learned, tmp_path):
    basis_file.save(toy.layout, learned, (6, 4), tmp_path / FILE, {"people": "6"})
    return tmp_path / FILE


def test_photos_in_groups_ask_for_the_same(toy):
    """Memory is bounded, and nothing else changes."""
    (person,) = people(1, photos=4)
    with trainable_weights(toy):
        whole, parts = (_gradients(toy, person, BasisConfig(group=group), 0) for group in (32, 3))
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient)


def test_finds_what_two_halves_agree_in_beneath_larger_differences():
    """The context of a photo asks for more than the person, and differs from photo to photo."""
    generator = torch.Generator().manual_seed(0)
    identity, context = torch.linalg.qr(torch.randn(20, 2, generator=generator))[0].T
    directions = Directions(20, 1, torch.device("cpu"))
    for _ in range(3):
        directions.iterate()
        for _ in range(400):
            person = torch.randn(3, 1, generator=generator) * identity
            directions.add(*(person + 3 * torch.randn(3, 1, generator=generator) * context for _ in range(2)))
    found = directions.principal()[:, 0].float()
    assert (found @ identity).abs() > 0.95 and (found @ context).abs() < 0.3


def test_orthonormal_and_cut_to_the_layers(toy, learned):
    for layer in toy.layout.layers:
        down_aux, up_aux = learned[layer.name]
        assert down_aux.shape == (6, layer.in_features) and up_aux.shape == (layer.out_features, 4)
        torch.testing.assert_close(down_aux @ down_aux.T, torch.eye(6), atol=1e-5, rtol=0)
        torch.testing.assert_close(up_aux.T @ up_aux, torch.eye(4), atol=1e-5, rtol=0)
    wide = learn_basis(toy, people(2), BasisConfig(100, 50))
    assert all(down.shape[0] == down.shape[1] and up.shape[0] == up.shape[1] for down, up in wide.values())


def test_holds_more_of_an_unseen_person_than_a_random_basis(toy, learned):
    unseen = people(3, first=99)
    bases = [learned, bases_of(BasisRecipe(0, **DIMS), toy.layout), bases_of(BasisRecipe(0, 100, 100), toy.layout)]
    held, held_by_random, complete = held_share(toy, unseen, bases, BasisConfig())
    assert held > 3 * held_by_random
    assert complete == pytest.approx(1, abs=1e-4)


def test_repeatable_and_leaves_model_and_generator_alone(toy, learned):
    before, state = [w.clone() for w in toy.net.parameters()], torch.random.get_rng_state()
    again = learn_basis(toy, people(6), BasisConfig(**DIMS))
    assert all(torch.equal(a, b) for name in learned for a, b in zip(learned[name], again[name], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, toy.net.parameters(), strict=True))
    assert all(w.grad is None and not w.requires_grad for w in toy.net.parameters())
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_single_photo_is_seen_under_two_noises(toy):
    (person,) = people(1, photos=1)
    assert [len(half.latents) for half in person.halves()] == [1, 1]
    with trainable_weights(toy):
        one, other = (_gradients(toy, half, BasisConfig(), i) for i, half in enumerate(person.halves()))
    assert all(not torch.equal(one[name], other[name]) for name in one)


def test_no_people_to_learn_from_and_broken_photos(toy):
    with pytest.raises(BasisError, match="without people"):
        learn_basis(toy, [], BasisConfig())
    (person,) = people(1)
    person.latents.fill_(torch.nan)
    with pytest.raises(BasisError, match="NaN"):
        learn_basis(toy, [person], BasisConfig(**DIMS))


def test_the_file_brings_the_basis_back_orthonormal(toy, learned, path):
    layout, recipe = basis_file.load(path)
    assert layout == toy.layout and recipe.learned == container.read_digest(basis_file.KIND, path)
    for name, (down_aux, up_aux) in bases_of(recipe, layout).items():
        torch.testing.assert_close(down_aux @ down_aux.T, torch.eye(6), atol=1e-6, rtol=0)
        torch.testing.assert_close(down_aux, learned[name][0], atol=1e-3, rtol=0)
        torch.testing.assert_close(up_aux, learned[name][1], atol=1e-3, rtol=0)


def test_the_algebra_on_the_core_is_that_of_the_full_matrices(path):
    layout, recipe = basis_file.load(path)
    generator = torch.Generator().manual_seed(1)
    down, up = (torch.randn(len(layout.layers), *shape, generator=generator) for shape in ((2, 6), (4, 2)))
    person = LiDB(layout, recipe, down, up)
    full = sum(delta_weight(person, i).square().sum() for i in range(len(layout.layers))).sqrt()
    torch.testing.assert_close(norm(person), full, atol=0, rtol=1e-5)


def test_a_person_in_it_needs_its_file(path, tmp_path):
    layout, recipe = basis_file.load(path)
    up = torch.randn(len(layout.layers), 4, 1, generator=torch.Generator().manual_seed(1))
    person = LiDB(layout, recipe, start_down(recipe, layout, 1), up)
    lidb_file.save(person, tmp_path / "person.safetensors")
    assert lidb_file.read_header(tmp_path / "person.safetensors").basis == recipe
    with pytest.raises(LiDBFileError, match=r"learned basis .* is not there"):
        lidb_file.load(tmp_path / "person.safetensors")
    other = replace(recipe, learned="0" * 64)
    with pytest.raises(LiDBFileError, match=r"learned basis .* is not there"):
        lidb_file.load(tmp_path / "person.safetensors", other)
    loaded = lidb_file.load(tmp_path / "person.safetensors", basis_file.load(path)[1])
    assert loaded.basis == recipe and (core(loaded) - core(person)).norm() < 1e-3 * norm(person)


def test_of_another_model_it_is_refused(path):
    _, recipe = basis_file.load(path)
    for layer in (Layer("unet.other", 32, 32), Layer(next(iter(recipe.bases)), 33, 32)):
        with pytest.raises(BasisError, match="another model"):
            layer_basis(recipe, layer)


def test_a_fine_tune_in_it_takes_the_steps_that_suit_it(toy, latents, path):
    start = nobody(*basis_file.load(path))
    config = FinetuneConfig(rank=1, batch_size=1, learning_rate=1e-3)
    about = finetune(toy, latents, config, init=start).lidb.about
    assert (about.made_from, about.steps) == (IN_LEARNED_BASIS, RECOMMENDED[IN_LEARNED_BASIS].steps)
    assert about.strengths == RECOMMENDED[IN_LEARNED_BASIS].strengths


def test_nobody_changes_nothing(path):
    person = nobody(*basis_file.load(path))
    assert person.rank == 1 and norm(person) == 0
    assert torch.equal(person.down, start_down(person.basis, person.layout, 1))


@pytest.mark.parametrize("size", [20, -10])
def test_a_cut_file_is_refused(path, size):
    os.truncate(path, size if size > 0 else path.stat().st_size + size)
    with pytest.raises(BasisFileError):
        basis_file.load(path)


def test_other_sizes_than_the_header_says_are_refused(toy, learned, tmp_path):
    for dims in ((7, 4), (6, 3)):
        basis_file.save(toy.layout, learned, dims, tmp_path / FILE, {})
        with pytest.raises(BasisFileError, match="disagree"):
            basis_file.load(tmp_path / FILE)


def test_vectors_that_are_not_orthonormal_are_refused(toy, learned, tmp_path):
    doubled = {name: (2 * down, up) for name, (down, up) in learned.items()}
    basis_file.save(toy.layout, doubled, (6, 4), tmp_path / FILE, {})
    with pytest.raises(BasisFileError, match="not orthonormal"):
        basis_file.load(tmp_path / FILE)


def test_thousands_of_small_layers_are_made_orthonormal_together(tmp_path, monkeypatch):
    """One by one they would take seconds, of a file of some 600 KB."""
    layout = Layout("sd1", tuple(Layer(f"unet.{i}", 2 + i % 2, 3) for i in range(400)))
    bases = bases_of(BasisRecipe(0, 2, 2), layout)
    basis_file.save(layout, bases, (2, 2), tmp_path / FILE, {})
    calls, orthonormal = [], basis_file.orthonormal
    monkeypatch.setattr(basis_file, "orthonormal", lambda columns: calls.append(1) or orthonormal(columns))
    _, recipe = basis_file.load(tmp_path / FILE)
    assert len(calls) < 10
    for name, sides in bases.items():
        for own, before in zip(recipe.bases[name], sides, strict=True):
            torch.testing.assert_close(own, before, atol=1e-3, rtol=0)


def test_infinite_numbers_are_not_written(toy, learned, tmp_path):
    broken = {name: (torch.full_like(down, torch.nan), up) for name, (down, up) in learned.items()}
    with pytest.raises(BasisFileError, match="nothing was written"):
        basis_file.save(toy.layout, broken, (6, 4), tmp_path / FILE, {})
    assert not (tmp_path / FILE).exists()


def test_another_file_has_another_name(toy, learned, path, tmp_path):
    basis_file.save(toy.layout, learned, (6, 4), tmp_path / "again.safetensors", {"people": "6"})
    assert container.read_digest(basis_file.KIND, tmp_path / "again.safetensors") == container.read_digest(
        basis_file.KIND, path
    )
    other = learn_basis(toy, people(6, first=1), BasisConfig(**DIMS))
    basis_file.save(toy.layout, other, (6, 4), tmp_path / "other.safetensors", {"people": "6"})
    assert basis_file.load(tmp_path / "other.safetensors")[1] != basis_file.load(path)[1]


def test_random_bases_keep_their_hash():
    """Files that were written before there were learned bases stay readable."""
    layout = Layout("sd1", (Layer("unet.x", 40, 30),))
    assert BasisRecipe().hash(layout) == "c407860631014442cfc7eb39e353d0f5211984c3dda26d583ed158056d60b1b7"
