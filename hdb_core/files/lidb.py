"""The LiDB file: two packed tensors behind the header of `container`.

They hold the components of all layers one after the other, down (N, a) and up (N, b); the header says how many are a
layer's. With 6 bits a number, four numbers are packed into three bytes, and every row has a scale, ``down_scale`` and
``up_scale`` (N).
"""

from __future__ import annotations

import json
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
from ..errors import LiDBFileError
from ..layout import Layout
from ..lidb import About, LiDB, strongest, truncate
from ..recommended import RECOMMENDED
from . import container
from .fields import read_dataclass, whole_number

FORMAT_VERSION = 1
DEFAULT_RANK = 4  # on SD 1.5 at most 115 KB with 6 bits a number
COMPACT, HALF, FULL = 6, 16, 32  # bits a number
_DTYPES = {COMPACT: "int6", HALF: "float16", FULL: "float32"}
_BITS = {name: bits for bits, name in _DTYPES.items()}
_TENSORS = {name: {"down", "up"} | ({"down_scale", "up_scale"} if name == "int6" else set()) for name in _BITS}
_SCALE_BYTES = 4  # of a component's two rows, with 6 bits a number
_LARGEST = 2 ** (COMPACT - 1) - 1
MAX_VALUES = 16_000_000  # of an unpacked person, who then takes 64 MB
MAX_COUNT = 1_000_000_000  # of photos and steps
MAX_STRENGTH = 100.0
_OPTIONAL = ("model", "name", "thumbnail")
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
    ranks: tuple[int, ...]  # components of each layer
    about: About
    fields: dict[str, Any]  # the header as it is written

    @property
    def component_bytes(self) -> float:
        """The size of the numbers of one component."""
        bits = _BITS[self.fields["dtype"]]
        numbers = (self.basis.down_dim + self.basis.up_dim) * bits / 8
        return numbers + (_SCALE_BYTES if bits == COMPACT else 0)


def save(lidb: LiDB, path: str | os.PathLike[str], rank: int | None = None, bits: int = HALF, new: bool = False) -> int:
    """Write a person to a file, atomically: either the whole new file is there, or what was there before.

    Args:
        lidb: the person. Its factors are balanced first (the same person), so that float16 cannot overflow.
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
        LiDBFileError: if the person is not finite, or the file cannot be written.
        LiDBError: if the rank is below 1.
    """
    path = Path(path)
    if not (lidb.up.isfinite().all() and lidb.down.isfinite().all()):
        raise _not_finite(path)
    factors, ranks = _components(lidb, rank)
    tensors = _compact(factors) if bits == COMPACT else _floating(factors, bits)
    if not all(bool(t.isfinite().all()) for t in tensors.values()):
        raise _not_finite(path)
    _require_readable(lidb, ranks, path)
    fields = container.space_fields(lidb.layout, lidb.basis) | {
        "ranks": ranks,
        "dtype": _DTYPES[bits],
        "about": about_fields(lidb.about),
    }
    return container.write(KIND, path, fields, tensors, new)


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
        if set(tensors) != _TENSORS[header.fields["dtype"]]:
            raise ValueError("its tensors are others than its header says")
        down = _as_float(tensors, "down", (count, header.basis.down_dim), header.fields["dtype"])
        up = _as_float(tensors, "up", (count, header.basis.up_dim), header.fields["dtype"])
    if not (up.isfinite().all() and down.isfinite().all()):
        raise LiDBFileError(f"{path.name!r} holds NaN or infinity. Make the person again with a lower learning rate.")
    down, up = _by_layer(header.ranks, down), _by_layer(header.ranks, up).mT
    return LiDB(header.layout, basis, down, up, header.about)


def read_header(path: str | os.PathLike[str]) -> LiDBHeader:
    """Read and check what a file says about itself, without its tensors.

    Raises:
        FileNotFoundError: if there is no such file.
        LiDBFileError: if it is no LiDB file, damaged, incomplete or of a newer version.
    """
    path = Path(path)
    fields = container.read_fields(KIND, path)
    layout, basis = container.read_space(KIND, fields, path)
    with KIND.garbled(path):
        ranks = tuple(whole_number(rank, 0, basis.max_rank, "ranks") for rank in fields["ranks"])
        size = len(layout.layers) * max(ranks) * (basis.down_dim + basis.up_dim)
        if len(ranks) != len(layout.layers) or not 0 < size <= MAX_VALUES:
            raise ValueError("ranks")
        if fields["dtype"] not in _BITS:
            raise ValueError("dtype")
        return LiDBHeader(layout, basis, ranks, read_about(fields["about"]), fields)


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
    if about.made_from not in RECOMMENDED:
        raise ValueError("made_from")
    whole_number(about.photos, 0, MAX_COUNT, "photos")
    whole_number(about.steps, 0, MAX_COUNT, "steps")
    if any(abs(strength) > MAX_STRENGTH for strength in about.strengths):
        raise ValueError("strengths")
    return about


def _require_readable(lidb: LiDB, ranks: list[int], path: Path) -> None:
    """Refuse to write what `load` would refuse to read.

    Raises:
        LiDBFileError: if a person is too large, or says of themselves what is out of its range.
    """
    size = len(ranks) * max(ranks) * (lidb.basis.down_dim + lidb.basis.up_dim)
    try:
        read_about(json.loads(json.dumps(about_fields(lidb.about))))
        if size > MAX_VALUES:
            raise ValueError(f"{size:,} numbers, where {MAX_VALUES:,} are the most")
    except (TypeError, ValueError) as error:
        raise LiDBFileError(f"The LiDB for {path.name!r} cannot be written ({error}); nothing was written.") from error


def _not_finite(path: Path) -> LiDBFileError:
    return LiDBFileError(
        f"Expected finite numbers, got NaN or infinity in the LiDB for {path.name!r}; nothing was written. "
        "Make the person again with a lower learning rate."
    )


def _components(lidb: LiDB, rank: int | None) -> tuple[dict[str, Tensor], list[int]]:
    """The factors of the file, rows of all layers one after the other, and how many of them are a layer's."""
    count = math.inf if rank is None else rank * len(lidb.layout.layers)
    fits = lidb.rank * len(lidb.layout.layers) <= count
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


def _as_float(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, int], dtype: str) -> Tensor:
    """One factor (N, d) as float32, whatever way it was stored."""
    factor, (rows, size) = tensors[name], shape
    if dtype != _DTYPES[COMPACT]:
        if factor.shape != shape or factor.dtype is not getattr(torch, dtype):
            raise ValueError(f"{name} has another shape or type than the header says")
        return factor.float()
    scale, num_bytes = tensors[f"{name}_scale"], -(-rows * size // 4) * 3
    whole = factor.shape == (num_bytes,) and factor.dtype is torch.uint8
    if not whole or scale.shape != (rows,) or scale.dtype is not torch.bfloat16:
        raise ValueError(f"{name} has another length or type than the header says")
    return _unpacked(factor, rows * size).view(rows, size) * scale.float()[:, None]


def _by_layer(ranks: tuple[int, ...], rows: Tensor) -> Tensor:
    """Rows (N, d) of all layers as (L, R, d), zero where a layer has fewer than R."""
    numbers = torch.tensor(ranks)
    layers = torch.arange(len(ranks)).repeat_interleave(numbers)
    columns = torch.cat([torch.arange(number) for number in ranks])
    return rows.new_zeros(len(ranks), max(ranks), rows.shape[1]).index_put((layers, columns), rows)
