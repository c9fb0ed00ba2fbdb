"""The file that a training goes on from: weights, their average and AdamW's moments, behind the header of `container`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import HyperNetError
from ..files import container
from ..files.fields import whole_number
from .data.groups import differing

MOST_STEPS = 1_000_000_000
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
KIND = container.FileKind(
    key="training",
    name="training state",
    version=1,
    choose="Delete it to train from the start, or use another run folder.",
    remake="delete it to train from the start",
    error=HyperNetError,
)


def write(
    path: Path,
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: Mapping[str, Tensor],
    step: int,
    sizes: Mapping[str, Any],
) -> None:
    """Write a state atomically; a kill leaves the old or the new one.

    Args:
        path: where; the folder must exist.
        net: the module.
        optimizer: AdamW, of its parameters.
        average: by the names of the module's state_dict.
        step: the next one.
        sizes: what must be the same to go on from here, as JSON takes it.

    Raises:
        HyperNetError: if it cannot be written.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in net.named_parameters()}
    tensors = {f"net.{name}": weight for name, weight in net.state_dict().items()}
    tensors |= {f"average.{name}": weight for name, weight in average.items()}
    for parameter, own in optimizer.state.items():
        tensors |= {f"{moment}.{names[parameter]}": own[moment] for moment in _MOMENTS}
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    container.write(KIND, path, {"step": step, "sizes": dict(sizes)}, stored, _header)


def _header(fields: Mapping[str, Any], path: Path) -> tuple[int, dict[str, Any]]:
    """The next step, and what must be the same."""
    with KIND.garbled(path):
        return whole_number(fields["step"], 0, MOST_STEPS, "step"), dict(fields["sizes"])


def restore(
    path: Path,
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: dict[str, Tensor],
    sizes: Mapping[str, Any],
) -> int:
    """Load what `write` wrote; rates and decay stay those of the optimizer.

    Returns:
        The next step.

    Raises:
        HyperNetError: if it is damaged, or of a training with other sizes or weights.
    """
    fields = container.read_fields(KIND, path)
    step, own = _header(fields, path)
    if different := differing(own, sizes):
        raise HyperNetError(
            f"{path} is of a training with another {', '.join(different):.300}. Give the settings that it was begun with, "
            "or use another run folder."
        )
    tensors = container.read_tensors(KIND, fields, path)
    groups = optimizer.state_dict()["param_groups"]
    # A parameter without a gradient so far has no moments.
    trained = {number: name for number, name in enumerate(_trained(net, optimizer)) if f"step.{name}" in tensors}
    _require_same(path, tensors, _expected(net, trained.values()))
    net.load_state_dict({name: tensors[f"net.{name}"] for name in net.state_dict()})
    average.update({name: tensors[f"average.{name}"] for name in net.state_dict()})
    moments = {number: {moment: tensors[f"{moment}.{name}"] for moment in _MOMENTS} for number, name in trained.items()}
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
    return step


def _trained(net: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """The names of the optimizer's parameters, in its order."""
    names = {parameter: name for name, parameter in net.named_parameters()}
    return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]


def _expected(net: nn.Module, trained: Iterable[str]) -> dict[str, tuple[torch.dtype, torch.Size]]:
    """Type and shape of every tensor of a state with moments of these parameters."""
    weights = {name: (weight.dtype, weight.shape) for name, weight in net.state_dict().items()}
    found = {f"{part}.{name}": kind for part in ("net", "average") for name, kind in weights.items()}
    for name in trained:
        found |= {f"{moment}.{name}": weights[name] for moment in _MOMENTS[1:]}
        found[f"step.{name}"] = (torch.float32, torch.Size())
    return found


def _require_same(
    path: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[torch.dtype, torch.Size]]
) -> None:
    found = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    if other := sorted(name for name in {**found, **expected} if found.get(name) != expected.get(name)):
        raise HyperNetError(
            f"{path} trains other weights ({other[0]:.100}). Give the settings that it was begun with, or use another run "
            "folder."
        )
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise KIND.damaged(path, f"{name} holds NaN or infinity")
        # A count of steps, or a mean of squares.
        if name.startswith(("step.", "exp_avg_sq.")) and (tensor < 0).any():
            raise KIND.damaged(path, f"{name} is below 0")
