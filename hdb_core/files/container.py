"""What our files share: safetensors with one compact JSON header, checked before any tensor is read, written atomically.

Every file belongs to one space: the layers of a model (`layout`) and their bases (`basis`).
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ..basis import STREAM, BasisRecipe, drawing_cost, probe, probed, same_basis
from ..errors import BasisError, HDBError
from ..layout import Layer, Layout
from .atomic import creating, replacing
from .fields import as_type, read_dataclass, whole_number
from .reading import GARBLED, opened, read_whole, reason, regular

# A file is believed only within these limits, so that whatever it says, reading it takes no more than its own length
# and these allow. The largest model of today has some 2,000 layers, up to 55,296 wide.
MAX_HEADER_BYTES = 1 << 20
MAX_LAYERS = 4096
MAX_FEATURES = 65_536
MAX_DIM = 1024  # of a basis
MAX_NAME = 256
MAX_PROBED = 500_000_000  # operations that comparing bases takes
_LORA_MARKS = ("lora_up", "lora_down", "lora_A", "lora_B", "hada_", "lokr_")


@dataclass(frozen=True)
class FileKind:
    """A kind of file and the words of its refusals.

    Attributes:
        key: of the header in the safetensors metadata.
        name: "LiDB".
        version: of the format.
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

    @contextmanager
    def garbled(self, path: Path) -> Iterator[None]:
        """Turns what reading of a header raises into one sentence.

        Raises:
            HDBError: of the kind's class.
        """
        try:
            yield
        except self.error:
            raise
        except HDBError as error:
            raise self.error(f"{path.name!r}: {error}") from error
        except GARBLED as error:
            raise self.damaged(path, f"its header lacks or garbles a field ({reason(error)})") from error

    def unreadable(self, path: Path, error: OSError) -> HDBError:
        """A file that the system does not let us read."""
        return self.error(f"Cannot read {path.name!r} in {str(path.parent)!r}: {reason(error)}.")

    def no_safetensors(self, path: Path) -> HDBError:
        """A file in another format."""
        return self.error(
            f"Expected a {self.name} file, but {path.name!r} is not in the safetensors format (a web page or another "
            "kind of file saved under this name?). Download or save it again."
        )

    def foreign_size(self, path: Path) -> HDBError:
        """A file whose header is larger than any of ours."""
        return self.error(f"{path.name!r} is not a {self.name}: its header is too large. {self.choose}")

    def other_basis(self, path: Path) -> HDBError:
        """A file whose basis this installation does not reproduce."""
        return self.error(
            f"{path.name!r} was made with another basis than this installation makes from its header, so the result would be "
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
        HDBError: of the kind's class, if a field is missing, garbled, beyond a limit, or contradicts another.
    """
    with kind.garbled(path):
        family = fields["family"]
        if not isinstance(family, str) or len(family.encode()) > MAX_NAME:
            raise TypeError("the name of the family")
        layout = Layout(family, tuple(_layer(row) for row in _unpacked_layers(fields["layers"])))
        if len({layer.name for layer in layout.layers}) != len(layout.layers):
            raise ValueError("a layer is there twice")
        intact = layout.hash == fields["layout_hash"]
    if not intact:
        raise kind.damaged(path, "its layer list does not match its hash")
    return layout


def _unpacked_layers(packed: str) -> list[Any]:
    unpack = zlib.decompressobj()
    text = unpack.decompress(base64.b64decode(packed, validate=True), MAX_HEADER_BYTES)
    if not unpack.eof:
        raise ValueError("its layer list is too long")
    rows = json.loads(text)
    if not isinstance(rows, list) or not 1 <= len(rows) <= MAX_LAYERS:
        raise ValueError("its layer list")
    return rows


def _layer(row: Any) -> Layer:
    name, *sizes = row
    if not isinstance(name, str) or not 1 <= len(name.encode()) <= MAX_NAME:
        raise TypeError("the name of a layer")
    inputs, outputs = (whole_number(size, 1, MAX_FEATURES, name) for size in sizes)
    layer = Layer(name, inputs, outputs)
    if layer.kernel_size and inputs % layer.kernel_size**2:
        raise ValueError(name)
    return layer


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
    with kind.garbled(path):
        recipe = dict(fields["basis"])
        stream = recipe.pop("stream")
        whole_number(recipe["down_dim"], 1, MAX_DIM, "down_dim")
        whole_number(recipe["up_dim"], 1, MAX_DIM, "up_dim")
        basis = read_dataclass(BasisRecipe, recipe, bases=None)
        if drawing_cost(basis, probed(basis, layout)) > MAX_PROBED:
            raise ValueError("its smallest layers are too large")
        same_recipe = stream == STREAM and basis.hash(layout) == fields["basis_hash"]
    if not same_recipe:
        raise kind.other_basis(path)
    return layout, basis


def read_info(fields: Mapping[str, Any]) -> dict[str, str]:
    """The free text of a header.

    Raises:
        LookupError, TypeError: if it is missing, or no mapping of texts.
    """
    info = fields["info"]
    if not isinstance(info, dict) or not all(isinstance(value, str) for value in info.values()):
        raise TypeError("info")
    return info


def check_basis(
    kind: FileKind, fields: Mapping[str, Any], path: Path, learned: BasisRecipe | None = None
) -> BasisRecipe:
    """Compare a file's probe with the basis as this installation makes it; the recipe, with a learned basis in it.

    Args:
        kind: of the file.
        fields: its header.
        path: of the file, for the messages.
        learned: the learned basis that the file names, if it names one.

    Raises:
        HDBError: of the kind's class, if they differ, or the file of a learned basis was not read.
    """
    layout, basis = read_space(kind, fields, path)
    with kind.garbled(path):
        stored = list(as_type(fields["basis_probe"], tuple[float, ...], "basis_probe"))
    basis = basis.read(learned)
    try:
        made = probe(basis, layout)
    except BasisError as error:
        raise kind.error(f"{path.name!r}: {error}") from error
    if not same_basis(stored, made):
        raise kind.other_basis(path)
    return basis


def write(
    kind: FileKind,
    path: Path,
    fields: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    read: Callable[[Mapping[str, Any], Path], object],
    new: bool = False,
) -> int:
    """Write a file atomically: either the whole new file is there, or what was there before.

    Args:
        kind: which.
        path: where; the folder must exist.
        fields: header; format version and checksum are added.
        tensors: contiguous, on the CPU.
        read: what reads the header; what it refuses is not written.
        new: never replace a file.

    Returns:
        The number of bytes written.

    Raises:
        FileExistsError: if it must be new and is there.
        HDBError: of the kind's class, if the file cannot be written, or could not be read again.
    """
    header = {"format_version": kind.version, **fields}
    try:
        read(json.loads(json.dumps(header)), path)
    except (kind.error, *GARBLED) as error:
        what = reason(error.__cause__ or error)
        raise kind.error(
            f"The {kind.name} for {path.name!r} could not be read again ({what}); nothing was written."
        ) from error
    header["checksum"] = checksum(header, tensors)
    data = safetensors.torch.save(dict(tensors), {kind.key: json.dumps(header)})
    if int.from_bytes(data[:8], "little") > MAX_HEADER_BYTES:
        raise kind.error(
            f"The header of {path.name!r} would be larger than {MAX_HEADER_BYTES:,} bytes, so that nothing could read it; "
            "nothing was written. Give it a shorter prompt, name or thumbnail."
        )
    try:
        with (creating if new else replacing)(path) as temporary:
            temporary.write_bytes(data)
    except FileExistsError:
        raise
    except OSError as error:
        raise kind.error(
            f"Cannot write {path.name!r} into {str(path.parent)!r}: {reason(error)}. "
            "Check that the folder exists, is writable, and that the disk has room."
        ) from error
    return len(data)


def read_fields(kind: FileKind, path: Path) -> dict[str, Any]:
    """The header of a file, without its tensors.

    Raises:
        FileNotFoundError: if there is no such file.
        HDBError: of the kind's class, if it is no such file, damaged, incomplete or of a newer version.
    """
    with kind.garbled(path):
        fields = json.loads(_read_metadata(kind, path))
    version = fields.get("format_version") if isinstance(fields, dict) else None
    if version != kind.version or isinstance(version, bool):
        raise kind.error(
            f"Expected a {kind.name} file of format version {kind.version}, {path.name!r} has version {str(version)[:20]}. "
            f"Update this node pack, or {kind.remake}."
        )
    return fields


def read_digest(kind: FileKind, path: Path) -> str:
    """What names a file for ever, without reading its numbers: the checksum that its header gives.

    Raises:
        FileNotFoundError: if there is no such file.
        HDBError: of the kind's class, if it is no such file, damaged, incomplete or of a newer version.
    """
    return str(read_fields(kind, path).get("checksum", ""))


def read_tensors(kind: FileKind, fields: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """The tensors of a file whose header is ``fields``, as stored, on the CPU.

    Raises:
        HDBError: of the kind's class, if they are damaged.
    """
    try:
        tensors = safetensors.torch.load(read_whole(path))
    except GARBLED as error:
        raise kind.damaged(path, reason(error)) from error
    except OSError as error:
        raise kind.unreadable(path, error) from error
    if checksum(fields, tensors) != fields.get("checksum"):
        raise kind.damaged(path, "its contents do not match its checksum")
    return tensors


def as_weights(kind: FileKind, tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors of a file as the weights of a network, float32.

    Raises:
        HDBError: of the kind's class, if they are no floating-point numbers, or not finite.
    """
    if not all(tensor.is_floating_point() for tensor in tensors.values()):
        raise kind.damaged(path, "its weights are no floating-point numbers")
    weights = {name: tensor.float() for name, tensor in tensors.items()}
    if not all(bool(weight.isfinite().all()) for weight in weights.values()):
        raise kind.error(f"{path.name!r} holds NaN or infinity. Copy or download it again.")
    return weights


def _read_metadata(kind: FileKind, path: Path) -> str:
    """Our header's text, after checks that need no knowledge of ours: is it whole, is it safetensors, is it ours."""
    try:
        size = regular(path).stat().st_size
        with opened(path) as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            opening = file.read(1)
            if len(start) < 8 or opening != b"{" or length < 2:
                raise kind.no_safetensors(path)
            raw = opening + file.read(min(length, MAX_HEADER_BYTES) - 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise kind.unreadable(path, error) from error
    if length > MAX_HEADER_BYTES:
        raise kind.foreign_size(path) if size >= length else kind.no_safetensors(path)
    with kind.garbled(path):
        entries = json.loads(raw)
        metadata = entries.pop("__metadata__", None) or {}
        expected = 8 + length + max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
        text = metadata.get(kind.key)
    if not isinstance(text, str):
        raise kind.foreign(path, list(entries))
    if size != expected:
        raise kind.damaged(path, f"expected {expected:,} bytes, got {size:,}")
    return text


def checksum(fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the header, without its own checksum, and the tensors: names, types, shapes and numbers."""
    rest = {name: value for name, value in fields.items() if name != "checksum"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode())
        digest.update(tensors[name].flatten().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
