"""People a second of every stage of a hypernetwork's training, on models with random weights and generated photos.

It is the trainer's own program on the host's own model; from the rates follow the hours of `PEOPLE`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image

from devtools.inprocess import InProcessHost

from .memory import clean
from .models import SIZES, Training, opened, random_models, size_of, watched_training
from .part import Part

PEOPLE, TURNS = 15_000, 40  # whose hours are told: times that everybody is seen
PRETRAINED = 2000 * 64  # photos that the encoder sees, by the trainer's defaults
FIT_STEPS = 40  # that fitting a person takes
MATMUL = 8192  # side, of the products that the card's peak is measured with


def write_photos(folder: Path, count: int, pixels: int) -> None:
    """Photos of as many people: smooth noise, since no time depends on what they show."""
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        coarse = (255 * torch.rand(16, 16, 3, generator=generator)).byte().numpy()
        Image.fromarray(coarse).resize((pixels, pixels), Image.Resampling.BICUBIC).save(
            folder / f"{number:05}.jpg", quality=90
        )


def peak(part: Part) -> float:
    """FLOP/s of large products in bfloat16 on this device."""
    side = 256 if part.toy else MATMUL
    one = torch.randn(side, side, device=part.device, dtype=torch.bfloat16)
    part.timed(lambda: one @ one)
    seconds = min(part.timed(lambda: [one @ one for _ in range(4)]) / 4 for _ in range(5))
    found = 2 * side**3 / seconds
    part.add("peak, bfloat16", tflops_a_second=found / 1e12)
    return found


def trained(part: Part, host: InProcessHost, family: str, folder: Path, people: int, steps: int) -> Training:
    """A run of all stages; what was seen of it."""
    photos = folder / "photos"
    photos.mkdir(parents=True)
    pixels, count = size_of(family, part.toy), max(2 * people, 8)
    write_photos(photos, count, pixels)
    models = random_models(family, part.toy)
    cpu = ["--cpu", "--mixed-precision", "no"] if torch.device(part.device).type == "cpu" else []
    arguments = [
        str(folder / "run"), "--model", family, "--photos", str(photos), "--image-size", str(pixels), *cpu,
        "--people", str(people), "--steps", str(steps), "--set", f"fit.steps={min(steps, 8)}", f"group={min(32, count)}",
        f"pretrain.steps={steps}", f"pretrain.people={people}", "samples.every=0", "evaluate.draws=1",
    ]  # fmt: skip
    with watched_training(host, models, part.device) as seen:
        seen.run(arguments)
    return seen


def report(part: Part, family: str, seen: Training, people: int, most: float) -> None:
    """The rates, and hours of `PEOPLE`."""
    hours = {}

    def rate(stage: str, done: float, seconds: float, needed: float, **more: float) -> None:
        a_second = done / seconds
        hours[stage] = needed / a_second / 3600
        part.add(f"{family}, {stage}", a_second=a_second, hours_for_15000=hours[stage], **more)

    rate("latents", seen.photos, seen.latents, PEOPLE)
    rate("fit", seen.fitted * seen.fit_steps / FIT_STEPS, seen.fits, PEOPLE)
    for stage, needed in (("pretrain", PRETRAINED), ("train", PEOPLE * TURNS)):
        steps, seconds = seen.steady(stage)
        share = seen.flops[stage] * steps / seconds / most
        rate(stage, people * steps, seconds, needed, share_of_peak=share, seconds_a_step=seconds / steps)
    without = sum(value for stage, value in hours.items() if stage != "fit")
    part.add(f"{family}, all", hours_for_15000=without, with_fitted_people=without + hours["fit"])


def main() -> None:
    def families(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--families", nargs="+", choices=SIZES, default=["sd15"])

    part, args = Part.from_arguments(__doc__, families)
    with TemporaryDirectory() as folder:
        host = opened(Path(folder) / "host", part.device)
        most = peak(part)
        for family in args.families:
            # As many people in a step as fit; a step of fewer says more than none.
            for people, steps in ((2, 4),) if part.toy else ((32, 24), (8, 24), (2, 24)):
                with part.attempt(f"{family}, {people} people a step"):
                    own = Path(folder) / f"{family}_{people}"
                    seen = trained(part, host, family, own, people, steps)
                    report(part, family, seen, people, most)
                    part.add(f"{family}, {people} people a step", done=True)
                    break
                clean()


if __name__ == "__main__":
    main()
