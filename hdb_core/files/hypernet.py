"""The hypernetwork's file: its weights at float16 behind the header of `container`, which holds every size."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..basis import BasisRecipe
from ..errors import HyperNetFileError
from ..hypernet import HyperNet, HyperNetConfig
from ..hypernet.encoder import SUMMED_WIDTH
from ..layout import Layout
from ..prompt import MOST_CHARACTERS
from . import container
from .fields import read_dataclass, whole_number

KIND = container.FileKind(
    key="hypernet",
    name="HyperNet",
    version=1,
    choose="Choose a file that hdb_core.train has written.",
    remake="train it again",
    error=HyperNetFileError,
)


_OTHER_SIZES = "its weights do not fit its sizes"
# A header is believed only within these.
LIMITS = {
    "width": 8192,
    "depth": 64,
    "heads": 128,
    "rank": 256,
    "iterations": 64,
    "code": 4096,
    "image_size": 2048,
    "token_width": 8192,
    "patch_size": 64,
    "summary": 64,
    "num_tokens": 65_536,
    "stages": 8,
}


@dataclass(frozen=True)
class HyperNetHeader:
    """What a file says about itself, readable without its weights."""

    config: HyperNetConfig
    info: dict[str, str]
    fields: dict[str, Any]  # the header as it is written


def save(
    net: HyperNet, path: str | os.PathLike[str], info: Mapping[str, str], dtype: torch.dtype = torch.float16
) -> int:
    """Write a hypernetwork atomically; the number of bytes.

    Args:
        net: which.
        path: where; the folder must exist.
        info: free text about how it was made.
        dtype: of the stored numbers; a number below 6e-8 becomes 0 at float16.

    Raises:
        HyperNetFileError: if a weight is not finite at that dtype, or the file cannot be written, or could not be read
            again.
    """
    path = Path(path)
    tensors = {name: weight.detach().cpu().to(dtype).contiguous() for name, weight in net.state_dict().items()}
    if not all(bool(weight.isfinite().all()) for weight in tensors.values()):
        raise HyperNetFileError(f"The hypernetwork for {path.name!r} holds NaN or infinity; nothing was written.")
    config = net.config
    fields = container.space_fields(config.layout, config.basis) | {"sizes": config.fields(), "info": dict(info)}
    return container.write(KIND, path, fields, tensors, _header)


def read_header(path: str | os.PathLike[str]) -> HyperNetHeader:
    """Read and check what a file says about itself, without its weights.

    Raises:
        FileNotFoundError: if there is no such file.
        HyperNetFileError: if it is no hypernetwork file, damaged, incomplete or of a newer version.
    """
    path = Path(path)
    return _header(container.read_fields(KIND, path), path)


def _header(fields: Mapping[str, Any], path: Path) -> HyperNetHeader:
    layout, basis = container.read_space(KIND, fields, path)
    with KIND.garbled(path):
        return HyperNetHeader(read_config(fields["sizes"], layout, basis), container.read_info(fields), dict(fields))


def load(path: str | os.PathLike[str], learned: BasisRecipe | None = None) -> HyperNet:
    """Read a hypernetwork, float32 on the CPU, in evaluation mode.

    Args:
        path: of the file.
        learned: the learned basis that the file names, from `files.basis.load`; of no use for a random one.

    Raises:
        FileNotFoundError: if there is no such file.
        HyperNetFileError: if it is no hypernetwork file, damaged, incomplete, of another version, or made for a basis
            that this installation does not reproduce.
    """
    path = Path(path)
    header = read_header(path)
    basis = container.check_basis(KIND, header.fields, path, learned)
    tensors = container.read_tensors(KIND, header.fields, path)
    with KIND.garbled(path):
        shapes = {name: tuple(weight.shape) for name, weight in tensors.items()}
        _require_sizes(header.config, shapes)
        net = HyperNet.create(replace(header.config, basis=basis))
        if shapes != {name: tuple(weight.shape) for name, weight in net.state_dict().items()}:
            raise ValueError(_OTHER_SIZES)
        net.load_state_dict(container.as_weights(KIND, tensors, path))
    return net.eval().requires_grad_(False)


def read_config(sizes: Any, layout: Layout, basis: BasisRecipe) -> HyperNetConfig:
    """The opposite of `HyperNetConfig.fields`.

    Raises:
        TypeError, ValueError: if a field is missing, unknown, of another type, or beyond its limit.
        HyperNetError: if the sizes make no sense together.
    """
    config = read_dataclass(HyperNetConfig, sizes, layout=layout, basis=basis)
    for one in (config, config.encoder):
        for name, limit in LIMITS.items():
            if hasattr(one, name):
                whole_number(getattr(one, name), 0, limit, name)
    if len(config.prompt) > MOST_CHARACTERS:
        raise ValueError("prompt")
    stages = config.encoder.stem
    if len(stages) > LIMITS["stages"] or any(not 1 <= w <= LIMITS["width"] or n > LIMITS["depth"] for w, n in stages):
        raise ValueError("stem")
    return config


def _require_sizes(config: HyperNetConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check every size of a header by a tensor of the file, so that the network is no larger than the file.

    Raises:
        ValueError: if one of them is another.
    """
    count, width, encoder = len(config.layout.layers), config.width, config.encoder
    proofs: dict[str, tuple[int, ...]] = {
        "position": (count, width),
        "readout": (count, width, config.num_outputs),
        "direct": (count, config.code, config.num_outputs),
        "down_start": (count, config.rank, config.basis.down_dim),
        "face_in.1.weight": (width, encoder.token_width),
        "code_map": (encoder.token_width * encoder.num_summed, config.code),
    }
    repeated = {"decoder.layers.{}.linear1.weight": (config.depth, (4 * width, width))}
    if encoder.kind == "vit":
        places, token = encoder.places + 1, encoder.token_width
        proofs["encoder.vit.embeddings.position_embeddings"] = (1, places, token)
        repeated["encoder.vit.layers.{}.mlp.fc1.weight"] = (encoder.depth, (4 * token, token))
        if encoder.summary:
            proofs["encoder.summary.3.weight"] = (encoder.summary * token, places * SUMMED_WIDTH)
            proofs["encoder.summary.5.weight"] = (encoder.summary * token,) * 2
        channels, place = 3, 0
        for stage, (own, blocks) in enumerate(encoder.stem):
            kernel = 3 if stage else encoder.patch_size
            proofs[f"encoder.stem.{place}.weight"] = (own, channels, kernel, kernel)
            proofs |= {f"encoder.stem.{place + 1 + i}.conv1.weight": (own, own, 3, 3) for i in range(blocks)}
            channels, place = own, place + 1 + blocks
        patch = 1 if encoder.stem else encoder.patch_size
        proofs["encoder.vit.embeddings.patch_embeddings.projection.weight"] = (token, channels, patch, patch)
    for pattern, (number, shape) in repeated.items():
        proofs |= {pattern.format(i): shape for i in range(number)}
    if any(shapes.get(name) != shape for name, shape in proofs.items()):
        raise ValueError(_OTHER_SIZES)
