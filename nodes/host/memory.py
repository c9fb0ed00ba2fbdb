"""How much memory a step of a fine-tune takes, and how many samples fit into what is free."""

from __future__ import annotations

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher

from .targets import family_of

# Values that autograd keeps per latent pixel of a sample, counted on the UNets; SD 2.x has the widths of SD 1.5.
SAVED_VALUES_PER_LATENT_PIXEL = {"sd1": 95_000, "sd2": 95_000, "sdxl": 170_000}


def memory_of(model: ModelPatcher, latent_pixels: int) -> int:
    """The bytes that a step keeps of so many latent pixels."""
    itemsize = max(2, model.model.get_dtype().itemsize)  # float8 weights are computed with at 16 bit
    return latent_pixels * SAVED_VALUES_PER_LATENT_PIXEL[family_of(model)] * itemsize


def samples_at_once(model: ModelPatcher, latent_pixels: int, device: torch.device) -> int:
    """How many samples of so many latent pixels fit into the free memory of a device; at least one."""
    return max(1, int(comfy.model_management.get_free_memory(device) // memory_of(model, latent_pixels)))
