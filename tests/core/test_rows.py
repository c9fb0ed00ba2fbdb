"""A low-rank change of some samples of a batch, in place."""

import pytest
import torch
from torch import nn

from hdb_core.rows import RowChange, runs

close = torch.testing.assert_close


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator)


def factors_of(draw, *layers):
    return {
        name: (draw(module.weight.shape[0], rank), draw(rank, module.weight[0].numel()))
        for name, module, rank in layers
    }


def changed(module, factors, scale):
    weight = module.weight + scale * (factors[0] @ factors[1]).view(module.weight.shape)
    return nn.utils.stateless._reparametrize_module(module, {"weight": weight})


@pytest.mark.parametrize("rows", [[(1, 2, 1.0)], [(0, 2, 1.0)], [(0, 1, 1.0), (2, 3, 0.3)], [(0, 2, 0.5), (2, 3, 1.0)]])
@pytest.mark.parametrize("times", [1, 2])
def test_some_rows_of_linear_layers_that_share_an_input(draw, rows, times):
    modules = {name: nn.Linear(6, size) for name, size in (("q", 5), ("k", 4), ("other", 3))}
    factors = factors_of(draw, ("q", modules["q"], 2), ("k", modules["k"], 1), ("other", modules["other"], 2))
    change, scales = RowChange(factors), torch.zeros(3 * times)
    for first, last, scale in rows:
        scales[first * times : last * times] = scale
    with torch.inference_mode(), change.attached(modules):
        for factor in (-0.5, 2.0, -0.5):  # the first pass sees that q and k read the same
            x, y = draw(3 * times, 7, 6), draw(3 * times, 7, 6)
            given = {"q": x, "k": x, "other": y}
            plain = {name: module(given[name]) for name, module in modules.items()}
            with change.acting([(first, last, scale * factor) for first, last, scale in rows], 3):
                own = {name: module(given[name]) for name, module in modules.items()}
            for name, module in modules.items():
                for sample, scale in enumerate(scales):
                    with changed(module, factors[name], scale * factor):
                        expected = module(given[name])[sample]
                    close(own[name][sample], expected, rtol=1e-4, atol=1e-5)
                    assert torch.equal(own[name][sample], plain[name][sample]) == (not scale)
    assert sorted(map(len, change._downs)) == [1, 1, 1, 2]
    assert not change._products and not any(module._forward_hooks for module in modules.values())


def test_layers_that_no_longer_share_their_input(draw):
    modules = {"q": nn.Linear(6, 5), "k": nn.Linear(6, 4)}
    factors = factors_of(draw, *((name, module, 2) for name, module in modules.items()))
    change, x, y = RowChange(factors), draw(2, 3, 6), draw(2, 3, 6)
    with torch.inference_mode(), change.attached(modules):
        for given in ((x, x), (x, y)):
            with change.acting([(0, 1, 1.0)], 2):
                for (name, module), own in zip(modules.items(), given, strict=True):
                    up, down = factors[name]
                    expected = own[0] @ (module.weight + up @ down).T + module.bias
                    close(module(own)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (3, 2)])
def test_some_rows_of_a_convolution(draw, layout, kernel, stride):
    module = nn.Conv2d(4, 6, kernel, stride, kernel // 2).to(memory_format=layout)
    factors = factors_of(draw, ("conv", module, 3))
    change, x = RowChange(factors), draw(3, 4, 8, 8).to(memory_format=layout)
    with torch.inference_mode(), change.attached({"conv": module}):
        plain = module(x)
        with change.acting([(1, 3, 0.5)], 3):
            own = module(x)
        with changed(module, factors["conv"], 0.5):
            close(own[1:], module(x)[1:], rtol=1e-4, atol=1e-5)
    assert torch.equal(own[:1], plain[:1])


def test_adjacent_parts_of_one_scale_are_one_run():
    assert runs([0.5, 0], 2) == [(0, 2, 0.5)]
    assert runs([0, 0.5], 1, 2) == [(1, 2, 0.5), (3, 4, 0.5)]
    assert runs([0.5, 0, 0.5], 1, 2) == [(0, 1, 0.5), (2, 4, 0.5), (5, 6, 0.5)]
    assert runs([0.5, -2, -2], 2) == [(0, 2, 0.5), (2, 6, -2)]
    assert runs([0], 4) == []
