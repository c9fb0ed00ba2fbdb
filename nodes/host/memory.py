"""How much memory a step of a fine-tune takes on the model at hand, and how it is done in what is free."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain
from typing import NamedTuple
from weakref import WeakKeyDictionary

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP
from torch import Tensor, nn

from ...hdb_core.adapters import Adapters, attach
from ...hdb_core.diffusion import diffusion_loss
from ...hdb_core.finetuning import FinetuneConfig, MemoryPlan
from ...hdb_core.finetuning.batches import BatchSampler
from ...hdb_core.finetuning.factors import TrainableFactors
from ...hdb_core.memory import SIDES, MemoryCost, measured_cost, saved_bytes
from ...hdb_core.recompute import blocks_of
from .denoiser import HostDenoiser
from .differentiable import differentiable
from .dry_run import mutates

GB = 2**30
# Beside what autograd keeps there are gradients on their way and workspaces: 3 % on the CPU for SD 1.5.
_BESIDE = 1.1


class StepCost(NamedTuple):
    """What is known of a step on a model.

    Attributes:
        memory: it takes beside weights and bases.
        blocks: of the UNet, which may be computed twice.
    """

    memory: MemoryCost
    blocks: list[nn.Module]

    def bytes(self, samples: int, latents: Tensor) -> int:
        """Of a step on so many samples of the size of `latents` (N, C, …, h, w)."""
        return int(_BESIDE * self.memory.bytes(samples, pixels_of(latents)))

    def plan(self, latents: Tensor, free: float, compression: int) -> MemoryPlan:
        """How a step on samples of the size of `latents` is done in so many free bytes; `compression` is the VAE's."""
        cost, free = self.memory, free / _BESIDE
        at_once, side = cost.samples(free, pixels_of(latents)), int(cost.pixels(free) ** 0.5 * compression) // 64 * 64
        lower = f"Set resolution of Fast Finetune to {side}, or close" if side else "Too little for this model: close"
        return MemoryPlan(
            max(1, at_once),
            recompute=at_once == 0,
            blocks=self.blocks,
            what_fits=f"{free * _BESIDE / GB:.1f} GB were free. {lower} other programs that use the GPU.",
        )


# All clones of a MODEL have one underlying model. What was measured goes with it when the host lets go of it.
_MEASURED: WeakKeyDictionary[nn.Module, dict[object, StepCost]] = WeakKeyDictionary()


def step_cost(model: ModelPatcher, clip: CLIP, adapters: Adapters, config: FinetuneConfig, latents: Tensor) -> StepCost:
    """What a step costs, measured on a few small ones that a model does not need a second time.

    Args:
        adapters: of the layers that are trained.
        config: of the fine-tune, its rank that of the result.
        latents: of the photos, (N, C, …, h, w); only their kind counts.
    """
    key = adapters.layout, adapters.recipe, config.rank, config.train_text_encoder, latents.shape[1:-2]
    own, config = _MEASURED.setdefault(model.model, {}), replace(config, photo_words="", prior_weight=0.0)
    if key not in own:
        layout, prompts = adapters.layout, config.captions(1)
        with differentiable(model, clip, adapters.num_bytes, layout.has_convolutions, prompts, layout) as denoiser:
            own[key] = _measured(denoiser, model, clip, adapters.to(denoiser.device), config, latents)
    return own[key]


def free_memory(device: torch.device) -> int:
    """Bytes that a step may take on a device."""
    return int(comfy.model_management.get_free_memory(device))


def pixels_of(latents: Tensor) -> int:
    """Of a sample of latents (N, C, …, h, w)."""
    return latents.shape[-2] * latents.shape[-1]


def _measured(
    denoiser: HostDenoiser,
    model: ModelPatcher,
    clip: CLIP,
    adapters: Adapters,
    config: FinetuneConfig,
    latents: Tensor,
) -> StepCost:
    factors = TrainableFactors(adapters, config)

    def loss(samples: int, side: int) -> Tensor:
        small = torch.zeros(1, *latents.shape[1:-2], side, side, device=denoiser.device)
        sampler = BatchSampler(denoiser.sigmas(), small, replace(config, batch_size=samples))
        with attach(denoiser.modules, factors()):
            with nullcontext() if config.train_text_encoder else torch.no_grad():
                conditioning = denoiser.encode_prompts(sampler.prompts(0))
            return diffusion_loss(denoiser, sampler.draw(0), conditioning)

    def weights() -> Iterator[Tensor]:
        for root in (model.model, clip.cond_stage_model):
            yield from chain(root.parameters(), root.buffers())

    there = [*weights(), *adapters.bases, *factors.parameters()]
    cost = measured_cost(lambda samples, side: saved_bytes(lambda: loss(samples, side), there))
    # A model that writes into what its blocks are given cannot compute them a second time.
    blocks = [] if mutates(model) else blocks_of(model.model.diffusion_model, lambda: loss(1, SIDES[0]))
    return StepCost(cost, blocks)
