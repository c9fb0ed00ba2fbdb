"""A training step of what others use: diffusers with a LoRA of peft, and full DreamBooth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.nn import functional

from devtools.inprocess import InProcessHost

from .models import Models

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]  # as diffusers' own training of a LoRA has it
DREAMBOOTH_BYTES = 20  # a weight: itself, its gradient and two moments in float32, and a fifth for activations
WORDS = 77
POOLED, SIZES = 1280, 6  # that SDXL's UNet is given beside the words


@contextmanager
def diffusers_step(
    host: InProcessHost, models: Models, pixels: int, batch: int, rank: int | None
) -> Iterator[Callable[[], None]]:
    """A step of diffusers' UNet on the same weights, as its DreamBooth examples train: AdamW, clipped gradients, under
    autocast in what FastFinetune computes in. Texts are encoded before; the text encoder is not trained.

    Args:
        rank: of a LoRA in the attention layers; None trains all weights, which are then float32.

    Raises:
        MemoryError: if the device has no room for training all weights.
    """
    import comfy.model_management as management

    unet_of = host.module("hdb_core.train.base.single_file").unet_of
    own, device = models.model.model.diffusion_model, management.get_torch_device()
    with torch.inference_mode(False):
        unet = unet_of({f"model.diffusion_model.{name}": value.clone() for name, value in own.state_dict().items()})
        if rank is None:
            needed = DREAMBOOTH_BYTES * unet.num_parameters()
            if needed > management.get_free_memory(device):
                raise MemoryError(f"full DreamBooth takes {needed / 2**30:.0f} GB")
            unet.to(device).float()
        else:
            with_lora(unet.to(device).requires_grad_(False), rank)
        weights = next(own.parameters()).dtype
        # What FastFinetune computes in, which is bfloat16 on some CPUs.
        computed = host.module("nodes.host.denoiser").autocast_dtype(device) if weights == torch.float32 else weights
        trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4)
        noisy = torch.randn(batch, 4, pixels // 8, pixels // 8, device=device)
        words = torch.randn(batch, WORDS, unet.config.cross_attention_dim, device=device)
        more = {
            "text_embeds": torch.randn(batch, POOLED, device=device),
            "time_ids": torch.full((batch, SIZES), float(pixels), device=device),
        }
        levels = torch.linspace(100, 800, batch, device=device).long()

        def step() -> None:
            with torch.inference_mode(False), torch.enable_grad():
                with torch.autocast(device.type, computed, enabled=computed is not None):
                    found = unet(noisy, levels, words, added_cond_kwargs=more).sample
                functional.mse_loss(found.float(), noisy).backward()
                torch.nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                optimizer.zero_grad()

        yield step


def with_lora(unet: torch.nn.Module, rank: int) -> None:
    """Adds peft's LoRA, whose factors are float32, as diffusers' examples have them."""
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=ATTENTION))
    cast_training_params(unet, torch.float32)
