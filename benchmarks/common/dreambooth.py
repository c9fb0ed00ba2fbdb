"""Full DreamBooth with class-prior preservation, inside the host's model: the slow reference of the fast fine-tune.

Source: Ruiz et al., DreamBooth, arXiv 2208.12242; with the text encoder trained as in diffusers' ``train_dreambooth.py``.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from .studio import Studio, as_image, counted_flops


@dataclass(frozen=True)
class DreamBoothConfig:
    """Settings of one training.

    Attributes:
        rate: of AdamW, constant.
        checkpoints: steps after which the model is looked at.
        batch_size: photos a step, and as many class pictures.
        class_pictures: how many the base makes for the prior.
    """

    rate: float = 2e-5
    checkpoints: tuple[int, ...] = (50, 100, 200, 400)
    batch_size: int = 4
    prior_weight: float = 1.0
    weight_decay: float = 0.01
    class_pictures: int = 64
    prompt: str = "a [v] face"
    class_prompt: str = "a face"


class Checkpoint(NamedTuple):
    """The host's base model holds the trained weights while its consumer has this."""

    steps: int
    seconds: float
    flops: int
    parameters: int


def dreambooth(
    studio: Studio, photo: np.ndarray, class_pictures: np.ndarray, config: DreamBoothConfig, seed: int
) -> Generator[Checkpoint]:
    """Trains all weights of UNet and text encoder in place; the generator's end, early or not, puts the base back.

    Args:
        photo: uint8 (128, 128, 3).
        class_pictures: uint8 (N, 128, 128, 3).
        seed: of noise and timesteps.
    """
    core = studio.host.module("hdb_core.finetune")
    training = studio.host.module("nodes.host.training")
    model, clip, _ = studio.base
    modules, family = studio.host.module("nodes.host.targets").target_modules(model, clip)
    settings = core.FinetuneConfig(
        prompt=config.prompt, class_prompt=config.class_prompt, prior_weight=config.prior_weight,
        batch_size=config.batch_size, seed=seed,
    )  # fmt: skip
    latents, prior = (encoded(studio, pictures) for pictures in (photo[None], class_pictures))
    latent_pixels = 2 * config.batch_size * latents.shape[-2] * latents.shape[-1]
    trained = (model.model.diffusion_model, clip.cond_stage_model)
    with (
        torch.inference_mode(),
        training.training(model, clip, modules, family, latent_pixels) as denoiser,
        trainable(*trained) as parameters,
    ):
        sampler = core.BatchSampler(denoiser.sigmas(), latents, settings, None, prior)
        optimizer = torch.optim.AdamW(parameters, lr=config.rate, weight_decay=config.weight_decay, fused=True)

        def train_step(step: int) -> None:
            conditioning = denoiser.encode_prompts(sampler.prompts)
            core.diffusion_loss(denoiser, sampler.draw(step), conditioning).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        seconds, flops, done = 0.0, 0, 0
        for checkpoint in config.checkpoints:
            start = time.perf_counter()
            for step in range(done, checkpoint):
                if step == 0:
                    flops = counted_flops(lambda: train_step(0))
                else:
                    train_step(step)
            seconds, done = seconds + time.perf_counter() - start, checkpoint
            yield Checkpoint(done, seconds, flops * done, sum(p.numel() for p in parameters))


@torch.inference_mode()
def encoded(studio: Studio, pictures: np.ndarray) -> torch.Tensor:
    """Model-space latents (N, 4, 16, 16) of uint8 (N, 128, 128, 3)."""
    images = studio.host.module("nodes.host.images")
    return images.encode(studio.base.model, studio.base.vae, as_image(pictures).movedim(-1, 1))


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
