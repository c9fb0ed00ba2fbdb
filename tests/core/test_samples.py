"""Sampling with a person in every sample of a batch, and the sheet of pictures."""

from __future__ import annotations

import pytest
import torch

from hdb_core.adapters import Adapters
from hdb_core.train.samples import sample, sheet

PROMPTS = ["a [v] face", "a [v] face, at the beach"]


class Gaussian:
    """The exact denoiser of independent numbers with this deviation; a prompt says their mean."""

    deviation = 0.5
    modules = {}  # noqa: RUF012

    def encode_prompts(self, prompts):
        return torch.tensor([float(prompt or 0) for prompt in prompts]).view(-1, 1, 1, 1)

    def sigmas(self):
        return torch.linspace(-3.5, 2.7, 1000).exp()

    def add_noise(self, latents, noise, sigma):
        return latents + noise * sigma.view(-1, 1, 1, 1)

    def denoise(self, noisy, sigma, conditioning):
        share = self.deviation**2 / (self.deviation**2 + sigma.view(-1, 1, 1, 1) ** 2)
        return conditioning + share * (noisy - conditioning)


def noise(count, seed=0):
    return torch.randn(count, 4, 6, 6, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def adapters(toy, recipe):
    generator, count = torch.Generator().manual_seed(1), len(toy.layout.layers)
    down = torch.randn(2, count, 1, recipe.down_dim, generator=generator)
    up = torch.randn(2, count, recipe.up_dim, 1, generator=generator)
    return Adapters(recipe, toy.layout).expand(down, up)


def test_the_sampler_follows_the_noise_to_the_data():
    """The probability flow of a Gaussian is known: a number keeps its place in the distribution."""
    start, top = noise(1, 3), Gaussian().sigmas()[-1]
    mean = 2.0
    expected = mean + (start * top - mean) * Gaussian.deviation / (Gaussian.deviation**2 + top**2) ** 0.5
    errors = [(sample(Gaussian(), start, ["2"], {}, steps, 1.0) - expected).abs().max() for steps in (20, 100, 1000)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert errors[2] < 0.01


def test_guidance_goes_beyond_the_prompt():
    plain, guided = (sample(Gaussian(), noise(2), ["1", "2"], {}, 50, scale) for scale in (1.0, 3.0))
    torch.testing.assert_close(guided - plain, 2 * (plain - sample(Gaussian(), noise(2), ["0", "0"], {}, 50, 1.0)))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_every_sample_has_its_own_person(toy, adapters, guidance):
    both = sample(toy, noise(2), PROMPTS, adapters, 3, guidance)
    for i in range(2):
        own = {name: (up[i : i + 1], down[i : i + 1]) for name, (up, down) in adapters.items()}
        alone = sample(toy, noise(2)[i : i + 1], PROMPTS[i : i + 1], own, 3, guidance)
        torch.testing.assert_close(both[i : i + 1], alone, atol=1e-2, rtol=1e-3)
    assert (both - sample(toy, noise(2), PROMPTS, {}, 3, guidance)).abs().mean() > 0.01
    assert not any(module._forward_hooks for module in toy.modules.values())


def test_a_sheet():
    reds, blues = torch.zeros(2, 20, 30, 3), torch.zeros(2, 20, 30, 3)
    reds[..., 0], blues[..., 2] = 1, 1
    image = sheet({"red": reds, "blue:\nand a long second line": blues})
    assert image.size == (68, 76)
    assert [image.getpixel((x, y)) for x in (5, 45) for y in (40, 65)] == [(255, 0, 0)] * 2 + [(0, 0, 255)] * 2
