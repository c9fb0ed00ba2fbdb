"""Check 5: the tables of README and docs on the weights at hand; run by `python dev.py gpu run tables`."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence

from ..common.bench import KEPT, RESULTS
from .check import ENDING, Context, Stage, Visit, parser

NAME = "tables"
MINUTES = 9.2
MADE = ("base", "control", "pairs", "hypernet")


def tables(context: Context) -> Sequence[str]:
    """All of `bench all`, which goes on from the scores that an earlier visit has brought home."""
    if (RESULTS / KEPT).is_file():
        shutil.copy(RESULTS / KEPT, context.folder)
    minutes = f"{max(0.0, context.seconds - ENDING) / 60:.3f}"
    toy = ["--toy"] if context.toy else []
    return ["benchmarks.all", "--results", str(context.folder), "--minutes", minutes, "--device", context.device, *toy]


STAGES = (
    Stage("tables", tables, share=1.0, keeps=(KEPT, *(f"{name}.{end}" for name in MADE for end in ("json", "md")))),
)


def main() -> int:
    return Visit(NAME, STAGES, parser(NAME, __doc__, STAGES, MINUTES).parse_args()).run()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
