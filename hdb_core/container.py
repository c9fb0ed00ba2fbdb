"""What our files share: safetensors with one compact JSON header, checked before any tensor is read, written atomically.

Every file belongs to one space: the layers of a model (`layout`) and their bases (`basis`).
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from .basis import STREAM, BasisRecipe, probe, same_basis
from .errors import BasisError, HDBError
from .layout import Layer, Layout

_MAX_HEADER_BYTES = 16 << 20
_LORA_MARKS = ("lora_up", "lora_down", "lora_A", "lora_B", "hada_", "lokr_")


@dataclass(frozen=True)
class FileKind:
    """A kind of file and the words of its refusals.

    Attributes:
        key: of the header in the safetensors metadata.
        name: "LiDB".
        version: of the format that is written; older ones are read, too.
        choose: what to choose instead of a file of another kind.
        remake: how to get a new one.
        error: what is raised.
    """

    key: str
    name: str
    version: int
    choose: str
    remake: str
    error: type[HDBError]

    def damaged(self, path: Path, what: str) -> HDBError:
        """A file that is not what its writer wrote."""
        return self.error(f"{path.name!r} is damaged or incomplete: {what}. Copy or download it again.")

    def other_basis(self, path: Path) -> HDBError:
        """A file whose basis this installation does not reproduce."""
        return self.error(
            f"{path.name!r} was made with another basis than the one its recipe gives here, so it would decode to "
            f"noise. Load it with the version of this node pack that made it, or {self.remake}."
        )

    def foreign(self, path: Path, keys: list[str]) -> HDBError:
        """A safetensors file of somebody else, with these tensors."""
        if any(mark in key for key in keys for mark in _LORA_MARKS):
            return self.error(f"{path.name!r} is an ordinary LoRA, not a {self.name}. Load it with the Load LoRA node.")
        return self.error(f"{path.name!r} is a safetensors file but not a {self.name}. {self.choose}")


def layout_fields(layout: Layout) -> dict[str, Any]:
    """The header fields that say for which layers a file was made."""
    layers = json.dumps([[layer.name, layer.in_features, layer.out_features] for layer in layout.layers])
    return {
        "family": layout.family,
        "layers": base64.b64encode(zlib.compress(layers.encode(), 9)).decode(),
        "layout_hash": layout.hash,
    }


def read_layout(kind: FileKind, fields: Mapping[str, Any], path: Path) -> Layout:
    """The opposite of `layout_fields`.

    Raises:
        HDBError: of the kind's class, if a field is missing, garbled or contradicts another.
    """
    try:
        layers = json.loads(zlib.decompress(base64.b64decode(fields["layers"])))
        layout = Layout(str(fields["family"]), tuple(Layer(str(n), int(i), int(o)) for n, i, o in layers))
        intact = layout.hash == fields["layout_hash"]
    except (KeyError, TypeError, ValueError, AttributeError, zlib.error) as error:
        raise kind.damaged(path, f"its header lacks or garbles a field ({error})") from error
    if not intact:
        raise kind.damaged(path, "its layer list does not match its hash")
    return layout


def space_fields(layout: Layout, basis: BasisRecipe) -> dict[str, Any]:
    """The header fields that say for which layers and in which bases a file was made."""
    return layout_fields(layout) | {
        "basis": {"stream": STREAM, **basis.fields()},
        "basis_hash": basis.hash(layout),
        "basis_probe": [round(value, 8) for value in probe(basis, layout)],
    }


def read_space(kind: FileKind, fields: Mapping[str, Any], path: Path) -> tuple[Layout, BasisRecipe]:
    """The opposite of `space_fields`. Whether the basis is the same here, `check_basis` says.

    Raises:
        HDBError: of the kind's class, if a field is missing, garbled or contradicts another.
    """
    layout = read_layout(kind, fields, path)
    try:
        recipe = dict(fields["basis"])
        stream = recipe.pop("stream")
        basis = BasisRecipe(**recipe)
        same_recipe = stream == STREAM and basis.hash(layout) == fields["basis_hash"]
    except BasisError as error:
        raise kind.error(f"{path.name!r}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise kind.damaged(path, f"its header lacks or garbles a field ({error})") from error
    if not same_recipe:
        raise kind.other_basis(path)
    return layout, basis


def read_info(fields: Mapping[str, Any]) -> dict[str, str]:
    """The free text of a header.

    Raises:
        KeyError, AttributeError: if it is missing or no mapping.
    """
    return {str(key): str(value) for key, value in fields["info"].items()}


def check_basis(kind: FileKind, fields: Mapping[str, Any], path: Path) -> None:
    """Compare a file's probe with the basis as this installation makes it.

    Raises:
        HDBError: of the kind's class, if they differ, or the file of a learned basis was not read.
    """
    layout, basis = read_space(kind, fields, path)
    try:
        stored = [float(value) for value in fields["basis_probe"]]
    except (KeyError, TypeError, ValueError) as error:
        raise kind.damaged(path, f"its header lacks or garbles a field ({error})") from error
    try:
        made = probe(basis, layout)
    except BasisError as error:
        raise kind.error(f"{path.name!r}: {error}") from error
    if not same_basis(stored, made):
        raise kind.other_basis(path)


def write(kind: FileKind, path: Path, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> int:
    """Write a file atomically: either the whole new file is there, or what was there before.

    Args:
        kind: which.
        path: where; the folder must exist.
        fields: header; format version and checksum are added.
        tensors: contiguous, on the CPU.

    Returns:
        The number of bytes written.

    Raises:
        HDBError: of the kind's class, if the file cannot be written.
    """
    header = {"format_version": kind.version, **fields}
    header["checksum"] = checksum(header, tensors)
    data = safetensors.torch.save(dict(tensors), {kind.key: json.dumps(header)})
    _write_atomically(kind, path, data)
    return len(data)


def read_fields(kind: FileKind, path: Path) -> dict[str, Any]:
    """The header of a file, without its tensors.

    Raises:
        FileNotFoundError: if there is no such file.
        HDBError: of the kind's class, if it is no such file, damaged, incomplete or of a newer version.
    """
    metadata = _read_metadata(kind, path)
    try:
        fields = json.loads(metadata)
    except ValueError as error:
        raise kind.damaged(path, "its header is not readable") from error
    version = fields.get("format_version") if isinstance(fields, dict) else None
    if not isinstance(version, int) or not 1 <= version <= kind.version:
        raise kind.error(
            f"Expected a {kind.name} file of format version 1 to {kind.version}, {path.name!r} has version {version}. "
            f"Update this node pack, or {kind.remake}."
        )
    return fields


def read_tensors(kind: FileKind, fields: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """The tensors of a file whose header is ``fields``, as stored, on the CPU.

    Raises:
        HDBError: of the kind's class, if they are damaged.
    """
    try:
        tensors = safetensors.torch.load(path.read_bytes())
    except (SafetensorError, ValueError, KeyError) as error:
        raise kind.damaged(path, str(error)) from error
    if checksum(fields, tensors) != fields.get("checksum"):
        raise kind.damaged(path, "its contents do not match its checksum")
    return tensors


def _read_metadata(kind: FileKind, path: Path) -> str:
    """Our header's text, after checks that need no knowledge of ours: is it whole, is it safetensors, is it ours."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        opening = file.read(1)
        if len(start) < 8 or opening != b"{" or not 2 <= length <= _MAX_HEADER_BYTES:
            raise kind.error(
                f"Expected a {kind.name} file, but {path.name!r} is not in the safetensors format (a web page or another "
                "kind of file saved under this name?). Download or save it again."
            )
        raw = opening + file.read(length - 1)
    try:
        entries = json.loads(raw)
        metadata = entries.pop("__metadata__", None) or {}
        expected = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise kind.damaged(path, "its header is not readable") from error
    if kind.key not in metadata:
        raise kind.foreign(path, list(entries))
    if size != expected:
        raise kind.damaged(path, f"expected {expected:,} bytes, got {size:,}")
    return metadata[kind.key]


def checksum(fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the header, without its own checksum, and the stored numbers."""
    rest = {name: value for name, value in fields.items() if name != "checksum"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _write_atomically(kind: FileKind, path: Path, data: bytes) -> None:
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{kind.key}-", delete=False) as file:
            temporary = Path(file.name)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise kind.error(
            f"Cannot write {path.name!r} into {str(path.parent)!r}: {error.strerror or error}. "
            "Check that the folder exists, is writable, and that the disk has room."
        ) from error
