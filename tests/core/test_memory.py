"""What autograd keeps is counted, and scaled from small inputs to large ones."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional

from hdb_core.memory import SIDES, MemoryCost, measured_cost, saved_bytes


class Unfused(nn.Module):
    """Convolutions at two resolutions, and attention whose T × T matrix autograd keeps."""

    def __init__(self):
        super().__init__()
        self.inner, self.down, self.out = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 2, 2), nn.Conv2d(8, 4, 1)
        self.requires_grad_(False)

    def forward(self, x):
        x = torch.sin(self.inner(x))
        q = self.down(x).flatten(2).mT
        text = torch.sin(x.mean((2, 3), keepdim=True) + 1)
        y = (torch.softmax(q @ q.mT, -1) @ q).mT.unflatten(2, (x.shape[2] // 2, -1))
        return self.out(x + text + functional.interpolate(y, scale_factor=2))


@pytest.fixture
def count():
    net, copied = Unfused(), torch.ones(1000, requires_grad=True)

    def execute(samples, side):
        x = torch.ones(samples, 4, side, side, requires_grad=True)
        return saved_bytes(lambda: net(x).sum() + torch.sin(copied).sum(), net.parameters())

    return execute


def test_the_cost_of_small_inputs_tells_that_of_large_ones(count):
    cost = measured_cost(count)
    assert cost.of_a_pair > 0 and cost.constant == pytest.approx(4000)
    for samples, side in ((1, 64), (3, 32), (4, 48)):
        assert side > max(SIDES)
        assert cost.bytes(samples, side**2) == pytest.approx(count(samples, side), rel=1e-6)


def test_every_piece_counts_once_and_weights_do_not():
    net = nn.Linear(8, 8).requires_grad_(False)
    x = torch.ones(2, 8, requires_grad=True)
    assert saved_bytes(lambda: net(x).sum(), net.parameters()) == 0
    assert saved_bytes(lambda: torch.sin(net(x)).sum(), net.parameters()) == 64
    two = net(x)
    assert saved_bytes(lambda: (torch.sin(two) + torch.cos(two[:1])).sum(), net.parameters()) == 64
    assert saved_bytes(lambda: (x @ net.weight.half().float().mT).sum(), net.parameters()) == 256


class Quantised(torch.Tensor):
    """Wraps bytes and a scale, as the host's quantised weights do; saved for the backward pass as it is."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        plain = [a.codes.float() * a.scale if isinstance(a, cls) else a for a in args]
        return func(*plain, **(kwargs or {}))


def test_quantised_weights_count_by_what_they_wrap():
    weight = Quantised(torch.ones(8, 8, dtype=torch.int8), torch.ones(1))
    x = torch.ones(2, 8, requires_grad=True)
    assert saved_bytes(lambda: (x @ weight).sum(), [weight]) == 0
    assert saved_bytes(lambda: (x @ weight).sum(), []) == 64 + 4


@pytest.mark.parametrize("of_a_pair", [0.0, 0.5])
def test_what_fits_fits(of_a_pair):
    cost = MemoryCost(1000.0, 200.0, 30.0, of_a_pair)
    for free in (1300, 5_000, 1_000_000):
        pixels = cost.pixels(free)
        assert cost.bytes(1, pixels) <= free < cost.bytes(1, pixels + 2)
        assert cost.samples(free, pixels) == 1
    samples = cost.samples(1_000_000, 100)
    assert cost.bytes(samples, 100) <= 1_000_000 < cost.bytes(samples + 1, 100)
    assert cost.pixels(1100) == cost.samples(1100, 4) == 0


def test_what_is_counted_is_let_go_of():
    """A result that autograd keeps must not keep its own graph."""
    x, results = torch.ones(3, requires_grad=True), []

    def forward():
        result = x.exp()
        results.append(weakref.ref(result))
        return result.sum()

    assert saved_bytes(forward, []) == 12
    gc.collect()
    assert results[0]() is None
