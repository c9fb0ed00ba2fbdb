"""The first contact with a GPU, within nine minutes; run by `python dev.py gpu run first_contact`."""

from __future__ import annotations

import sys

from .check import measured, run_check

NAME = "first_contact"
STAGES = (
    measured("nodes", "nodes", 100),
    measured("memory", "memory", 75),
    measured("memory, 12 GB", "memory", 55, "--cap-gb", "12"),
    measured("memory, 6 GB", "memory", 55, "--cap-gb", "6"),
    measured("speed", "speed", 135),
    measured("rates", "rates", 100),
)


if __name__ == "__main__":
    try:
        sys.exit(run_check(NAME, STAGES, __doc__))
    except KeyboardInterrupt:
        sys.exit(130)
