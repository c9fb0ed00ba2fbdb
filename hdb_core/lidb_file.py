"""The LiDB file: two packed tensors behind the header of `container`.

They hold the components of all layers one after the other, down (N, a) and up (N, b); the header says how many are a
layer's. Only the shared frozen down side (`start_down`) is not stored: a file that leaves it out says so, and holds up
(L, b, R), as files of version 1 hold both sides. At int8 every row has a scale, ``down_scale`` and ``up_scale`` (N).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import container
from .basis import BasisRecipe
from .errors import LiDBFileError
from .layout import Layout
from .lidb import LiDB, start_down, strongest, truncate

FORMAT_VERSION = 2
DEFAULT_RANK = 4  # on SD 1.5 about 115 KB at int8

KIND = container.FileKind(
    key="lidb",
    name="LiDB",
    version=FORMAT_VERSION,
    choose="Choose a file that the Save LiDB node has written.",
    remake="make the person again",
    error=LiDBFileError,
)


@dataclass(frozen=True)
class LiDBHeader:
    """What a file says about itself, readable without its tensors."""

    layout: Layout
    basis: BasisRecipe
    rank: int  # the highest of a layer
    ranks: tuple[int, ...]  # of the layers; empty where all have the same
    info: dict[str, str]
    shared_down: bool
    fields: dict[str, Any]  # the header as it is written

    @property
    def component_bytes(self) -> int:
        """Of the numbers of one component."""
        size = self.basis.up_dim if self.shared_down else self.basis.down_dim + self.basis.up_dim
        dtype = self.fields.get("dtype", "float16")
        return size + 8 if dtype == "int8" else size * getattr(torch, dtype).itemsize


def save(lidb: LiDB, path: str | os.PathLike[str], rank: int | None = None, dtype: torch.dtype = torch.float16) -> int:
    """Write a person to a file, atomically: either the whole new file is there, or what was there before.

    Args:
        lidb: the person. Its factors are balanced first (the same person), so that float16 cannot overflow.
        path: where; the folder must exist.
        rank: keep only the strongest components, so many for each linear layer of the layout, wherever they are,
            convolutions included; None keeps all.
        dtype: of the stored numbers, int8 or a floating one; int8 changes each by at most 1/254 of its row's largest.

    Returns:
        The number of bytes written.

    Raises:
        LiDBFileError: if the person is not finite, or the file cannot be written.
        LiDBError: if the rank is below 1.
    """
    path = Path(path)
    factors, ranks = _stored_factors(lidb, rank)
    tensors = _as_stored(factors, dtype if ranks else torch.float16 if dtype is torch.int8 else dtype)
    if not all(bool(t.isfinite().all()) for t in tensors.values()):
        raise LiDBFileError(
            f"Expected finite numbers, got NaN or infinity in the LiDB for {path.name!r}; nothing was written. "
            "Make the person again with a lower learning rate."
        )
    fields = container.space_fields(lidb.layout, lidb.basis) | {
        "rank": max(ranks) if ranks else lidb.rank,
        "down": "stored" if ranks else "shared",
        "dtype": str(tensors["up"].dtype).removeprefix("torch."),
        "info": dict(lidb.info),
    }
    return container.write(KIND, path, fields | ({"ranks": ranks} if ranks else {}), tensors)


def load(path: str | os.PathLike[str]) -> LiDB:
    """Read a person, float32 on the CPU.

    Raises:
        FileNotFoundError: if there is no such file.
        LiDBFileError: if it is no LiDB file, damaged, incomplete, of a newer version, with NaN, or made with a basis
            that this installation does not reproduce.
    """
    path = Path(path)
    header = read_header(path)
    container.check_basis(KIND, header.fields, path)
    tensors = container.read_tensors(KIND, header.fields, path)
    up = _as_float(tensors, "up")
    down = start_down(header.basis, header.layout, header.rank) if header.shared_down else _as_float(tensors, "down")
    if header.ranks:
        if not len(up) == len(down) == sum(header.ranks):
            raise KIND.damaged(path, "it has more or fewer components than its header says")
        down, up = _unpacked(header.ranks, down), _unpacked(header.ranks, up).mT
    if not (up.isfinite().all() and down.isfinite().all()):
        raise LiDBFileError(f"{path.name!r} holds NaN or infinity. Make the person again with a lower learning rate.")
    return LiDB(header.layout, header.basis, down, up, header.info)


def read_header(path: str | os.PathLike[str]) -> LiDBHeader:
    """Read and check what a file says about itself, without its tensors.

    Raises:
        FileNotFoundError: if there is no such file.
        LiDBFileError: if it is no LiDB file, damaged, incomplete or of a newer version.
    """
    path = Path(path)
    fields = container.read_fields(KIND, path)
    layout, basis = container.read_space(KIND, fields, path)
    try:
        rank, ranks = int(fields["rank"]), tuple(int(number) for number in fields.get("ranks", ()))
        if ranks and (len(ranks) != len(layout.layers) or min(ranks) < 0 or max(ranks) != rank):
            raise ValueError("ranks")
        info, shared_down = container.read_info(fields), fields["down"] == "shared"
        return LiDBHeader(layout, basis, rank, ranks, info, shared_down, fields)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise KIND.damaged(path, f"its header lacks or garbles a field ({error})") from error


def _stored_factors(lidb: LiDB, rank: int | None) -> tuple[dict[str, Tensor], list[int]]:
    """The factors of the file, and how many components of each layer they hold; none where down is not stored."""
    if not (lidb.up.isfinite().all() and lidb.down.isfinite().all()):
        return {"up": lidb.up}, []
    count = math.inf if rank is None else rank * len(lidb.layout.without_convolutions().layers)
    fits = lidb.rank * len(lidb.layout.layers) <= count
    if fits and torch.equal(lidb.down.cpu(), start_down(lidb.basis, lidb.layout, lidb.rank)):
        return {"up": lidb.up}, []
    kept = truncate(lidb, lidb.rank) if fits else strongest(lidb, int(count))
    filled = (kept.down.abs().amax(2) > 0) & (kept.up.abs().amax(1) > 0)
    if not filled.any():  # a person that changes nothing
        filled[0, 0] = True
    return {"down": kept.down[filled], "up": kept.up.mT[filled]}, [int(number) for number in filled.sum(1)]


def _as_stored(factors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Factors at a dtype, each row with a scale at int8."""
    found = {}
    for name, factor in factors.items():
        factor = factor.detach().cpu().float()
        if dtype is torch.int8:
            scale = factor.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
            found[f"{name}_scale"], factor = scale, (factor / scale[:, None]).round()
        found[name] = factor.to(dtype).contiguous()
    return found


def _as_float(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """The opposite of `_as_stored` for one factor."""
    factor, scale = tensors[name].float(), tensors.get(f"{name}_scale")
    return factor if scale is None else factor * scale[:, None]


def _unpacked(ranks: tuple[int, ...], rows: Tensor) -> Tensor:
    """Rows (N, d) of all layers as (L, R, d), zero where a layer has fewer than R."""
    numbers = torch.tensor(ranks)
    layers = torch.arange(len(ranks)).repeat_interleave(numbers)
    columns = torch.cat([torch.arange(number) for number in ranks])
    return rows.new_zeros(len(ranks), max(ranks), rows.shape[1]).index_put((layers, columns), rows)
