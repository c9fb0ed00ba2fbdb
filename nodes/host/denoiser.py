"""The host's MODEL and CLIP as `hdb_core.diffusion.Denoiser`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.conds
import comfy.model_management
import comfy.model_sampling
import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP
from torch import Tensor, nn

from ...hdb_core.layout import Layout


@dataclass(frozen=True)
class Conditioning:
    """What the UNet reads: text (B, T, D) and the pooled text (B, P) that SDXL adds."""

    text: Tensor
    pooled: Tensor


class HostDenoiser:
    """A frozen model for a fine-tune. `differentiable` makes it; it is valid inside that context."""

    def __init__(self, patcher: ModelPatcher, clip: CLIP, modules: Mapping[str, nn.Module], layout: Layout) -> None:
        self.modules = modules
        self.layout = layout
        self.device = patcher.load_device
        self._model = patcher.model
        self._sampling = patcher.get_model_object("model_sampling")
        self._options = patcher.model_options.get("transformer_options", {})
        self._clip = clip
        self._autocast = autocast_dtype(self.device)
        self._tokens: dict[str, dict] = {}

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning for ``len(prompts)`` samples; equal prompts are encoded once."""
        unique = list(dict.fromkeys(prompts))
        with self._mixed_precision():
            encoded = [self._encode(prompt) for prompt in unique]
        first, *others = (comfy.conds.CONDCrossAttn(text) for text, _ in encoded)
        index = torch.tensor([unique.index(prompt) for prompt in prompts], device=self.device)
        text, pooled = first.concat(others), torch.cat([pooled for _, pooled in encoded])
        return Conditioning(text.to(self.device)[index], pooled.to(self.device)[index])

    def sigmas(self) -> Tensor:
        """The noise levels of the model's schedule, ascending."""
        return self._sampling.sigmas

    def add_noise(self, latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """Noisy latents (B, 4, h, w) at sigma (B,)."""
        # The host scales its noise argument in place.
        return self._sampling.noise_scaling(sigma, noise.clone(), latents)

    def denoise(self, noisy: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Predicted clean latents (B, 4, h, w), float32."""
        batch = noisy.shape[0]
        conds = comfy.sampler_helpers.convert_cond([[conditioning.text, {"pooled_output": conditioning.pooled}]])
        (cond,) = comfy.samplers.encode_model_conds(
            self._model.extra_conds, conds, noisy, self.device, "positive",
            latent_image=noisy, denoise_mask=None, seed=0, latent_shapes=[noisy.shape],
        )  # fmt: skip
        arguments = {name: c.process_cond(batch_size=batch, area=None).cond for name, c in cond["model_conds"].items()}
        options = {
            **self._options,
            "cond_or_uncond": [0],
            "sigmas": sigma,
            "optimized_attention_override": differentiable_attention,
        }
        with self._mixed_precision():
            return self._model.apply_model(noisy, sigma, transformer_options=options, **arguments).float()

    def loss_weight(self, sigma: Tensor) -> Tensor:
        """Weight (B,) that turns the squared error of clean latents into that of the model's own target."""
        sampling = self._sampling
        if isinstance(sampling, comfy.model_sampling.X0):
            return torch.ones_like(sigma)
        if isinstance(sampling, comfy.model_sampling.V_PREDICTION):  # EDM is a subclass
            data = sampling.sigma_data**2
            return (sigma**2 + data) / (sigma**2 * data)
        return sigma**-2

    def _encode(self, prompt: str) -> tuple[Tensor, Tensor]:
        encoder = self._clip.cond_stage_model
        if prompt not in self._tokens:
            self._tokens[prompt] = self._clip.tokenize(prompt)
        encoder.reset_clip_options()
        if self._clip.layer_idx is not None:
            encoder.set_clip_options({"layer": self._clip.layer_idx})
        return encoder.encode_token_weights(self._tokens[prompt])[:2]

    def _mixed_precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self._autocast, enabled=self._autocast is not None)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """bfloat16 where it is fast, None elsewhere: float16 gradients would underflow without loss scaling."""
    if device.type == "cpu":
        # At least twice as fast where the CPU multiplies it, gradients within 1e-4 (cosine); slower where it is emulated.
        probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
        native = any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
        return torch.bfloat16 if native else None
    return torch.bfloat16 if device.type == "cuda" and comfy.model_management.should_use_bf16(device) else None


def differentiable_attention(_: Any, *args: Any, **kwargs: Any) -> Tensor:
    """PyTorch's attention, in place of back ends without a backward pass."""
    return attention_pytorch(*args, **kwargs)
