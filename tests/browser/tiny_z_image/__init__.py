"""A node pack for the server under test: the three files of Z-Image, tiny and random, under the names that the template has.

The host knows the sizes of Z-Image and of its text encoder by heart; this pack gives it smaller ones. Everything else is the
host's own code: what the files are, loading, tokens, text, sampling, decoding.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path

import comfy.model_detection
import comfy.ops
import comfy.sd
import comfy.supported_models
import comfy.taesd.taesd
import folder_paths
import torch
from comfy.text_encoders import llama
from safetensors.torch import save_file

NODE_CLASS_MAPPINGS = {}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def random_models():
    path = Path(__file__).resolve().parents[2] / "host" / "random_models.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shrink(unet) -> None:
    """Let the host find Z-Image in files of these sizes."""
    detect = comfy.model_detection.detect_unet_config
    comfy.model_detection.detect_unet_config = lambda *a, **k: {**detect(*a, **k), **unet}
    comfy.supported_models.ZImage.unet_config = {"image_model": "lumina2", "dim": unet["dim"]}
    comfy.sd.detect_te_model = lambda weights: comfy.sd.TEModel.QWEN3_4B
    llama.Qwen3_4BConfig = functools.partial(llama.Qwen3_4BConfig, **TEXT)


def write(folder: str, name: str, weights) -> None:
    path = Path(folder_paths.models_dir) / folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.bfloat16().contiguous() for key, tensor in weights.items()}, path)


def write_files(models) -> None:
    write("diffusion_models", "z_image_turbo_bf16.safetensors",
          models.random_model("Z-Image", cap_feat_dim=TEXT["hidden_size"]).model.diffusion_model.state_dict())  # fmt: skip
    text = llama.Qwen3_4B({}, torch.float32, "cpu", comfy.ops.disable_weight_init)
    vae = comfy.taesd.taesd.TAESD(latent_channels=16)
    for module in (text, vae):
        models.fill(module, torch.Generator().manual_seed(0))
    write("text_encoders", "qwen_3_4b.safetensors", text.state_dict())
    scale = {"vae_scale": torch.tensor(1.0), "vae_shift": torch.tensor(0.0)}
    write("vae", "ae.safetensors", {**vae.state_dict(), **scale})


MODELS = random_models()
shrink({**MODELS.FAMILIES["Z-Image"].unet, "cap_feat_dim": TEXT["hidden_size"]})
write_files(MODELS)
