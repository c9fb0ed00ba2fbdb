"""How fast the miniature could be trained here: drawing, encoding, and steps of its UNet and of the image encoder."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch.nn import functional

from devtools.device import cores, synchronize
from devtools.environment import ROOT
from hdb_core.hypernet import EncoderConfig
from hdb_core.train.encoder_loss import PhotoPredictor
from miniature.base import Base, alphas_cumprod, diffusion_loss
from miniature.people import sample_person
from miniature.photos import photo_context
from miniature.pictures import training_picture
from miniature.text import MAX_TOKENS, WIDTH, load_tokenizer, tokenize
from miniature.training import Length, Trainer
from miniature.vae import build_vae, encode, face_weights

from .part import Part

CHUNK = 20  # photos that a process draws at a time
TOKENS = 1000  # rows of the token table, about as many as captions use
COMPONENTS = 1024  # of a photo, that the encoder predicts; 4 × 16 × 16


def draw(first: int) -> int:
    """Draws some photos; how many."""
    from miniature.drawing import photo

    for seed in range(first, first + CHUNK):
        photo(sample_person(seed), photo_context(seed, 1))
    return CHUNK


def drawing(part: Part, seconds: float) -> None:
    """Photos a second, on all cores."""
    with ProcessPoolExecutor(cores()) as pool:
        list(pool.map(draw, range(cores())))  # starts the processes
        start, done, waiting = time.perf_counter(), 0, []
        while time.perf_counter() - start < seconds:
            waiting = [pool.submit(draw, CHUNK * i) for i in range(2 * cores())]
            done += sum(future.result() for future in waiting)
    part.add("drawing", photos_a_second=done / (time.perf_counter() - start), cores=cores())


def captions(part: Part, seconds: float) -> None:
    """Captions a second that one core writes and turns into tokens, as the training of the UNet does."""
    tokenizer, done, start = load_tokenizer(), 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        tokenize(tokenizer, [training_picture(done + i, False)[1] for i in range(32)])
        done += 32
    part.add("captions", captions_a_second=done / (time.perf_counter() - start), cores=1)


def rate(part: Part, step: Callable[[], None], batch: int, seconds: float) -> float:
    """Samples a second of a step."""
    for _ in range(1 if part.toy else 3):
        step()
    synchronize(part.device)
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        step()
        done += batch
        if done % (20 * batch) == 0:  # steps are queued ahead of the device
            synchronize(part.device)
    synchronize(part.device)
    return done / (time.perf_counter() - start)


def encoding(part: Part, batch: int) -> Callable[[], None]:
    """A batch of pictures through the VAE's encoder."""
    vae = build_vae().to(part.device, torch.bfloat16).eval()
    pictures = np.random.default_rng(0).integers(0, 256, (batch, 128, 128, 3), np.uint8)

    def step() -> None:
        encode(vae, pictures)

    return step


def unet_training(part: Part, batch: int, folder: Path) -> Callable[[], None]:
    """A step of the base's training on the same latents and tokens."""
    base = Base(torch.arange(TOKENS), part.device)
    trainer = Trainer(base, folder, length=Length(steps=10**6), rate=1e-4, muon=True, adam_scale=0.3)
    generator, signal = torch.Generator(part.device).manual_seed(0), alphas_cumprod().to(part.device)
    weight = face_weights(16).to(part.device)
    latents = torch.randn(batch, 4, 16, 16, device=part.device)
    tokens = torch.randint(TOKENS, (batch, MAX_TOKENS), device=part.device)
    return lambda: trainer.step(diffusion_loss(base, latents, tokens, generator, signal, weight, trainer.dtype))


def encoder_training(part: Part, batch: int) -> Callable[[], None]:
    """A step of the image encoder's training, as `hdb_core.train pretrain` takes it, on the same pixels."""
    config = EncoderConfig()
    net = PhotoPredictor(config, WIDTH, COMPONENTS).to(part.device)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-4, fused=True)
    pixels = torch.rand(batch, 3, config.image_size, config.image_size, device=part.device)
    text, shown = torch.randn(batch, WIDTH, device=part.device), torch.randn(batch, COMPONENTS, device=part.device)

    def step() -> None:
        with torch.autocast(torch.device(part.device).type, torch.bfloat16):
            predicted = net(pixels, text)
        functional.mse_loss(predicted.float(), shown).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def trainings(part: Part, folder: Path) -> Iterator[tuple[str, int, Callable[[], Callable[[], None]]]]:
    """Name, batch, and what makes the step."""
    for batch in (1,) if part.toy else (32, 256):
        yield "VAE encoding", batch, lambda batch=batch: encoding(part, batch)
        yield "UNet training", batch, lambda batch=batch: unet_training(part, batch, folder / str(batch))
        yield "encoder training", batch, lambda batch=batch: encoder_training(part, batch)


def main() -> None:
    part, _ = Part.from_arguments(__doc__)
    whole = 0.5 if part.toy else 20.0
    os.chdir(ROOT)
    with part.attempt("drawing"):
        drawing(part, 0.6 * whole)
    with part.attempt("captions"):
        captions(part, 0.2 * whole)
    with TemporaryDirectory() as folder:
        for name, batch, make in trainings(part, Path(folder)):
            with part.attempt(f"{name}, batch {batch}"):
                samples = rate(part, make(), batch, 0.4 * whole)
                part.add(f"{name}, batch {batch}", samples_a_second=samples)


if __name__ == "__main__":
    main()
