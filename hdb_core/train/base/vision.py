"""Computes in training the tokens of a frozen image encoder that Predict LiDB sees behind Load CLIP Vision.

The host recognises an encoder by its sizes and then takes activation, normalisation and colours from a list of its own,
whatever the encoder's own files say. So does this module.
Source: ComfyUI 0.3.75, comfy/clip_vision.py and the JSON files beside it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ...errors import HyperNetError
from ...files.reading import garbled_as
from ...hypernet import EncoderConfig
from ...images import resize_to_cover
from .local import local_config, require_safetensors, require_unquantised

Color = tuple[float, float, float]
_CLIP_COLORS: tuple[Color, Color] = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_SIGLIP_COLORS: tuple[Color, Color] = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
_IMAGENET_COLORS: tuple[Color, Color] = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class HostEncoder(NamedTuple):
    """An encoder that Load CLIP Vision can load, and how it runs there."""

    name: str
    architecture: str
    width: int
    depth: int
    image_size: int
    patch_size: int
    activation: str
    epsilon: float  # of the layer norms
    colors: tuple[Color, Color]  # mean and standard deviation of the pixels


HOST_ENCODERS = [
    HostEncoder("CLIP ViT-L/14", "clip", 1024, 24, 224, 14, "quick_gelu", 1e-5, _CLIP_COLORS),
    HostEncoder("CLIP ViT-L/14 at 336", "clip", 1024, 24, 336, 14, "quick_gelu", 1e-5, _CLIP_COLORS),
    HostEncoder("CLIP ViT-H/14", "clip", 1280, 32, 224, 14, "gelu", 1e-5, _CLIP_COLORS),
    HostEncoder("CLIP ViT-bigG/14", "clip", 1664, 48, 224, 14, "gelu", 1e-5, _CLIP_COLORS),
    HostEncoder("SigLIP so400m at 384", "siglip", 1152, 27, 384, 14, "gelu_pytorch_tanh", 1e-5, _SIGLIP_COLORS),
    HostEncoder("SigLIP so400m at 512", "siglip", 1152, 27, 512, 16, "gelu_pytorch_tanh", 1e-5, _SIGLIP_COLORS),
    HostEncoder("DINOv2 large", "dinov2", 1024, 24, 518, 14, "gelu", 1e-6, _IMAGENET_COLORS),
    HostEncoder("DINOv2 giant", "dinov2", 1536, 40, 518, 14, "gelu", 1e-6, _IMAGENET_COLORS),
]


class VisionEncoder:
    """A loaded encoder.

    Args:
        model: of `transformers`, float32.
        host: how the host runs it.
        name: of the checkpoint.

    Attributes:
        model: of `transformers`, frozen.
        config: what a hypernetwork behind it records.
        weights: a hash that tells encoders of the same sizes apart.
    """

    def __init__(self, model: nn.Module, host: HostEncoder, name: str) -> None:
        # The host computes at float32, but stores all weights except those of CLIP's first norm at float16.
        for weight_name, weight in model.named_parameters():
            if "pre_layrnorm" not in weight_name:
                weight.data = weight.half().float()
        self.model = model.eval().requires_grad_(False)
        tokens = (host.image_size // host.patch_size) ** 2 + (host.architecture != "siglip")
        mean, std = host.colors
        self.config = EncoderConfig(
            "clip_vision", host.image_size, host.width, mean=mean, std=std, name=name, num_tokens=tokens
        )
        self.weights = _hash_of(model)

    @torch.no_grad()
    def encode(self, photos: Sequence[Tensor]) -> Tensor:
        """The host's ``penultimate_hidden_states`` (N, T, D), float32, of uncut photos (3, H, W) in 0..1."""
        size = (self.config.image_size, self.config.image_size)
        device = next(self.model.parameters()).device
        squares = torch.cat([resize_to_cover(photo[None], size) for photo in photos]).to(device)
        mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (self.config.mean, self.config.std))
        pixels = ((255 * squares).round() / 255 - mean) / std
        return self.model(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]


def load_vision_encoder(folder: Path, device: torch.device) -> VisionEncoder:
    """Load a `transformers` folder of CLIP's, SigLIP's or DINOv2's image encoder from the local disk.

    Raises:
        FileNotFoundError: if there is no such folder, or no model in it.
        HyperNetError: if ComfyUI could not load this encoder, or weights are missing or damaged.
        LayoutError: if its weights are quantised.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} is no image encoder: it lacks config.json. Give --clip-vision a transformers folder of one."
        )
    with garbled_as(lambda why: HyperNetError(f"{folder} is damaged ({why}). Download it again.")):
        return _loaded(folder, device)


def _loaded(folder: Path, device: torch.device) -> VisionEncoder:
    import transformers

    classes: dict[str, tuple[str, Any, Any]] = {
        "clip": ("clip", transformers.CLIPVisionConfig, transformers.CLIPVisionModel),
        "clip_vision_model": ("clip", transformers.CLIPVisionConfig, transformers.CLIPVisionModel),
        "siglip": ("siglip", transformers.SiglipVisionConfig, transformers.SiglipVisionModel),
        "siglip_vision_model": ("siglip", transformers.SiglipVisionConfig, transformers.SiglipVisionModel),
        "dinov2": ("dinov2", transformers.Dinov2Config, transformers.Dinov2Model),
    }
    require_unquantised(folder)
    kind = transformers.PretrainedConfig.get_config_dict(folder, local_files_only=True)[0].get("model_type", "nothing")
    if kind not in classes:
        raise HyperNetError(
            f"{folder} holds {kind!r}, but Load CLIP Vision takes CLIP, SigLIP and DINOv2 ({', '.join(classes)}). "
            "Give --clip-vision one of these."
        )
    require_safetensors(folder)
    architecture, config_class, model_class = classes[kind]
    config = local_config(config_class, folder)
    host = _host_encoder(architecture, config, folder)
    config.hidden_act, config.layer_norm_eps = host.activation, host.epsilon
    with torch.device("meta"):
        numbers = sum(weight.numel() for weight in model_class(config).parameters())
    if numbers > (size := sum(path.stat().st_size for path in folder.iterdir())):  # transformers would make them up
        raise HyperNetError(
            f"{folder} holds no weights that can be read: its config.json describes {numbers:,}, but its files have "
            f"{size:,} bytes. Download it again."
        )
    try:
        model, info = model_class.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise HyperNetError(f"{folder} holds no weights that can be read ({error}). Download it again.") from error
    if missing := sorted(info["missing_keys"]):
        raise HyperNetError(
            f"{folder} lacks {len(missing)} weights of its encoder, {missing[0]!r} among them. Download it again."
        )
    return VisionEncoder(model.to(device), host, folder.resolve().name)


def _host_encoder(architecture: str, config: Any, folder: Path) -> HostEncoder:
    sizes = (config.hidden_size, config.num_hidden_layers, config.image_size, config.patch_size)
    for host in HOST_ENCODERS:
        if (host.architecture, host.width, host.depth, host.image_size, host.patch_size) == (architecture, *sizes):
            return host
    raise HyperNetError(
        f"{folder} is an encoder ({architecture}, width, layers, image size, patch size {sizes}) that Load CLIP Vision "
        f"cannot load. It takes {', '.join(host.name for host in HOST_ENCODERS)}."
    )


def _hash_of(model: nn.Module) -> str:
    """Over all biases and norms at float16: a few MB that no two trainings share."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        if weight.ndim == 1:
            digest.update(name.encode() + weight.detach().half().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
