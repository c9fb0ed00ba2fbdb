"""The host's model as the fine-tune sees it: loss weights of every prediction type, and prompts."""

from __future__ import annotations

import pytest
import torch


def native_target(kind: str, latents, noise, sigma):
    if kind == "eps":
        return noise
    if kind == "x0":
        return latents
    if kind == "flow":
        return noise - latents
    velocity = (noise - sigma * latents) / (1 + sigma**2).sqrt()
    return -velocity if kind == "edm" else velocity


@pytest.fixture
def predicting(host, loaded):
    """The miniature's MODEL with another prediction type, by the stock nodes."""
    from comfy_extras import nodes_model_advanced as stock

    def execute(kind: str):
        if kind == "edm":
            return stock.ModelSamplingContinuousEDM().patch(loaded.model, "edm", 100.0, 0.01)[0]
        if kind == "flow":
            return stock.ModelSamplingSD3().patch(loaded.model, 3.0)[0]
        name = {"eps": "eps", "v": "v_prediction", "x0": "x0"}[kind]
        return stock.ModelSamplingDiscrete().patch(loaded.model, name, zsnr=False)[0]

    return execute


@pytest.fixture
def denoiser(host, loaded):
    differentiable = host.module("nodes.host.differentiable").differentiable
    return lambda model: differentiable(model, loaded.clip)


@pytest.mark.parametrize("kind", ["eps", "v", "x0", "edm", "flow"])
def test_loss_weight_gives_the_error_of_the_native_target(denoiser, predicting, kind):
    model = predicting(kind)
    sampling = model.get_model_object("model_sampling")
    sampling.sigma_data = 1.0
    generator = torch.Generator().manual_seed(0)
    latents, noise, output = torch.randn(3, 2, 4, 8, 8, generator=generator)
    sigma = torch.tensor([0.2, 0.7] if kind == "flow" else [0.7, 3.0])
    with denoiser(model) as host_side:
        ratio = sigma / (1 - sigma) if kind == "flow" else sigma
        torch.testing.assert_close(host_side.noise_ratio(sigma), ratio)
        noisy = host_side.add_noise(latents.clone(), noise.clone(), sigma)
        denoised = sampling.calculate_denoised(sigma.view(-1, 1, 1, 1), output, noisy)
        weight = host_side.loss_weight(sigma).view(-1, 1, 1, 1)
    native = (output - native_target(kind, latents, noise, sigma.view(-1, 1, 1, 1))).square()
    torch.testing.assert_close(weight * (denoised - latents).square(), native, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["v", "x0", "edm", "flow"])
def test_every_prediction_type_trains(train, predicting, kind):
    lidb = train(model=predicting(kind), steps=1)
    assert torch.isfinite(lidb.up).all()
    assert lidb.up.abs().sum() > 0


def test_prompts_equal_the_stock_text_encode(denoiser, host, loaded, monkeypatch):
    monkeypatch.setattr(host.module("nodes.host.denoiser"), "autocast_dtype", lambda device: None)
    prompts = ["a [v] face", "a face", "a [v] face"]
    encode = host.stock["CLIPTextEncode"]().encode
    stock = torch.cat([encode(loaded.clip, prompt)[0][0][0] for prompt in prompts])
    with denoiser(loaded.model) as host_side:
        conditioning = host_side.encode_prompts(prompts)
        read = [conditioning.prompts[prompt].text for prompt in conditioning.of_sample]
    torch.testing.assert_close(torch.cat(read), stock)


def test_mixed_precision_gradients_are_those_of_float32(train, host, monkeypatch):
    mixed = train(steps=1, batch_size=2)
    monkeypatch.setattr(host.module("nodes.host.denoiser"), "autocast_dtype", lambda device: None)
    exact = train(steps=1, batch_size=2)
    # The first step of Adam moves by the sign of the gradient.
    assert (mixed.up.sign() == exact.up.sign()).float().mean() > 0.95
