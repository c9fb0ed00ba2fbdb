"""The miniature's base model: a two-level SD 1.x UNet on the text encoder of ``miniature.text``, ``python -m miniature.base``.

The text encoder is frozen; the UNet trains with the ε-loss on Stable Diffusion 1.x's noise schedule, weighted by min-SNR-5.
Source: Hang et al., Efficient Diffusion Training via Min-SNR Weighting Strategy, arXiv 2303.09556.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny, DPMSolverMultistepScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from torch import nn

from devtools.device import add_option, synchronize

from .checkpoint import TOKEN_ROWS, write_base
from .packing import read_packed, trained_weights, unpack_tensors
from .pictures import PERIOD, training_picture
from .pool import PicturePool
from .text import build_text_encoder, load_tokenizer, tokenize, vocabulary
from .training import Length, Trainer, working_dtype
from .vae import encode, face_weights, load_vae, to_pictures

PAIRS_EVERY = 6  # steps: each sixth batch is of pairs
PREVIEWED = 3_000_000  # pictures from here on lend their captions to the preview; no training draws them


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
        # Only the steps on squares are worth compiling, see `compile_if_faster`.
        is_square = noisy.shape[-1] == noisy.shape[-2]
        run = self.unet if torch.is_grad_enabled() and is_square else self.unet.forward
        return run(noisy, timesteps, text).sample


def compile_if_faster(base: Base, step: Callable[[], torch.Tensor], steps: int = 5) -> str:
    """Compiles the UNet, and takes it back if that fails here or is no faster; what was found.

    Args:
        base: the model.
        step: gives a loss of one step; gradients are thrown away.
        steps: that are timed.
    """

    def seconds() -> float:
        for number in range(steps + 2):
            if number == 2:  # the first ones warm up, and compile
                synchronize(str(base.rows.device))
                start = time.perf_counter()
            step().backward()
            base.zero_grad(set_to_none=True)
        synchronize(str(base.rows.device))
        return (time.perf_counter() - start) / steps

    plain = seconds()
    try:
        base.unet.compile()
        compiled = seconds()
        found = f"{plain:.3f} s a step, compiled {compiled:.3f} s"
        if compiled < plain:
            return found
    except Exception as error:  # noqa: BLE001 - a compiler, a library or a card: it goes without
        found = f"{plain:.3f} s a step, not compiled: {type(error).__name__}: {error!s:.300}"
    base.unet._compiled_call_impl = None
    base.zero_grad(set_to_none=True)
    return found


def diffusion_loss(base: nn.Module, latents: torch.Tensor, tokens: torch.Tensor, generator: torch.Generator,
                   signal: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:  # fmt: skip
    """Min-SNR-5 weighted ε-loss at one stratified random timestep a sample.

    Args:
        base: the model, in ``dtype``.
        latents: float32 (B, 4, h, w) of unit variance.
        tokens: (B, 77).
        generator: of the device of all of them.
        signal: `alphas_cumprod`.
        weight: (1, 1, h, w), of each place.
        dtype: of the noisy latents.
    """
    count, device = len(latents), latents.device
    strata = torch.randperm(count, generator=generator, device=device)
    fractions = (strata + torch.rand(count, generator=generator, device=device)) / count
    timesteps = (fractions * 1000).long().clamp(max=999)
    share = signal[timesteps].view(-1, 1, 1, 1)
    noise = torch.randn(latents.shape, generator=generator, device=device)
    noisy = (share.sqrt() * latents + (1 - share).sqrt() * noise).to(dtype, memory_format=torch.channels_last)
    snr = share / (1 - share)
    error = (base(noisy, timesteps, tokens).float() - noise).square() * weight
    return (snr.clamp(max=5.0) / snr * error).mean()


@torch.no_grad()
def sample(base: Base, tokens: torch.Tensor, generator: torch.Generator, steps: int = 20, cfg: float = 3.0,
           squares: int = 1) -> torch.Tensor:  # fmt: skip
    """Unit-variance latents (B, 4, 16, 16 * squares) float32 for tokens (B, 77), with guidance, by DPM++ 2M.

    Args:
        base: the model.
        tokens: of the prompts.
        generator: of the model's device.
        steps: of the sampler.
        cfg: scale of the guidance away from the empty prompt; at 1 there is none.
        squares: width of the pictures, in squares.
    """
    device, dtype = tokens.device, next(base.unet.parameters()).dtype
    scheduler = DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", use_karras_sigmas=True
    )
    scheduler.set_timesteps(steps, device=device)
    latents = torch.randn(len(tokens), 4, 16, 16 * squares, generator=generator, device=device)
    empty = torch.full_like(tokens, int(base.rows[-1]))
    empty[:, 0] = base.rows[-2]
    both = tokens if cfg == 1 else torch.cat([tokens, empty])
    for timestep in scheduler.timesteps:
        noisy = scheduler.scale_model_input(latents, timestep).to(dtype)
        noise = base(noisy.repeat(len(both) // len(noisy), 1, 1, 1), timestep.expand(len(both)), both).float()
        if cfg != 1:
            with_prompt, without = noise.chunk(2)
            noise = without + cfg * (with_prompt - without)
        latents = scheduler.step(noise, timestep, latents).prev_sample
    return latents


def load_base(path: Path, device: str) -> Base:
    """A packed base for inference on a device, in its `working_dtype`."""
    tensors, _ = read_packed(path)
    base = Base(tensors.pop(TOKEN_ROWS).long(), device)
    base.load_state_dict(unpack_tensors(tensors))
    return base.to(working_dtype(device)).eval().requires_grad_(False)


def preview(base: Base, vae: AutoencoderTiny, scale: float, tokens: torch.Tensor, path: Path) -> None:
    """Draws prompts, tokens (N, 77), always from the same noise, as a PNG of four rows."""
    generator = torch.Generator(tokens.device).manual_seed(0)
    latents = (sample(base, tokens, generator) * scale).to(next(vae.parameters()).dtype)
    with torch.no_grad():
        pictures = to_pictures(vae.decoder(latents))
    rows = (np.concatenate(list(row), 1) for row in np.array_split(pictures, 4))
    Image.fromarray(np.concatenate(list(rows), 0)).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, default=Path(".runs/pictures"))
    parser.add_argument("--vae", type=Path, default=Path(".runs/vae/miniature_vae.safetensors"))
    parser.add_argument(
        "--text", type=Path, default=Path(".runs/text"), help="run of the text encoder, or a packed base"
    )
    parser.add_argument("--run", type=Path, default=Path(".runs/base"), help="also receives the packed file")
    parser.add_argument("--start", type=Path, default=None, help="weights/miniature_base.safetensors: go on from there")
    Length.add_options(parser, steps=2_400)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--warmup", type=float, default=0.08, help="share of the schedule")
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--preview", type=int, default=16, help="pictures drawn at every save")
    parser.add_argument("--compile", action="store_true", help="the UNet, if it is faster then; costs a minute")
    parser.add_argument("--seed", type=int, default=0)
    add_option(parser)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    vae, scale = load_vae(args.vae, args.device)
    pool = PicturePool(args.pictures, args.device, lambda pixels: encode(vae, pixels))
    rows = vocabulary(load_tokenizer())
    base = Base(rows, args.device)
    if not args.start and not args.text.exists():
        parser.error(f"no text encoder in {args.text}: run miniature.text first, or give --start")
    if args.start:
        base.load_state_dict(trained_weights(args.start), strict=False)
    if args.text.exists():
        given = {name: w for name, w in trained_weights(args.text).items() if name.startswith("text_encoder.")}
        base.load_state_dict(given, strict=False)
    text = {f"text_encoder.{name}": weight.cpu().clone() for name, weight in base.text_encoder.state_dict().items()}
    captions = [training_picture(PREVIEWED + PERIOD * i, False)[1] for i in range(args.preview)]
    shown = tokenize(load_tokenizer(), captions or [""]).to(args.device)

    def save() -> None:
        write_base(args.run, trainer.averages() | text, rows)
        if args.preview:
            with trainer.averaged():
                preview(base, vae, scale, shown, args.run / "preview.png")

    trainer = Trainer(base, args.run, length=Length.of(args), rate=args.rate, warmup=args.warmup, ema=args.ema, muon=True,
                      adam_scale=0.3, save=save)  # fmt: skip
    generator = torch.Generator(args.device).manual_seed(args.seed + 7919 * trainer.step_count)
    signal = alphas_cumprod().to(args.device)
    weights = {pairs: face_weights(16, 1 + pairs).to(args.device) for pairs in (False, True)}

    def loss_of(count: int, pairs: bool) -> torch.Tensor:
        latents, tokens = pool.batch(count, generator, pairs)
        latents = latents.float() / scale
        return diffusion_loss(base, latents, tokens, generator, signal, weights[pairs], trainer.dtype)

    with trainer.waiting():
        pool.grow()
    if args.compile:
        print(compile_if_faster(base, lambda: loss_of(args.batch, False)), flush=True)
    samples = 0
    while trainer.running:
        with trainer.waiting():
            pool.grow()
        pairs = trainer.step_count % PAIRS_EVERY == PAIRS_EVERY - 1
        count = args.batch // 2 if pairs else args.batch
        samples += count
        trainer.notes |= {"samples": samples, "pictures": len(pool)}
        trainer.step(loss_of(count, pairs))
    trainer.save()


if __name__ == "__main__":
    main()
