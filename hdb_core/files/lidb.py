"""The LiDB file: two packed tensors behind the header of `container`.

They hold the components of all layers one after the other, down (N, a) and up (N, b); the header says how many are a
layer's. With 6 bits a number, four numbers are packed into three bytes. Below 32 bits every row has a scale,
``down_scale`` and ``up_scale`` (N), so that no person is too weak or too strong for the type.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..basis import BasisRecipe
from ..errors import LiDBError, LiDBFileError, require
from ..layout import Layout
from ..lidb import MAX_COUNT, About, LiDB, is_finite, strongest, truncate
from ..prompt import MOST_CHARACTERS
from ..recommended import RECOMMENDED
from . import container
from .fields import as_type, read_dataclass, whole_number

FORMAT_VERSION = 1
DEFAULT_RANK = 4  # on SD 1.5 at most 115 KB with 6 bits a number
COMPACT, HALF, FULL = 6, 16, 32  # bits a number
_DTYPES = {COMPACT: "int6", HALF: "float16", FULL: "float32"}
_BITS = {name: bits for bits, name in _DTYPES.items()}
_SIDES, _SCALES = {"down", "up"}, {"down_scale", "up_scale"}
_SCALE_BYTES = 4  # of a component's two rows
_LARGEST = 2 ** (COMPACT - 1) - 1
MAX_VALUES = 8_000_000  # of an unpacked person, who then takes 32 MB
MAX_STRENGTH = 100.0
_OPTIONAL = ("model", "name", "thumbnail")
_SHIFTS = torch.arange(4, dtype=torch.int32) * COMPACT  # of the numbers in a word of 24 bits

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
    ranks: tuple[int, ...]  # components of each layer
    about: About
    fields: dict[str, Any]  # the header as it is written

    @property
    def component_bytes(self) -> float:
        """The size of the numbers of one component."""
        bits = _BITS[self.fields["dtype"]]
        numbers = (self.basis.down_dim + self.basis.up_dim) * bits / 8
        return numbers + (0 if bits == FULL else _SCALE_BYTES)


def save(lidb: LiDB, path: str | os.PathLike[str], rank: int | None = None, bits: int = HALF, new: bool = False) -> int:
    """Write a person to a file, atomically: either the whole new file is there, or what was there before.

    Args:
        lidb: the person. Its factors are balanced first, which leaves it the same.
        path: where; the folder must exist.
        rank: keep only the strongest components, so many for each layer of the layout, wherever they are; None keeps
            all.
        bits: of a stored number, `COMPACT`, `HALF` or `FULL`; `COMPACT` changes each by at most 1/60 of its row's
            largest.
        new: never replace a file.

    Returns:
        The number of bytes written.

    Raises:
        FileExistsError: if it must be new and is there.
        LiDBFileError: if the person is not finite, or the file cannot be written, or could not be read again.
        LiDBError: if the rank is below 1, or there is no such number of bits.
    """
    path = Path(path)
    require(bits in tuple(_DTYPES), "bits", "6, 16 or 32", bits, LiDBError)
    require(
        rank is None or (isinstance(rank, int) and rank >= 1), "rank", "a whole number of at least 1", rank, LiDBError
    )
    if not is_finite(lidb):
        raise LiDBFileError(
            f"Expected finite numbers, got NaN or infinity in the LiDB for {path.name!r}; nothing was written. "
            "Make the person again with a lower learning rate."
        )
    factors, ranks = _components(lidb, rank, bits)
    tensors = factors if bits == FULL else _scaled(factors, bits)
    fields = container.space_fields(lidb.layout, lidb.basis) | {
        "ranks": ranks,
        "dtype": _DTYPES[bits],
        "about": about_fields(lidb.about),
    }
    return container.write(KIND, path, fields, tensors, _header, new)


def load(path: str | os.PathLike[str], learned: BasisRecipe | None = None) -> LiDB:
    """Read a person, float32 on the CPU.

    Args:
        path: of the file.
        learned: the learned basis that the file names, from `files.basis.load`; of no use for a random one.

    Raises:
        FileNotFoundError: if there is no such file.
        LiDBFileError: if it is no LiDB file, damaged, incomplete, of a newer version, with NaN, or made with a basis
            that this installation does not reproduce.
    """
    path = Path(path)
    header = read_header(path)
    basis = container.check_basis(KIND, header.fields, path, learned)
    tensors = container.read_tensors(KIND, header.fields, path)
    with KIND.garbled(path):
        count = sum(header.ranks)
        if set(tensors) != _SIDES | (set() if header.fields["dtype"] == _DTYPES[FULL] else _SCALES):
            raise ValueError("its tensors are others than its header says")
        down = _as_float(tensors, "down", (count, header.basis.down_dim), header.fields["dtype"])
        up = _as_float(tensors, "up", (count, header.basis.up_dim), header.fields["dtype"])
    down, up = _by_layer(header.ranks, down), _by_layer(header.ranks, up).mT
    lidb = LiDB(header.layout, basis, down, up, header.about)
    if not is_finite(lidb):
        raise LiDBFileError(f"{path.name!r} holds NaN or infinity. Make the person again with a lower learning rate.")
    return lidb


def read_header(path: str | os.PathLike[str]) -> LiDBHeader:
    """Read and check what a file says about itself, without its tensors.

    Raises:
        FileNotFoundError: if there is no such file.
        LiDBFileError: if it is no LiDB file, damaged, incomplete or of a newer version.
    """
    path = Path(path)
    header = _header(container.read_fields(KIND, path), path)
    if path.stat().st_size > sum(header.ranks) * header.component_bytes + 2 * container.MAX_HEADER_BYTES:
        raise KIND.damaged(path, "it is larger than its header says")
    return header


def _header(fields: Mapping[str, Any], path: Path) -> LiDBHeader:
    layout, basis = container.read_space(KIND, fields, path)
    with KIND.garbled(path):
        ranks = as_type(fields["ranks"], tuple[int, ...], "ranks")
        if len(ranks) != len(layout.layers) or not 0 <= min(ranks) <= max(ranks) <= basis.max_rank:
            raise ValueError("ranks")
        size = len(ranks) * max(ranks) * (basis.down_dim + basis.up_dim)
        if not 0 < size <= MAX_VALUES:
            raise ValueError(f"{size:,} numbers, where {MAX_VALUES:,} are the most")
        if fields["dtype"] not in _BITS:
            raise ValueError("dtype")
        return LiDBHeader(layout, basis, ranks, read_about(fields["about"]), dict(fields))


def about_fields(about: About) -> dict[str, Any]:
    """What a person says about themselves, as JSON takes it; without a name, a thumbnail, a model where there is none."""
    fields = {name: value for name, value in asdict(about).items() if value or name not in _OPTIONAL}
    return fields | {"strengths": list(about.strengths)}


def read_about(fields: Any) -> About:
    """The opposite of `about_fields`.

    Raises:
        TypeError, ValueError: if a field is unknown, of another type, or out of its range.
    """
    about = read_dataclass(About, fields)
    if max(len(about.prompt), len(about.token)) > MOST_CHARACTERS:
        raise ValueError("prompt")
    if about.made_from not in RECOMMENDED:
        raise ValueError("made_from")
    whole_number(about.photos, 0, MAX_COUNT, "photos")
    whole_number(about.steps, 0, MAX_COUNT, "steps")
    if about.strengths.guidance < 1 or any(abs(strength) > MAX_STRENGTH for strength in about.strengths):
        raise ValueError("strengths")
    return about


def _components(lidb: LiDB, rank: int | None, bits: int) -> tuple[dict[str, Tensor], list[int]]:
    """The factors of the file, rows of all layers one after the other, and how many of them are a layer's."""
    count = math.inf if rank is None else rank * len(lidb.layout.layers)
    factors, ranks = _rows(lidb)
    # A person of such a file stays as they are; in balance, they would be rounded anew each time, and lose a little.
    if bits == COMPACT and sum(ranks) <= count and _is_compact(factors):
        return factors, ranks
    return _rows(truncate(lidb, lidb.rank) if lidb.rank * len(ranks) <= count else strongest(lidb, int(count)))


def _rows(lidb: LiDB) -> tuple[dict[str, Tensor], list[int]]:
    """The components that are not zero, as `_components` gives them; of a person that changes nothing, one."""
    filled = (lidb.down.abs().amax(2) > 0) & (lidb.up.abs().amax(1) > 0)
    if not filled.any():
        filled[0, 0] = True
    rows = {"down": lidb.down[filled], "up": lidb.up.mT[filled]}
    return {name: own.detach().cpu().float() for name, own in rows.items()}, filled.sum(1).tolist()


def _is_compact(factors: Mapping[str, Tensor]) -> bool:
    """Whether 6 bits a number hold rows (N, d) exactly."""
    stored = _scaled(factors, COMPACT)
    return all(
        torch.equal(_as_float(stored, name, (len(rows), rows.shape[1]), _DTYPES[COMPACT]), rows)
        for name, rows in factors.items()
    )


def _scaled(factors: Mapping[str, Tensor], bits: int) -> dict[str, Tensor]:
    """Rows (N, d) in their own scale, packed or in float16, and the scales (N)."""
    found: dict[str, Tensor] = {}
    for name, rows in factors.items():
        # bfloat16 has float32's range: no row is too small for it.
        scale = (rows.abs().amax(1) / _LARGEST).clamp(min=torch.finfo(torch.bfloat16).tiny).bfloat16()
        numbers = rows / scale.float()[:, None]
        packed = _packed(numbers.round().clamp(-_LARGEST, _LARGEST)) if bits == COMPACT else numbers.half()
        found |= {f"{name}_scale": scale, name: packed}
    return found


def _packed(numbers: Tensor) -> Tensor:
    """Whole numbers from -31 to 31, of any shape, as bytes: four in three."""
    codes = functional.pad(numbers.flatten().int() + _LARGEST + 1, (0, -numbers.numel() % 4)).view(-1, 4)
    words = (codes << _SHIFTS).sum(1)
    return torch.stack([words, words >> 8, words >> 16], 1).bitwise_and(255).flatten().to(torch.uint8)


def _unpacked(data: Tensor, count: int) -> Tensor:
    """The first ``count`` numbers of `_packed`, float32.

    Raises:
        ValueError: if one of them is -32, which no writer gives.
    """
    low, middle, high = data.int().view(-1, 3).unbind(1)
    words = low | middle << 8 | high << 16
    numbers = ((words[:, None] >> _SHIFTS & 2 * _LARGEST + 1) - _LARGEST - 1).flatten()[:count]
    if int(numbers.min()) < -_LARGEST:
        raise ValueError("a number is out of its range")
    return numbers.float()


def _as_float(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, int], dtype: str) -> Tensor:
    """One factor (N, d) as float32, whatever way it was stored."""
    rows, size = shape
    expected: tuple[tuple[int, ...], torch.dtype] = shape, getattr(torch, dtype, torch.uint8)
    if dtype == _DTYPES[COMPACT]:
        expected = (-(-rows * size // 4) * 3,), torch.uint8
    factor, scale = tensors[name], tensors.get(f"{name}_scale", torch.ones(rows).bfloat16())
    if (factor.shape, factor.dtype) != expected or (scale.shape, scale.dtype) != ((rows,), torch.bfloat16):
        raise ValueError(f"{name} has another shape or type than the header says")
    if not (scale > 0).all():
        raise ValueError(f"{name} has a scale of no size")
    whole = _unpacked(factor, rows * size).view(shape) if dtype == _DTYPES[COMPACT] else factor.float()
    return whole * scale.float()[:, None]


def _by_layer(ranks: tuple[int, ...], rows: Tensor) -> Tensor:
    """Rows (N, d) of all layers as (L, R, d), zero where a layer has fewer than R."""
    numbers = torch.tensor(ranks)
    layers = torch.arange(len(ranks)).repeat_interleave(numbers)
    columns = torch.cat([torch.arange(number) for number in ranks])
    return rows.new_zeros(len(ranks), max(ranks), rows.shape[1]).index_put((layers, columns), rows)
