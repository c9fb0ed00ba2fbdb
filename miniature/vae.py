"""The miniature's VAE: a TAESD (diffusers ``AutoencoderTiny``), trained by ``python -m miniature.vae``.

Latents are drawn towards zero mean and unit variance a channel, and the decoder sees them with a little noise, so that
it forgives what a diffusion model leaves. Errors count more where a face is. Resumes from its checkpoint.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny
from PIL import Image

from devtools.device import add_option

from .checkpoint import LATENT_FACTOR, write_vae
from .drawing import face_place
from .packing import read_packed, trained_weights, unpack_tensors
from .pool import PicturePool
from .training import Length, Trainer, to_device, working_dtype

LATENT_NOISE = 0.08
FACE = 3.0  # weight of the middle of a face, where the rest counts 1
FIXED = 64  # pictures that tell the spread of the latents
IN_MEMORY = {"cuda": 200_000, "cpu": 20_000}  # pictures, 49 KB each


def build_vae() -> AutoencoderTiny:
    """An untrained TAESD: (B, 3, H, W) in [-1, 1] to (B, 4, H/8, W/8)."""
    return AutoencoderTiny().to(memory_format=torch.channels_last)


def load_vae(path: Path, device: torch.device | str) -> tuple[AutoencoderTiny, float]:
    """A packed VAE for inference on a device, in its `working_dtype`, and the standard deviation of its raw latents."""
    tensors, header = read_packed(path)
    vae = build_vae()
    vae.load_state_dict(unpack_tensors(tensors))
    vae = vae.to(device, working_dtype(device)).eval().requires_grad_(False)
    return vae, float(header["vae_scale"]) / LATENT_FACTOR


def to_tensor(pictures: np.ndarray | torch.Tensor) -> torch.Tensor:
    """uint8 RGB (B, H, W, 3) to float32 (B, 3, H, W) in [-1, 1]."""
    return torch.as_tensor(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pictures(pixels: torch.Tensor) -> np.ndarray:
    """(B, 3, H, W) in [-1, 1] to uint8 RGB (B, H, W, 3)."""
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


@torch.inference_mode()
def encode(vae: AutoencoderTiny, pictures: np.ndarray | torch.Tensor) -> torch.Tensor:
    """uint8 RGB (N, H, W, 3) to float16 raw latents (N, 4, H/8, W/8), on the VAE's device."""
    weight, parts = next(vae.parameters()), []
    batch = 8 if weight.device.type == "cpu" else 64  # 80 pictures a second instead of 44 on two cores
    for some in torch.as_tensor(pictures).split(batch):
        pixels = to_tensor(to_device(some, weight.device)).to(weight.dtype, memory_format=torch.channels_last)
        parts.append(vae.encoder(pixels).half())
    return torch.cat(parts)


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """L1 and squared error of the picture and L1 of its horizontal and vertical differences.

    Args:
        output: (B, 3, H, W).
        target: the same.
        weight: (B or 1, 1, H, W) of mean 1, of each place.
    """
    error = output - target
    across, down = error.diff(dim=3).abs() * weight[..., 1:], error.diff(dim=2).abs() * weight[..., 1:, :]
    return ((error.abs() + 2 * error.square()) * weight).mean() + 0.5 * (across.mean() + down.mean())


def moment_loss(latents: torch.Tensor) -> torch.Tensor:
    """Distance of each channel's mean and variance from 0 and 1; latents (B, C, h, w)."""
    variance, mean = torch.var_mean(latents, dim=(0, 2, 3))
    return mean.square().mean() + (variance.log()).square().mean()


def face_weights(size: int, squares: int = 1) -> torch.Tensor:
    """How much each place of a picture counts, float32 (1, 1, size, size * squares) of mean 1: the middle of a face
    `FACE` times as much as the rest.
    """
    weight = 1 + (FACE - 1) * torch.from_numpy(face_place(size)).float() / 255
    weight = weight.repeat(1, squares)[None, None]
    return weight / weight.mean()


def crops(
    pixels: torch.Tensor, weights: torch.Tensor, side: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same random square of a whole batch, (B, 3, side, side), and its weights."""
    if side == pixels.shape[-1]:
        return pixels, weights
    y, x = torch.randint(pixels.shape[-1] - side + 1, (2,), generator=generator, device=generator.device).tolist()
    part = (..., slice(y, y + side), slice(x, x + side))
    return pixels[part], weights[part]


def preview(vae: AutoencoderTiny, pictures: torch.Tensor, path: Path) -> None:
    """Pictures above what the VAE makes of them, as a PNG; uint8 RGB (N, H, W, 3)."""
    with torch.no_grad():
        pixels = to_tensor(pictures).to(next(vae.parameters()).dtype)
        made = to_pictures(vae.decoder(vae.encoder(pixels)))
    rows = (np.concatenate(list(row), 1) for row in (pictures.cpu().numpy(), made))
    Image.fromarray(np.concatenate(list(rows), 0)).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, default=Path(".runs/pictures"))
    parser.add_argument("--run", type=Path, default=Path(".runs/vae"), help="also receives the packed file")
    parser.add_argument("--start", type=Path, help="weights/miniature_vae.safetensors: go on from there")
    Length.add_options(parser, steps=2800)
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
    vae = build_vae()
    if args.start:
        vae.load_state_dict(trained_weights(args.start))
    untrained = {name: weight.clone() for name, weight in vae.state_dict().items()}
    vae.to(args.device).encoder.requires_grad_(not args.freeze_encoder)
    pool = PicturePool(
        args.pictures, args.device, lambda pixels: pixels, (False,), IN_MEMORY[torch.device(args.device).type]
    )

    def save() -> None:
        with trainer.averaged():
            latents = encode(vae, fixed)
            write_vae(args.run, untrained | trainer.averages(), float(latents.float().std()))
            preview(vae, fixed[:8], args.run / "preview.png")

    trainer = Trainer(vae, args.run, length=Length.of(args), rate=args.rate, ema=0.998, muon=True, save=save)
    generator = torch.Generator(args.device).manual_seed(args.seed + trainer.step_count)
    with trainer.waiting():
        pool.grow()
    fixed, weights = pool.batch(FIXED, generator)[0], face_weights(128).to(args.device)
    while trainer.running:
        with trainer.waiting():
            pool.grow()
        pixels = to_tensor(pool.batch(args.batch, generator)[0])
        target, weight = crops(pixels, weights, args.crop, generator)
        latents = vae.encoder(target.to(trainer.dtype, memory_format=torch.channels_last))
        output = vae.decoder(latents + LATENT_NOISE * torch.randn_like(latents))
        trainer.notes |= {"samples": trainer.step_count * args.batch, "pictures": len(pool)}
        trainer.step(reconstruction_loss(output.float(), target, weight) + 0.02 * moment_loss(latents.float()))
    trainer.save()


if __name__ == "__main__":
    main()
