"""The judges: two networks that read every attribute and factor off a picture, ``python -m miniature.judge``.

Architecture ``a`` is a residual convolutional network, ``b`` an MLP-Mixer over the patches of a small convolutional
stem. Both see rendered training people only, slightly damaged; neither ever trains or selects what it judges.
Source: Tolstikhin et al., MLP-Mixer: An all-MLP Architecture for Vision, arXiv 2105.01601 (architecture b).
"""

import argparse
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from devtools.device import add_option

from .people import (
    ACCESSORIES,
    BACKGROUNDS,
    CLOTHING,
    CLOTHING_COLORS,
    EXPRESSIONS,
    FACIAL_HAIR,
    GEOMETRY,
    HAIR_COLORS,
    HAIR_SHAPES,
    SKIN_COLORS,
    STYLES,
    Context,
    Person,
)
from .pictures import chunk_indices, subject
from .training import Length, Trainer, load_average, to_device
from .vae import to_tensor

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "hair_shape": HAIR_SHAPES,
    "hair_color": tuple(HAIR_COLORS),
    "skin": tuple(SKIN_COLORS),
    "facial_hair": FACIAL_HAIR,
    "expression": EXPRESSIONS,
    "accessory": ACCESSORIES,
    "clothing": CLOTHING,
    "clothing_color": tuple(CLOTHING_COLORS),
    "background": BACKGROUNDS,
    "style": STYLES,
}
FACTORS = (*GEOMETRY, *(f"{part}_{channel}" for part in ("skin", "hair") for channel in "rgb"))
NUM_OUTPUTS = sum(map(len, ATTRIBUTES.values())) + len(FACTORS)


@dataclass(frozen=True)
class Readings:
    """What a judge, or the truth, says of N pictures.

    Attributes:
        names: int64 (N, 10), the index of each attribute's value in ``ATTRIBUTES``.
        factors: float32 (N, 16), ``FACTORS``: geometry in [-1, 1], then skin and hair RGB, 0..255 as [-1, 1].
    """

    names: np.ndarray
    factors: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, rows: slice | np.ndarray) -> "Readings":
        return Readings(self.names[rows], self.factors[rows])

    def index(self, attribute: str) -> np.ndarray:
        """int64 (N,): the value's index of one attribute."""
        return self.names[:, list(ATTRIBUTES).index(attribute)]

    def value(self, attribute: str) -> list[str]:
        """The N words of one attribute."""
        return [ATTRIBUTES[attribute][i] for i in self.index(attribute)]


def true_readings(subjects: list[tuple[Person, Context]]) -> Readings:
    """What a perfect judge would read off the photos of ``subjects``."""
    names = [
        [values.index(getattr(p if hasattr(p, a) else c, a)) for a, values in ATTRIBUTES.items()] for p, c in subjects
    ]
    factors = [[*p.geometry, *(v / 127.5 - 1 for v in (*p.skin_rgb, *p.hair_rgb))] for p, _ in subjects]
    return Readings(np.array(names, np.int64).reshape(-1, len(ATTRIBUTES)),
                    np.array(factors, np.float32).reshape(-1, len(FACTORS)))  # fmt: skip


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, channels), nn.GroupNorm(8, channels)
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


class ConvJudge(nn.Module):
    """Architecture ``a``: (B, 3, 128, 128) in [-1, 1] to (B, NUM_OUTPUTS).

    The last 8 x 8 map is flattened, not pooled: where a feature sits is what the geometry is about.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, 32, 5, stride=2, padding=2)]
        for inputs, outputs, blocks in ((32, 48, 1), (48, 96, 2), (96, 160, 1)):
            layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), *(_Residual(outputs) for _ in range(blocks))]
        layers += [nn.GroupNorm(8, 160), nn.SiLU(), nn.Conv2d(160, 32, 1), nn.Flatten()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.Linear(2048, 320), nn.SiLU(), nn.Linear(320, NUM_OUTPUTS))

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(pictures))


class _Mixer(nn.Module):
    def __init__(self, tokens: int, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.tokens = nn.Sequential(nn.Linear(tokens, 160), nn.GELU(), nn.Linear(160, tokens))
        self.channels = nn.Sequential(nn.Linear(channels, 3 * channels), nn.GELU(), nn.Linear(3 * channels, channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class MixerJudge(nn.Module):
    """Architecture ``b``: the same interface, 256 overlapping patches mixed by MLPs that know every position."""

    def __init__(self) -> None:
        super().__init__()
        tokens, channels = 256, 112
        self.patches = nn.Sequential(
            nn.Conv2d(3, 24, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(24, 64, 3, stride=2, padding=1),
            nn.GroupNorm(8, 64),
            nn.GELU(),
            nn.Conv2d(64, channels, 3, stride=2, padding=1),
        )
        self.blocks = nn.Sequential(*(_Mixer(tokens, channels) for _ in range(5)), nn.LayerNorm(channels))
        self.pool = nn.Linear(tokens, 16)
        self.head = nn.Sequential(nn.Linear(16 * channels, 256), nn.GELU(), nn.Linear(256, NUM_OUTPUTS))

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        tokens = self.blocks(self.patches(pictures).flatten(2).transpose(1, 2))
        return self.head(self.pool(tokens.transpose(1, 2)).flatten(1))


ARCHITECTURES: dict[str, type[nn.Module]] = {"a": ConvJudge, "b": MixerJudge}


class Judge:
    """A trained judge, ready to read pictures.

    Args:
        model: one of ``ARCHITECTURES``, float32.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval().requires_grad_(False)

    @classmethod
    def load(cls, architecture: str, folder: Path = Path(__file__).parent.parent / "weights") -> "Judge":
        """The shipped judge ``a`` or ``b``."""
        model = ARCHITECTURES[architecture]()
        weights = load_file(folder / f"judge_{architecture}.safetensors")
        model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
        return cls(model)

    def read(self, pictures: np.ndarray, batch: int = 64) -> Readings:
        """Reads uint8 RGB pictures (N, 128, 128, 3).

        Raises:
            ValueError: The pictures have another shape or type.
        """
        if pictures.ndim != 4 or pictures.shape[1:] != (128, 128, 3) or pictures.dtype != np.uint8:
            raise ValueError(f"expected uint8 (N, 128, 128, 3), got {pictures.dtype} {pictures.shape}")
        outputs = [self.model(to_tensor(pictures[i : i + batch])) for i in range(0, len(pictures), batch)]
        logits, factors = split_outputs(torch.cat(outputs) if outputs else torch.zeros(0, NUM_OUTPUTS))
        names = torch.stack([scores.argmax(1) for scores in logits], 1)
        return Readings(names.numpy(), factors.numpy())


def split_outputs(outputs: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Outputs (B, NUM_OUTPUTS) as the logits of each attribute and the factors (B, 16)."""
    *logits, factors = outputs.split([*map(len, ATTRIBUTES.values()), len(FACTORS)], dim=1)
    return tuple(logits), factors


def judge_loss(outputs: torch.Tensor, names: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each attribute plus the absolute errors of the factors; names (B, 10), factors (B, 16)."""
    logits, read = split_outputs(outputs)
    words = sum(F.cross_entropy(scores, target) for scores, target in zip(logits, names.unbind(1), strict=True))
    return words + 2 * (read - factors).abs().sum(1).mean()


def damage(pictures: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Light blur, noise, colour shift and JPEG artefacts, some on each picture: uint8 (N, 128, 128, 3), as given.

    A judge that only knows clean renders misreads the softness that a VAE and a diffusion model leave.
    """
    damaged = []
    for picture in pictures:
        if rng.random() < 0.2:
            buffer = io.BytesIO()
            Image.fromarray(picture).save(buffer, "JPEG", quality=int(rng.integers(35, 90)))
            picture = np.asarray(Image.open(buffer))
        if rng.random() < 0.35:
            size = int(rng.integers(52, 112))
            small = Image.fromarray(picture).resize((size, size), Image.Resampling.BILINEAR)
            picture = np.asarray(small.resize((128, 128), Image.Resampling.BICUBIC))
        damaged.append(picture)
    out = torch.from_numpy(np.stack(damaged)).permute(0, 3, 1, 2).float()
    count = len(out)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.uniform(low, high, (count, *shape)).astype(np.float32))

    kernel = torch.tensor([1.0, 2.0, 1.0]) / 4
    blurred = F.conv2d(
        F.pad(out, (1, 1, 1, 1), mode="replicate"), (kernel[:, None] * kernel).expand(3, 1, 3, 3), groups=3
    )
    out = out.lerp(blurred, uniform(-0.6, 1, 1, 1, 1).clamp(min=0))
    out = (out - 127.5) * uniform(0.96, 1.04, 1, 1, 1) + 127.5 + uniform(-5, 5, 3, 1, 1)
    grain = torch.from_numpy(rng.standard_normal((count, 3, 128, 128), np.float32))
    out = out + grain * uniform(-4, 9, 1, 1, 1).clamp(min=0)
    return out.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


class _Pictures:
    """The rendered pictures of one person and what they show."""

    def __init__(self, folder: Path, rng: np.random.Generator) -> None:
        self.rng, self.rows, stacks, subjects = rng, [], [], []
        for file in sorted(folder.glob("singles_*.npy")):
            people = [subject(i)[0] for i in chunk_indices(int(file.stem.split("_")[1]), pairs=False)]
            self.rows += [(len(stacks), row) for row, shown in enumerate(people) if shown]
            subjects += [shown[0] for shown in people if shown]
            stacks.append(np.load(file, mmap_mode="r"))
        self.stacks, self.truth = stacks, true_readings(subjects)

    def batch(self, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """float32 (count, 3, 128, 128) in [-1, 1], names (count, 10), factors (count, 16)."""
        rows = self.rng.integers(len(self.rows), size=count)
        pictures = np.stack([self.stacks[stack][row] for stack, row in (self.rows[r] for r in rows)])
        truth = self.truth[rows]
        return to_tensor(damage(pictures, self.rng)), torch.from_numpy(truth.names), torch.from_numpy(truth.factors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", choices=ARCHITECTURES, required=True)
    parser.add_argument("--pictures", type=Path, default=Path(".runs/pictures"))
    parser.add_argument("--run", type=Path, help="checkpoints; .runs/judge_a or _b unless given")
    parser.add_argument("--weights", type=Path, default=Path("weights"))
    Length.add_options(parser, steps=3000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    add_option(parser)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    run = args.run or Path(f".runs/judge_{args.architecture}")
    model = ARCHITECTURES[args.architecture]().to(args.device, memory_format=torch.channels_last)
    trainer = Trainer(model, run, length=Length.of(args), rate=args.rate, ema=0.995, muon=True)
    pictures = _Pictures(args.pictures, np.random.default_rng([args.seed, trainer.step_count]))
    while trainer.running:
        batch, names, factors = (to_device(tensor, args.device) for tensor in pictures.batch(args.batch))
        outputs = model(batch.to(trainer.dtype, memory_format=torch.channels_last))
        trainer.step(judge_loss(outputs.float(), names, factors))
    trainer.save()
    weights = {name: tensor.to(torch.float16) for name, tensor in load_average(run).items()}
    args.weights.mkdir(exist_ok=True)
    save_file(weights, args.weights / f"judge_{args.architecture}.safetensors", {"format": "pt"})


if __name__ == "__main__":
    main()
