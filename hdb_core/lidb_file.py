"""The LiDB file: safetensors with two packed tensors and one compact JSON header under the key ``lidb``.

The header is read and checked before any tensor. Only the shared frozen down side (`start_down`) is not stored:
a file that leaves it out says so.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import tempfile
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from .basis import STREAM, BasisRecipe, probe, same_basis
from .errors import BasisError, LiDBFileError
from .layout import Layer, Layout
from .lidb import LiDB, start_down, truncate

FORMAT_VERSION = 1
DEFAULT_RANK = 2  # on SD 1.5 about 108 KB at float16
_HEADER_KEY = "lidb"
_MAX_HEADER_BYTES = 16 << 20
_LORA_MARKS = ("lora_up", "lora_down", "lora_A", "lora_B", "hada_", "lokr_")


@dataclass(frozen=True)
class LiDBHeader:
    """What a file says about itself, readable without its tensors."""

    layout: Layout
    basis: BasisRecipe
    rank: int
    info: dict[str, str]
    basis_probe: tuple[float, ...]
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
    data = safetensors.torch.save(tensors, {_HEADER_KEY: _header_json(lidb, tensors)})
    _write_atomically(path, data)
    return len(data)


def load(path: str | os.PathLike[str]) -> LiDB:
    """Read a person, float32 on the CPU.

    Raises:
        FileNotFoundError: if there is no such file.
        LiDBFileError: if it is no LiDB file, damaged, incomplete, of a newer version, with NaN, or made with a basis
            that this installation does not reproduce.
    """
    path = Path(path)
    header = read_header(path)
    _check_basis(header, path)
    try:
        tensors = safetensors.torch.load(path.read_bytes())
    except (SafetensorError, ValueError, KeyError) as error:
        raise _damaged(path, str(error)) from error
    if _checksum(header.fields, tensors) != header.fields.get("checksum"):
        raise _damaged(path, "its contents do not match its checksum")
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
    metadata = _read_metadata(path)
    try:
        fields = json.loads(metadata)
    except ValueError as error:
        raise _damaged(path, "its header is not readable") from error
    version = fields.get("format_version") if isinstance(fields, dict) else None
    if version != FORMAT_VERSION:
        raise LiDBFileError(
            f"Expected a LiDB file of format version {FORMAT_VERSION}, {path.name!r} has version {version}. "
            "Update this node pack, or make the person again."
        )
    return _parse_header(fields, path)


def _stored_tensors(lidb: LiDB, rank: int | None, dtype: torch.dtype) -> dict[str, Tensor]:
    rank = lidb.rank if rank is None else min(rank, lidb.rank)
    if not (lidb.up.isfinite().all() and lidb.down.isfinite().all()):
        return {"up": lidb.up}
    if rank == lidb.rank and torch.equal(lidb.down.cpu(), start_down(lidb.basis, lidb.layout, rank)):
        return {"up": lidb.up.detach().cpu().to(dtype).contiguous()}
    balanced = truncate(lidb, rank)
    factors = {"down": balanced.down, "up": balanced.up}
    return {name: factor.detach().cpu().to(dtype).contiguous() for name, factor in factors.items()}


def _header_json(lidb: LiDB, tensors: dict[str, Tensor]) -> str:
    layers = json.dumps([[layer.name, layer.in_features, layer.out_features] for layer in lidb.layout.layers])
    fields = {
        "format_version": FORMAT_VERSION,
        "family": lidb.layout.family,
        "layers": base64.b64encode(zlib.compress(layers.encode(), 9)).decode(),
        "layout_hash": lidb.layout.hash,
        "rank": tensors["up"].shape[2],
        "basis": {"stream": STREAM, **asdict(lidb.basis)},
        "basis_hash": lidb.basis.hash(lidb.layout),
        "basis_probe": [round(value, 8) for value in probe(lidb.basis, lidb.layout)],
        "down": "stored" if "down" in tensors else "shared",
        "info": dict(lidb.info),
    }
    return json.dumps({**fields, "checksum": _checksum(fields, tensors)})


def _parse_header(fields: dict[str, Any], path: Path) -> LiDBHeader:
    try:
        layers = json.loads(zlib.decompress(base64.b64decode(fields["layers"])))
        layout = Layout(str(fields["family"]), tuple(Layer(str(n), int(i), int(o)) for n, i, o in layers))
        recipe = dict(fields["basis"])
        stream = recipe.pop("stream")
        header = LiDBHeader(
            layout=layout,
            basis=BasisRecipe(**recipe),
            rank=int(fields["rank"]),
            info={str(key): str(value) for key, value in fields["info"].items()},
            basis_probe=tuple(float(value) for value in fields["basis_probe"]),
            shared_down=fields["down"] == "shared",
            fields=fields,
        )
        intact = layout.hash == fields["layout_hash"]
        same_recipe = stream == STREAM and header.basis.hash(layout) == fields["basis_hash"]
    except BasisError as error:
        raise LiDBFileError(f"{path.name!r}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, zlib.error) as error:
        raise _damaged(path, f"its header lacks or garbles a field ({error})") from error
    if not intact:
        raise _damaged(path, "its layer list does not match its hash")
    if not same_recipe:
        raise _other_basis(path)
    return header


def _check_basis(header: LiDBHeader, path: Path) -> None:
    if not same_basis(list(header.basis_probe), probe(header.basis, header.layout)):
        raise _other_basis(path)


def _read_metadata(path: Path) -> str:
    """Our header's text, after checks that need no knowledge of ours: is it whole, is it safetensors, is it ours."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        opening = file.read(1)
        if len(start) < 8 or opening != b"{" or not 2 <= length <= _MAX_HEADER_BYTES:
            raise LiDBFileError(
                f"Expected a LiDB file, but {path.name!r} is not in the safetensors format (a web page or another kind "
                "of file saved under this name?). Download or save it again."
            )
        raw = opening + file.read(length - 1)
    try:
        entries = json.loads(raw)
        metadata = entries.pop("__metadata__", None) or {}
        expected = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, "its header is not readable") from error
    if _HEADER_KEY not in metadata:
        raise _foreign(path, list(entries))
    if size != expected:
        raise _damaged(path, f"expected {expected:,} bytes, got {size:,}")
    return metadata[_HEADER_KEY]


def _foreign(path: Path, keys: list[str]) -> LiDBFileError:
    if any(mark in key for key in keys for mark in _LORA_MARKS):
        return LiDBFileError(f"{path.name!r} is an ordinary LoRA, not a LiDB. Load it with the Load LoRA node.")
    return LiDBFileError(
        f"{path.name!r} is a safetensors file but not a LiDB. Choose a file that the Save LiDB node has written."
    )


def _damaged(path: Path, what: str) -> LiDBFileError:
    return LiDBFileError(f"{path.name!r} is damaged or incomplete: {what}. Copy or download it again.")


def _other_basis(path: Path) -> LiDBFileError:
    return LiDBFileError(
        f"{path.name!r} was made with another basis than the one its recipe gives here, so it would decode to noise. "
        "Load it with the version of this node pack that made it, or make the person again."
    )


def _checksum(fields: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """SHA-256 over the header, without its own checksum, and the stored numbers."""
    rest = {name: value for name, value in fields.items() if name != "checksum"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _write_atomically(path: Path, data: bytes) -> None:
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".lidb-", delete=False) as file:
            temporary = Path(file.name)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise LiDBFileError(
            f"Cannot write {path.name!r} into {str(path.parent)!r}: {error.strerror or error}. "
            "Check that the folder exists, is writable, and that the disk has room."
        ) from error
