"""SD 1.5 and SDXL with random weights, of the host's own classes, and a toy of each family; nothing is on disk.

Time and memory do not depend on the values of weights; pictures and losses of these models mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from devtools.environment import Host
from devtools.inprocess import InProcessHost, boot

SIZES = {"sd15": 512, "sdxl": 1024}  # pixels that the families were made for
_COMMON: Mapping[str, Any] = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "use_spatial_transformer": True, "legacy": False,
}  # fmt: skip
_SD15: Mapping[str, Any] = {**_COMMON, "context_dim": 768, "num_heads": 8, "use_linear_in_transformer": False}
_SDXL: Mapping[str, Any] = {
    **_COMMON, "context_dim": 2048, "num_heads": -1, "num_head_channels": 64, "use_linear_in_transformer": True,
    "num_classes": "sequential", "adm_in_channels": 2816,
}  # fmt: skip
_FULL: Mapping[str, Mapping[str, Any]] = {
    "sd15": {
        **_SD15, "model_channels": 320, "channel_mult": (1, 2, 4, 4), "num_res_blocks": [2, 2, 2, 2],
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        "transformer_depth_middle": 1,
    },
    "sdxl": {
        **_SDXL, "model_channels": 320, "channel_mult": (1, 2, 4), "num_res_blocks": [2, 2, 2],
        "transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
        "transformer_depth_middle": 10,
    },
}  # fmt: skip
_TOY: Mapping[str, Any] = {
    "model_channels": 64, "channel_mult": (1, 1), "num_res_blocks": [1, 1], "transformer_depth": [0, 1],
    "transformer_depth_output": [0, 0, 1, 1], "transformer_depth_middle": 1,
}  # fmt: skip
_KL_VAE: Mapping[str, Any] = {
    "double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0, "ch": 128,  # the host takes no other
}  # fmt: skip


class Models(NamedTuple):
    """The host's MODEL, CLIP and VAE."""

    model: Any
    clip: Any
    vae: Any


def opened(folder: Path, device: str) -> InProcessHost:
    """The host that `dev.py` prepared, in this process; its nodes write to `folder`."""
    import logging

    folder.mkdir(parents=True, exist_ok=True)
    logging.getLogger().setLevel(logging.WARNING)
    host = boot(Host.from_environ().root, folder, device=device)
    import comfy.utils

    comfy.utils.PROGRESS_BAR_ENABLED = False
    return host


def size_of(family: str, toy: bool) -> int:
    """Pixels of a side."""
    return 64 if toy else SIZES[family]


@torch.inference_mode()
def random_models(family: str, toy: bool) -> Models:
    """MODEL, CLIP and VAE of "sd15" or "sdxl", held where the host holds what it has just loaded."""
    import comfy.model_management as management
    import comfy.sd
    import comfy.supported_models
    from comfy import sd1_clip, sdxl_clip
    from comfy.ldm.models.autoencoder import AutoencoderKL
    from comfy.model_patcher import ModelPatcher
    from comfy.supported_models_base import ClipTarget

    supported, tokenizer, encoder = {
        "sd15": (comfy.supported_models.SD15, sd1_clip.SD1Tokenizer, sd1_clip.SD1ClipModel),
        "sdxl": (comfy.supported_models.SDXL, sdxl_clip.SDXLTokenizer, sdxl_clip.SDXLClipModel),
    }[family]
    there, home = management.get_torch_device(), management.unet_offload_device()
    draw = randomiser(there)
    dtype = torch.float32 if there.type == "cpu" else torch.float16
    config = supported({**_FULL[family], **(_TOY if toy else {}), "dtype": dtype})
    config.set_inference_dtype(dtype, None)
    base = config.get_model({}, device=home)
    draw(base.diffusion_model)
    few = {f"{name}_model_config": {"num_hidden_layers": 3} for name in ("clip_l", "clip_g")} if toy else {}
    clip = comfy.sd.CLIP(ClipTarget(tokenizer, encoder), model_options=few)
    draw(clip.cond_stage_model)
    vae = AutoencoderKL(ddconfig=dict(_KL_VAE), embed_dim=4).to(torch.float16)
    draw(vae)
    return Models(ModelPatcher(base, there, home), clip, comfy.sd.VAE(sd=vae.state_dict()))


def randomiser(device: torch.device) -> Callable[[nn.Module], None]:
    """A function that gives a module weights that keep activations near unit variance, drawn on `device`."""
    generator = torch.Generator(device).manual_seed(0)

    def weights(name: str, tensor: Tensor) -> Tensor:
        if tensor.ndim < 2:
            return torch.ones_like(tensor) if name.endswith("weight") else torch.zeros_like(tensor)
        scale = 1.0 if "embedding" in name else tensor[0].numel() ** -0.5
        return torch.randn(tensor.shape, generator=generator, device=device) * scale

    def draw(module: nn.Module) -> None:
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(weights(name, tensor))

    return draw


# What follows looks into the pack beyond its nodes, and is the only place here that does.


@contextmanager
def watched_plan(host: InProcessHost) -> Iterator[dict[str, Any]]:
    """What FastFinetune plans while this is open: `samples_at_once`; `start` is called when the training begins."""
    node, plan = host.module("nodes.host.finetune"), {"start": lambda: None}
    original = node.finetune

    def noted(*given: Any, samples_at_once: int | None = None, **options: Any) -> Any:
        plan["samples_at_once"] = samples_at_once
        plan["start"]()
        return original(*given, samples_at_once=samples_at_once, **options)

    node.finetune = noted
    try:
        yield plan
    finally:
        node.finetune = original


def planned_bytes(host: InProcessHost, models: Models, pixels: int) -> int:
    """What FastFinetune takes a sample of a square photo to keep."""
    return host.module("nodes.host.memory").memory_of(models.model, (pixels // 8) ** 2)


@contextmanager
def bare_training_step(host: InProcessHost, models: Models, pixels: int, batch: int) -> Iterator[Callable[[], None]]:
    """Forward, and backward through activations alone: below this no training of a frozen base can be."""
    differentiable = host.module("nodes.host.differentiable").differentiable
    with torch.inference_mode(), differentiable(models.model, models.clip) as denoiser:
        with torch.no_grad():
            conditioning = denoiser.encode_prompts(["a [v] face"] * batch)
        noisy = torch.randn(batch, 4, pixels // 8, pixels // 8, device=denoiser.device, requires_grad=True)
        sigma = denoiser.sigmas()[torch.linspace(100, 800, batch).long()].to(denoiser.device, copy=True)

        def step() -> None:
            denoiser.denoise(noisy, sigma, conditioning).square().mean().backward()
            noisy.grad = None

        yield step
