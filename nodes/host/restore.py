"""Changes of the host's modules that end with a context: ordinary tensors, and text layers that can be differentiated."""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from comfy.clip_model import CLIPLayer
from torch import Tensor, nn


@contextmanager
def ordinary_tensors(*roots: nn.Module) -> Iterator[None]:
    """Replace parameters and buffers by ordinary frozen tensors over the same memory.

    The host loads everything in inference mode, and autograd refuses to save inference tensors.
    """
    replaced = []
    try:
        for module in {module for root in roots for module in root.modules()}:
            for table, wrap in ((module._parameters, frozen_parameter), (module._buffers, same_memory)):
                for name, tensor in list(table.items()):
                    # Quantised tensors are subclasses; the host computes ordinary ones from them on the way.
                    if type(tensor) in (Tensor, nn.Parameter):
                        replaced.append((table, name, tensor))
                        table[name] = wrap(tensor)
        yield
    finally:
        for table, name, tensor in replaced:
            table[name] = tensor


def same_memory(tensor: Tensor) -> Tensor:
    """An ordinary tensor over the memory of another, possibly an inference tensor."""
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return empty.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())


def frozen_parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(same_memory(tensor), requires_grad=False)


@contextmanager
def out_of_place_residuals(text_encoder: nn.Module) -> Iterator[None]:
    """Let CLIP layers add their residuals out of place: the host's ``x +=`` destroys what autograd has saved."""
    layers = [module for module in text_encoder.modules() if isinstance(module, CLIPLayer)]
    try:
        for layer in layers:
            layer.forward = types.MethodType(clip_layer_forward, layer)
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def clip_layer_forward(
    self: CLIPLayer, x: Tensor, mask: Tensor | None = None, optimized_attention: Any = None
) -> Tensor:
    x = x + self.self_attn(self.layer_norm1(x), mask, optimized_attention)
    return x + self.mlp(self.layer_norm2(x))
