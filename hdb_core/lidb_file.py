"""The LiDB file: two packed tensors behind the header of `container`.

Only the shared frozen down side (`start_down`) is not stored: a file that leaves it out says so.
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
from .lidb import LiDB, start_down, truncate

FORMAT_VERSION = 1
DEFAULT_RANK = 2  # on SD 1.5 about 108 KB at float16

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
    rank: int
    info: dict[str, str]
    shared_down: bool
    fields: dict[str, Any]  # the header as it is written


def save(lidb: LiDB, path: str | os.PathLike[str], rank: int | None = None, dtype: torch.dtype = torch.float16) -> int:
    """Write a person to a file, atomically: either the whole new file is there, or what was there before.

    Args:
        lidb: the person. Its factors are balanced first (the same person), so that float16 cannot overflow.
        path: where; the folder must exist.
        rank: truncate to this rank; None keeps all.
        dtype: of the stored numbers.

    Returns:
        The number of bytes written.

    Raises:
        LiDBFileError: if the person is not finite, or the file cannot be written.
        LiDBError: if the rank is below 1.
    """
    path = Path(path)
    tensors = _stored_tensors(lidb, rank, dtype)
    if not all(bool(t.isfinite().all()) for t in tensors.values()):
        raise LiDBFileError(
            f"Expected finite numbers, got NaN or infinity in the LiDB for {path.name!r}; nothing was written. "
            "Make the person again with a lower learning rate."
        )
    fields = container.space_fields(lidb.layout, lidb.basis) | {
        "rank": tensors["up"].shape[2],
        "down": "stored" if "down" in tensors else "shared",
        "info": dict(lidb.info),
    }
    return container.write(KIND, path, fields, tensors)


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
        rank, shared_down = int(fields["rank"]), fields["down"] == "shared"
        return LiDBHeader(layout, basis, rank, container.read_info(fields), shared_down, fields)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise KIND.damaged(path, f"its header lacks or garbles a field ({error})") from error


def _stored_tensors(lidb: LiDB, rank: int | None, dtype: torch.dtype) -> dict[str, Tensor]:
    rank = lidb.rank if rank is None else min(rank, lidb.rank)
    if not (lidb.up.isfinite().all() and lidb.down.isfinite().all()):
        return {"up": lidb.up}
    if rank == lidb.rank and torch.equal(lidb.down.cpu(), start_down(lidb.basis, lidb.layout, rank)):
        return {"up": lidb.up.detach().cpu().to(dtype).contiguous()}
    balanced = truncate(lidb, rank)
    factors = {"down": balanced.down, "up": balanced.up}
    return {name: factor.detach().cpu().to(dtype).contiguous() for name, factor in factors.items()}
