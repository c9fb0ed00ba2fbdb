"""The packed form of trained weights in ``weights/``: int8 matrices with a float16 scale a row, the rest float16."""

from pathlib import Path

import torch
from safetensors import safe_open

from .training import load_average

_SCALE = "::scale"


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix or kernel (out, ...) as int8 of the same shape and a float16 scale (out,)."""
    scale = (weight.flatten(1).abs().amax(1) / 127).clamp(min=1e-8).half()
    rows = scale.float().view(-1, *[1] * (weight.ndim - 1))
    return torch.round(weight / rows).clamp(-127, 127).to(torch.int8), scale


def pack_tensors(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """float32 weights to their packed form."""
    packed = {}
    for name, weight in state.items():
        if weight.ndim >= 2 and weight.numel() >= 4096:
            packed[name], packed[name + _SCALE] = quantize(weight)
        else:
            packed[name] = weight.half()
    return {name: weight.contiguous() for name, weight in packed.items()}


def unpack_tensors(packed: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Packed weights back to float32."""
    state = {}
    for name, weight in packed.items():
        if name.endswith(_SCALE):
            continue
        scale = packed.get(name + _SCALE)
        state[name] = weight.float() if scale is None else weight * scale.float().view(-1, *[1] * (weight.ndim - 1))
    return state


def read_packed(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The packed tensors and the header of a file in ``weights/``."""
    with safe_open(path, "pt") as file:
        names = list(file.keys())
        return {name: file.get_tensor(name) for name in names}, file.metadata()


def trained_weights(source: Path) -> dict[str, torch.Tensor]:
    """float32 weights of a training, from its run's folder or from the packed file in ``weights/``."""
    return load_average(source) if source.is_dir() else unpack_tensors(read_packed(source)[0])
