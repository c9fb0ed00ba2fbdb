"""Check 3: trains the miniature's image encoder, hypernetwork and Control-LoRA; run by `python dev.py gpu run person`.

It stands on the VAE and the base of check 2: those in ``weights/``, or those that this machine has just trained. People are
drawn on all cores while the predictor trains.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence

from devtools.device import cores
from miniature.predictor import ENCODER_FILE

from .check import WORK, Context, Stage, Visit, parser
from .trained import BASE, CONTROL, HYPERNET, VAE

NAME = "person"
MINUTES = 9.2
PEOPLE = 150_000  # 30 GB of photos
MODEL = WORK / "model" / "diffusers"
CROWD = WORK / "crowd"


def model(context: Context) -> Sequence[str]:
    """The base as the trainer reads it."""
    packed = context.folder / "packed"
    packed.mkdir(parents=True)
    for made in (VAE, BASE):
        shutil.copy(made.found(), packed)
    return ["miniature.checkpoint", "diffusers", "--weights", str(packed), "--target", str(MODEL)]


def trained(context: Context, what: str, batch: int, rate: float) -> list[str]:
    size = ["--batch", "4", "--first", "16"] if context.toy else ["--batch", str(batch)]
    given = ["--crowd", str(CROWD), "--model", str(MODEL)]
    return ["miniature.predictor", what, *context.common, *given, *size, "--rate", str(rate / 2**context.attempt)]


def encoder(context: Context) -> Sequence[str]:
    return trained(context, "encoder", 256, 1e-3)


def hypernet(context: Context) -> Sequence[str]:
    return [*trained(context, "hypernet", 128, 1e-3), "--encoder", str(WORK / "encoder" / ENCODER_FILE)]


def control(context: Context) -> Sequence[str]:
    batch, workers = ("2", "1") if context.toy else ("64", str(cores()))
    given = ["--base", str(BASE.found()), "--vae", str(VAE.found())]
    rate = ["--rate", str(1e-3 / 2**context.attempt)]
    return ["miniature.control", *context.common, *given, *rate, "--batch", batch, "--workers", workers]


STAGES = (
    Stage("model", model, seconds=45),
    Stage("encoder", encoder, share=0.4, keeps=(ENCODER_FILE,), again=True),
    Stage("hypernet", hypernet, share=0.6, keeps=(HYPERNET.file,), again=True),
    Stage("control", control, seconds=110, keeps=(CONTROL.file,), again=True),
)


def main() -> int:
    args = parser(NAME, __doc__, STAGES, MINUTES).parse_args()
    people = str(32 if args.toy else PEOPLE)
    return Visit(NAME, STAGES, args).run(beside=["miniature.crowd", "--folder", str(CROWD), "--people", people])


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
