"""Settings of `transformers` models from the local disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def local_config(config_class: Any, folder: Path) -> Any:
    """A model's ``config.json``, but for its attention: it could name one whose code transformers downloads."""
    config = config_class.from_pretrained(folder, local_files_only=True)
    config._attn_implementation = "sdpa"
    return config
