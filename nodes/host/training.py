"""Fast fine-tune inside the host: MODEL and CLIP as a differentiable denoiser, and everything put back afterwards."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.conds
import comfy.model_management
import comfy.model_sampling
import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.clip_model import CLIPLayer
from comfy.ldm.modules.attention import attention_pytorch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from torch import Tensor, nn

from ...hdb_core.errors import FinetuneError
from ...hdb_core.finetune import FinetuneConfig, FinetuneResult, finetune, photo_captions, start_factors
from ...hdb_core.images import resize_to_cover
from ...hdb_core.layout import Layout, layout_of
from ...hdb_core.lidb import LiDB
from .images import checked_mask, checked_photos, encode, photo_size
from .progress import FinetuneDisplay
from .targets import family_of, target_modules

# Values that autograd keeps per latent pixel of a sample, counted on the UNets; SD 2.x has the widths of SD 1.5.
SAVED_VALUES_PER_LATENT_PIXEL = {"sd1": 95_000, "sd2": 95_000, "sdxl": 170_000}


@dataclass(frozen=True)
class Conditioning:
    """What the UNet reads: text (B, T, D) and the pooled text (B, P) that SDXL adds."""

    text: Tensor
    pooled: Tensor


class HostDenoiser:
    """`hdb_core.finetune.Denoiser` over the host's MODEL and CLIP. Made by :func:`training`, valid inside it."""

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


@dataclass(frozen=True)
class Photos:
    """What the user connects: IMAGE (N, H, W, 3), MASK (N or 1, H, W), IMAGE of the class, and the training size."""

    image: Tensor
    mask: Tensor | None = None
    class_images: Tensor | None = None
    resolution: int = 0

    def prepare(self, family: str, multiple: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Checked and cut to one size: pixels (N, 3, h, w), mask (N or 1, 1, h, w), class pixels (M, 3, h, w).

        Raises:
            FinetuneError: one of them cannot be used; the message says why.
        """
        pixels = checked_photos(self.image)
        size = photo_size(*pixels.shape[-2:], self.resolution, family, multiple)
        mask = None if self.mask is None else resize_to_cover(checked_mask(self.mask, pixels), size)
        others = None if self.class_images is None else resize_to_cover(checked_photos(self.class_images), size)
        return resize_to_cover(pixels, size), mask, others


def finetune_in_host(
    model: ModelPatcher,
    clip: CLIP,
    vae: VAE,
    photos: Photos,
    config: FinetuneConfig,
    init: LiDB | None,
    convolutions: bool,
    node_id: str | None,
) -> FinetuneResult:
    """Fast fine-tune on the host's MODEL, CLIP and VAE, which are the same afterwards; see `hdb_core.finetune`.

    Args:
        convolutions: train those of the UNet's residual blocks, too; those of `init` are trained in any case.

    Raises:
        HDBError: inputs that cannot be used, before heavy work; or training diverged.
    """
    convolutions = convolutions or (init is not None and init.layout.has_convolutions)
    layout = layout_of(*target_modules(model, clip, convolutions))
    if config.prior_weight > 0 and photos.class_images is None:
        raise FinetuneError(
            f"prior_weight is {config.prior_weight:g}, but class_images is not connected. "
            f"Connect pictures of {config.class_prompt!r} made with the same checkpoint, or set prior_weight to 0."
        )
    pixels, mask, class_pixels = photos.prepare(layout.family, vae.spacial_compression_encode())
    # What these refuse is refused before anything is encoded or loaded.
    photo_captions(config, len(pixels))
    start_factors(config.basis if init is None else init.basis, layout, config.rank, init)
    latents = encode(model, vae, pixels)
    prior_latents = encode(model, vae, class_pixels) if config.prior_weight > 0 else None
    samples, of_a_sample = config.batch_size * (1 if prior_latents is None else 2), latents[0, 0].numel()
    with training(model, clip, samples * of_a_sample, layout.has_convolutions) as denoiser:
        free = comfy.model_management.get_free_memory(denoiser.device)
        return finetune(
            denoiser,
            latents.to(denoiser.device),
            config,
            mask=mask,
            prior_latents=prior_latents,
            init=init,
            callback=FinetuneDisplay(config.steps, node_id),
            samples_at_once=max(1, int(free // memory_of(model, of_a_sample))),
        )


@contextmanager
def training(model: ModelPatcher, clip: CLIP, latent_pixels: int, convolutions: bool = False) -> Iterator[HostDenoiser]:
    """Load MODEL and CLIP and make them differentiable for the duration of the context.

    No weight changes. Parameters, forwards and modes are put back at the end, whatever happens inside.

    Args:
        latent_pixels: of all samples of one step, for the memory that the host is asked to free.
        convolutions: adapt those of the UNet's residual blocks, too.

    Raises:
        FinetuneError: the host cannot give one of them weights that are trained through.
        LayoutError: as `target_modules`.
    """
    patcher, text = ordinary_clone(model), clip.clone()
    text.patcher = ordinary_clone(clip.patcher)
    text.patcher.forced_hooks = None
    text.cond_stage_model = text.patcher.model
    modules, family = target_modules(patcher, text, convolutions)
    # Loading writes patched weights in place, which the host's inference mode allows and ordinary tensors do not.
    comfy.model_management.load_models_gpu(
        [patcher, text.patcher],
        memory_required=memory_of(patcher, latent_pixels),
        force_full_load=True,
    )
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(ordinary_tensors(patcher.model, text.cond_stage_model))
        stack.enter_context(out_of_place_residuals(text.cond_stage_model))
        stack.callback(text.cond_stage_model.reset_clip_options)
        yield HostDenoiser(patcher, text, modules, layout_of(modules, family))


def memory_of(model: ModelPatcher, latent_pixels: int) -> int:
    """The bytes that a step keeps of so many latent pixels."""
    itemsize = max(2, model.model.get_dtype().itemsize)  # float8 weights are computed with at 16 bit
    return latent_pixels * SAVED_VALUES_PER_LATENT_PIXEL[family_of(model)] * itemsize


def ordinary_clone(patcher: ModelPatcher) -> ModelPatcher:
    """A clone whose modules hold the weights that run.

    Newer hosts keep a model's weights in its file until they are used; an ordinary clone of such a one is not of the
    same model, but of another that the host reads anew.

    Raises:
        FinetuneError: the host does not know how to read it again.
    """
    if "disable_dynamic" not in inspect.signature(patcher.clone).parameters:
        return patcher.clone()
    try:
        return patcher.clone(disable_dynamic=True)
    except RuntimeError as error:
        raise FinetuneError(
            f"ComfyUI cannot load this model in a way that can be trained ({error}). Load it with Load Checkpoint, or "
            "start ComfyUI with --disable-dynamic-vram."
        ) from error


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


@contextmanager
def ordinary_tensors(*roots: nn.Module) -> Iterator[None]:
    """Replace parameters and buffers by ordinary frozen tensors over the same memory.

    The host loads everything in inference mode, and autograd refuses to save inference tensors.
    """
    replaced = []
    try:
        for module in {module for root in roots for module in root.modules()}:
            for table, wrap in ((module._parameters, frozen_parameter), (module._buffers, same_memory)):
                for name, tensor in list(table.items()):
                    # Quantised tensors are subclasses; the host computes ordinary ones from them on the way.
                    if type(tensor) in (Tensor, nn.Parameter):
                        replaced.append((table, name, tensor))
                        table[name] = wrap(tensor)
        yield
    finally:
        for table, name, tensor in replaced:
            table[name] = tensor


def same_memory(tensor: Tensor) -> Tensor:
    """An ordinary tensor over the memory of another, possibly an inference tensor."""
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return empty.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())


def frozen_parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(same_memory(tensor), requires_grad=False)


@contextmanager
def out_of_place_residuals(text_encoder: nn.Module) -> Iterator[None]:
    """Let CLIP layers add their residuals out of place: the host's ``x +=`` destroys what autograd has saved."""
    layers = [module for module in text_encoder.modules() if isinstance(module, CLIPLayer)]
    try:
        for layer in layers:
            layer.forward = types.MethodType(clip_layer_forward, layer)
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def clip_layer_forward(
    self: CLIPLayer, x: Tensor, mask: Tensor | None = None, optimized_attention: Any = None
) -> Tensor:
    x = x + self.self_attn(self.layer_norm1(x), mask, optimized_attention)
    return x + self.mlp(self.layer_norm2(x))
