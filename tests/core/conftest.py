"""A frozen random attention network in the shape of a diffusion model: text in, noise out, milliseconds a step."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from hdb_core.basis import BasisRecipe
from hdb_core.layout import find_targets, layout_of
from hdb_core.lidb import About, LiDB

WIDTH, TEXT_WIDTH, CHANNELS = 32, 24, 4
RECIPE = BasisRecipe(seed=3, down_dim=12, up_dim=8)


class Attention(nn.Module):
    def __init__(self, width, context_width, names=("to_q", "to_k", "to_v")):
        super().__init__()
        self.names = names
        for name, size in zip(names, (width, context_width, context_width), strict=True):
            setattr(self, name, nn.Linear(size, width))
        if "to_q" in names:
            self.to_out = nn.Sequential(nn.Linear(width, width))
        else:
            self.out_proj = nn.Linear(width, width)

    def forward(self, x, context):
        q, k, v = (getattr(self, n)(t)[:, None] for n, t in zip(self.names, (x, context, context), strict=True))
        out = functional.scaled_dot_product_attention(q, k, v)[:, 0]
        return self.to_out(out) if hasattr(self, "to_out") else self.out_proj(out)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn1, self.attn2 = Attention(WIDTH, WIDTH), Attention(WIDTH, TEXT_WIDTH)

    def forward(self, x, text):
        h = functional.layer_norm(x, (WIDTH,))
        x = x + self.attn1(h, h)
        return x + self.attn2(functional.layer_norm(x, (WIDTH,)), text)


class ToyDenoiser:
    """ε-prediction with σ up to 14; `hdb_core.finetune.Denoiser`."""

    def __init__(self, dtype=torch.float32):
        self.dtype = dtype
        self.net = nn.ModuleDict({"embed": nn.Embedding(256, TEXT_WIDTH)})
        self.net["text"] = nn.ModuleList(
            Attention(TEXT_WIDTH, TEXT_WIDTH, ("q_proj", "k_proj", "v_proj")) for _ in "ab"
        )
        self.net["project_in"] = nn.Linear(CHANNELS + 1, WIDTH)
        self.net["blocks"] = nn.ModuleList(Block() for _ in "ab")
        self.net["project_out"] = nn.Linear(WIDTH, CHANNELS)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.net.parameters():
            fan_in = parameter.shape[-1] if parameter.ndim > 1 else 100
            parameter.data = (torch.randn(parameter.shape, generator=generator) / fan_in**0.5).to(dtype)
            parameter.requires_grad_(False)
        unet = dict(self._named("blocks", "input_blocks.{}.1.transformer_blocks.0", first=1))
        text = dict(self._named("text", "transformer.text_model.encoder.layers.{}.self_attn", first=0))
        self.modules = find_targets(unet, {"clip_l": text}, "sd1")
        self.layout = layout_of(self.modules, "sd1")
        self.encoded = []

    def _named(self, part, pattern, first):
        for i, module in enumerate(self.net[part]):
            for name, child in module.named_modules():
                yield f"{pattern.format(i + first)}.{name}", child

    def encode_prompts(self, prompts):
        self.encoded.append(list(prompts))
        x = self.net["embed"](torch.tensor([[*p.encode().ljust(12)[:12]] for p in prompts]))
        for layer in self.net["text"]:
            x = x + layer(x, x)
        return x

    def summaries(self, prompts):
        return self.encode_prompts(prompts)[:, -1]

    def sigmas(self):
        return torch.linspace(-3.5, 2.7, 200).exp()

    def add_noise(self, latents, noise, sigma):
        return latents + noise * sigma[:, None, None, None]

    def denoise(self, noisy, sigma, conditioning):
        s = sigma[:, None, None, None]
        x = torch.cat([noisy / (s**2 + 1).sqrt(), s.log().expand_as(noisy[:, :1])], 1).flatten(2).mT.to(self.dtype)
        x = self.net["project_in"](x)
        for block in self.net["blocks"]:
            x = block(x, conditioning)
        noise = self.net["project_out"](x).mT.unflatten(-1, noisy.shape[-2:]).float()
        return noisy - s * noise

    def loss_weight(self, sigma):
        return sigma**-2

    def noise_ratio(self, sigma):
        return sigma


@pytest.fixture
def toy():
    return ToyDenoiser()


@pytest.fixture
def toy_of_dtype():
    return ToyDenoiser


@pytest.fixture
def latents():
    return torch.randn(1, CHANNELS, 6, 6, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def recipe():
    return RECIPE


@pytest.fixture
def make_lidb(toy, recipe):
    """LiDB of random factors: (seed, rank) → person."""

    def make(seed=0, rank=2):
        generator, count = torch.Generator().manual_seed(seed), len(toy.layout.layers)
        down = torch.randn(count, rank, recipe.down_dim, generator=generator)
        up = torch.randn(count, recipe.up_dim, rank, generator=generator)
        return LiDB(toy.layout, recipe, down, up, About(photos=2, steps=40, name="Anna"))

    return make
