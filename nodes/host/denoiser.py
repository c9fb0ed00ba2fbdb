"""The host's MODEL and CLIP as `hdb_core.diffusion.Denoiser`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP
from torch import Tensor, nn

from ...hdb_core.adapters import only_samples
from ...hdb_core.cpu import multiplies_bfloat16
from ...hdb_core.layout import Layout
from .restore import same_memory


@dataclass(frozen=True)
class Prompt:
    """What a text encoder gives for one prompt: text (1, T, D), and whatever else the model family reads."""

    text: Tensor
    extras: Mapping[str, Any]


@dataclass(frozen=True)
class Conditioning:
    """What the model reads: the distinct prompts, and for every sample of a batch the number of its own."""

    prompts: tuple[Prompt, ...]
    of_sample: tuple[int, ...]


class HostDenoiser:
    """A frozen model for a fine-tune. `differentiable` makes it; it is valid inside that context.

    Args:
        patcher: the MODEL.
        clip: the CLIP that encodes, whose layers may be trained, too; None where all prompts are encoded.
        modules: the adapted layers.
        layout: of them.
        encoded: prompts that are encoded already.
    """

    def __init__(
        self,
        patcher: ModelPatcher,
        clip: CLIP | None,
        modules: Mapping[str, nn.Module],
        layout: Layout,
        encoded: Mapping[str, Prompt],
    ) -> None:
        self.modules = modules
        self.layout = layout
        self.device = patcher.load_device
        self._model = patcher.model
        self._sampling = patcher.get_model_object("model_sampling")
        self._options = patcher.model_options.get("transformer_options", {})
        self._clip = clip
        self.trains_text = any(layer.is_text for layer in layout.layers)
        self._encoded = encoded
        self._autocast = autocast_dtype(self.device)
        # A UNet of 16 bit computes as it does for pictures: autograd would keep a copy of each weight that autocast casts.
        self._unet_autocast = self._autocast if compute_dtype(patcher) == torch.float32 else None
        self._tokens: dict[str, dict] = {}

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning for ``len(prompts)`` samples; equal prompts are encoded once."""
        unique = list(dict.fromkeys(prompts))
        frozen = nullcontext() if self.trains_text else torch.no_grad()
        with self._mixed_precision(self._autocast if self.trains_text else None), frozen:
            encoded = tuple(self._encoded.get(prompt) or self._encode(prompt) for prompt in unique)
        return Conditioning(encoded, tuple(unique.index(prompt) for prompt in prompts))

    def sigmas(self) -> Tensor:
        """The noise levels of the model's schedule, ascending: those of its sampling, with its shift."""
        return self._sampling.sigmas

    def add_noise(self, latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """Noisy latents (B, C, …) at sigma (B,)."""
        # The host scales its noise argument in place.
        return self._sampling.noise_scaling(sigma, noise.clone(), latents)

    def denoise(self, noisy: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Predicted clean latents (B, C, …), float32."""
        rows: dict[int, list[int]] = {}
        for sample, prompt in enumerate(conditioning.of_sample):
            rows.setdefault(prompt, []).append(sample)
        parts = [
            (own, self._model_conds(conditioning.prompts[prompt], _rows(noisy, own))) for prompt, own in rows.items()
        ]
        order, denoised = [], []
        with self._mixed_precision(self._unet_autocast):
            for together in _of_equal_size(parts):
                own = [sample for samples, _ in together for sample in samples]
                x, levels = _rows(noisy, own), _rows(sigma, own)
                arguments = comfy.samplers.cond_cat([conds for _, conds in together])
                options = {
                    **self._options,
                    "cond_or_uncond": [0],
                    "sigmas": levels,
                    "optimized_attention_override": differentiable_attention,
                }
                with only_samples(own):
                    answer = self._model.apply_model(x, levels, transformer_options=options, **arguments)
                denoised.append(answer.float())
                order += own
        return _rows(torch.cat(denoised), sorted(range(len(order)), key=order.__getitem__))

    def loss_weight(self, sigma: Tensor) -> Tensor:
        """Weight (B,) that turns the squared error of clean latents into that of the model's own target.

        Clean latents are linear in what the model predicts; the host says with which factor.
        """
        one, none = torch.ones_like(sigma)[:, None], torch.zeros_like(sigma)[:, None]
        return self._sampling.calculate_denoised(sigma, one, none)[:, 0] ** -2

    def noise_ratio(self, sigma: Tensor) -> Tensor:
        """How much noise noisy latents hold for each part of clean ones, (B,)."""
        one, none = torch.ones_like(sigma)[:, None], torch.zeros_like(sigma)[:, None]
        return (self.add_noise(none, one, sigma) / self.add_noise(one, none, sigma))[:, 0]

    def _model_conds(self, prompt: Prompt, noisy: Tensor) -> dict[str, Any]:
        """What the host hands to the model for samples of one prompt; the family's defaults, guidance say, are its own."""
        conds = comfy.sampler_helpers.convert_cond([[prompt.text, dict(prompt.extras)]])
        (cond,) = comfy.samplers.encode_model_conds(
            self._model.extra_conds, conds, noisy, self.device, "positive",
            latent_image=noisy, denoise_mask=None, seed=0, latent_shapes=[noisy.shape],
        )  # fmt: skip
        return {name: c.process_cond(batch_size=len(noisy), area=None) for name, c in cond["model_conds"].items()}

    def _encode(self, prompt: str) -> Prompt:
        assert self._clip is not None, f"{prompt!r} was not among the prompts of the training"
        encoder = self._clip.cond_stage_model
        if prompt not in self._tokens:
            self._tokens[prompt] = self._clip.tokenize(prompt)
        encoder.reset_clip_options()
        if self._clip.layer_idx is not None:
            encoder.set_clip_options({"layer": self._clip.layer_idx})
        text, pooled, *others = encoder.encode_token_weights(self._tokens[prompt])
        return Prompt(text, {"pooled_output": pooled, **(others[0] if others else {})})

    def _mixed_precision(self, dtype: torch.dtype | None) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)


def compute_dtype(patcher: ModelPatcher) -> torch.dtype:
    """What the host computes a MODEL in."""
    return getattr(patcher.model, "manual_cast_dtype", None) or patcher.model.get_dtype()


def encode_prompts(clip: CLIP, prompts: Sequence[str]) -> dict[str, Prompt]:
    """Prompts as the host's own nodes encode them, of a text encoder that is not trained."""
    encoded = {}
    for prompt in dict.fromkeys(prompts):
        text, extras = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))[0]
        with torch.inference_mode(False):
            encoded[prompt] = Prompt(same_memory(text), {name: _ordinary(value) for name, value in extras.items()})
    return encoded


def _rows(tensor: Tensor, numbers: list[int]) -> Tensor:
    """Those rows of a tensor; itself if that is all of them, so that nothing is sent to the device for it."""
    return tensor if numbers == list(range(len(tensor))) else tensor[numbers]


def _ordinary(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_ordinary(item) for item in value)
    return same_memory(value) if isinstance(value, Tensor) else value


def _of_equal_size(parts: Sequence[tuple[list[int], dict[str, Any]]]) -> list[list[tuple[list[int], dict[str, Any]]]]:
    """Samples of different prompts that the model can read together, as the host decides it when it samples."""
    groups: list[list[tuple[list[int], dict[str, Any]]]] = []
    for part in parts:
        own = next((g for g in groups if comfy.samplers.cond_equal_size(g[0][1], part[1])), None)
        if own is None:
            groups.append(own := [])
        own.append(part)
    return groups


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What models of float32 are computed in: bfloat16 where it is fast, None elsewhere."""
    if device.type == "cpu":
        return torch.bfloat16 if multiplies_bfloat16() else None  # gradients within 1e-4 (cosine)
    return torch.bfloat16 if device.type == "cuda" and comfy.model_management.should_use_bf16(device) else None


def differentiable_attention(_: Any, *args: Any, **kwargs: Any) -> Tensor:
    """PyTorch's attention, in place of back ends without a backward pass."""
    return attention_pytorch(*args, **kwargs)
