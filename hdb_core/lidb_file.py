"""The LiDB file: two packed tensors behind the header of `container`.

They hold the components of all layers one after the other, down (N, a) and up (N, b); the header says how many are a
layer's. Only the shared frozen down side (`start_down`) is not stored: a file that leaves it out says so, and holds up
(L, b, R), as files of version 1 hold both sides. With 6 bits a number, four numbers are packed into three bytes, and
every row has a scale, ``down_scale`` and ``up_scale`` (N); in version 2 it was 8 bits.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from . import container
from .basis import BasisRecipe
from .errors import LiDBFileError
from .layout import Layout
from .lidb import LiDB, start_down, strongest, truncate

FORMAT_VERSION = 3
DEFAULT_RANK = 4  # on SD 1.5 at most 115 KB with 6 bits a number
COMPACT, HALF, FULL = 6, 16, 32  # bits a number
_DTYPES = {COMPACT: "int6", HALF: "float16", FULL: "float32"}
_SCALE_BYTES = {"int6": 4, "int8": 8}  # of a component's two rows
_LARGEST = 2 ** (COMPACT - 1) - 1
_SHIFTS = torch.arange(4) * COMPACT  # of the numbers in a word of 24 bits

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
    def component_bytes(self) -> float:
        """Of the numbers of one component."""
        size = self.basis.up_dim if self.shared_down else self.basis.down_dim + self.basis.up_dim
        dtype = self.fields.get("dtype", "float16")
        return size * int(re.sub(r"\D", "", dtype)) / 8 + _SCALE_BYTES.get(dtype, 0)


def save(lidb: LiDB, path: str | os.PathLike[str], rank: int | None = None, bits: int = HALF) -> int:
    """Write a person to a file, atomically: either the whole new file is there, or what was there before.

    Args:
        lidb: the person. Its factors are balanced first (the same person), so that float16 cannot overflow.
        path: where; the folder must exist.
        rank: keep only the strongest components, so many for each layer of the layout, wherever they are; None keeps
            all.
        bits: of a stored number, `COMPACT`, `HALF` or `FULL`; `COMPACT` changes each by at most 1/60 of its row's
            largest.

    Returns:
        The number of bytes written.

    Raises:
        LiDBFileError: if the person is not finite, or the file cannot be written.
        LiDBError: if the rank is below 1.
    """
    path = Path(path)
    factors, ranks = _stored_factors(lidb, rank)
    if not ranks:
        bits = max(bits, HALF)
    tensors = _compact(factors) if bits == COMPACT else _floating(factors, bits)
    if not all(bool(t.isfinite().all()) for t in tensors.values()):
        raise LiDBFileError(
            f"Expected finite numbers, got NaN or infinity in the LiDB for {path.name!r}; nothing was written. "
            "Make the person again with a lower learning rate."
        )
    fields = container.space_fields(lidb.layout, lidb.basis) | {
        "rank": max(ranks) if ranks else lidb.rank,
        "down": "stored" if ranks else "shared",
        "dtype": _DTYPES[bits],
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
    basis, up = header.basis, _as_float(tensors, "up", header.basis.up_dim)
    if header.shared_down:
        down = start_down(basis, header.layout, header.rank)
    else:
        down = _as_float(tensors, "down", basis.down_dim)
    if header.ranks:
        if not len(up) == len(down) == sum(header.ranks):
            raise KIND.damaged(path, "it has more or fewer components than its header says")
        down, up = _by_layer(header.ranks, down), _by_layer(header.ranks, up).mT
    if not (up.isfinite().all() and down.isfinite().all()):
        raise LiDBFileError(f"{path.name!r} holds NaN or infinity. Make the person again with a lower learning rate.")
    return LiDB(header.layout, basis, down, up, header.info)


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
    count = math.inf if rank is None else rank * len(lidb.layout.layers)
    fits = lidb.rank * len(lidb.layout.layers) <= count
    if fits and torch.equal(lidb.down.cpu(), start_down(lidb.basis, lidb.layout, lidb.rank)):
        return {"up": lidb.up}, []
    kept = truncate(lidb, lidb.rank) if fits else strongest(lidb, int(count))
    filled = (kept.down.abs().amax(2) > 0) & (kept.up.abs().amax(1) > 0)
    if not filled.any():  # a person that changes nothing
        filled[0, 0] = True
    return {"down": kept.down[filled], "up": kept.up.mT[filled]}, [int(number) for number in filled.sum(1)]


def _floating(factors: Mapping[str, Tensor], bits: int) -> dict[str, Tensor]:
    """Factors at a floating dtype, contiguous on the CPU."""
    dtype = getattr(torch, _DTYPES[bits])
    return {name: factor.detach().cpu().to(dtype).contiguous() for name, factor in factors.items()}


def _compact(factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rows (N, d) as packed numbers of 6 bits, and a scale a row."""
    found: dict[str, Tensor] = {}
    for name, factor in factors.items():
        factor = factor.detach().cpu().float()
        # bfloat16 has float32's range: no row is too small for it.
        scale = (factor.abs().amax(1) / _LARGEST).clamp(min=torch.finfo(torch.bfloat16).tiny).bfloat16()
        numbers = (factor / scale.float()[:, None]).round().clamp(-_LARGEST, _LARGEST)
        found |= {f"{name}_scale": scale, name: _packed(numbers)}
    return found


def _packed(numbers: Tensor) -> Tensor:
    """Whole numbers from -32 to 31, of any shape, as bytes: four in three."""
    codes = functional.pad(numbers.flatten().int() + _LARGEST + 1, (0, -numbers.numel() % 4)).view(-1, 4)
    words = (codes << _SHIFTS).sum(1)
    return torch.stack([words, words >> 8, words >> 16], 1).bitwise_and(255).flatten().to(torch.uint8)


def _unpacked(data: Tensor, count: int) -> Tensor:
    """The first ``count`` numbers of `_packed`, float32."""
    low, middle, high = data.int().view(-1, 3).unbind(1)
    words = low | middle << 8 | high << 16
    return ((words[:, None] >> _SHIFTS & 2 * _LARGEST + 1) - _LARGEST - 1).flatten()[:count].float()


def _as_float(tensors: Mapping[str, Tensor], name: str, size: int) -> Tensor:
    """One factor as float32, whatever way it was stored; rows have ``size`` numbers."""
    factor = tensors[name]
    if f"{name}_scale" not in tensors:
        return factor.float()
    scale = tensors[f"{name}_scale"].float()
    if factor.dtype is torch.uint8:
        factor = _unpacked(factor, len(scale) * size).view(-1, size)
    return factor * scale[:, None]


def _by_layer(ranks: tuple[int, ...], rows: Tensor) -> Tensor:
    """Rows (N, d) of all layers as (L, R, d), zero where a layer has fewer than R."""
    numbers = torch.tensor(ranks)
    layers = torch.arange(len(ranks)).repeat_interleave(numbers)
    columns = torch.cat([torch.arange(number) for number in ranks])
    return rows.new_zeros(len(ranks), max(ranks), rows.shape[1]).index_put((layers, columns), rows)
