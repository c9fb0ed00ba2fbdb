"""The hypernetwork's file: its weights at float16 behind the header of `container`, which holds every size."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import container
from .errors import HyperNetError, HyperNetFileError
from .hypernet import HyperNet, HyperNetConfig

KIND = container.FileKind(
    key="hypernet",
    name="HyperNet",
    version=2,
    choose="Choose a file that hdb_core.train has written.",
    remake="train it again",
    error=HyperNetFileError,
)


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
        HyperNetFileError: if a weight is not finite at that dtype, or the file cannot be written.
    """
    path = Path(path)
    tensors = {name: weight.detach().cpu().to(dtype).contiguous() for name, weight in net.state_dict().items()}
    if not all(bool(weight.isfinite().all()) for weight in tensors.values()):
        raise HyperNetFileError(f"The hypernetwork for {path.name!r} holds NaN or infinity; nothing was written.")
    config = net.config
    fields = container.space_fields(config.layout, config.basis) | {"sizes": config.fields(), "info": dict(info)}
    return container.write(KIND, path, fields, tensors)


def read_header(path: str | os.PathLike[str]) -> HyperNetHeader:
    """Read and check what a file says about itself, without its weights.

    Raises:
        FileNotFoundError: if there is no such file.
        HyperNetFileError: if it is no hypernetwork file, damaged, incomplete or of a newer version.
    """
    path = Path(path)
    fields = container.read_fields(KIND, path)
    layout, basis = container.read_space(KIND, fields, path)
    try:
        config = HyperNetConfig.from_fields(fields["sizes"], layout, basis)
        return HyperNetHeader(config, container.read_info(fields), fields)
    except HyperNetError as error:
        raise HyperNetFileError(f"{path.name!r}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise KIND.damaged(path, f"its header lacks or garbles a field ({error})") from error


def load(path: str | os.PathLike[str]) -> HyperNet:
    """Read a hypernetwork, float32 on the CPU, in evaluation mode.

    Raises:
        FileNotFoundError: if there is no such file.
        HyperNetFileError: if it is no hypernetwork file, damaged, incomplete, of a newer version, or made for a basis
            that this installation does not reproduce.
    """
    path = Path(path)
    header = read_header(path)
    container.check_basis(KIND, header.fields, path)
    tensors = container.read_tensors(KIND, header.fields, path)
    try:
        net = HyperNet.create(header.config)
        net.load_state_dict({name: weight.float() for name, weight in tensors.items()})
    except (RuntimeError, HyperNetError) as error:
        raise KIND.damaged(path, f"its weights do not fit its header ({error})") from error
    if not all(bool(weight.isfinite().all()) for weight in net.state_dict().values()):
        raise HyperNetFileError(f"{path.name!r} holds NaN or infinity. Copy or download it again.")
    return net.eval().requires_grad_(False)
