"""Rates of a hypernetwork's training on SD 1.5 and SDXL, within nine minutes; run by `python dev.py gpu run training_rates`."""

from __future__ import annotations

import sys

from .check import measured, run_check

NAME = "training_rates"
STAGES = (
    measured("SD 1.5", "training", 200, "--families", "sd15"),
    measured("SDXL", "training", 320, "--families", "sdxl"),
)


if __name__ == "__main__":
    try:
        sys.exit(run_check(NAME, STAGES, __doc__))
    except KeyboardInterrupt:
        sys.exit(130)
