"""Single-file SD 1.x checkpoints with random weights, in the layout that the stock loader detects.

ComfyUI's own modules give the keys and the shapes, so the files cannot drift from what the loader expects.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

CLIP_L = {
    "num_hidden_layers": 12,
    "hidden_size": 768,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "quick_gelu",
    "max_position_embeddings": 77,
    "eos_token_id": 49407,
}
SD1_UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "context_dim": 768,
    "num_heads": 8,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
}
MINIATURE_UNET = {  # two levels of 320 channels with one block each, attention at the lower
    **SD1_UNET,
    "channel_mult": (1, 1),
    "num_res_blocks": [1, 1],
    "transformer_depth": [0, 1],
    "transformer_depth_output": [0, 0, 1, 1],
    "transformer_depth_middle": 1,
}
FULL_UNET = {
    **SD1_UNET,
    "channel_mult": (1, 2, 4, 4),
    "num_res_blocks": [2, 2, 2, 2],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
}
KL_VAE = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 128,
    "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [],
    "dropout": 0.0,
}


def randomise(shapes: dict[str, torch.Tensor], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Weights that keep activations near unit variance: 1/sqrt(fan in) for matrices, ones and zeros for norms."""
    weights = {}
    for key, value in shapes.items():
        if value.ndim > 1:
            scale = 1.0 if "embedding" in key else value[0].numel() ** -0.5
            weight = torch.randn(value.shape, generator=generator) * scale
        else:
            weight = torch.ones(value.shape) if key.endswith("weight") else torch.zeros(value.shape)
        weights[key] = weight.half()
    return weights


def state_dict_of(build, generator: torch.Generator) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        module: nn.Module = build()
    return randomise(module.state_dict(), generator)


@torch.inference_mode()
def random_models(supported: type, unet: Mapping[str, Any], tokenizer: type, text_encoder: type) -> SimpleNamespace:
    """MODEL and CLIP of another family, as `model` and `clip`: the miniature's UNet, three layers a text encoder.

    Args:
        supported: the host's description of the family.
        unet: in which its UNet differs.
        tokenizer: of the family.
        text_encoder: of the family.
    """
    import comfy.sd
    from comfy.model_patcher import ModelPatcher
    from comfy.supported_models_base import ClipTarget

    heads = {"use_linear_in_transformer": True, "num_head_channels": 64, "num_heads": -1, "dtype": torch.float32}
    config = supported({**MINIATURE_UNET, **heads, **unet})
    config.set_inference_dtype(torch.float32, None)
    base, cpu, generator = config.get_model({}), torch.device("cpu"), torch.Generator().manual_seed(0)
    base.diffusion_model.load_state_dict(randomise(base.diffusion_model.state_dict(), generator))
    few = {f"{name}_model_config": {"num_hidden_layers": 3} for name in ("clip_l", "clip_h", "clip_g")}
    clip = comfy.sd.CLIP(ClipTarget(tokenizer, text_encoder), model_options=few)
    clip.cond_stage_model.load_state_dict(randomise(clip.cond_stage_model.state_dict(), generator))
    return SimpleNamespace(model=ModelPatcher(base, cpu, cpu), clip=clip)


def write_checkpoint(
    path: Path, *, full_size: bool = False, identity_text_layers: Iterable[int] = range(2, 12), seed: int = 0
) -> Path:
    """Write a random SD 1.x checkpoint (float16): a miniature with a TAESD, or the full SD 1.5 shapes with a KL VAE.

    Args:
        identity_text_layers: CLIP-L layers whose ``out_proj`` and ``fc2`` are zero.
    """
    import comfy.clip_model
    import comfy.ops
    import comfy.taesd.taesd
    from comfy.ldm.models.autoencoder import AutoencoderKL
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    generator = torch.Generator().manual_seed(seed)
    ops = comfy.ops.disable_weight_init
    unet = state_dict_of(lambda: UNetModel(**(FULL_UNET if full_size else MINIATURE_UNET), operations=ops), generator)
    text = state_dict_of(lambda: comfy.clip_model.CLIPTextModel(CLIP_L, torch.float16, "meta", ops), generator)
    for key, weight in text.items():
        if any(f"layers.{i}.{part}" in key for i in identity_text_layers for part in ("self_attn.out_proj", "mlp.fc2")):
            weight.zero_()
    del text["text_projection.weight"]  # SD 1.x checkpoints carry none
    if full_size:
        vae = state_dict_of(lambda: AutoencoderKL(ddconfig=KL_VAE, embed_dim=4), generator)
    else:
        vae = state_dict_of(comfy.taesd.taesd.TAESD, generator)
        vae["vae_scale"], vae["vae_shift"] = torch.tensor(1.0).half(), torch.tensor(0.0).half()
    parts = {
        "model.diffusion_model.": unet,
        "cond_stage_model.transformer.": text,
        "first_stage_model.": vae,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({prefix + k: v for prefix, part in parts.items() for k, v in part.items()}, path)
    return path
