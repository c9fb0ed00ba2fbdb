"""The file of a learned basis: two float16 tensors a layer behind the header of `container`.

Rounded to float16 the vectors are orthonormal within 1e-3 only; reading makes them so again, since all algebra on the
core of a LiDB rests on it. The checksum of the file names the basis for ever: people and hypernetworks refer to it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..basis import BasisRecipe
from ..errors import BasisFileError
from ..layout import Layout
from . import container
from .fields import whole_number

KIND = container.FileKind(
    key="lidb_basis",
    name="LiDB basis",
    version=1,
    choose="Choose the basis.safetensors of a run of hdb_core.train.",
    remake="learn it again",
    error=BasisFileError,
)
_TOGETHER = 100_000  # numbers
_NEWTON_STEPS = 2  # the distance from orthonormality is squared by each


def save(
    layout: Layout,
    bases: Mapping[str, tuple[Tensor, Tensor]],
    dims: tuple[int, int],
    path: str | os.PathLike[str],
    info: Mapping[str, str],
) -> int:
    """Write a learned basis atomically; the number of bytes.

    Args:
        layout: the layers that it is for.
        bases: layer name → (down_aux (a', in), up_aux (out, b')), orthonormal.
        dims: a and b; a layer with fewer inputs or outputs has as many vectors as those.
        path: where; the folder must exist.
        info: free text about how it was made.

    Raises:
        BasisFileError: if a number is not finite, or the file cannot be written, or could not be read again.
    """
    tensors = {
        f"{name}.{side}": vectors.detach().cpu().half().contiguous()
        for name, pair in bases.items()
        for side, vectors in zip(("down", "up"), pair, strict=True)
    }
    if not all(bool(t.isfinite().all()) for t in tensors.values()):
        raise BasisFileError(f"The basis for {Path(path).name!r} holds NaN or infinity; nothing was written.")
    fields = container.layout_fields(layout) | {"dims": list(dims), "info": dict(info)}
    return container.write(KIND, Path(path), fields, tensors, _header)


def load(path: str | os.PathLike[str]) -> tuple[Layout, BasisRecipe]:
    """Read a learned basis.

    Returns:
        The layers that it is for, and the recipe that names and holds it.

    Raises:
        FileNotFoundError: if there is no such file.
        BasisFileError: if it is no basis file, damaged, incomplete, of a newer version, or not orthonormal.
    """
    path = Path(path)
    fields = container.read_fields(KIND, path)
    layout, dims = _header(fields, path)
    tensors = container.read_tensors(KIND, fields, path)
    recipe = BasisRecipe(0, *dims, learned=fields["checksum"])
    try:
        if len(tensors) != 2 * len(layout.layers):
            raise ValueError(f"{len(tensors)} tensors")
        bases = {layer.name: (tensors[f"{layer.name}.down"], tensors[f"{layer.name}.up"]) for layer in layout.layers}
        for layer in layout.layers:
            a, b = recipe.dims(layer)
            down, up = bases[layer.name]
            if down.shape != (a, layer.in_features) or up.shape != (layer.out_features, b):
                raise ValueError(layer.name)
            if down.dtype is not torch.float16 or up.dtype is not torch.float16:
                raise TypeError(layer.name)
    except (LookupError, TypeError, ValueError) as error:
        raise KIND.damaged(path, f"its header and its numbers disagree ({error})") from error
    with torch.inference_mode(False):
        made = _made_orthonormal(bases)
    if not all(bool(t.isfinite().all()) for pair in made.values() for t in pair):
        raise KIND.damaged(path, "its vectors are not orthonormal")
    return layout, replace(recipe, bases=made)


def _header(fields: Mapping[str, Any], path: Path) -> tuple[Layout, tuple[int, int]]:
    layout = container.read_layout(KIND, fields, path)
    with KIND.garbled(path):
        down_dim, up_dim = (whole_number(dim, 1, container.MAX_DIM, "dims") for dim in fields["dims"])
        container.read_info(fields)
    return layout, (down_dim, up_dim)


def _made_orthonormal(bases: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """`orthonormal` of both sides of all layers; small ones of one shape together, since there may be thousands."""
    columns = {(name, side): own for name, (down, up) in bases.items() for side, own in (("down", down.mT), ("up", up))}
    shapes: dict[torch.Size, list[tuple[str, str]]] = {}
    for key, own in columns.items():
        shapes.setdefault(own.shape, []).append(key)
    made: dict[tuple[str, str], Tensor] = {}
    for shape, keys in shapes.items():
        count = max(1, _TOGETHER // shape.numel())
        for some in (keys[i : i + count] for i in range(0, len(keys), count)):
            made |= zip(some, orthonormal(torch.stack([columns[key] for key in some])).unbind(), strict=True)
    return {name: (made[name, "down"].mT.contiguous(), made[name, "up"].contiguous()) for name in bases}


def orthonormal(columns: Tensor) -> Tensor:
    """The nearest orthonormal columns (..., n, k) float32 of nearly orthonormal ones; NaN if they are far from it.

    Newton-Schulz iteration for the polar factor, in float64.
    """
    x = columns.clone().double()
    identity = torch.eye(x.shape[-1], dtype=x.dtype)
    if not float((x.mT @ x - identity).abs().max()) < 0.1:
        return torch.full_like(x, torch.nan).float()
    for _ in range(_NEWTON_STEPS):
        x = x @ (3 * identity - x.mT @ x) / 2
    return x.float()
