"""Diffusers folders and tokenizers of another kind are refused in a sentence, when they are loaded."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel

from hdb_core.errors import LayoutError
from hdb_core.train.base.denoiser import load_base_model


@pytest.fixture
def copy(model, tmp_path):
    """The model, to change."""
    return shutil.copytree(model, tmp_path / "model")


def load(folder, tokenizer=None):
    return load_base_model(folder, torch.device("cpu"), torch.float32, tokenizer)


def unet(**other):
    """With other settings than it has."""
    return lambda folder: UNet2DConditionModel.from_config(
        UNet2DConditionModel.load_config(folder / "unet"), **other
    ).save_pretrained(folder / "unet")


def text_encoder(**other):
    sizes = {"num_hidden_layers": 1, "hidden_size": 768, "intermediate_size": 32, "num_attention_heads": 4}
    return lambda folder: CLIPTextModel(CLIPTextConfig(**sizes | other)).save_pretrained(folder / "text_encoder")


def vae(folder):
    made = AutoencoderKL(latent_channels=16, block_out_channels=(32,), norm_num_groups=8)
    shutil.rmtree(folder / "vae")
    made.save_pretrained(folder / "vae")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (unet(in_channels=9), "to have 9 channels, but got 4"),
        (unet(num_class_embeds=1000), "class_labels should be provided"),
        (unet(out_channels=8), "must match"),
        (vae, "to have 4 channels, but got 16"),
        (text_encoder(hidden_size=128), "cannot be multiplied"),
        (text_encoder(max_position_embeddings=20), "77"),
    ],
    ids=["inpainting", "upscaler", "variance", "VAE", "width", "positions"],
)
def test_parts_that_do_not_work_together(copy, change, said):
    change(copy)
    with pytest.raises(LayoutError, match=rf"A first step of .*model on a tiny picture fails \(.*{said}.*Give --model"):
        load(copy)


@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"])
def test_weights_that_are_not_finite(copy, name):
    path = copy / f"{name}.safetensors"
    save_file({name: torch.nan * weight for name, weight in load_file(path).items()}, path, {"format": "pt"})
    with pytest.raises(LayoutError, match=r"fails \(it gives NaN or infinity\)"):
        load(copy)


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
@pytest.mark.parametrize("method", ["bitsandbytes", "gptq"])
def test_quantised_parts(copy, part, method):
    path = copy / part / "config.json"
    described = {"quant_method": method, "load_in_4bit": True, "bits": 4}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": described}))
    with pytest.raises(LayoutError, match=rf"{part} holds quantised weights"):
        load(copy)


@pytest.mark.parametrize("part", ["text_encoder", "unet"])
@pytest.mark.parametrize(
    ("dtype", "beside"),
    [(torch.int8, "SCB"), (torch.int8, ""), (torch.float8_e4m3fn, "weight_scale_inv"), (torch.float8_e4m3fn, "weight.scale")],
)  # fmt: skip
def test_quantised_weights_that_no_config_speaks_of(copy, part, dtype, beside):
    """They were taken for the weights themselves."""
    path = next((copy / part).glob("*.safetensors"))
    weights = load_file(path)
    name = next(name for name, tensor in weights.items() if name.endswith(".weight") and tensor.ndim == 2)
    weights |= {name: torch.ones_like(weights[name]).to(dtype)}
    weights |= {name.removesuffix("weight") + beside: torch.ones(1)} if beside else {}
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(LayoutError, match=rf"{part} holds quantised weights \({name}\)"):
        load(copy)


@pytest.mark.parametrize("kind", ["EDMDPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler", None])
def test_other_schedules(copy, kind):
    """diffusers makes up betas for them."""
    described = {"_class_name": kind, "num_train_timesteps": 1000} if kind else {}
    (copy / "scheduler" / "scheduler_config.json").write_text(json.dumps(described))
    with pytest.raises(LayoutError, match=rf"describes another noise schedule \({kind or 'nothing'}\)"):
        load(copy)


def test_shifted_latents(copy):
    path = copy / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"latents_mean": [1.0, 0.0, 0.0, 0.0]}))
    with pytest.raises(LayoutError, match=r"vae are of another form \(latents_mean\)"):
        load(copy)


def vocabulary(change):
    """A folder with CLIP's vocabulary in the older two files, changed."""

    def write(folder, model):
        described = json.loads((model / "tokenizer" / "tokenizer.json").read_text())["model"]
        words, merges = change(described["vocab"], [" ".join(pair) for pair in described["merges"]])
        (folder / "vocab.json").write_text(json.dumps(words))
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))

    return write


def of_bert(folder, model):
    made = Tokenizer(models.WordPiece({"[UNK]": 0, "[CLS]": 1, "a": 2, "face": 3}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(os.fspath(folder / "tokenizer.json"))


@pytest.mark.parametrize(
    "write",
    [
        vocabulary(lambda words, merges: ({word: i + 60_000 for word, i in words.items()}, merges)),
        vocabulary(lambda words, merges: ({word: str(i) for word, i in words.items()}, merges)),
        vocabulary(lambda words, merges: ({}, [])),
        of_bert,
    ],
    ids=["of another model", "texts", "empty", "of BERT"],
)
def test_tokenizers_of_another_kind(model, tmp_path, write):
    write(tmp_path, model)
    with pytest.raises(LayoutError, match=r"The tokenizer .*Add --set tokenizer=FOLDER"):
        load(model, tmp_path)


def test_the_same_vocabulary_in_two_files(model, tmp_path):
    vocabulary(lambda words, merges: (words, merges))(tmp_path, model)
    own, given = (load(model, tokenizer).denoiser.encode_prompts(["a [v] face"]) for tokenizer in (None, tmp_path))
    assert torch.equal(own.text, given.text)
