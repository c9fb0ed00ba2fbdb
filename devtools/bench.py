"""Runs benchmarks by name; run by `python dev.py bench NAME … [options]`. Options go to each of them."""

from __future__ import annotations

import subprocess
import sys
from itertools import takewhile

from .environment import OF_THE_MINIATURE, ROOT, lacking


def main() -> int:
    known = sorted(p.stem for p in (ROOT / "benchmarks").glob("*.py") if not p.stem.startswith("_"))
    names = list(takewhile(known.__contains__, sys.argv[1:]))
    options = sys.argv[1 + len(names) :]
    if not names:
        print(f"usage: dev.py bench NAME … [options]\nbenchmarks: {', '.join(known) or 'none yet'}")
        return 2
    if lack := lacking(OF_THE_MINIATURE):
        print(lack)
        return 1
    for name in names:
        command = [sys.executable, "-m", f"benchmarks.{name}", *options]
        if code := subprocess.run(command, cwd=ROOT, check=False).returncode:
            return code
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
