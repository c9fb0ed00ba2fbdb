"""The miniature's base model: a two-level SD 1.x UNet on the text encoder of ``miniature.text``, ``python -m miniature.base``.

The text encoder is frozen; the UNet trains with the ε-loss on Stable Diffusion 1.x's noise schedule, weighted by min-SNR-5.
Source: Hang et al., Efficient Diffusion Training via Min-SNR Weighting Strategy, arXiv 2303.09556.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import nn
from transformers import CLIPTokenizer

from devtools.device import add_option

from .latents import chunk_indices
from .packing import trained_weights
from .pictures import training_picture
from .text import build_text_encoder, load_tokenizer, tokenize, vocabulary
from .training import Trainer, to_device


def build_unet() -> UNet2DConditionModel:
    """37 M parameters: two levels of 320 channels, one residual block each, attention at the 8 x 8 level only.

    Attention at 16 x 16 as well takes twice the time a picture (measured), and all that it does there can be done below.
    """
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(320, 320),
        layers_per_block=1,
        cross_attention_dim=768,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )


def alphas_cumprod() -> torch.Tensor:
    """Stable Diffusion 1.x's cumulative signal shares, float32 (1000,)."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float()


class Base(nn.Module):
    """UNet and text encoder, the latter frozen, as one module.

    Args:
        rows: the tokens that have a row of their own, ascending, int64 (V,); see ``vocabulary``.
        device: that it is for.
    """

    def __init__(self, rows: torch.Tensor, device: str = "cpu") -> None:
        super().__init__()
        self.register_buffer("rows", rows, persistent=False)
        self.unet = build_unet().to(memory_format=torch.channels_last)
        if device == "cpu":
            self.unet.set_attn_processor(AttnProcessor())  # as in build_text_encoder
        self.text_encoder = build_text_encoder(len(rows), device).requires_grad_(False)
        self.to(device)

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Predicted noise (B, 4, h, w) for noisy latents (B, 4, h, w), timesteps (B,) and tokens (B, 77)."""
        with torch.no_grad():
            text = self.text_encoder(torch.searchsorted(self.rows, tokens)).last_hidden_state
        return self.unet(noisy, timesteps, text).sample


def diffusion_loss(base: nn.Module, latents: torch.Tensor, tokens: torch.Tensor, generator: torch.Generator,
                   signal: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:  # fmt: skip
    """Min-SNR-5 weighted ε-loss at one stratified random timestep a sample; latents (B, 4, h, w) of unit variance.

    Timesteps and noise are drawn on the CPU, so that a seed means the same everywhere; the rest is where latents are.
    """
    count = len(latents)
    fractions = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
    timesteps = to_device((fractions * 1000).long(), latents.device)
    share = signal[timesteps].view(-1, 1, 1, 1)
    noise = to_device(torch.randn(latents.shape, generator=generator), latents.device)
    noisy = (share.sqrt() * latents + (1 - share).sqrt() * noise).to(dtype, memory_format=torch.channels_last)
    snr = share / (1 - share)
    weight = snr.clamp(max=5.0) / snr
    return (weight * (base(noisy, timesteps, tokens).float() - noise).square()).mean()


class LatentSet:
    """The encoded training pictures in memory with their captions, drawn anew each time.

    Args:
        folder: what ``miniature.latents`` wrote, or is still writing: ``reload`` takes up new files.
        tokenizer: CLIP's.
        generator: draws batches and captions.
    """

    def __init__(self, folder: Path, tokenizer: CLIPTokenizer, generator: np.random.Generator) -> None:
        self.folder, self.tokenizer, self.rng = folder, tokenizer, generator
        self.scale = json.loads((folder / "std.json").read_text())["std"]
        self.num_files, self.sets = 0, {}
        self.reload()

    def reload(self) -> None:
        """Reads the folder again if it has grown."""
        files = {name: sorted(self.folder.glob(f"{name}_*.npy")) for name in ("singles", "pairs")}
        if len(files["singles"]) == self.num_files:
            return
        self.num_files = len(files["singles"])
        for name, paths in files.items():
            indices = [chunk_indices(int(path.stem.split("_")[1]), name == "pairs") for path in paths]
            self.sets[name] = np.concatenate([np.load(path) for path in paths]), np.concatenate(indices)

    def batch(self, count: int, pairs: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 unit-variance latents (count, 4, 16, 16 or 32) and tokens (count, 77)."""
        latents, indices = self.sets["pairs" if pairs else "singles"]
        rows = self.rng.integers(len(latents), size=count)
        draws = self.rng.integers(1000, size=count)
        captions = [training_picture(int(indices[r]), False, int(d))[1] for r, d in zip(rows, draws, strict=True)]
        return torch.from_numpy(latents[rows]).float() / self.scale, tokenize(self.tokenizer, captions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", type=Path, default=Path(".runs/latents"))
    parser.add_argument("--text", type=Path, default=Path(".runs/text"), help="the run of the text encoder")
    parser.add_argument("--run", type=Path, default=Path(".runs/base"))
    parser.add_argument("--start", type=Path, default=None, help="weights/miniature_base.safetensors: go on from there")
    parser.add_argument("--steps", type=int, default=2_400, help="length of the schedule")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    add_option(parser)
    args = parser.parse_args()
    tokenizer = load_tokenizer()
    torch.manual_seed(args.seed)
    base = Base(vocabulary(tokenizer), args.device)
    for source in (args.start, args.text):
        if source:
            base.load_state_dict(trained_weights(source), strict=False)
    trainer = Trainer(base, args.run, steps=args.steps, rate=args.rate, ema=0.998, muon=True, adam_scale=0.3)
    data = LatentSet(args.latents, tokenizer, np.random.default_rng([args.seed, trainer.step_count]))
    generator = torch.Generator().manual_seed(args.seed + 7919 * trainer.step_count)
    signal = alphas_cumprod().to(args.device)
    while trainer.step_count < args.steps:
        if trainer.step_count % 200 == 0:
            data.reload()
        pairs = trainer.step_count % 12 == 11
        batch = data.batch(args.batch // 2 if pairs else args.batch, pairs)
        latents, tokens = (to_device(tensor, args.device) for tensor in batch)
        trainer.step(diffusion_loss(base, latents, tokens, generator, signal))
    trainer.save()


if __name__ == "__main__":
    main()
