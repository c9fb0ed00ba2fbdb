"""The miniature's checkpoint file, read by training, is the model of its diffusers folder; nothing is downloaded."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hdb_core.errors import LayoutError
from hdb_core.train.base.denoiser import load_base_model
from hdb_core.train.base.single_file import find_tokenizer, read_single_file
from miniature.checkpoint import expand, write_diffusers

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ["a [v] face, smiling", "a face, wearing a red hoodie, at the beach"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    target = tmp_path_factory.mktemp("model") / "diffusers"
    write_diffusers(ROOT / "weights", target)
    return target


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """In a folder of its own: no tokenizer is around it."""
    path = tmp_path_factory.mktemp("file") / "miniature.safetensors"
    expand(ROOT / "weights", path)
    return path


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def refuse(self, address):
        raise AssertionError(f"a connection to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def load(path, **options):
    return load_base_model(path, torch.device("cpu"), torch.float32, **options)


@torch.no_grad()
def outputs(base):
    generator = torch.Generator().manual_seed(0)
    noisy = 5 * torch.randn(2, 4, 16, 16, generator=generator)
    pixels = torch.rand(1, 3, 128, 128, generator=generator)
    sigma = base.denoiser.sigmas()[torch.tensor([150, 700])]
    return base.denoiser.denoise(noisy, sigma, base.denoiser.encode_prompts(PROMPTS)), base.encode(pixels)


def test_a_schedule_that_ends_in_noise_alone(folder, tmp_path):
    """As ComfyUI has it: the last noise level is large, not infinite."""
    shutil.copytree(folder, tmp_path / "model")
    path = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rescale_betas_zero_snr": True}))
    sigmas, ordinary = load(tmp_path / "model").denoiser.sigmas(), load(folder).denoiser.sigmas()
    assert 4000 < float(sigmas[-1]) < 5000 and float(ordinary[-1]) < 100
    assert bool((sigmas.diff() > 0).all())


def test_file_and_folder_are_the_same_model(file, folder):
    global_state = torch.random.get_rng_state()
    from_file, from_folder = load(file, tokenizer=folder / "tokenizer"), load(folder)
    assert torch.equal(torch.random.get_rng_state(), global_state)
    assert from_file.denoiser.layout == from_folder.denoiser.layout
    torch.testing.assert_close(from_file.denoiser.sigmas(), from_folder.denoiser.sigmas())
    # The file is float16.
    for one, other in zip(outputs(from_file), outputs(from_folder), strict=True):
        assert (one - other).abs().max() < 2e-3 * other.std()


def test_the_tokenizer_is_found_beside_the_file(file, folder):
    (folder / "miniature.safetensors").hardlink_to(file)
    assert find_tokenizer(folder / "miniature.safetensors") == folder / "tokenizer"


def test_refusals(file, tmp_path, monkeypatch):
    monkeypatch.setattr("hdb_core.train.base.single_file._TOKENIZERS", ())
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer.*--set tokenizer=FOLDER"):
        load(file)
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer.*--set tokenizer=FOLDER"):
        load(file, tokenizer=tmp_path)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"not tensors")
    with pytest.raises(LayoutError, match=r"cannot be read as a .safetensors"):
        load(broken)


@pytest.mark.parametrize(
    ("without", "message"),
    [("model.diffusion_model.", "UNet.*is not there"), ("cond_stage_model.", "text encoder.*CLIP-L"),
     ("first_stage_model.taesd_encoder.0", "VAE"), ("first_stage_model.taesd_decoder.1.", "VAE.*2 of its tensors"),
     ("model.diffusion_model.out.0.weight", "1 of its tensors are not there.*conv_norm_out.weight")],
)  # fmt: skip
def test_a_file_of_another_form(file, folder, tmp_path, without, message):
    tensors = {name: tensor for name, tensor in load_file(file).items() if not name.startswith(without)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(LayoutError, match=message):
        read_single_file(tmp_path / "model.safetensors", torch.float32, folder / "tokenizer")
