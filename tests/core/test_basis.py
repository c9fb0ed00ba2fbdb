"""Bases: orthonormal, frozen, their own for every layer, and fit for training."""

import numpy as np
import pytest
import torch

from hdb_core.basis import BasisRecipe, layer_basis, probe, same_basis
from hdb_core.errors import BasisError
from hdb_core.layout import Layer, Layout

LAYER = Layer("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q", 40, 30)
LAYOUT = Layout("sd1", tuple(Layer(f"unet.{i}", 40, 30 + i) for i in range(6)))


@pytest.mark.parametrize(("down_dim", "up_dim"), [(12, 8), (40, 30), (100, 50)])
def test_orthonormal_and_cut_to_the_layer(down_dim, up_dim):
    down_aux, up_aux = layer_basis(BasisRecipe(0, down_dim, up_dim), LAYER)
    a, b = min(down_dim, 40), min(up_dim, 30)
    assert down_aux.shape == (a, 40) and up_aux.shape == (30, b)
    assert down_aux.dtype == up_aux.dtype == torch.float32
    torch.testing.assert_close(down_aux @ down_aux.T, torch.eye(a), atol=1e-6, rtol=0)
    torch.testing.assert_close(up_aux.T @ up_aux, torch.eye(b), atol=1e-6, rtol=0)


@pytest.mark.parametrize("layer", LAYOUT.layers)
def test_with_enough_dimensions_a_basis_spans_every_matrix(layer):
    """Any matrix has a core in it: what is trained there is an ordinary LoRA."""
    down_aux, up_aux = layer_basis(BasisRecipe(0, 64, 64), layer)
    assert down_aux.shape == (layer.in_features,) * 2 and up_aux.shape == (layer.out_features,) * 2
    torch.testing.assert_close(down_aux.T @ down_aux, torch.eye(layer.in_features), atol=1e-5, rtol=0)
    torch.testing.assert_close(up_aux @ up_aux.T, torch.eye(layer.out_features), atol=1e-5, rtol=0)
    delta_weight = torch.randn(layer.out_features, layer.in_features, generator=torch.Generator().manual_seed(0))
    core = up_aux.T @ delta_weight @ down_aux.T
    torch.testing.assert_close(up_aux @ core @ down_aux, delta_weight, atol=1e-4, rtol=0)


def test_values_are_frozen():
    down_aux, up_aux = layer_basis(BasisRecipe(0, 12, 8), LAYER)
    np.testing.assert_allclose(down_aux[0, :3], [-0.27068675, 0.08409986, 0.19175696], atol=1e-6)
    np.testing.assert_allclose(up_aux[:3, 0], [0.02807754, -0.15496781, -0.39972484], atol=1e-6)


@pytest.mark.parametrize("other", [BasisRecipe(1, 12, 8), BasisRecipe(0, 11, 8), BasisRecipe(0, 12, 7)])
def test_recipes_differ_in_hash_and_the_seed_in_values(other):
    recipe = BasisRecipe(0, 12, 8)
    assert recipe.hash(LAYOUT) != other.hash(LAYOUT)
    if other.seed != recipe.seed:
        assert not same_basis(probe(recipe, LAYOUT), probe(other, LAYOUT))


def test_the_hash_knows_the_layers():
    renamed = Layout("sd1", (*LAYOUT.layers[:5], Layer("unet.other", 40, 35)))
    assert BasisRecipe().hash(LAYOUT) != BasisRecipe().hash(renamed)


def test_layers_of_one_size_have_different_bases():
    twin = Layer(LAYER.name.replace("to_q", "to_k"), 40, 30)
    recipe = BasisRecipe(0, 12, 8)
    for first, second in zip(layer_basis(recipe, LAYER), layer_basis(recipe, twin), strict=True):
        assert (first - second).abs().max() > 0.1


def test_the_two_sides_of_a_square_layer_differ():
    down_aux, up_aux = layer_basis(BasisRecipe(0, 8, 8), Layer("unet.x", 20, 20))
    assert (down_aux - up_aux.T).abs().max() > 0.1


def test_probes_pass_last_bit_differences_only():
    values = probe(BasisRecipe(0, 12, 8), LAYOUT)
    assert len(values) == 16
    assert same_basis(values, [v + 5e-6 for v in values])
    assert not same_basis(values, [v + 2e-5 for v in values])
    assert not same_basis(values, values[:-1])


def test_neither_reads_nor_moves_a_global_generator():
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002 - the global generator is what is tested
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    layer_basis(BasisRecipe(123, 12, 8), LAYER)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002


def test_a_basis_first_made_in_inference_mode_can_be_trained_with():
    with torch.inference_mode():
        down_aux, _ = layer_basis(BasisRecipe(77, 12, 8), LAYER)
    down = torch.ones(1, 12, requires_grad=True)
    (down @ down_aux).sum().backward()
    assert down.grad is not None and down.grad.abs().sum() > 0


@pytest.mark.parametrize("settings", [{"version": 2}, {"down_dim": 0}, {"up_dim": 0}])
def test_impossible_recipes_are_refused(settings):
    with pytest.raises(BasisError):
        BasisRecipe(**settings)
