"""The face code: of what is in the face tokens, that which tells how another photo of the person looks.

It is the linear prediction of the principal components of that photo, each in units of its standard deviation. So it has
no more of the photo's own clothes and background than help to know the person, and the small shapes of a face count in
it as much as the colours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .pretrain import Components

RIDGES = (1.0, 10.0, 100.0, 1000.0, 10000.0)


def fit_code(seen: Tensor, shown: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The map from tokens to code, by ridge regression.

    Args:
        seen: (N, S), the summed face tokens of one photo of each of N people.
        shown: (N, C, h, w), the latents of another photo of theirs, each place by the root of how much it counts.
        count: K.

    Returns:
        mean (S,) and map (S, K) float32: the code of x is (x − mean) @ map. K columns, of which those beyond the number
        of components are zero.
    """
    components = Components.of(shown)
    flat = (shown.float().flatten(1) - components.mean) @ components.directions[:, :count]
    targets = (flat / components.variance[:count].sqrt().clamp(min=1e-6)).double()
    mean, spread = seen.double().mean(0), seen.double().std(0).clamp(min=1e-6)
    inputs = (seen.double() - mean) / spread
    kept = max(1, len(inputs) // 5)

    def error(ridge: float) -> float:
        weights = ridge_weights(inputs[kept:], targets[kept:], ridge)
        return float((inputs[:kept] @ weights - targets[:kept]).square().mean())

    best = ridge_weights(inputs, targets, min(RIDGES, key=error)) / spread[:, None]
    padded = torch.nn.functional.pad(best, (0, count - best.shape[1]))
    return mean.float(), padded.float()


def ridge_weights(inputs: Tensor, targets: Tensor, ridge: float) -> Tensor:
    """The ridge regression (D, K) of centred targets (N, K) on centred inputs (N, D)."""
    if len(inputs) < inputs.shape[1]:
        gram = inputs @ inputs.mT
        return inputs.mT @ torch.linalg.solve(gram + ridge * torch.eye(len(gram)).to(gram), targets)
    gram = inputs.mT @ inputs
    return torch.linalg.solve(gram + ridge * torch.eye(len(gram)).to(gram), inputs.mT @ targets)
