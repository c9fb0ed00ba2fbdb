"""The miniature's VAE: a TAESD (diffusers ``AutoencoderTiny``), trained by ``python -m miniature.vae``.

Latents are drawn towards zero mean and unit variance a channel, and the decoder sees them with a little noise, so that
it forgives what a diffusion model leaves. Resumes from its checkpoint; the learning rate falls to zero over ``--steps``.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny

from devtools.device import add_option

from .training import Trainer, to_device

LATENT_NOISE = 0.08


def build_vae() -> AutoencoderTiny:
    """An untrained TAESD: (B, 3, H, W) in [-1, 1] to (B, 4, H/8, W/8)."""
    return AutoencoderTiny().to(memory_format=torch.channels_last)


def to_tensor(pictures: np.ndarray) -> torch.Tensor:
    """uint8 RGB (B, H, W, 3) to float32 (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1 and squared error of the picture and L1 of its horizontal and vertical differences; tensors (B, 3, H, W)."""
    error = output - target
    edges = sum((error.diff(dim=dim)).abs().mean() for dim in (2, 3))
    return error.abs().mean() + 2 * error.square().mean() + 0.5 * edges


def moment_loss(latents: torch.Tensor) -> torch.Tensor:
    """Distance of each channel's mean and variance from 0 and 1; latents (B, C, h, w)."""
    variance, mean = torch.var_mean(latents, dim=(0, 2, 3))
    return mean.square().mean() + (variance.log()).square().mean()


class _Pictures:
    """Random crops of the rendered pictures, reread as more of them are rendered."""

    def __init__(self, folder: Path, generator: np.random.Generator) -> None:
        self.folder, self.rng = folder, generator

    def batch(self, count: int, crop: int) -> torch.Tensor:
        """float32 (count, 3, crop, crop) in [-1, 1], from one random chunk file."""
        files = sorted(self.folder.glob("singles_*.npy"))
        chunk = np.load(files[self.rng.integers(len(files))], mmap_mode="r")
        crops = []
        for index in self.rng.integers(len(chunk), size=count):
            y, x = self.rng.integers(0, 128 - crop + 1, 2)
            crops.append(chunk[index, y : y + crop, x : x + crop])
        return to_tensor(np.stack(crops))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, default=Path(".runs/pictures"))
    parser.add_argument("--run", type=Path, default=Path(".runs/vae"))
    parser.add_argument("--steps", type=int, default=2800)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--crop", type=int, default=64)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    add_option(parser)
    parser.add_argument(
        "--freeze-encoder", action="store_true", help="train only the decoder, latents stay as they are"
    )
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    vae = build_vae().to(args.device)
    vae.encoder.requires_grad_(not args.freeze_encoder)
    trainer = Trainer(vae, args.run, steps=args.steps, rate=args.rate, ema=0.998, muon=True, warmup=100)
    pictures = _Pictures(args.pictures, np.random.default_rng([args.seed, trainer.step_count]))
    while trainer.step_count < args.steps:
        target = to_device(pictures.batch(args.batch, args.crop), args.device)
        latents = vae.encoder(target.to(torch.bfloat16, memory_format=torch.channels_last))
        output = vae.decoder(latents + LATENT_NOISE * torch.randn_like(latents))
        trainer.step(reconstruction_loss(output.float(), target) + 0.02 * moment_loss(latents.float()))


if __name__ == "__main__":
    main()
