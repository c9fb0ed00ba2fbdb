"""A hypernetwork before its first step: what it begins with, and what must fit for that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from ..errors import HyperNetError
from ..files import container
from ..files import hypernet as hypernet_file
from ..hypernet import HyperNet, HyperNetConfig
from .data.groups import differing
from .face_code import MOST_PHOTOS, fit_code
from .job import Job
from .predicted import PeopleInBase
from .settings import NetSettings

NOTHING_LEARNED = (
    "The image encoder is untrained. Run the stage pretrain first, or set begin_with to the encoder.safetensors of another "
    "run, and pretrain.steps to 0."
)

ENCODER = container.FileKind(
    key="encoder",
    name="trained image encoder",
    version=1,
    choose="Give the encoder.safetensors of another run.",
    remake="run the stage pretrain again",
    error=HyperNetError,
)


def beginning(job: Job, base: PeopleInBase, codes: Tensor | None) -> HyperNet:
    """The hypernetwork before its first step.

    Raises:
        HyperNetError: if what it begins with has other sizes, or there is no encoder that has learned anything.
    """
    run, settings = job.run, job.settings
    net = HyperNet.create(base.net, settings.seed)
    if base.energy is not None:
        net.set_scale(base.energy)
    if codes is None:
        net.load_state_dict(matching_hypernet(Path(settings.begin_with), base.net).state_dict())
        return net
    if run.state.exists():
        return net  # the state has all weights
    if net.encoder is not None:
        path = run.encoder if "pretrain" in run.stages() else Path(settings.begin_with)
        if not path.is_file():
            raise HyperNetError(NOTHING_LEARNED)
        load_encoder(net.encoder, path)
    learn_code(net.to(job.accelerator.device), base, codes)
    return net


@torch.no_grad()
def learn_code(net: HyperNet, base: PeopleInBase, codes: Tensor) -> None:
    """Set the map to the face code, from everybody's last photo, and how these photos look."""
    some, seen, looks = base.people[:MOST_PHOTOS], [], []
    for first in range(0, len(some), 64):
        read = base.faces.read([(p.person, len(p.person.photos) - 1) for p in some[first : first + 64]])
        read = read.to(net.code_mean.device)
        tokens = read if net.encoder is None else net.encode(read)
        seen.append(net.summed(tokens).float().cpu())
        looks.append(net.look(read).float().cpu())
    net.set_code(*fit_code(torch.cat(seen), codes[: len(some)]))
    net.set_seen(torch.cat(looks))


def net_sizes(config: HyperNetConfig) -> dict[str, Any]:
    """What two hypernetworks must share for the weights of one to go on in the other."""
    sizes = {name: value for name, value in config.fields().items() if name not in ("iterations", "by_token")}
    return {
        **sizes,
        "encoder": config.encoder.sizes,
        "layout": config.layout.hash,
        "basis": config.basis.fields(),
    }


def save_encoder(weights: Mapping[str, Tensor], path: Path) -> None:
    """Write an image encoder atomically, by the names of its state_dict.

    Raises:
        HyperNetError: if it cannot be written.
    """
    tensors = {name: weight.cpu().contiguous() for name, weight in weights.items()}
    container.write(ENCODER, path, {}, tensors, lambda header, path: None)


def load_encoder(encoder: Module, path: Path) -> None:
    """Load what `save_encoder` wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        HyperNetError: if it is another one, damaged, or of another size, or holds something else than finite numbers.
    """
    tensors = container.read_tensors(ENCODER, container.read_fields(ENCODER, path), path)
    weights = container.as_weights(ENCODER, tensors, path)
    try:
        encoder.load_state_dict(weights)
    except RuntimeError as error:
        raise HyperNetError(
            f"{path} is an image encoder of other sizes. Give the settings of encoder that it was trained with."
        ) from error


def matching_hypernet(path: Path, config: HyperNetConfig) -> HyperNet:
    """The hypernetwork of a file.

    Raises:
        HyperNetError: if its sizes, layers or basis are others than those of the training.
    """
    net = hypernet_file.load(path, config.basis)
    ours, theirs = net_sizes(config), net_sizes(net.config)
    if different := differing(ours, theirs):
        raise HyperNetError(
            f"{path} differs from the hypernetwork to be trained in: "
            f"{', '.join(_difference(name, theirs[name], ours[name]) for name in different)}. "
            "Give the settings that it was trained with."
        )
    return net


def _difference(name: str, theirs: Any, ours: Any) -> str:
    """A size as the setting is called, with both values where they are short; layers and bases are not."""
    setting = f"net.{name}" if name in {field.name for field in fields(NetSettings)} else name
    return f"{setting} ({theirs}, not {ours})" if isinstance(theirs, (int, str)) and name != "layout" else setting
