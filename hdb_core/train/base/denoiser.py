"""A frozen diffusers model as a `Denoiser` of batches in which every sample may carry its own LiDB."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import LayoutError
from ...layout import FAMILY_BY_CONTEXT, find_targets, layout_of
from .single_file import Parts, load_tokenizer, read_single_file

# Of a schedule that ends in noise alone, whose last sigma would be infinite; sigma is 4519 there. ComfyUI has the same.
_LEAST_SIGNAL = 4.8973451890853435e-08
_FAMILIES = ("sd1", "sd2")
_PARTS = ("unet", "text_encoder", "tokenizer", "vae", "scheduler")


class DiffusersDenoiser:
    """`hdb_core.diffusion.Denoiser` over the modules of a diffusers folder.

    Unlike the host's, it encodes every prompt for its own sample, since people differ.

    Args:
        unet: UNet2DConditionModel.
        text_encoder: CLIPTextModel.
        tokenizer: CLIP's.
        alphas_cumprod: (T,) signal shares of the schedule.
        prediction_type: "epsilon" or "v_prediction".
        convolutions: adapt those of the UNet's residual blocks, too.

    Raises:
        LayoutError: if the UNet is of no known family or predicts something else.
    """

    def __init__(
        self,
        unet: Any,
        text_encoder: Any,
        tokenizer: Any,
        alphas_cumprod: Tensor,
        prediction_type: str,
        convolutions: bool = False,
    ) -> None:
        family = FAMILY_BY_CONTEXT.get(unet.config.cross_attention_dim)
        if family not in _FAMILIES or prediction_type not in ("epsilon", "v_prediction"):
            raise LayoutError(
                f"Training knows SD 1.x and SD 2.x that predict epsilon or v, but this model reads text of width "
                f"{unet.config.cross_attention_dim} and predicts {prediction_type!r}. Give it another --model."
            )
        for part in (unet, text_encoder):
            part.eval().requires_grad_(False)
        self.unet, self.text_encoder, self.tokenizer = unet, text_encoder, tokenizer
        self.predicts_v = prediction_type == "v_prediction"
        self.device, self.dtype = unet.device, unet.dtype
        share = alphas_cumprod.double().clamp(min=_LEAST_SIGNAL)
        self._sigmas = ((1 - share) / share).sqrt().float().to(self.device)
        text_modules = {"text_encoder": dict(text_encoder.named_modules())}
        self.modules = find_targets(dict(unet.named_modules()), text_modules, family, convolutions)
        self.layout = layout_of(self.modules, family)
        self._tokens: dict[str, Tensor] = {}

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Text states (B, 77, D) for B prompts, each through its own sample's adapters."""
        for prompt in set(prompts) - self._tokens.keys():
            tokens = self.tokenizer(
                prompt, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
            ).input_ids
            self._tokens[prompt] = tokens[0]
        tokens = torch.stack([self._tokens[prompt] for prompt in prompts])
        return self.text_encoder(tokens.to(self.device)).last_hidden_state

    def sigmas(self) -> Tensor:
        """The noise levels (T,) of the schedule, ascending."""
        return self._sigmas

    def add_noise(self, latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """Noisy latents (B, C, h, w) = latents + sigma · noise, as ComfyUI writes them."""
        return latents + noise * sigma.view(-1, 1, 1, 1)

    def denoise(self, noisy: Tensor, sigma: Tensor, conditioning: Tensor) -> Tensor:
        """Predicted clean latents (B, C, h, w), float32."""
        timesteps = torch.searchsorted(self._sigmas, sigma).clamp(max=len(self._sigmas) - 1)
        s = sigma.view(-1, 1, 1, 1)
        scale = (s**2 + 1).rsqrt()
        output = self.unet((noisy * scale).to(self.dtype), timesteps, conditioning.to(self.dtype)).sample.float()
        return noisy * scale**2 - output * s * scale if self.predicts_v else noisy - s * output

    def loss_weight(self, sigma: Tensor) -> Tensor:
        """(B,): turns the squared error of clean latents into that of ε or v."""
        return (sigma**2 + 1) / sigma**2 if self.predicts_v else sigma**-2


@dataclass(frozen=True)
class BaseModel:
    """A loaded base model: its denoiser and its VAE."""

    denoiser: DiffusersDenoiser
    vae: Any  # AutoencoderKL or AutoencoderTiny

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Model-space latents (N, C, H/8, W/8) float32 of pixels (N, 3, H, W) in 0..1."""
        device = self.vae.device
        # bfloat16 has the range of float32 and, unlike float16, does not overflow in a VAE.
        with torch.autocast(device.type, torch.bfloat16, enabled=self.denoiser.dtype is torch.bfloat16):
            encoded = self.vae.encode((pixels * 2 - 1).to(device, self.vae.dtype))
        latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
        return latents.float() * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels (N, 3, H, W) float32 in 0..1 of model-space latents (N, C, H/8, W/8)."""
        unscaled = (latents / self.vae.config.scaling_factor).to(self.vae.device, self.vae.dtype)
        return (self.vae.decode(unscaled).sample.float() / 2 + 0.5).clamp(0, 1)


def load_base_model(
    model: Path,
    device: torch.device,
    dtype: torch.dtype,
    tokenizer: Path | None = None,
    prediction_type: str | None = None,
    convolutions: bool = False,
) -> BaseModel:
    """Load a diffusers folder or a single-file checkpoint from the local disk; nothing is downloaded.

    Args:
        model: the folder, or the ``.safetensors`` file.
        device: for everything.
        dtype: of UNet and text encoder.
        tokenizer: folder of CLIP's vocabulary; None is the model's own, or what `single_file.find_tokenizer` finds.
        prediction_type: "epsilon" or "v_prediction"; None is what the model says.
        convolutions: adapt those of the UNet's residual blocks, too.

    Raises:
        FileNotFoundError: if there is no such model, it lacks a part, or there is no tokenizer.
        LayoutError: if the model is of no known family.
    """
    if model.is_file():
        parts = read_single_file(model, dtype, tokenizer, prediction_type)
    else:
        parts = _read_folder(model, dtype, tokenizer)
    denoiser = DiffusersDenoiser(
        parts.unet.to(device, memory_format=torch.channels_last),
        parts.text_encoder.to(device),
        parts.tokenizer,
        parts.scheduler.alphas_cumprod,
        prediction_type or parts.scheduler.config.prediction_type,
        convolutions,
    )
    vae = parts.vae.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    return BaseModel(denoiser, vae)


def _read_folder(folder: Path, dtype: torch.dtype, tokenizer: Path | None) -> Parts:
    from diffusers import AutoencoderKL, AutoencoderTiny, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel

    paths = {part: folder / part for part in _PARTS} | ({"tokenizer": tokenizer} if tokenizer else {})
    if missing := [part for part, path in paths.items() if not path.is_dir()]:
        raise FileNotFoundError(
            f"{folder} is no diffusers model: it lacks {', '.join(missing)}. Give --model a folder with "
            f"{', '.join(_PARTS)}, or a .safetensors checkpoint."
        )
    local: Any = {"local_files_only": True}
    text_encoder: Any = CLIPTextModel
    tiny = AutoencoderTiny.load_config(paths["vae"], **local)["_class_name"] == "AutoencoderTiny"
    return Parts(
        UNet2DConditionModel.from_pretrained(paths["unet"], torch_dtype=dtype, **local),
        text_encoder.from_pretrained(paths["text_encoder"], dtype=dtype, **local),
        load_tokenizer(paths["tokenizer"]),
        # A full VAE overflows in float16.
        (AutoencoderTiny if tiny else AutoencoderKL).from_pretrained(paths["vae"], **local),
        DDPMScheduler.from_pretrained(paths["scheduler"], **local),
    )
