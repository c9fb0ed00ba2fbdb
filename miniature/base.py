"""The miniature's base model: a two-level SD 1.x UNet with a CLIP-L-shaped text encoder, ``python -m miniature.base``.

Both train together with the ε-loss on Stable Diffusion 1.x's noise schedule, weighted by min-SNR-5.
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
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .latents import chunk_indices
from .pictures import training_picture
from .training import ENDS, Trainer

TEXT_LAYERS = 2
MAX_TOKENS = 77


def build_unet() -> UNet2DConditionModel:
    """44 M parameters: two levels of 320 channels, one residual block each, cross-attention on 768-wide text."""
    levels = 2
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(320,) * levels,
        layers_per_block=1,
        cross_attention_dim=768,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
    )


def build_text_encoder(vocabulary: int) -> CLIPTextModel:
    """CLIP-L's text model with its first two layers and ``vocabulary`` token rows only.

    The checkpoint adds ten layers that are identities, and zero rows for all tokens that no caption uses.
    """
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=TEXT_LAYERS,
        num_attention_heads=12,
        max_position_embeddings=MAX_TOKENS,
        hidden_act="quick_gelu",
        eos_token_id=vocabulary - 1,
        bos_token_id=vocabulary - 2,
    )
    return CLIPTextModel(config)


def load_tokenizer(root: Path = Path(".comfyui")) -> CLIPTokenizer:
    """CLIP's tokenizer from the files that ComfyUI carries, below ``root``.

    Raises:
        FileNotFoundError: No ComfyUI below ``root``.
    """
    for folder in sorted(root.rglob("sd1_tokenizer")):
        return CLIPTokenizer.from_pretrained(folder)
    raise FileNotFoundError(
        f"no sd1_tokenizer below {root.resolve()}; run `python dev.py serve` once to unpack ComfyUI"
    )


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Captions to int64 tokens (B, 77), padded with the end token as Stable Diffusion 1.x does."""
    batch = tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    return batch["input_ids"]


def vocabulary(tokenizer: CLIPTokenizer) -> torch.Tensor:
    """The tokens that captions use, ascending, int64 (V,); the last two are CLIP's begin and end."""
    return torch.unique(tokenize(tokenizer, [training_picture(i, render=False)[1] for i in range(20_000)]))


def alphas_cumprod() -> torch.Tensor:
    """Stable Diffusion 1.x's cumulative signal shares, float32 (1000,)."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float()


class Base(nn.Module):
    """UNet and text encoder as one module, so that one optimiser and one checkpoint hold both.

    Args:
        rows: the tokens that have a row of their own, ascending, int64 (V,); see ``vocabulary``.
    """

    def __init__(self, rows: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("rows", rows, persistent=False)
        self.unet = build_unet().to(memory_format=torch.channels_last)
        self.text_encoder = build_text_encoder(len(rows))
        # Measured on a CPU: plain matrix products train a fifth faster than the fused attention with its slow backward.
        self.unet.set_attn_processor(AttnProcessor())
        self.text_encoder.set_attn_implementation("eager")

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Predicted noise (B, 4, h, w) for noisy latents (B, 4, h, w), timesteps (B,) and tokens (B, 77)."""
        text = self.text_encoder(torch.searchsorted(self.rows, tokens)).last_hidden_state
        return self.unet(noisy, timesteps, text).sample


def diffusion_loss(base: nn.Module, latents: torch.Tensor, tokens: torch.Tensor, generator: torch.Generator,
                   signal: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:  # fmt: skip
    """Min-SNR-5 weighted ε-loss at one stratified random timestep a sample; latents (B, 4, h, w) of unit variance."""
    count = len(latents)
    fractions = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
    timesteps = (fractions * 1000).long()
    share = signal[timesteps].view(-1, 1, 1, 1)
    noise = torch.randn(latents.shape, generator=generator)
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
    parser.add_argument("--run", type=Path, default=Path(".runs/base"))
    parser.add_argument("--steps", type=int, default=12_000, help="length of the schedule")
    parser.add_argument("--stop", type=int, default=None, help="pause at this step; the schedule is resumed later")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tokenizer = load_tokenizer()
    torch.manual_seed(args.seed)
    base = Base(vocabulary(tokenizer))
    trainer = Trainer(
        base, args.run, steps=args.steps, rate=args.rate, muon=True, adam_scale=0.3, adam_only=("text_encoder", *ENDS)
    )
    data = LatentSet(args.latents, tokenizer, np.random.default_rng([args.seed, trainer.step_count]))
    generator = torch.Generator().manual_seed(args.seed + 7919 * trainer.step_count)
    signal = alphas_cumprod()
    while trainer.step_count < min(args.steps, args.stop or args.steps):
        if trainer.step_count % 200 == 0:
            data.reload()
        pairs = trainer.step_count % 12 == 11
        latents, tokens = data.batch(args.batch // 2 if pairs else args.batch, pairs)
        trainer.step(diffusion_loss(base, latents, tokens, generator, signal))
    trainer.save()


if __name__ == "__main__":
    main()
