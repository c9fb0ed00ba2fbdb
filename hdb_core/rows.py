"""A low-rank change of layers that acts on some samples of a batch alone, in place: for pictures, without autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn import functional

from .adapters import Factors, moved_together, places_of

Rows = Sequence[tuple[int, int, float]]  # from, to: samples of a batch; scale of the change


class RowChange:
    """Hooks on layers that add ``scale · up · (down · x)`` to some samples' outputs while `acting`.

    Layers that read the same tensor, such as to_q, to_k and to_v, share the product with it: the first pass sees which
    do. Factors are cast once, to where and to what the layers compute in.

    Args:
        factors: layer name → (up (out, R), down (R, in)); of a convolution, down is (R, in · kernel height · width).
    """

    def __init__(self, factors: Mapping[str, Factors]) -> None:
        self.factors = factors
        self._rows: Rows = ()
        self._samples = 1
        self._ups: dict[str, Tensor] = {}
        self._downs: dict[tuple[str, ...], Tensor] = {}  # of layers together, below each other
        self._together: dict[str, tuple[str, ...]] | None = None  # layer → those that share its input, if known
        self._kernels: dict[str, Tensor] = {}
        self._seen: list[tuple[ref[Tensor], list[str]]] = []
        self._products: dict[tuple[str, ...], tuple[ref[Tensor], list[Tensor]]] = {}

    @contextmanager
    def attached(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """Hooks on the modules of all layers; they do nothing unless `acting`."""
        handles = [modules[name].register_forward_hook(self._hook(name)) for name in self.factors]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def acting(self, rows: Rows, samples: int) -> Iterator[None]:
        """The change on some samples of so many; where a layer has more, each stands for as many."""
        self._rows, self._samples = rows, samples
        try:
            yield
            if self._together is None:
                groups = [tuple(names) for _, names in self._seen]
                self._together = {name: group for group in groups for name in group}
        finally:
            self._rows = ()
            self._seen.clear()
            self._products.clear()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def change(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if self._rows:
                work = self._convolution if isinstance(module, nn.Conv2d) else self._linear
                work(name, module, inputs[0], output)

        return change

    def _linear(self, name: str, _: nn.Module, x: Tensor, y: Tensor) -> None:
        up = self._up(name, y)
        for part, hidden, scale in zip(self._parts(y), self._hidden(name, x), self._scales(), strict=True):
            flat = part.reshape(-1, part.shape[-1])
            flat.addmm_(hidden.to(y.dtype), up.mT, alpha=scale)
            written(flat, part)

    def _convolution(self, name: str, module: Any, x: Tensor, y: Tensor) -> None:
        up, keeps_size = self._up(name, y), y.shape[-2:] == x.shape[-2:]
        if name not in self._kernels:
            down = self._down((name,), x)
            shape = (-1, module.in_channels, *module.kernel_size)  # a quantised weight has another
            self._kernels[name] = places_of(module, down) if keeps_size else down.view(shape)
        for part, given, scale in zip(self._parts(y), self._parts(x), self._scales(), strict=True):
            if keeps_size:
                hidden = moved_together(module, self._kernels[name] @ given.flatten(2), given.shape[-2:])
            else:
                hidden = functional.conv2d(
                    given, self._kernels[name], None, module.stride, module.padding, module.dilation
                )
            flat = part.flatten(2)
            flat.baddbmm_(up.expand(len(part), -1, -1), hidden.flatten(2).to(y.dtype), alpha=scale)
            written(flat, part)

    def _hidden(self, name: str, x: Tensor) -> list[Tensor]:
        """(samples · T, R) of each run of rows: the layer's own columns of the product of all that read `x`."""
        group = self._group(name, x)
        known = self._products.get(group)
        if known is None or known[0]() is not x:
            down = self._down(group, x)
            products = [given.reshape(-1, x.shape[-1]) @ down.mT for given in self._parts(x)]
            self._products[group] = known = ref(x), products
        first = sum(len(self.factors[other][1]) for other in group[: group.index(name)])
        return [product[:, first : first + len(self.factors[name][1])] for product in known[1]]

    def _group(self, name: str, x: Tensor) -> tuple[str, ...]:
        if self._together is not None:
            return self._together.get(name, (name,))
        same = next((names for tensor, names in reversed(self._seen) if tensor() is x), None)
        if same is None:
            self._seen.append((ref(x), same := []))
        same.append(name)
        return (name,)

    def _parts(self, tensor: Tensor) -> list[Tensor]:
        each = len(tensor) // self._samples
        return [tensor[first * each : last * each] for first, last, _ in self._rows]

    def _scales(self) -> list[float]:
        return [scale for *_, scale in self._rows]

    def _up(self, name: str, y: Tensor) -> Tensor:
        if name not in self._ups:
            self._ups[name] = self.factors[name][0].to(y)
        return self._ups[name]

    def _down(self, names: tuple[str, ...], x: Tensor) -> Tensor:
        if names not in self._downs:
            self._downs[names] = torch.cat([self.factors[name][1] for name in names]).to(x)
        return self._downs[names]


def written(flat: Tensor, part: Tensor) -> None:
    """Puts back what was changed in another arrangement, if that was no view of the same memory."""
    if flat.data_ptr() != part.data_ptr():
        part.copy_(flat.view_as(part))


def runs(scales: Sequence[float], each: int, times: int = 1) -> Rows:
    """The samples of a batch that are changed, adjacent ones of one scale together.

    Args:
        scales: of parts of the batch; 0 is not changed.
        each: samples of a part.
        times: how often the batch has all parts, one after the other.
    """
    found: list[tuple[int, int, float]] = []
    for index, scale in enumerate(list(scales) * times):
        first, last = index * each, (index + 1) * each
        if scale and found and found[-1][1:] == (first, scale):
            found[-1] = found[-1][0], last, scale
        elif scale:
            found.append((first, last, scale))
    return found
