"""A Control-LoRA of the miniature that reads silhouettes: ``python -m miniature.control``.

A ControlNet whose copied layers are the base's own plus low-rank changes, so that its file holds little more than what is
new; ComfyUI's stock loader reads it. The control picture is white where the person is and black elsewhere.
Source: Zhang et al., Adding Conditional Control to Text-to-Image Diffusion Models, arXiv 2302.05543; Control-LoRA by
Stability AI for the form of the file.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import ControlNetModel
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader
from transformers import CLIPTokenizer

from devtools.device import add_option
from hdb_core.files.atomic import replacing

from .base import Base, alphas_cumprod, diffusion_loss, load_base, sample
from .captions import sample_caption
from .checkpoint import CONTROL_FILE, ldm_name
from .drawing import photo, silhouette
from .people import SPLITS, STYLES, sample_context, sample_person
from .text import DrawnBatches, tokenize
from .training import Length, Trainer, to_device
from .vae import encode, load_vae, to_pictures

RANK = 16
_HINT = "controlnet_cond_embedding."


class LowRank(nn.Module):
    """A frozen weight (out, …) plus ``up @ down``."""

    def __init__(self, weight: torch.Tensor, rank: int) -> None:
        super().__init__()
        rows, columns = weight.flatten(1).shape
        rank = min(rank, rows, columns)
        self.up = nn.Parameter(torch.zeros(rows, rank))
        self.down = nn.Parameter(torch.randn(rank, columns) / columns**0.5)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """The changed weight."""
        return weight + (self.up @ self.down).view_as(weight)


def build_control(base: Base, rank: int = RANK) -> ControlNetModel:
    """A ControlNet that changes nothing yet, in float32 on the base's device; all but the copied weights is trained."""
    control = ControlNetModel.from_unet(base.unet, conditioning_channels=3).float().requires_grad_(False)
    copied = set(base.unet.state_dict())
    for name, parameter in control.named_parameters():
        parameter.requires_grad_(name not in copied)
    for name, module in control.named_modules():
        if f"{name}.weight" in copied and isinstance(module, nn.Linear | nn.Conv2d):
            parametrize.register_parametrization(module, "weight", LowRank(module.weight, rank))
    return control.to(base.rows.device, memory_format=torch.channels_last)


def control_tensors(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The trained weights of `build_control` under the names of a Control-LoRA file, float16."""
    tensors = {"lora_controlnet": torch.zeros(0)}
    for name, weight in weights.items():
        tensors[_control_name(name)] = weight
    return {name: weight.half().contiguous() for name, weight in tensors.items()}


def _control_name(name: str) -> str:
    layer, _, leaf = name.rpartition(".")
    if ".parametrizations.weight.0" in layer:
        return ldm_name(f"{layer.removesuffix('.parametrizations.weight.0')}.weight").removesuffix("weight") + leaf
    if layer.startswith("controlnet_down_blocks."):
        return f"zero_convs.{layer.rpartition('.')[2]}.0.{leaf}"
    if layer == "controlnet_mid_block":
        return f"middle_block_out.0.{leaf}"
    place = layer.removeprefix(_HINT)
    number = {"conv_in": 0, "conv_out": 14}.get(place)
    return f"input_hint_block.{2 + 2 * int(place.split('.')[1]) if number is None else number}.{leaf}"


class Silhouettes(DrawnBatches):
    """New people: pictures uint8 (B, 128, 128, 3), silhouettes uint8 (B, 128, 128), tokens (B, 77)."""

    def draw(self, step: int, rng: np.random.Generator, tokenizer: CLIPTokenizer) -> tuple[torch.Tensor, ...]:
        pictures, shapes, captions = zip(*(self._one(rng) for _ in range(self.batch)), strict=True)
        return torch.from_numpy(np.stack(pictures)), torch.from_numpy(np.stack(shapes)), tokenize(tokenizer, captions)

    def _one(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, str]:
        seed = int(rng.integers(len(SPLITS["train"]) // 2))
        person = sample_person(SPLITS["train"][seed])
        context = sample_context(seed, str(rng.choice(STYLES, p=[0.8, 0.05, 0.05, 0.05, 0.05])))
        return photo(person, context), silhouette(person, context), sample_caption(person, context, rng)


def hint(shapes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Silhouettes uint8 (B, H, W) as control pictures (B, 3, H, W) in 0..1."""
    return (shapes[:, None].to(dtype) / 255).expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)


class Controlled(nn.Module):
    """The base with its ControlNet, as `miniature.base.sample` takes it, for control pictures (B, 3, H, W)."""

    def __init__(self, base: Base, control: ControlNetModel, shapes: torch.Tensor) -> None:
        super().__init__()
        self.unet, self.rows, self.base, self.control, self.shapes = base.unet, base.rows, base, control, shapes

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Predicted noise (B, 4, h, w); a batch of twice as many samples sees each control picture twice."""
        with torch.no_grad():
            text = self.base.text_encoder(torch.searchsorted(self.rows, tokens)).last_hidden_state
        shapes = self.shapes.repeat(len(noisy) // len(self.shapes), 1, 1, 1)
        down, middle = self.control(noisy, timesteps, text, controlnet_cond=shapes, return_dict=False)
        return self.unet(
            noisy, timesteps, text, down_block_additional_residuals=down, mid_block_additional_residual=middle
        ).sample


def control_loss(base: Base, control: ControlNetModel, latents: torch.Tensor, shapes: torch.Tensor, tokens: torch.Tensor,
                 generator: torch.Generator, signal: torch.Tensor) -> torch.Tensor:  # fmt: skip
    """ε-loss of the controlled base; every noise level counts as min-SNR-5 has it, as in ``miniature.base``."""
    weight = torch.ones(1, 1, *latents.shape[-2:], device=latents.device)
    return diffusion_loss(Controlled(base, control, shapes), latents, tokens, generator, signal, weight, shapes.dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    weights = Path(__file__).parent.parent / "weights"
    parser.add_argument("--base", type=Path, default=weights / "miniature_base.safetensors")
    parser.add_argument("--vae", type=Path, default=weights / "miniature_vae.safetensors")
    parser.add_argument("--run", type=Path, default=Path(".runs/control"), help="also receives the packed file")
    Length.add_options(parser, steps=1500)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--workers", type=int, default=2, help="processes that draw people")
    parser.add_argument("--seed", type=int, default=0)
    add_option(parser)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    vae, scale = load_vae(args.vae, args.device)
    base = load_base(args.base, args.device)
    control = build_control(base)

    def save() -> None:
        with replacing(args.run / CONTROL_FILE) as partial:
            save_file(control_tensors(trainer.averages()), partial, {"format": "pt"})
        with trainer.averaged():
            preview(Controlled(base, control, shown), vae, scale, tokens, args.run / "preview.png")

    trainer = Trainer(control, args.run, length=Length.of(args), rate=args.rate, ema=0.998, save=save)
    batches = iter(DataLoader(Silhouettes(args.batch, args.seed + trainer.step_count), None, num_workers=args.workers))
    generator = torch.Generator(args.device).manual_seed(args.seed + trainer.step_count)
    signal, shown = alphas_cumprod().to(args.device), None
    while trainer.running:
        with trainer.waiting():
            pictures, shapes, tokens = (to_device(tensor, args.device) for tensor in next(batches))
        hints = hint(shapes, trainer.dtype)
        shown = hints[:8]
        loss = control_loss(base, control, encode(vae, pictures).float() / scale, hints, tokens, generator, signal)
        trainer.notes["samples"] = trainer.step_count * args.batch
        trainer.step(loss)
    trainer.save()


def preview(model: Controlled, vae: nn.Module, scale: float, tokens: torch.Tensor, path: Path) -> None:
    """Control pictures above what is drawn with them, as a PNG."""
    generator = torch.Generator(tokens.device).manual_seed(0)
    latents = sample(model, tokens[: len(model.shapes)], generator) * scale
    with torch.no_grad():
        made = to_pictures(vae.decoder(latents.to(next(vae.parameters()).dtype)))
    rows = (np.concatenate(list(row), 1) for row in (to_pictures(model.shapes * 2 - 1), made))
    Image.fromarray(np.concatenate(list(rows), 0)).save(path)


if __name__ == "__main__":
    main()
