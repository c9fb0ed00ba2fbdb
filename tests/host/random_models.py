"""Tiny models with random weights of every family that the host under test has, made through the host's own classes.

Text encoders of today's families hold billions of numbers; `Encoder` stands in for them and gives every prompt random
text of the form that the family's own gives. The host's own are in `test_separate_loaders.py` and in the tests of SD.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        supported: the host's description of it, in ``comfy.supported_models``.
        unet: the sizes of a tiny one.
        text: width of its text.
        extras: further entries of its conditioning: name → shape; 0 is the number of tokens.
        downscale: pixels per latent.
        cfg: what its workflows sample with.
        clips: text encoders that would be adapted, too.
    """

    supported: str
    unet: Mapping[str, Any]
    text: int
    extras: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    downscale: int = 8
    cfg: float = 4.0
    clips: tuple[str, ...] = ()


FLUX = {
    "vec_in_dim": 24, "context_in_dim": 20, "hidden_size": 32, "mlp_ratio": 2.0, "num_heads": 2, "depth": 2,
    "depth_single_blocks": 2, "axes_dim": [4, 6, 6], "theta": 10000, "patch_size": 2, "qkv_bias": True, "in_channels": 16,
    "out_channels": 16, "guidance_embed": True,
}  # fmt: skip
LUMINA = {
    "patch_size": 2, "in_channels": 16, "dim": 48, "cap_feat_dim": 20, "n_layers": 2, "n_refiner_layers": 1, "qk_norm": True,
    "n_heads": 2, "axes_dims": [8, 8, 8], "axes_lens": [64, 64, 64], "multiple_of": 16,
}  # fmt: skip
COSMOS = {
    "max_img_h": 64, "max_img_w": 64, "max_frames": 8, "in_channels": 16, "out_channels": 16, "patch_spatial": 2,
    "patch_temporal": 1, "model_channels": 48, "num_blocks": 2, "num_heads": 2, "crossattn_emb_channels": 20,
    "pos_emb_cls": "rope3d", "use_adaln_lora": True, "adaln_lora_dim": 16, "rope_enable_fps_modulation": False,
}  # fmt: skip
UNET = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 64, "num_heads": -1, "num_head_channels": 64,
    "use_spatial_transformer": True, "channel_mult": (1, 1), "num_res_blocks": [1, 1], "transformer_depth": [0, 1],
    "transformer_depth_output": [0, 0, 1, 1], "transformer_depth_middle": 1,
}  # fmt: skip
LINEAR = {"use_linear_in_transformer": True}
FAMILIES = {
    "SD 1.x": Family("SD15", {**UNET, "context_dim": 768, "use_linear_in_transformer": False}, 768, clips=("clip_l",)),
    "SD 2.x": Family("SD20", {**UNET, **LINEAR, "context_dim": 1024}, 1024, clips=("clip_h",)),
    "SDXL": Family(
        "SDXL",
        {**UNET, **LINEAR, "context_dim": 2048, "num_classes": "sequential", "adm_in_channels": 2816},
        2048,
        {"pooled_output": (1, 1280)},
        clips=("clip_l", "clip_g"),
    ),
    "SD3": Family(
        "SD3",
        {"in_channels": 16, "input_size": None, "num_patches": 1024, "pos_embed_max_size": 32, "depth": 1, "qk_norm": "rms",
         "pos_embed_scaling_factor": None, "adm_in_channels": 24, "context_size": 20,
         "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 20, "out_features": 64}}},
        20, {"pooled_output": (1, 24)},
    ),
    "Flux.1": Family("Flux", {**FLUX, "image_model": "flux"}, 20, {"pooled_output": (1, 24)}, cfg=1.0),
    "Flux.2": Family(
        "Flux2",
        {**FLUX, "image_model": "flux2", "vec_in_dim": None, "global_modulation": True, "mlp_silu_act": True, "qkv_bias": False,
         "ops_bias": False, "axes_dim": [4, 4, 4, 4], "in_channels": 128, "out_channels": 128, "patch_size": 1},
        20, downscale=16, cfg=1.0,
    ),
    "Chroma": Family(
        "Chroma",
        {**{k: v for k, v in FLUX.items() if k not in ("vec_in_dim", "guidance_embed")}, "image_model": "chroma",
         "in_channels": 64, "out_channels": 64, "in_dim": 64, "out_dim": 32, "hidden_dim": 40, "n_layers": 2},
        20,
    ),
    "Lumina 2": Family("Lumina2", {**LUMINA, "image_model": "lumina2", "n_kv_heads": 1}, 20, {"attention_mask": (1, 0)}),
    "Z-Image": Family(
        "ZImage",
        {**LUMINA, "image_model": "lumina2", "dim": 256, "axes_dims": [32, 48, 48], "n_kv_heads": 2, "z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 8},
        20, {"attention_mask": (1, 0)}, cfg=1.0,
    ),
    "Qwen-Image": Family(
        "QwenImage",
        {"image_model": "qwen_image", "in_channels": 64, "num_layers": 2, "attention_head_dim": 24, "num_attention_heads": 2,
         "joint_attention_dim": 20, "axes_dims_rope": (8, 8, 8)},
        20, {"attention_mask": (1, 0)},
    ),
    "HiDream": Family(
        "HiDream",
        {"image_model": "hidream", "attention_head_dim": 24, "num_attention_heads": 2, "axes_dims_rope": [8, 8, 8],
         "caption_channels": [20, 20], "max_resolution": [32, 32], "in_channels": 16, "out_channels": 16, "llama_layers": [0, 1, 1],
         "num_layers": 1, "num_single_layers": 1, "patch_size": 2, "text_emb_dim": 24},
        20, {"pooled_output": (1, 24), "conditioning_llama3": (1, 2, 0, 20)},
    ),
    "AuraFlow": Family(
        "AuraFlow",
        {"cond_seq_dim": 20, "max_seq": 1024, "n_double_layers": 1, "n_layers": 2, "dim": 64, "n_heads": 2, "global_conddim": 64},
        20,
    ),
    "Wan": Family(
        "WAN21_T2V",
        {"image_model": "wan2.1", "model_type": "t2v", "dim": 48, "ffn_dim": 64, "num_heads": 2, "num_layers": 2, "freq_dim": 32,
         "text_dim": 20, "text_len": 16, "in_dim": 16, "out_dim": 16},
        20,
    ),
    "HunyuanImage": Family(
        "HunyuanImage21",
        {"image_model": "hunyuan_video", "vec_in_dim": None, "context_in_dim": 20, "hidden_size": 48, "mlp_ratio": 2.0, "num_heads": 2,
         "depth": 2, "depth_single_blocks": 2, "axes_dim": [12, 12], "theta": 256, "patch_size": [1, 1], "qkv_bias": True,
         "in_channels": 64, "out_channels": 64, "guidance_embed": False, "byt5": False, "meanflow": False},
        20, {"attention_mask": (1, 0)}, downscale=32,
    ),
    "Cosmos-Predict2": Family("CosmosT2IPredict2", {**COSMOS, "image_model": "cosmos_predict2"}, 20),
}  # fmt: skip


def random_model(name: str, dtype: torch.dtype = torch.float32, **others: Any):
    """A ModelPatcher on the CPU with random weights, loaded as the host loads them: in inference mode.

    Args:
        name: of the family.
        dtype: of the weights.
        others: sizes in which it differs.
    """
    import comfy.supported_models
    from comfy.model_patcher import ModelPatcher

    family = FAMILIES[name]
    with torch.inference_mode():
        config = getattr(comfy.supported_models, family.supported)({**sizes(family), **others, "dtype": dtype})
        config.set_inference_dtype(dtype, None)
        base, cpu = config.get_model({}), torch.device("cpu")
        fill(base.diffusion_model, torch.Generator().manual_seed(0))
        return ModelPatcher(base, cpu, cpu)


NEWER = {
    ("flux", "FluxParams"): {"txt_ids_dims": []},
    ("chroma", "ChromaParams"): {"txt_ids_dims": [], "vec_in_dim": None},
    ("hunyuan_video", "HunyuanVideoParams"): {
        "use_cond_type_embedding": False,
        "vision_in_dim": None,
        "meanflow_sum": False,
    },
}


def sizes(family: Family) -> dict[str, Any]:
    """The sizes of a family; newer hosts have some that older ones refuse."""
    found = dict(family.unet)
    for (package, name), others in NEWER.items():
        known = getattr(importlib.import_module(f"comfy.ldm.{package}.model"), name).__dataclass_fields__
        if str(family.unet.get("image_model", "")).rstrip("2") == package:
            found |= {size: value for size, value in others.items() if size in known}
    return found


def fill(module: torch.nn.Module, generator: torch.Generator) -> None:
    """Random weights of the usual sizes; nothing is zero, so that every layer acts."""
    for name, parameter in (*module.named_parameters(), *module.named_buffers()):
        if not parameter.is_floating_point() or "rope" in name or "pe_embedder" in name:
            continue
        if parameter.ndim > 1:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter) * (
                0.5 if "pos_embed" in name else parameter[0].numel() ** -0.5
            )
        else:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter) + (
                1.0 if "norm" in name or name.endswith(("scale", "gamma")) else 0.0
            )


class Text(torch.nn.Module):
    """Random text of a family for every prompt; no layer of it can be adapted."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        self.family = family
        for name in family.clips:
            self.add_module(name, torch.nn.Module())

    def reset_clip_options(self) -> None:
        pass

    def encode_token_weights(self, tokens: str) -> tuple[Any, ...]:
        seed = int.from_bytes(hashlib.sha256(tokens.encode()).digest()[:4], "little")
        generator = torch.Generator().manual_seed(seed)
        count = 6 + len(tokens) % 3  # the templates of these encoders do not pad
        extras = {
            name: torch.ones(1, count, dtype=torch.long)
            if name == "attention_mask"
            else torch.randn([size or count for size in shape], generator=generator)
            for name, shape in self.family.extras.items()
        }
        text = torch.randn(1, count, self.family.text, generator=generator)
        return text, extras.pop("pooled_output", None), extras


class Encoder:
    """Stands in for a CLIP."""

    def __init__(self, family: Family) -> None:
        from comfy.model_patcher import ModelPatcher

        self.cond_stage_model, self.layer_idx, cpu = Text(family), None, torch.device("cpu")
        self.patcher = ModelPatcher(self.cond_stage_model, cpu, cpu)

    def clone(self) -> Encoder:
        return copy.copy(self)

    def add_patches(self, patches: Mapping[str, Any], strength: float) -> list[str]:
        return list(patches)

    def tokenize(self, text: str) -> str:
        return text

    def encode_from_tokens_scheduled(self, tokens: str, **_: Any) -> list[list[Any]]:
        text, pooled, extras = self.cond_stage_model.encode_token_weights(tokens)
        return [[text, {"pooled_output": pooled, **extras}]]


class Vae:
    """Stands in for a VAE: blocks of pixels, mixed into the channels of a family."""

    def __init__(self, name: str, model) -> None:
        self.block, self.format = FAMILIES[name].downscale, model.model.latent_format
        generator = torch.Generator().manual_seed(2)
        self.mix = torch.randn(self.format.latent_channels, 3, generator=generator)

    def spacial_compression_encode(self) -> int:
        return self.block

    def encode(self, pixels):
        small = torch.nn.functional.avg_pool2d(2 * pixels.movedim(-1, 1) - 1, self.block)
        latents = torch.einsum("cr,brhw->bchw", self.mix, small)
        return latents if self.format.latent_dimensions == 2 else latents.unsqueeze(2)

    def decode(self, latents):
        flat = latents if latents.ndim == 4 else latents[:, :, 0]
        small = torch.einsum("rc,bchw->brhw", torch.linalg.pinv(self.mix), flat)
        return (small.repeat_interleave(self.block, 2).repeat_interleave(self.block, 3) / 2 + 0.5).movedim(1, -1)


def available() -> list[str]:
    """The families whose class the host under test has."""
    import comfy.supported_models

    return [name for name, family in FAMILIES.items() if hasattr(comfy.supported_models, family.supported)]
