"""What autograd keeps of a model's forward pass: counted on small inputs, and scaled to any size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Sides of the latents that are counted on, small ones for all kinds of models. Layers keep as much as there are pixels,
# and attention without a fused kernel as much as their square.
SIDES = (8, 16, 24)


class MemoryCost(NamedTuple):
    """Bytes of a training step: ``constant + samples · (of_a_sample + of_a_pixel · p + of_a_pair · p²)``.

    A sample has p latent pixels. The constant part is what does not grow with the samples: copies of weights.
    """

    constant: float
    of_a_sample: float
    of_a_pixel: float
    of_a_pair: float

    def bytes(self, samples: int, pixels: int) -> int:
        """Of a step on so many samples of so many latent pixels."""
        return int(self.constant + samples * (self.of_a_sample + pixels * (self.of_a_pixel + pixels * self.of_a_pair)))

    def samples(self, free: float, pixels: int) -> int:
        """How many samples of so many latent pixels fit into so many bytes; 0 if not even one."""
        sample = max(1, self.bytes(1, pixels) - self.constant)
        return max(0, int((free - self.constant) // sample))

    def pixels(self, free: float) -> int:
        """The latent pixels of the largest single sample that fits into so many bytes; 0 if there is none."""
        left = free - self.constant - self.of_a_sample
        if left <= 0:
            return 0
        root = (self.of_a_pixel**2 + 4 * max(0.0, self.of_a_pair) * left) ** 0.5
        return int(2 * left / (self.of_a_pixel + root))


def measured_cost(count: Callable[[int, int], int]) -> MemoryCost:
    """The cost of which `count` gives single values.

    Args:
        count: (samples, side of the latents) → bytes; called four times.
    """
    (one, middle, large), two = (count(1, side) for side in SIDES), count(2, SIDES[0])
    p, q, r = (float(side**2) for side in SIDES)
    of_a_pair = ((large - middle) / (r - q) - (middle - one) / (q - p)) / (r - p)
    of_a_pixel = (middle - one) / (q - p) - of_a_pair * (p + q)
    constant = 2 * one - two
    return MemoryCost(constant, one - constant - of_a_pixel * p - of_a_pair * p * p, of_a_pixel, of_a_pair)


def saved_bytes(forward: Callable[[], object], there: Iterable[Tensor]) -> int:
    """Bytes of all memory that autograd keeps for the backward pass of a forward pass, every piece once.

    Args:
        forward: gives something that holds the graph.
        there: what does not count, because it is there anyway: weights.
    """
    owned = {piece.data_ptr() for tensor in there for piece in _pieces(tensor)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept.update((piece.data_ptr(), piece.nbytes()) for piece in _pieces(tensor) if piece.data_ptr() not in owned)
        return tensor.detach()  # a result that keeps its own graph would never be freed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        graph = forward()  # held until all is counted, or an address could come twice
    total = sum(kept.values())
    del graph
    return total


def _pieces(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    """The memory of a tensor; a quantised one has none itself, but wraps others that have."""
    if hasattr(tensor, "__tensor_flatten__"):  # PyTorch's protocol for those
        for name in tensor.__tensor_flatten__()[0]:
            yield from _pieces(getattr(tensor, name))
    else:
        yield tensor.untyped_storage()
