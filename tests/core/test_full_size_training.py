"""People are fitted, and a hypernetwork is trained, through a model of the full SD 1.5 shapes with random weights."""

from __future__ import annotations

from math import ceil
from types import SimpleNamespace

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import DDPMScheduler, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

from hdb_core.adapters import Adapters
from hdb_core.basis import BasisRecipe
from hdb_core.cpu import multiplies_bfloat16
from hdb_core.hypernet import EncoderConfig, HyperNet, HyperNetConfig
from hdb_core.train.base.denoiser import DiffusersDenoiser
from hdb_core.train.base.single_file import TextEncoder
from hdb_core.train.data.faces import PhotoPixels
from hdb_core.train.data.latents import EncodedPhotos
from hdb_core.train.data.people import EncodedPerson
from hdb_core.train.data.photos import find_people
from hdb_core.train.fit import FitConfig, Fitter
from hdb_core.train.person_loss import PersonLoss, TrainConfig
from hdb_core.train.predicted import FromFaces, PeopleInBase

pytestmark = pytest.mark.slow
DTYPE = torch.bfloat16 if multiplies_bfloat16() else torch.float32
CLIP_L = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
# 1 x 2 at the lowest level: over a single position, the gradients of query and key would be rounding and nothing else.
LATENT_SHAPE = (4, 8, 16)


def tokenizer(prompt, **_):
    tokens = [49406, *prompt.encode()[:75]]
    return SimpleNamespace(input_ids=torch.tensor([tokens + [49407] * (77 - len(tokens))]))


def with_random_weights(build):
    """In bfloat16 where that is fast, without the time that the usual initialisation takes."""
    with init_empty_weights(include_buffers=False):
        module = build()
    pool = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0)).to(DTYPE)
    weights = {}
    for name, weight in module.named_parameters():
        if weight.ndim > 1:
            values = pool.repeat(ceil(weight.numel() / len(pool)))[: weight.numel()].view(weight.shape)
            weights[name] = values if "embedding" in name else values * weight[0].numel() ** -0.5
        else:
            weights[name] = torch.full(weight.shape, float(name.endswith("weight")), dtype=DTYPE)
    module.load_state_dict(weights, strict=False, assign=True)
    return module


@pytest.fixture(scope="module")
def denoiser():
    unet = with_random_weights(lambda: UNet2DConditionModel(cross_attention_dim=768))
    schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    text = with_random_weights(lambda: CLIPTextModel(CLIP_L))
    return DiffusersDenoiser(unet, [TextEncoder(text, tokenizer)], schedule.alphas_cumprod, "epsilon")


@pytest.fixture
def people(tmp_path):
    for name, color in (("anna.png", "red"), ("ben.png", "blue")):
        Image.new("RGB", (32, 32), color).save(tmp_path / name)
    return find_people(tmp_path)


def sums(denoiser):
    roots = (denoiser.unet, denoiser.texts[0].model)
    return [int(weight.view(torch.int16).sum()) for root in roots for weight in root.parameters()]


def test_sd15_fits_people_and_trains_a_hypernetwork(denoiser, people):
    assert denoiser.layout.describe() == "SD 1.x, 128 UNet + 48 text layers"
    before = sums(denoiser)
    latents = torch.randn(2, 1, *LATENT_SHAPE, generator=torch.Generator().manual_seed(1))
    photos = [EncodedPhotos(own, [""], torch.ones_like(own[:, :1])) for own in latents]
    fitter = Fitter(denoiser, Adapters(BasisRecipe(), denoiser.layout), FitConfig(steps=2))
    up = fitter.fit(photos, torch.Generator().manual_seed(0))
    assert up.shape == (2, 176, 50, 1) and up.isfinite().all()
    assert (up.flatten(2).norm(dim=-1) > 0).all()

    fitted = [EncodedPerson(*row) for row in zip(people, latents.half(), up, strict=True)]
    encoder = EncoderConfig(image_size=32, token_width=32, stem=((16, 1), (16, 1)), depth=1)
    config = HyperNetConfig(denoiser.layout, BasisRecipe(), encoder, width=32, depth=1)
    settings = TrainConfig(people=2, regression_weight=0, max_iterations=1)
    base = PeopleInBase(denoiser, fitted, config, PhotoPixels(config.encoder))
    loss_of = PersonLoss(base, settings)
    net = FromFaces(HyperNet.create(config))
    net.net.set_scale(base.energy)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    for step in range(2):
        losses = loss_of(net, step)
        losses["loss"].backward()
        assert losses["diffusion"].isfinite()
        if step == 0:
            assert (net.net.readout.grad.flatten(1).norm(dim=1) > 0).all()
        optimizer.step()
        optimizer.zero_grad()
    assert all(weight.isfinite().all() for weight in net.parameters())
    assert sums(denoiser) == before
    assert all(weight.grad is None for weight in denoiser.unet.parameters())
