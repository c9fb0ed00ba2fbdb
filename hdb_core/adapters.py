"""Low-rank output paths on linear layers and convolutions: ``y + up · (down · x)`` by forward hooks.

The full change of a weight is never formed, so autograd never forms a gradient of that size, and the layer may store
its weight in any format. One person for the whole batch, or another person for every sample.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from .basis import BasisRecipe, layer_basis
from .errors import LayoutError
from .layout import Layout

Factors = tuple[Tensor, Tensor]  # up (out, R) and down (R, in) of a layer
_SAMPLES: ContextVar[list[int] | None] = ContextVar("samples", default=None)


class Group(NamedTuple):
    """Layers of one shape and their bases."""

    names: tuple[str, ...]  # n
    down_aux: Tensor  # (n, a', in)
    up_aux: Tensor  # (n, out, b')


class Adapters:
    """The bases of one recipe and layout on one device, grouped by layer shape; turns a person's factors into adapters.

    SD 1.5 has 27 shapes and SDXL 25: a person is expanded in two batched products a shape, whatever the number of
    layers. The bases live as long as this object.

    Args:
        recipe: of the bases.
        layout: the layers, whose order the factors follow.
        device: of bases and factors.
        dtype: that layers' factors are cast to; the products are float32.
    """

    def __init__(
        self,
        recipe: BasisRecipe,
        layout: Layout,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.recipe, self.layout, self.device, self.dtype = recipe, layout, torch.device(device), dtype
        shapes: dict[tuple[int, int], list[int]] = {}
        for index, layer in enumerate(layout.layers):
            shapes.setdefault((layer.in_features, layer.out_features), []).append(index)
        self.groups = [self._group(indices) for indices in shapes.values()]
        # A node runs in inference mode, whose tensors could never take part in training.
        with torch.inference_mode(False):
            self._order = torch.tensor([i for indices in shapes.values() for i in indices], device=self.device)
        self._counts = [len(group.names) for group in self.groups]

    def expand(self, down: Tensor, up: Tensor) -> dict[str, Factors]:
        """The low-rank factors in the layers' own dimensions, as any LoRA has them; differentiable.

        Args:
            down: (..., L, R, a) float32; leading dimensions are the people of a batch.
            up: (..., L, b, R) float32.

        Returns:
            Layer name → (up (..., out, R), down (..., R, in)); ``delta_weight = up @ down``.
        """
        made: dict[str, Factors] = {}
        downs = down.index_select(-3, self._order).split(self._counts, -3)
        ups = up.index_select(-3, self._order).split(self._counts, -3)
        for group, own_down, own_up in zip(self.groups, downs, ups, strict=True):
            a, b = group.down_aux.shape[1], group.up_aux.shape[2]
            wide_down = _product(own_down[..., :a], group.down_aux).to(self.dtype)
            wide_up = _product(own_up[..., :b, :].mT, group.up_aux.mT).mT.to(self.dtype)
            made |= zip(group.names, zip(wide_up.unbind(-3), wide_down.unbind(-3), strict=True), strict=True)
        return {layer.name: made[layer.name] for layer in self.layout.layers}

    def to(self, device: torch.device | str) -> Adapters:
        """The same on another device, without making the bases again; itself if they are there already."""
        if torch.device(device) == self.device:
            return self
        moved = copy.copy(self)
        moved.device = torch.device(device)
        # A node runs in inference mode, whose tensors could never take part in training.
        with torch.inference_mode(False):
            moved.groups = [Group(names, *(aux.to(device) for aux in bases)) for names, *bases in self.groups]
            moved._order = self._order.to(device)
        return moved

    @property
    def bases(self) -> list[Tensor]:
        """All that is kept on the device."""
        return [aux for group in self.groups for aux in (group.down_aux, group.up_aux)]

    @property
    def num_bytes(self) -> int:
        """Memory of the bases."""
        return sum(aux.numel() * aux.element_size() for aux in self.bases)

    def _group(self, indices: list[int]) -> Group:
        layers = [self.layout.layers[index] for index in indices]
        with torch.inference_mode(False):
            bases = [layer_basis(self.recipe, layer) for layer in layers]
            down_aux, up_aux = (torch.stack(side).to(self.device) for side in zip(*bases, strict=True))
        return Group(tuple(layer.name for layer in layers), down_aux, up_aux)


def _product(factors: Tensor, bases: Tensor) -> Tensor:
    """(..., n, R, k) @ (n, k, d) as one batched product over n: the people's rows stand side by side."""
    people = factors.shape[:-3]
    rows = factors.flatten(0, -4).permute(1, 0, 2, 3).flatten(1, 2) if people else factors
    product = rows @ bases
    if not people:
        return product
    return product.unflatten(1, (-1, factors.shape[-2])).permute(1, 0, 2, 3).unflatten(0, people)


def low_rank_output(x: Tensor, y: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """``y + (x · downᵀ) · upᵀ`` in the dtype and on the device of the activations.

    Args:
        x: (..., in), the input of a linear layer; (B, T, in) if the factors are per sample.
        y: (..., out), its output; (B, ..., out) if the factors are per sample.
        up: (out, R), or (B, out, R) with one person per sample; if there are more samples, each stands for as many.
        down: (R, in), or (B, R, in).

    Returns:
        A new tensor with the shape and dtype of `y`.
    """
    hidden = (x @ down.to(x).mT).to(y.dtype)
    up = up.to(y)
    if up.ndim == 3:
        rows, per_row = y.flatten(1, -2), up.repeat_interleave(len(y) // len(up), 0)
        return torch.baddbmm(rows, hidden.flatten(1, -2), per_row.mT).view_as(y)
    return torch.addmm(y.flatten(0, -2), hidden.flatten(0, -2), up.mT).view(y.shape)


def low_rank_convolution(module: nn.Conv2d, x: Tensor, y: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """`low_rank_output` of a convolution: R kernels, then a mix of their maps.

    Args:
        module: the convolution; of stride 1 and with maps as large as its input, if `down` is per sample.
        x: (B, in, h, w).
        y: (B, out, h', w'), its output.
        up: (out, R), or (B, out, R) with one person per sample.
        down: (R, in · kernel height · kernel width), or (B, R, …).
    """
    keeps_size = x.shape[-2:] == y.shape[-2:]
    if down.ndim == 2 and not (keeps_size and x.is_contiguous()):  # channels_last stays channels_last
        kernels = down.to(x).view(-1, module.in_channels, *module.kernel_size)  # a quantised weight has another shape
        hidden = functional.conv2d(x, kernels, None, module.stride, module.padding, module.dilation)
        return y + functional.conv2d(hidden.to(y.dtype), up.to(y)[:, :, None, None]).to(y.dtype)
    hidden = moved_together(module, places_of(module, down.to(x)) @ x.flatten(2), x.shape[-2:])
    up = up.to(y).expand(len(y), -1, -1)
    return torch.baddbmm(y.flatten(2), up, hidden.flatten(2).to(y.dtype)).view_as(y)


def places_of(module: nn.Conv2d, down: Tensor) -> Tensor:
    """Kernels (…, R, in · h_k · w_k) by their places, (…, R · h_k · w_k, in): each is one product over the channels."""
    return down.unflatten(-1, (module.in_channels, -1)).transpose(-1, -2).flip(-2).flatten(-3, -2)


def moved_together(module: nn.Conv2d, products: Tensor, size: Sequence[int]) -> Tensor:
    """The products (B, R · h_k · w_k, h · w) of each place of a kernel, moved and added: (B, R, h, w).

    Several times as fast as a convolution in groups, or of few kernels, and without the memory of unfolded patches.
    """
    padding: Any = module.padding
    return functional.fold(products, tuple(size), module.kernel_size, padding=padding)


@contextmanager
def attach(modules: Mapping[str, nn.Module], factors: Mapping[str, Factors]) -> Iterator[None]:
    """Give layers a low-rank output path for the duration of the context.

    The mapping is read at every forward pass, so a training loop may put new factors into it between steps.

    Args:
        modules: layer name → linear-like module with output (..., out), or convolution.
        factors: layer name → (up, down), see `low_rank_output`; layers without an entry stay as they are.

    Raises:
        LayoutError: if a factor has no module.
    """
    if missing := [name for name in factors if name not in modules]:
        raise LayoutError(
            f"{len(missing)} of {len(factors)} layers of the LiDB are not in the model, the first is {missing[0]!r}. "
            "Connect the MODEL and CLIP of a matching checkpoint."
        )
    with ExitStack() as stack:
        for name, module in modules.items():
            handle = module.register_forward_hook(_hook(name, factors))
            stack.callback(handle.remove)
        yield


@contextmanager
def only_samples(numbers: Sequence[int]) -> Iterator[None]:
    """Within, batches hold only some samples of the whole one, those of these numbers; their factors are taken."""
    token = _SAMPLES.set(list(numbers))
    try:
        yield
    finally:
        _SAMPLES.reset(token)


def _hook(name: str, factors: Mapping[str, Factors]) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def add_low_rank_output(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if name not in factors:
            return output
        up, down = factors[name]
        if (numbers := _SAMPLES.get()) is not None:
            up, down = (side[numbers] if side.ndim == 3 else side for side in (up, down))
        if isinstance(module, nn.Conv2d):
            return low_rank_convolution(module, inputs[0], output, up, down)
        return low_rank_output(inputs[0], output, up, down)

    return add_low_rank_output
