"""Full DreamBooth with class-prior preservation, inside the host's model: the slow reference of the fast fine-tune.

Source: Ruiz et al., DreamBooth, arXiv 2208.12242; with the text encoder trained as in diffusers' ``train_dreambooth.py``.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from .reference import Checkpoint, Prior, ReferenceConfig, train
from .studio import Studio


@dataclass(frozen=True)
class DreamBoothConfig(ReferenceConfig):
    """Settings of one training; the rate was chosen on dev people, and both sides of the best joint score are looked at.

    Attributes:
        prior_weight: of the loss on class pictures.
        class_pictures: how many the base makes for it.
    """

    rate: float = 2e-5
    checkpoints: tuple[int, ...] = (50, 100, 150)
    prior_weight: float = 1.0
    class_pictures: int = 64


def dreambooth(
    studio: Studio,
    photo: np.ndarray,
    class_pictures: np.ndarray,
    config: DreamBoothConfig,
    seed: int,
) -> Generator[Checkpoint]:
    """Trains weights of UNet and text encoder; see `reference.train`.

    Args:
        photo: uint8 (128, 128, 3).
        class_pictures: uint8 (N, 128, 128, 3).
        seed: of noise and timesteps.
    """
    model, clip = studio.base.model, studio.base.clip
    roots = model.model.diffusion_model, clip.cond_stage_model
    prior = Prior(class_pictures, config.prior_weight)
    return train(studio, photo, config, seed, lambda: trainable(*roots), prior)


@contextmanager
def trainable(*roots: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Float32 trainable copies of all weights in their modules' places, the old ones put back at the end.

    Text layers that are identities stay as they are: padding of the miniature, no part of its text encoder.
    """
    skipped = {part for layer in identity_layers(roots) for part in layer.modules()}
    replaced: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for module in (module for root in roots for module in root.modules() if module not in skipped):
            for name, weight in module._parameters.items():
                if weight is not None:
                    replaced.append((module._parameters, name, weight))
        for table, name, weight in replaced:
            table[name] = nn.Parameter(weight.detach().clone().float())
        yield [table[name] for table, name, _ in replaced]
    finally:
        for table, name, weight in replaced:
            table[name] = weight


def identity_layers(roots: Iterable[nn.Module]) -> list[nn.Module]:
    """Transformer layers of a text encoder whose output path is zero."""
    layers: list[Any] = [module for root in roots for module in root.modules() if hasattr(module, "self_attn")]
    return [layer for layer in layers if not layer.self_attn.out_proj.weight.any()]
