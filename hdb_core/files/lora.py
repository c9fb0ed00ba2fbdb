"""A person as an ordinary LoRA file, with the names that kohya's trainer gives: some 30 times larger than a LiDB."""

from __future__ import annotations

import os
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from ..adapters import Adapters
from ..lidb import LiDB, expand, truncate
from .atomic import creating

_ONE_ENCODER = {"unet": "lora_unet", "text_encoder": "lora_te"}
PREFIXES = {
    "sd1": _ONE_ENCODER,
    "sd2": _ONE_ENCODER,
    "sdxl": {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
}
METADATA = ("made_from", "prompt", "token", "photos", "steps", "model", "name")  # of `lidb.About`


def save(lidb: LiDB, path: str | os.PathLike[str], adapters: Adapters | None = None) -> int:
    """Write a person atomically to a new LoRA file in float16; the number of bytes.

    Args:
        lidb: the person.
        path: where; the folder must exist.
        adapters: of its recipe and layout; None makes them.

    Raises:
        FileExistsError: if the file is there.
        OSError: if it cannot be written.
    """
    metadata = {f"lidb_{name}": str(getattr(lidb.about, name)) for name in METADATA}
    data = safetensors.torch.save(state_dict(lidb, adapters), metadata)
    with creating(Path(path)) as temporary:
        temporary.write_bytes(data)  # whose errors are the system's
    return len(data)


def state_dict(lidb: LiDB, adapters: Adapters | None = None) -> dict[str, Tensor]:
    """The tensors of the file: up (out, R), down (R, in) float16, alpha = R.

    Those of a convolution are kernels: up (out, R, 1, 1), down (R, in, k, k).
    """
    found = {}
    kernels = {layer.name: layer.kernel_size for layer in lidb.layout.layers}
    # Truncation to its own rank leaves the person as it is and balances the factors: both stay in float16's range.
    for name, (up, down) in expand(truncate(lidb, lidb.rank), adapters).items():
        component, layer = name.split(".", 1)
        if size := kernels[name]:
            up, down = up[..., None, None], down.unflatten(1, (-1, size, size))
        key = f"{PREFIXES[lidb.layout.family][component]}_{layer.replace('.', '_')}"
        found[f"{key}.lora_up.weight"] = up.half().contiguous()
        found[f"{key}.lora_down.weight"] = down.half().contiguous()
        found[f"{key}.alpha"] = torch.tensor(float(lidb.rank))
    return found
