"""The slow trainings that the fast fine-tune is compared with: one loop inside the host's model, whatever is trained."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from .studio import Studio, as_image, counted_flops

ALL_OF_IT = 10**20  # bytes that the host is asked to free, whatever it holds: every weight gets a gradient


@dataclass(frozen=True)
class ReferenceConfig:
    """Settings of one training.

    Attributes:
        rate: of AdamW, constant.
        checkpoints: steps after which the model is looked at.
        batch_size: photos a step.
        weight_decay: of AdamW.
        prompt: describes the photo, with the rare token.
        class_prompt: the same words without it.
    """

    rate: float
    checkpoints: tuple[int, ...]
    batch_size: int = 4
    weight_decay: float = 0.01
    prompt: str = "a [v] face"
    class_prompt: str = "a face"


class Prior(NamedTuple):
    """For class-prior preservation: uint8 (N, 128, 128, 3) of the class, and the weight of their loss."""

    pictures: np.ndarray
    weight: float


class Checkpoint(NamedTuple):
    """The host's base model is the trained one while its consumer has this."""

    steps: int
    seconds: float
    flops: int
    parameters: int


def train(
    studio: Studio,
    photo: np.ndarray,
    config: ReferenceConfig,
    seed: int,
    trained: Callable[[], AbstractContextManager[list[nn.Parameter]]],
    prior: Prior | None = None,
) -> Generator[Checkpoint]:
    """Trains in place; the generator's end, early or not, puts the base back.

    Args:
        photo: uint8 (128, 128, 3).
        config: steps, rate and prompts.
        seed: of noise and timesteps.
        trained: puts trainable parameters into the model and takes them out again.
        prior: pictures of the class, as many a step as photos.
    """
    core, diffusion = studio.host.module("hdb_core.finetuning"), studio.host.module("hdb_core.diffusion")
    model, clip = studio.base.model, studio.base.clip
    settings = core.FinetuneConfig(
        prompt=config.prompt, class_prompt=config.class_prompt, prior_weight=prior.weight if prior else 0.0,
        batch_size=config.batch_size, seed=seed, noise=diffusion.NoiseLevels(),
    )  # fmt: skip
    latents = encoded(studio, photo[None])
    prior_latents = encoded(studio, prior.pictures) if prior else None
    with (
        torch.inference_mode(),
        studio.host.module("nodes.host.differentiable").differentiable(model, clip, ALL_OF_IT) as denoiser,
        trained() as parameters,
    ):
        sampler = studio.host.module("hdb_core.finetuning.batches").BatchSampler(
            denoiser.sigmas(), latents, settings, None, prior_latents
        )
        optimizer = torch.optim.AdamW(parameters, lr=config.rate, weight_decay=config.weight_decay, fused=True)

        def train_step(step: int) -> None:
            conditioning = denoiser.encode_prompts(sampler.prompts(step))
            diffusion.diffusion_loss(denoiser, sampler.draw(step), conditioning).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        seconds, flops, done = 0.0, 0, 0
        for checkpoint in config.checkpoints:
            start = studio.now()
            for step in range(done, checkpoint):
                if step == 0:
                    flops = counted_flops(lambda: train_step(0))
                else:
                    train_step(step)
            seconds, done = seconds + studio.now() - start, checkpoint
            yield Checkpoint(done, seconds, flops * done, sum(p.numel() for p in parameters))


@torch.inference_mode()
def encoded(studio: Studio, pictures: np.ndarray) -> Any:
    """Model-space latents (N, 4, 16, 16) of uint8 (N, 128, 128, 3)."""
    photos = studio.host.module("nodes.host.photos")
    return photos.encode(studio.base.model, studio.base.vae, as_image(pictures).movedim(-1, 1))
