"""Low-rank output paths on linear layers and convolutions: ``y + up · (down · x)`` by forward hooks.

The full change of a weight is never formed, so autograd never forms a gradient of that size, and the layer may store
its weight in any format. One person for the whole batch, or another person for every sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .errors import LayoutError

Factors = tuple[Tensor, Tensor]


def low_rank_output(x: Tensor, y: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """``y + (x · downᵀ) · upᵀ`` in the dtype and on the device of the activations.

    Args:
        x: (..., in), the input of a linear layer; (B, T, in) if the factors are per sample.
        y: (..., out), its output.
        up: (out, R), or (B, out, R) with one person per sample; if there are more samples, each stands for as many.
        down: (R, in), or (B, R, in).

    Returns:
        A new tensor with the shape and dtype of `y`.
    """
    hidden = (x @ down.to(x).mT).to(y.dtype)
    up = up.to(y)
    if up.ndim == 3:
        return torch.baddbmm(y, hidden, up.repeat_interleave(len(y) // len(up), 0).mT)
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
    if down.ndim == 3:
        hidden = _maps_per_sample(module, x, down.to(x))
    else:
        kernels = down.to(x).view(-1, module.in_channels, *module.kernel_size)  # a quantised weight has another shape
        hidden = functional.conv2d(x, kernels, None, module.stride, module.padding, module.dilation)
    if up.ndim == 3:
        return torch.baddbmm(y.flatten(2), up.to(y), hidden.flatten(2).to(y.dtype)).view_as(y)
    return y + functional.conv2d(hidden.to(y.dtype), up.to(y)[:, :, None, None]).to(y.dtype)


def _maps_per_sample(module: nn.Conv2d, x: Tensor, down: Tensor) -> Tensor:
    """(B, R, h, w), every sample of x (B, in, h, w) convolved with its own kernels, down (B, R, in · h_k · w_k).

    Each place of a kernel is one product over the channels, and the products are then moved and added: several times as
    fast as a convolution in groups, and without the memory of unfolded patches.
    """
    kernels = down.unflatten(-1, (module.in_channels, -1)).permute(0, 1, 3, 2).flip(2).flatten(1, 2)
    products = kernels @ x.flatten(2)
    padding: Any = module.padding
    return functional.fold(products, x.shape[-2:], module.kernel_size, padding=padding)


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


def _hook(name: str, factors: Mapping[str, Factors]) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def add_low_rank_output(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if name not in factors:
            return output
        up, down = factors[name]
        if isinstance(module, nn.Conv2d):
            return low_rank_convolution(module, inputs[0], output, up, down)
        return low_rank_output(inputs[0], output, up, down)

    return add_low_rank_output
