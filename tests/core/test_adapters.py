"""Low-rank output paths: equal to a merged weight, for one person and for one per sample."""

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from hdb_core.adapters import Adapters, attach, low_rank_output, only_samples
from hdb_core.basis import BasisRecipe, layer_basis
from hdb_core.errors import LayoutError
from hdb_core.lidb import delta_weight, expand

close = torch.testing.assert_close


@pytest.mark.parametrize("shape", [(7, 10), (3, 7, 10), (2, 3, 7, 10)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_output_path_equals_the_merged_weight(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    weight, up, down = (torch.randn(s, generator=generator) for s in ((6, 10), (6, 2), (2, 10)))
    y = (x @ weight.T).to(dtype)
    before = y.clone()
    result = low_rank_output(x.to(dtype), y, up, down)
    assert result.dtype == dtype
    assert torch.equal(y, before)
    tolerance = 1e-4 if dtype == torch.float32 else 0.2
    close(result.float(), x @ (weight + up @ down).T, atol=tolerance, rtol=tolerance / 4)


def test_bases_move_without_being_made_again(toy, monkeypatch):
    adapters = Adapters(BasisRecipe(0, 6, 4), toy.layout)
    monkeypatch.setattr("hdb_core.adapters.layer_basis", None)
    assert adapters.to("cpu") is adapters
    moved = adapters.to("meta")
    assert moved.device.type == "meta" and moved.num_bytes == adapters.num_bytes
    count = len(toy.layout.layers)
    up, down = moved.expand(torch.zeros(count, 2, 6, device="meta"), torch.zeros(count, 4, 2, device="meta"))[
        toy.layout.layers[0].name
    ]
    assert up.device.type == down.device.type == "meta"
    assert adapters.groups[0].down_aux.device.type == "cpu"


@pytest.mark.parametrize("context_length", [1, 5])
def test_one_person_per_sample_equals_one_at_a_time(context_length):
    generator = torch.Generator().manual_seed(0)
    x, y, up, down = (
        torch.randn(s, generator=generator)
        for s in ((3, context_length, 10), (3, context_length, 6), (3, 6, 2), (3, 2, 10))
    )
    single = [low_rank_output(x[i : i + 1], y[i : i + 1], up[i], down[i]) for i in range(3)]
    close(low_rank_output(x, y, up, down), torch.cat(single))


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_convolution_with_one_person_per_sample_equals_one_at_a_time(kernel):
    generator = torch.Generator().manual_seed(0)
    layer = nn.Conv2d(4, 6, kernel, padding=kernel // 2).requires_grad_(False)
    x = torch.randn(3, 4, 8, 5, generator=generator)
    up, down = (torch.randn(s, generator=generator, requires_grad=True) for s in ((3, 6, 2), (3, 2, 4 * kernel**2)))

    def outputs(*parts):
        with attach({"a": layer}, {"a": parts[1:]}):
            return layer(parts[0])

    together = outputs(x, up, down)
    single = torch.cat([outputs(x[i : i + 1], up[i], down[i]) for i in range(3)])
    close(together, single, atol=1e-4, rtol=1e-4)
    gradients = (torch.autograd.grad(y.square().sum(), (up, down)) for y in (together, single))
    close(*gradients, atol=1e-2, rtol=1e-4)


@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (3, 2)])
def test_a_convolution_equals_that_of_the_merged_weight(kernel, stride):
    generator = torch.Generator().manual_seed(0)
    layer = nn.Conv2d(4, 6, kernel, stride, padding=kernel // 2).requires_grad_(False)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    up, down = (torch.randn(s, generator=generator, requires_grad=True) for s in ((6, 2), (2, 4 * kernel**2)))
    with attach({"a": layer}, {"a": (up, down)}):
        hooked = layer(x)
        through_hook = torch.autograd.grad(hooked.square().sum(), (up, down))
    weight = layer.weight + (up @ down).view_as(layer.weight)
    merged = nn.functional.conv2d(x, weight, layer.bias, stride, kernel // 2)
    close(hooked, merged, atol=1e-4, rtol=1e-4)
    close(through_hook, torch.autograd.grad(merged.square().sum(), (up, down)), atol=1e-2, rtol=1e-4)


def test_gradients_equal_those_of_the_merged_weight():
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(10, 6).requires_grad_(False)
    x = torch.randn(3, 7, 10, generator=generator)
    up, down = (torch.randn(s, generator=generator, requires_grad=True) for s in ((6, 2), (2, 10)))
    with attach({"a": layer}, {"a": (up, down)}):
        through_hook = torch.autograd.grad(layer(x).square().sum(), (up, down))
    merged = nn.functional.linear(x, layer.weight + up @ down, layer.bias)
    close(through_hook, torch.autograd.grad(merged.square().sum(), (up, down)), atol=1e-3, rtol=1e-4)
    assert layer.weight.grad is None


def outputs(toy, latents):
    sigma = torch.full((len(latents),), 1.5)
    return toy.denoise(latents, sigma, toy.encode_prompts(["a [v] face"] * len(latents)))


def test_a_whole_model_equals_merged_weights_and_is_itself_again_afterwards(toy, latents, make_lidb):
    lidb, before = make_lidb(0, 2), outputs(toy, latents)
    with attach(toy.modules, expand(lidb)):
        hooked = outputs(toy, latents)
    assert torch.equal(outputs(toy, latents), before)
    for i, module in enumerate(toy.modules.values()):
        module.weight += delta_weight(lidb, i)
    close(hooked, outputs(toy, latents), atol=1e-4, rtol=1e-4)
    assert (hooked - before).abs().max() > 0.1


def test_a_batch_of_different_people(toy, latents, make_lidb):
    people = [make_lidb(seed, 2) for seed in range(3)]
    batch = latents.expand(3, -1, -1, -1)
    each = [expand(p) for p in people]
    stacked = {
        name: tuple(torch.stack(side) for side in zip(*(e[name] for e in each), strict=True)) for name in each[0]
    }
    with attach(toy.modules, stacked):
        together = outputs(toy, batch)
    for i, factors in enumerate(each):
        with attach(toy.modules, factors):
            close(together[i : i + 1], outputs(toy, latents), atol=1e-4, rtol=1e-4)


def test_factors_may_change_inside_the_context_and_absent_layers_stay():
    layer, x = nn.Linear(4, 4), torch.ones(1, 4)
    factors = {}
    with torch.no_grad(), attach({"a": layer}, factors):
        base = layer(x)
        factors["a"] = (torch.ones(4, 1), torch.ones(1, 4))
        close(layer(x), base + 4)


def test_hooks_are_gone_after_an_error(toy, make_lidb):
    with pytest.raises(KeyboardInterrupt), attach(toy.modules, expand(make_lidb())):
        raise KeyboardInterrupt
    assert not any(module._forward_hooks for module in toy.modules.values())


def test_a_person_of_another_model_is_refused_before_anything_is_hooked(toy):
    with (
        pytest.raises(LayoutError, match="1 of 1 layers"),
        attach(toy.modules, {"unet.x": (torch.ones(1), torch.ones(1))}),
    ):
        pass
    assert not any(module._forward_hooks for module in toy.modules.values())


@pytest.mark.parametrize("people", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("recipe", [BasisRecipe(3, 12, 8), BasisRecipe(0, 28, 26)], ids=["basis", "narrow layers"])
def test_expansion_by_shape_equals_layer_by_layer(toy, recipe, people):
    adapters, generator = Adapters(recipe, toy.layout), torch.Generator().manual_seed(0)
    down = torch.randn(*people, len(toy.layout.layers), 2, recipe.down_dim, generator=generator)
    up = torch.randn(*people, len(toy.layout.layers), recipe.up_dim, 2, generator=generator)
    factors = adapters.expand(down, up)
    assert list(factors) == [layer.name for layer in toy.layout.layers]
    for i, layer in enumerate(toy.layout.layers):
        down_aux, up_aux = layer_basis(recipe, layer)
        close(factors[layer.name][0], up_aux @ up[..., i, : up_aux.shape[1], :])
        close(factors[layer.name][1], down[..., i, :, : len(down_aux)] @ down_aux)


def test_expansion_is_differentiable_and_casts_once(toy, recipe):
    adapters = Adapters(recipe, toy.layout, dtype=torch.bfloat16)
    down, up = (torch.randn(len(toy.layout.layers), *size, requires_grad=True) for size in ((1, 12), (8, 1)))
    factors = adapters.expand(down, up)
    assert {factor.dtype for pair in factors.values() for factor in pair} == {torch.bfloat16}
    sum(factor.float().sum() for pair in factors.values() for factor in pair).backward()
    assert (down.grad.norm(dim=(1, 2)) > 0).all() and (up.grad.norm(dim=(1, 2)) > 0).all()
    assert {group.down_aux.dtype for group in adapters.groups} == {torch.float32}


def test_layers_of_one_shape_share_two_products(toy, recipe):
    """However many layers a model has, the number of operations is that of its shapes."""
    adapters = Adapters(recipe, toy.layout)
    shapes = {(layer.in_features, layer.out_features) for layer in toy.layout.layers}
    factors = torch.zeros(len(toy.layout.layers), 1, 12), torch.zeros(len(toy.layout.layers), 8, 1)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        adapters.expand(*factors)
    assert sum(event.name == "aten::bmm" for event in profiler.events()) == 2 * len(shapes) < len(toy.layout.layers)


def test_the_memory_of_the_bases_is_said(toy, recipe):
    sizes = [12 * layer.in_features + 8 * layer.out_features for layer in toy.layout.layers]
    assert Adapters(recipe, toy.layout).num_bytes == 4 * sum(sizes)


def test_some_samples_of_a_batch_alone(toy, recipe):
    """Of many people, each sample by itself is what it is among the others."""
    generator = torch.Generator().manual_seed(0)
    people = {
        layer.name: (
            torch.randn(3, layer.out_features, 1, generator=generator),
            torch.randn(3, 1, layer.in_features, generator=generator),
        )
        for layer in toy.layout.layers
    }
    prompts = ["a [v] face", "a face", "a [v] face, smiling"]
    with attach(toy.modules, people):
        together = toy.encode_prompts(prompts)
        with only_samples([2, 0]):
            some = toy.encode_prompts([prompts[2], prompts[0]])
        again = toy.encode_prompts(prompts)
    torch.testing.assert_close(some, together[[2, 0]])
    assert torch.equal(again, together) and not torch.allclose(some[:1], together[:1])
