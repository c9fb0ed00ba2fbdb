"""Models on the local disk: their settings, before their weights are read, and which they are."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open

from ...errors import LayoutError
from ...files.reading import read_whole, reason, regular

_OWN = ("weight", "bias", "in_proj_weight", "in_proj_bias")  # what a layer is made of
_FLOATS = ("F16", "F32", "F64", "BF16")
_PLACES, _BLOCK = 4096, 256  # in a file of another format than safetensors; bytes of a tensor, or at a place
# As diffusers and transformers call the weights that they load; others beside them are variants.
_NAMES = ("diffusion_pytorch_model", "model")
_WEIGHTS = re.compile(rf"({'|'.join(_NAMES)})(-\d+-of-\d+)?\.safetensors")


def identity_of(files: Iterable[Path]) -> str:
    """Sixteen hex digits that tell loaded models apart, wherever they are kept: by their files' sizes and parts of all tensors."""
    digest = sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with path.open("rb") as file:
            for place in _places(file, size, path.suffix.lower() == ".safetensors"):
                file.seek(place)
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()[:16]


def _places(file: BinaryIO, size: int, is_safetensors: bool) -> list[int]:
    """Where to look: at every tensor's second half, or all over the file."""
    if not is_safetensors:
        return [max(0, size - _BLOCK) * place // (_PLACES - 1) for place in range(_PLACES)]
    length = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(length))
    offsets = [fields["data_offsets"] for name, fields in header.items() if name != "__metadata__"]
    return sorted(8 + length + max(start, min((start + end) // 2, end - _BLOCK)) for start, end in offsets)


def weights_in(folders: Iterable[Path]) -> list[Path]:
    """The files of weights that are loaded from folders of diffusers and transformers."""
    return [
        path
        for folder in folders
        for path in sorted(folder.glob("*"))
        if _WEIGHTS.fullmatch(path.name) and path.is_file()
    ]


def require_safetensors(folder: Path) -> None:
    """Check that a folder holds weights that are loaded, all of them. Older ones (``.bin``) are pickles, whose reading can take for ever.

    Raises:
        LayoutError: if it does not.
    """
    weights = {path.name: _kinds_in(path) for path in weights_in([folder])}
    shards = {name for name in weights if "-of-" in name}
    for path in filter(Path.is_file, (folder / f"{name}.safetensors.index.json" for name in _NAMES)):
        places = json.loads(read_whole(path).decode())["weight_map"]
        if not shards.issuperset(places.values()):
            raise LayoutError(f"{path} names other files than the folder's shards. Download the model again.")
        if missing := sorted(name for name, place in places.items() if name not in weights[place]):
            raise LayoutError(
                f"{folder / places[missing[0]]} lacks {missing[0]!r}, which {path.name} names. Download the model again."
            )
    if not weights:
        raise LayoutError(
            f"{folder} holds no weights called model.safetensors or diffusion_pytorch_model.safetensors. Download the model "
            "in this format; .bin files and other variants are not read."
        )


def _kinds_in(path: Path) -> dict[str, str]:
    """The names of all weights in a file, and what numbers they are.

    Raises:
        LayoutError: if the file is not whole.
    """
    try:
        with safe_open(regular(path), "pt") as file:
            names = file.keys()
            return {name: file.get_slice(name).get_dtype() for name in names}
    except (OSError, SafetensorError) as error:
        raise LayoutError(f"{path} cannot be read ({reason(error)}). Download it again.") from error


def local_config(config_class: Any, folder: Path) -> Any:
    """A model's ``config.json``, but for its attention: it could name one whose code transformers downloads."""
    config = config_class.from_pretrained(folder, local_files_only=True)
    config._attn_implementation = "sdpa"
    return config


def require_unquantised(folder: Path) -> None:
    """Check that the weights of a folder are those of the model itself.

    Raises:
        LayoutError: if they are quantised; which packages could read them does not matter; if there is no file that says so.
    """
    path = folder / "config.json"
    try:
        described = json.loads(read_whole(path).decode())
    except OSError as error:
        raise LayoutError(f"{path} cannot be read ({reason(error)}). Download the model again.") from error
    if described.get("quantization_config"):
        raise quantised_weights(folder)
    if name := quantised({name: kind for file in weights_in([folder]) for name, kind in _kinds_in(file).items()}):
        raise quantised_weights(folder, name)


def quantised(kinds: Mapping[str, str]) -> str:
    """The name of a weight that means something only together with other tensors; "" if there is none.

    Such are integers, and eight-bit floats with anything but a bias beside them. Alone, those are the weights themselves.

    Args:
        kinds: of all tensors by name, as safetensors calls them: F8_E4M3, I8, BF16 …
    """
    beside = set()
    for name in kinds:
        module, _, leaf = name.rpartition(".")
        if leaf not in _OWN:  # X.scale, X.weight_scale, X.weight.absmax
            beside |= {module, module.removesuffix(".weight")}
    for name, kind in kinds.items():
        module, _, leaf = name.rpartition(".")
        is_weight = leaf in _OWN and leaf.endswith("weight")
        if is_weight and not kind.startswith(_FLOATS) and (module in beside or not kind.startswith("F8")):
            return name
    return ""


def quantised_weights(path: Path | str, name: str = "") -> LayoutError:
    """Says that a file or folder holds them; the name is that of one."""
    named = f" ({name})" if name else ""
    return LayoutError(
        f"{path} holds quantised weights{named}, which training does not take. Give it the same model in float32, float16 "
        "or bfloat16."
    )
