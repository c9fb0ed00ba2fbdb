"""The miniature's text encoder learns to read captions, before the UNet sees it: ``python -m miniature.text``.

As CLIP's was for Stable Diffusion 1.x, the text encoder is trained first and then left alone. From the end token and
the padding behind it a linear head says what the caption says; the head is thrown away.
"""

import argparse
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from devtools.device import add_option
from devtools.environment import Host

from . import people
from .captions import background_words, context_words, person_words, style_words
from .pictures import subject, training_picture
from .training import Length, Trainer, to_device

TEXT_LAYERS = 2
WIDTH = 768
MAX_TOKENS = 77
SIDES = ("left", "right")  # of a pair; whoever is alone is on the left
VOCABULARY_FROM = 4000  # captions; the rarest word is in one of three hundred
READ_POSITIONS = 3  # the end token, and two random ones of the padding
_TABLES = {
    "hair_shape": people.HAIR_SHAPES,
    "hair_color": people.HAIR_COLORS,
    "skin": people.SKIN_COLORS,
    "facial_hair": people.FACIAL_HAIR,
    "expression": people.EXPRESSIONS,
    "accessory": people.ACCESSORIES,
    "clothing": people.CLOTHING,
    "clothing_color": people.CLOTHING_COLORS,
    "background": people.BACKGROUNDS,
    "style": people.STYLES,
}
_PARTS = {"hair": ("hair_color", "hair_shape"), "clothing": ("clothing", "clothing_color")}
LABELS = {name: i for i, name in enumerate(
    ["pair", "empty"] + [f"{side} {a}={v}" for side in SIDES for a, values in _TABLES.items() for v in values])}  # fmt: skip


def build_text_encoder(vocabulary: int, device: str = "cpu") -> CLIPTextModel:
    """CLIP-L's text model with its first two layers and ``vocabulary`` token rows only.

    The checkpoint adds ten layers that are identities, and zero rows for all tokens that no caption uses.
    """
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=3072,
        num_hidden_layers=TEXT_LAYERS,
        num_attention_heads=12,
        max_position_embeddings=MAX_TOKENS,
        hidden_act="quick_gelu",
        eos_token_id=vocabulary - 1,
        bos_token_id=vocabulary - 2,
    )
    encoder = CLIPTextModel(config)
    if (
        device == "cpu"
    ):  # measured there: plain products train a fifth faster than fused attention, whose backward is slow
        encoder.set_attn_implementation("eager")
    return encoder.to(device)


def load_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer from the files that ComfyUI carries.

    Raises:
        SetupError: No ComfyUI is unpacked.
    """
    return CLIPTokenizer.from_pretrained(Host.from_environ().root / "comfy" / "sd1_tokenizer")


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Captions to int64 tokens (B, 77), padded with the end token as Stable Diffusion 1.x does."""
    batch = tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    return batch["input_ids"]


def vocabulary(tokenizer: CLIPTokenizer) -> torch.Tensor:
    """The tokens that captions use, ascending, int64 (V,); the last two are CLIP's begin and end."""
    return torch.unique(tokenize(tokenizer, [training_picture(i, render=False)[1] for i in range(VOCABULARY_FROM)]))


def named(index: int, caption: str) -> list[str]:
    """What a caption of training picture ``index`` says, as names in ``LABELS``; what it leaves out is not in the list."""
    shown, background = subject(index)
    found = [name for name, start in (("pair", "two people"), ("empty", "an empty scene")) if caption.startswith(start)]
    if len(shown) != 1 and background_words(background) in caption:
        found.append(f"left background={background}")
    for side, half, (person, context) in zip(SIDES, caption.split(", on the right "), shown, strict=False):
        said = half.split(", ")
        values = vars(person) | vars(context)
        for part, words in (person_words(person) | context_words(context)).items():
            if words in said:
                found += [f"{side} {a}={values[a]}" for a in _PARTS.get(part, (part,))]
        if len(shown) == 1 and context.style != "photo" and caption.startswith(style_words(context.style)):
            found.append(f"left style={context.style}")
    return found


def reading_batch(count: int, rng: np.random.Generator) -> tuple[list[str], torch.Tensor]:
    """Random training captions and what they say, float32 (count, labels) of zeros and ones."""
    truth = torch.zeros(count, len(LABELS))
    captions = []
    for row, (index, draw) in enumerate(rng.integers((100_000, 1000), size=(count, 2)).tolist()):
        captions.append(training_picture(index, False, draw)[1])
        truth[row, [LABELS[name] for name in named(index, captions[-1])]] = 1
    return captions, truth


class Reader(nn.Module):
    """The text encoder and the head that it learns with.

    Args:
        rows: the tokens that have a row of their own, ascending, int64 (V,); see ``vocabulary``.
        device: that it is for.
    """

    def __init__(self, rows: torch.Tensor, device: str = "cpu") -> None:
        super().__init__()
        self.register_buffer("rows", rows, persistent=False)
        self.text_encoder = build_text_encoder(len(rows), device)
        self.head = nn.Linear(WIDTH, len(LABELS))
        self.to(device)

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Logits (B, P, labels) read at positions (B, P) of tokens (B, L)."""
        states = self.text_encoder(torch.searchsorted(self.rows, tokens)).last_hidden_state
        return self.head(states.gather(1, positions[..., None].expand(-1, -1, WIDTH)))


class DrawnBatches(IterableDataset):
    """Batches that are drawn while a model trains, without end.

    Args:
        batch: B.
        seed: of everything that is drawn; every worker draws its own.
    """

    def __init__(self, batch: int, seed: int) -> None:
        self.batch, self.seed = batch, seed

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        worker = get_worker_info()
        rng = np.random.default_rng([self.seed, worker.id if worker else 0])
        tokenizer = load_tokenizer()
        for step in count():
            yield self.draw(step, rng, tokenizer)

    def draw(self, step: int, rng: np.random.Generator, tokenizer: CLIPTokenizer) -> tuple[torch.Tensor, ...]:
        """The batch of a step, counted from 0 in each worker."""
        raise NotImplementedError


class ReadingTask(DrawnBatches):
    """Batches for the reader: tokens (B, L), truth (B, labels) and the positions (B, P) that are read."""

    def draw(self, step: int, rng: np.random.Generator, tokenizer: CLIPTokenizer) -> tuple[torch.Tensor, ...]:
        captions, truth = reading_batch(self.batch, rng)
        tokens = tokenize(tokenizer, captions)
        ends = (tokens != tokens[0, -1]).sum(1).numpy()
        # Shorter than 77 as a rule: it is cheaper, and each position is padding often enough all the same.
        shortest = int(ends.max()) + 2
        length = int(rng.integers(shortest, MAX_TOKENS + 1)) if step % 2 else min(shortest, MAX_TOKENS)
        positions = [*(rng.integers(ends, length) for _ in range(READ_POSITIONS - 1)), ends]
        return tokens[:, :length].contiguous(), truth, torch.from_numpy(np.stack(positions, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path(".runs/text"))
    Length.add_options(parser, steps=420)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--workers", type=int, default=0, help="processes that write captions")
    parser.add_argument("--seed", type=int, default=0)
    add_option(parser)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    reader = Reader(vocabulary(load_tokenizer()), args.device)
    trainer = Trainer(reader, args.run, length=Length.of(args), rate=args.rate, warmup=0.12, ema=0.99, muon=True,
                      adam_only=("embedding", "head"))  # fmt: skip
    task = ReadingTask(args.batch, args.seed + trainer.step_count)
    batches = iter(DataLoader(task, batch_size=None, num_workers=args.workers))
    while trainer.running:
        with trainer.waiting():
            tokens, truth, places = (to_device(tensor, args.device) for tensor in next(batches))
        logits = reader(tokens, places).float()
        trainer.step(F.binary_cross_entropy_with_logits(logits, truth[:, None].expand_as(logits)) * len(LABELS))
    trainer.save()


if __name__ == "__main__":
    main()
