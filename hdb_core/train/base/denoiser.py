"""A frozen diffusers model as a `Denoiser` of batches in which every sample may carry its own LiDB."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import LayoutError
from ...files.reading import garbled_as, read_whole
from ...layout import FAMILIES, FAMILY_BY_CONTEXT, find_targets, layout_of
from ...prompt import CLASS_PROMPT
from .local import identity_of, local_config, require_safetensors, require_unquantised, weights_in
from .model import BaseModel
from .single_file import GIVE_TOKENIZER, Parts, TextEncoder, load_tokenizer, read_single_file

# Of a schedule that ends in noise alone, whose last sigma would be infinite; sigma is 4519 there. ComfyUI has the same.
_LEAST_SIGNAL = 4.8973451890853435e-08
_PARTS = ("unet", "text_encoder", "tokenizer", "vae", "scheduler")
_SECOND_PARTS = ("text_encoder_2", "tokenizer_2")  # of SDXL
# By the name that `find_targets` has for each text encoder. That of a diffusers folder of SD 2.x lacks the layer that
# nothing reads, that of SDXL has it.
_TEXT_ENCODERS = {"sd1": ("clip_l",), "sd2": ("text_encoder",), "sdxl": ("clip_l", "clip_g")}
_OTHER_LATENTS = ("latents_mean", "latents_std", "shift_factor")
_PIXELS = 8  # side of what a latent stands for
_TRIED = 64  # side of the picture that a loaded model is tried on, pixels


class Conditioning(NamedTuple):
    """What a UNet reads of B prompts: text states (B, 77, D), and of SDXL the pooled text (B, P)."""

    text: Tensor
    pooled: Tensor | None = None


class DiffusersDenoiser:
    """`model.BatchDenoiser` over the modules of a diffusers folder.

    Unlike the host's, it encodes every prompt for its own sample, since people differ.

    Args:
        unet: UNet2DConditionModel.
        texts: its text encoders, one, or the two of SDXL.
        alphas_cumprod: (T,) signal shares of the schedule.
        prediction_type: "epsilon" or "v_prediction".
        convolutions: adapt those of the UNet's residual blocks, too.

    Raises:
        LayoutError: if the UNet is of no known family or predicts something else.
    """

    def __init__(
        self,
        unet: Any,
        texts: Sequence[TextEncoder],
        alphas_cumprod: Tensor,
        prediction_type: str,
        convolutions: bool = False,
    ) -> None:
        family = FAMILY_BY_CONTEXT.get(unet.config.cross_attention_dim)
        if family is None or prediction_type not in ("epsilon", "v_prediction"):
            raise LayoutError(
                f"Training knows {', '.join(FAMILIES.values())} that predict epsilon or v, but this model reads text of "
                f"width {unet.config.cross_attention_dim} and predicts {prediction_type!r}. Give it another --model."
            )
        names = _TEXT_ENCODERS[family]
        if len(texts) != len(names):
            raise LayoutError(
                f"{FAMILIES[family]} has {len(names)} text encoder(s), but this model has {len(texts)}. Give --model a "
                "whole checkpoint or diffusers folder."
            )
        for part in (unet, *(text.model for text in texts)):
            part.eval().requires_grad_(False)
        self.unet, self.texts, self.family = unet, texts, family
        self.predicts_v = prediction_type == "v_prediction"
        self.device, self.dtype = unet.device, unet.dtype
        share = alphas_cumprod.double().clamp(min=_LEAST_SIGNAL)
        self._sigmas = ((1 - share) / share).sqrt().float().to(self.device)
        text_modules = {name: dict(text.model.named_modules()) for name, text in zip(names, texts, strict=True)}
        self.modules = find_targets(dict(unet.named_modules()), text_modules, family, convolutions)
        self.layout = layout_of(self.modules, family)
        self._tokens: dict[str, Tensor] = {}

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """What B prompts say, each through its own sample's adapters: text states (B, 77, D).

        Raises:
            LayoutError: if a tokenizer is of another model than its text encoder.
        """
        for prompt in set(prompts) - self._tokens.keys():
            self._tokens[prompt] = torch.cat([_tokens(text, prompt) for text in self.texts])
        tokens = torch.stack([self._tokens[prompt] for prompt in prompts], 1).to(self.device)
        if self.family != "sdxl":
            return Conditioning(self.texts[0].model(tokens[0]).last_hidden_state)
        seen = [text.model(own, output_hidden_states=True) for text, own in zip(self.texts, tokens, strict=True)]
        # Of both the last layer but one, without the norm behind the last; pooled is the second one's.
        return Conditioning(torch.cat([own.hidden_states[-2] for own in seen], -1), seen[1].text_embeds)

    def summaries(self, prompts: Sequence[str]) -> Tensor:
        """The text states (B, D) of the last token of each prompt, which has seen the whole of it."""
        return self.encode_prompts(prompts).text[:, -1]

    def sigmas(self) -> Tensor:
        """The noise levels (T,) of the schedule, ascending."""
        return self._sigmas

    def add_noise(self, latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """Noisy latents (B, C, h, w) = latents + sigma · noise, as ComfyUI writes them."""
        return latents + noise * sigma.view(-1, 1, 1, 1)

    def denoise(self, noisy: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Predicted clean latents (B, C, h, w), float32."""
        timesteps = torch.searchsorted(self._sigmas, sigma).clamp(max=len(self._sigmas) - 1)
        s = sigma.view(-1, 1, 1, 1)
        scale = (s**2 + 1).rsqrt()
        given = (noisy * scale).to(self.dtype), timesteps, conditioning.text.to(self.dtype)
        output = self.unet(*given, added_cond_kwargs=self._added(noisy, conditioning)).sample.float()
        return noisy * scale**2 - output * s * scale if self.predicts_v else noisy - s * output

    def loss_weight(self, sigma: Tensor) -> Tensor:
        """(B,): turns the squared error of clean latents into that of ε or v."""
        return (sigma**2 + 1) / sigma**2 if self.predicts_v else sigma**-2

    def noise_ratio(self, sigma: Tensor) -> Tensor:
        """(B,): σ itself, as `add_noise` adds it."""
        return sigma

    def _added(self, noisy: Tensor, conditioning: Conditioning) -> dict[str, Tensor] | None:
        """Pooled text and sizes: of a picture that was neither scaled nor cropped, as ComfyUI has it by default."""
        if conditioning.pooled is None:
            return None
        height, width = (_PIXELS * side for side in noisy.shape[-2:])
        sizes = torch.tensor([[height, width, 0, 0, height, width]], device=self.device).expand(len(noisy), -1)
        return {"text_embeds": conditioning.pooled.to(self.dtype), "time_ids": sizes}


def _tokens(text: TextEncoder, prompt: str) -> Tensor:
    """(1, 77)."""
    given = {"padding": "max_length", "max_length": 77, "truncation": True, "return_tensors": "pt"}
    tokens = text.tokenizer(prompt, **given).input_ids
    known = text.model.get_input_embeddings().num_embeddings
    if int(tokens.max()) >= known:  # on a GPU, looking it up would end the process
        raise LayoutError(
            f"The tokenizer is of another model: it has a token {int(tokens.max()):,}, but the text encoder knows "
            f"{known:,}. {GIVE_TOKENIZER}"
        )
    return tokens


@dataclass(frozen=True)
class DiffusersModel:
    """`model.BaseModel` over the modules of a diffusers folder."""

    denoiser: DiffusersDenoiser
    vae: Any  # AutoencoderKL or AutoencoderTiny
    identity: str

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
) -> DiffusersModel:
    """Load a diffusers folder or a single-file checkpoint from the local disk; nothing is downloaded.

    Args:
        model: the folder, or the ``.safetensors`` file.
        device: for everything.
        dtype: of UNet and text encoders.
        tokenizer: folder of CLIP's vocabulary, which all text encoders share; None is the model's own, or what `single_file.find_tokenizer` finds.
        prediction_type: "epsilon" or "v_prediction"; None is what the model says.
        convolutions: adapt those of the UNet's residual blocks, too.

    Raises:
        FileNotFoundError: if there is no such model, it lacks a part, or there is no tokenizer.
        LayoutError: if the model is of no known family, damaged or quantised, or its parts do not work together.
    """
    if model.is_file():
        parts = read_single_file(model, dtype, tokenizer, prediction_type)
    else:
        parts = _read_folder(model, dtype, tokenizer)
    denoiser = DiffusersDenoiser(
        parts.unet.to(device, memory_format=torch.channels_last),
        [TextEncoder(text.model.to(device), text.tokenizer) for text in parts.texts],
        parts.scheduler.alphas_cumprod,
        prediction_type or parts.scheduler.config.prediction_type,
        convolutions,
    )
    vae = parts.vae.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    files = [model]
    if not model.is_file():
        schedule = model / "scheduler" / "scheduler_config.json"
        files = [*weights_in(model / part for part in (*_PARTS, *_SECOND_PARTS)), schedule]
    base = DiffusersModel(denoiser, vae, identity_of(files))
    with garbled_as(
        lambda why: LayoutError(
            f"A first step of {model} on a tiny picture fails ({why}). Give --model a text-to-image model "
            f"({', '.join(FAMILIES.values())}) whose parts are all its own."
        )
    ):
        try_base(base)
    return base


@torch.no_grad()
def try_base(base: BaseModel) -> None:
    """Compute once with every part: those of an inpainting model or an upscaler, for example, load and then fail."""
    latents = base.encode(torch.zeros(1, 3, _TRIED, _TRIED)).to(base.denoiser.device)
    conditioning = base.denoiser.encode_prompts([CLASS_PROMPT])
    predicted = base.denoiser.denoise(latents, base.denoiser.sigmas()[-1:], conditioning)
    if not all(bool(result.isfinite().all()) for result in (predicted, base.decode(latents))):
        raise ValueError("it gives NaN or infinity")


def _read_folder(folder: Path, dtype: torch.dtype, tokenizer: Path | None) -> Parts:
    from diffusers import AutoencoderKL, AutoencoderTiny, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    if not folder.exists():
        raise FileNotFoundError(f"There is no {folder}. Give --model a diffusers folder or a .safetensors checkpoint.")
    local: Any = {"local_files_only": True}
    second = (folder / "text_encoder_2").is_dir()
    paths = {part: folder / part for part in (*_PARTS, *(_SECOND_PARTS if second else ()))}
    if tokenizer is not None and not second:
        paths["tokenizer"] = tokenizer
    if missing := [part for part, path in paths.items() if not path.is_dir()]:
        raise FileNotFoundError(
            f"{folder} is no diffusers model: it lacks {', '.join(missing)}. Give --model a folder with "
            f"{', '.join(_PARTS)} (SDXL: and {', '.join(_SECOND_PARTS)}), or a .safetensors checkpoint."
        )
    kinds: list[tuple[Any, str]] = [(CLIPTextModel, ""), (CLIPTextModelWithProjection, "_2")]
    with garbled_as(lambda why: LayoutError(f"A part of {folder} is damaged ({why}). Download the model again.")):
        for part, path in paths.items():
            if not part.startswith(("tokenizer", "scheduler")):  # which have no weights
                require_unquantised(path)
                require_safetensors(path)
        texts = [
            TextEncoder(
                _whole(kind, path, config=local_config(kind.config_class, path), dtype=dtype, **local),
                load_tokenizer(paths[f"tokenizer{end}"]),
            )
            for kind, end in kinds[: 1 + second]
            for path in [paths[f"text_encoder{end}"]]
        ]
        _require_known_schedule(paths["scheduler"])
        vae_config = AutoencoderTiny.load_config(paths["vae"], **local)
        if strange := next((name for name in _OTHER_LATENTS if vae_config.get(name)), None):
            raise LayoutError(f"The latents of {paths['vae']} are of another form ({strange}) than training knows.")
        tiny = vae_config["_class_name"] == "AutoencoderTiny"
        return Parts(
            _whole(UNet2DConditionModel, paths["unet"], torch_dtype=dtype, **local),
            tuple(texts),
            # A full VAE overflows in float16.
            _whole(AutoencoderTiny if tiny else AutoencoderKL, paths["vae"], **local),
            DDPMScheduler.from_pretrained(paths["scheduler"], **local),
        )


def _require_known_schedule(folder: Path) -> None:
    """Check that diffusers does not make up a schedule for one of another kind.

    Raises:
        LayoutError: the folder describes noise by something else than betas.
    """
    path = folder / "scheduler_config.json"
    described = json.loads(read_whole(path).decode())
    if not {"beta_start", "trained_betas"} & described.keys():
        raise LayoutError(
            f"{path} describes another noise schedule ({described.get('_class_name', 'nothing')}) than SD 1.x, SD 2.x and SDXL "
            "have. Give --model one of these."
        )


def _whole(kind: Any, folder: Path, **options: Any) -> Any:
    """A part of a diffusers folder; where weights are missing, diffusers and transformers would make up random ones.

    Raises:
        LayoutError: if some are missing.
    """
    module, info = kind.from_pretrained(folder, output_loading_info=True, use_safetensors=True, **options)
    if missing := sorted(info["missing_keys"]):
        raise LayoutError(
            f"{folder} lacks {len(missing)} weights, {missing[0]!r} among them. Download the model again."
        )
    return module
