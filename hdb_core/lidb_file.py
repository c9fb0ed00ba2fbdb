"""The LiDB file: two packed tensors behind the header of `container`.

They hold the components of all layers one after the other, down (N, a) and up (N, b); the header says how many are a
layer's. Only the shared frozen down side (`start_down`) is not stored: a file that leaves it out says so, and holds up
(L, b, R), as files of version 1 hold both sides.
"""

from __future__ import annotations

import os
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
DEFAULT_RANK = 2  # on SD 1.5 about 108 KB at float16, with and without convolutions

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


def save(lidb: LiDB, path: str | os.PathLike[str], rank: int | None = None, dtype: torch.dtype = torch.float16) -> int:
    """Write a person to a file, atomically: either the whole new file is there, or what was there before.

    Args:
        lidb: the person. Its factors are balanced first (the same person), so that float16 cannot overflow.
        path: where; the folder must exist.
        rank: keep the strongest components only, so many for each linear layer of the layout, wherever they are;
            None keeps all.
        dtype: of the stored numbers.

    Returns:
        The number of bytes written.

    Raises:
        LiDBFileError: if the person is not finite, or the file cannot be written.
        LiDBError: if the rank is below 1.
    """
    path = Path(path)
    tensors, ranks = _stored_tensors(lidb, rank, dtype)
    if not all(bool(t.isfinite().all()) for t in tensors.values()):
        raise LiDBFileError(
            f"Expected finite numbers, got NaN or infinity in the LiDB for {path.name!r}; nothing was written. "
            "Make the person again with a lower learning rate."
        )
    fields = container.space_fields(lidb.layout, lidb.basis) | {
        "rank": max(ranks) if ranks else lidb.rank,
        "down": "stored" if ranks else "shared",
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
    up = tensors["up"].float()
    down = start_down(header.basis, header.layout, header.rank) if header.shared_down else tensors["down"].float()
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


def _stored_tensors(lidb: LiDB, rank: int | None, dtype: torch.dtype) -> tuple[dict[str, Tensor], list[int]]:
    """The tensors of the file, and how many components of each layer they hold; none where down is not stored."""
    rank = lidb.rank if rank is None else min(rank, lidb.rank)
    if not (lidb.up.isfinite().all() and lidb.down.isfinite().all()):
        return {"up": lidb.up}, []
    if rank == lidb.rank and torch.equal(lidb.down.cpu(), start_down(lidb.basis, lidb.layout, rank)):
        return {"up": lidb.up.detach().cpu().to(dtype).contiguous()}, []
    linear = sum(not layer.kernel_size for layer in lidb.layout.layers)
    kept = truncate(lidb, rank) if rank == lidb.rank else strongest(lidb, rank * linear)
    filled = (kept.down.abs().amax(2) > 0) & (kept.up.abs().amax(1) > 0)
    if not filled.any():  # a person that changes nothing
        filled[0, 0] = True
    factors = {"down": kept.down[filled], "up": kept.up.mT[filled]}
    ranks = [int(number) for number in filled.sum(1)]
    return {name: factor.detach().cpu().to(dtype).contiguous() for name, factor in factors.items()}, ranks


def _unpacked(ranks: tuple[int, ...], rows: Tensor) -> Tensor:
    """Rows (N, d) of all layers as (L, R, d), zero where a layer has fewer than R."""
    numbers = torch.tensor(ranks)
    layers = torch.arange(len(ranks)).repeat_interleave(numbers)
    columns = torch.cat([torch.arange(number) for number in ranks])
    return rows.new_zeros(len(ranks), max(ranks), rows.shape[1]).index_put((layers, columns), rows)
