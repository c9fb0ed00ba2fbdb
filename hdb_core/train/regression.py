"""The regression onto people who were fitted before, in the space of weight changes.

Distances are those of the full ``delta_weight`` matrices, exact on the factors: raw factors may differ where the change
is the same (``(c · down, up / c)``), and a loss on them would punish that. On the down side that all people share, whose
rows are orthonormal, both losses are one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..lidb import Factors, factors_inner


def squared_distance(one: Factors, other: Factors) -> Tensor:
    """‖ΔW − ΔW'‖² (B, L), differentiable."""
    return factors_inner(one, one) - 2 * factors_inner(one, other) + factors_inner(other, other)


def layer_energy(targets: Factors) -> Tensor:
    """The mean ‖ΔW‖² of each layer (L,) over the people; what `regression_loss` is measured in."""
    return factors_inner(targets, targets).mean(0)


def regression_loss(predicted: Factors, targets: Factors, energy: Tensor) -> Tensor:
    """Mean over people and layers of the squared distance, in units of each layer's energy (L,).

    Predicting zero gives 1; `mean_predictor_loss` is what a network must beat to have learned anything of a person.
    """
    live = energy > 0
    return (squared_distance(predicted, targets)[:, live] / energy[live]).mean()


def mean_predictor_loss(targets: Factors, energy: Tensor) -> Tensor:
    """The regression loss of the best constant: the mean change of all people, at full rank."""
    mean = torch.einsum("nlbr,nlra->lba", targets.up, targets.down) / len(targets.up)
    live = energy > 0
    return 1 - (mean.square().sum((-2, -1))[live] / energy[live]).mean()
