"""The miniature as a diffusers folder, which training reads, computes what ComfyUI computes from the checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from miniature.checkpoint import expand, write_diffusers

WEIGHTS = Path(__file__).resolve().parents[2] / "weights"
PROMPTS = ["a [v] face, smiling", "a face, wearing a red hoodie, at the beach"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    target = tmp_path_factory.mktemp("diffusers")
    with torch.inference_mode(False):
        write_diffusers(WEIGHTS, target)
    return target


@pytest.fixture(scope="module")
def trained(host, folder):
    with torch.inference_mode(False):
        module = host.module("hdb_core.training.base_model")
        return module.load_base_model(folder, torch.device("cpu"), torch.float32, convolutions=True)


@pytest.fixture(scope="module")
def in_host(host, base_directory):
    expand(WEIGHTS, base_directory / "models" / "checkpoints" / "shipped.safetensors")
    with torch.inference_mode():
        return host.stock["CheckpointLoaderSimple"]().load_checkpoint("shipped.safetensors")


def test_same_layers_under_the_same_names(host, trained, in_host):
    model, clip, _ = in_host
    modules, family = host.module("nodes.host.targets").target_modules(model, clip, convolutions=True)
    assert host.module("hdb_core.layout").layout_of(modules, family) == trained.denoiser.layout


def test_same_prediction_with_the_same_people(host, trained, in_host, person):
    """One person in the host, the same one in every sample of a batch in training."""
    model, clip, _ = in_host
    lidb = person(3, rank=2, convolutions=True)
    attach, expand_person = host.module("hdb_core.adapters").attach, host.module("hdb_core.lidb").expand
    training = host.module("nodes.host.training").training
    modules, family = host.module("nodes.host.targets").target_modules(model, clip, convolutions=True)
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 2, 4, 16, 16, generator=generator)
    outputs, changes = [], []
    with training(model, clip, modules, family, 512) as there, torch.no_grad():
        sigma = there.sigmas()[torch.tensor([150, 700])].clone()
        people = {
            name: (up[None].repeat(2, 1, 1), down[None].repeat(2, 1, 1))
            for name, (up, down) in expand_person(lidb).items()
        }
        for denoiser, factors in ((there, expand_person(lidb)), (trained.denoiser, people)):
            noisy = denoiser.add_noise(latents, noise, sigma)
            plain = denoiser.denoise(noisy, sigma, denoiser.encode_prompts(PROMPTS))
            with attach(denoiser.modules, factors):
                outputs.append(denoiser.denoise(noisy, sigma, denoiser.encode_prompts(PROMPTS)))
            changes.append((outputs[-1] - plain).abs().mean())
    assert changes[0] > 0.01
    # The host computes in bfloat16 where that is fast.
    assert (outputs[0] - outputs[1]).abs().mean() < 0.05 * changes[0]


def test_same_latents(host, trained, in_host, photo):
    model, _, vae = in_host
    expected = host.module("nodes.host.images").encode(model, vae, photo.movedim(-1, 1))
    torch.testing.assert_close(trained.encode(photo.movedim(-1, 1)), expected, atol=2e-2, rtol=0)


def test_an_incomplete_folder_says_what_is_missing(host, folder):
    with pytest.raises(FileNotFoundError, match=r"lacks unet.*--model"):
        host.module("hdb_core.training.base_model").load_base_model(folder / "unet", torch.device("cpu"), torch.float32)
