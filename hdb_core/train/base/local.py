"""Settings of models from the local disk, before their weights are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...errors import LayoutError


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
