"""Check 2: trains the miniature's VAE, text encoder and base within one command; run by `python dev.py gpu run base`.

Pictures are drawn on all cores from the first second to the last, and every training takes up what is there.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from devtools.device import cores
from devtools.environment import ROOT

from .check import WORK, Context, Stage, Visit, measured, parser
from .trained import BASE, VAE, Made

NAME = "base"
MINUTES = 9.2
PICTURES = 850_000  # 42 GB
FOLDER = WORK / "pictures"


def beginning(context: Context, made: Made, rate: float) -> list[str]:
    """The rate; a training that failed goes on from what it packed last, at half of it."""
    options = ["--rate", str(rate / 2 ** (context.attempt + context.go_on))]
    if not context.attempt:
        return [*options, *(["--start", str(ROOT / "weights" / made.file)] if context.go_on else [])]
    (context.folder / "state.pt").unlink(missing_ok=True)
    if (log := context.folder / "log.csv").exists():
        log.rename(context.folder / "failed.csv")
    return [*options, *(["--start", str(made.path)] if made.path.is_file() else [])]


def vae(context: Context) -> Sequence[str]:
    size = ["2", "--crop", "64"] if context.toy else ["64", "--crop", "128"]
    begin = beginning(context, VAE, 2e-3)
    return ["miniature.vae", "--pictures", str(FOLDER), *context.common, *begin, "--batch", *size]


def text(context: Context) -> Sequence[str]:
    batch, workers = ("4", "1") if context.toy else ("128", str(max(1, cores() // 2)))
    return ["miniature.text", *context.common, "--batch", batch, "--workers", workers]


def base(context: Context) -> Sequence[str]:
    """On the text encoder that was trained here, or the shipped one."""
    size = ["4", "--preview", "4"] if context.toy else ["512", "--preview", "32", "--compile"]
    given = WORK / "text" / "state.pt"
    text_encoder = given.parent if given.is_file() else BASE.found()
    begin = beginning(context, BASE, 2e-3)
    made = ["--vae", str(VAE.found()), "--text", str(text_encoder), "--ema", "0.999", *begin]
    return ["miniature.base", "--pictures", str(FOLDER), *context.common, *made, "--batch", *size]


STAGES = (
    Stage("vae", vae, share=0.32, keeps=(VAE.file,), again=True),
    Stage("text", text, seconds=60),
    Stage("base", base, share=0.68, keeps=(BASE.file,), again=True),
    measured("scores", "base_scores", 55),
)


def main() -> int:
    args = parser(NAME, __doc__, STAGES, MINUTES).parse_args()
    count = ["50", "--chunk", "25"] if args.toy else [str(PICTURES)]
    return Visit(NAME, STAGES, args).run(beside=["miniature.pictures", "--folder", str(FOLDER), "--count", *count])


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
