"""Models on the local disk: their settings, before their weights are read, and which they are."""

from __future__ import annotations

import json
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

from ...errors import LayoutError

_PLACES, _BLOCK = 16, 1 << 16


def identity_of(files: Iterable[Path]) -> str:
    """Sixteen hex digits that tell models apart, wherever they are kept: of each file its size, and 64 KB at 16 places."""
    digest = sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with path.open("rb") as file:
            for place in range(_PLACES):
                file.seek(max(0, size - _BLOCK) * place // (_PLACES - 1))
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()[:16]


def local_config(config_class: Any, folder: Path) -> Any:
    """A model's ``config.json``, but for its attention: it could name one whose code transformers downloads."""
    config = config_class.from_pretrained(folder, local_files_only=True)
    config._attn_implementation = "sdpa"
    return config


def require_unquantised(folder: Path) -> None:
    """Check that the weights of a folder are those of the model itself.

    Raises:
        LayoutError: if they are quantised; which packages could read them does not matter.
    """
    if json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config"):
        raise LayoutError(
            f"{folder} holds quantised weights, which training does not take. Give it the same model in float32, float16 "
            "or bfloat16."
        )
