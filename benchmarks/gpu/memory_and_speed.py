"""Memory and speed of SD 1.5 and SDXL on a GPU, within nine minutes; run by `python dev.py gpu run memory_and_speed`."""

from __future__ import annotations

import sys

from .check import measured, run_check

NAME = "memory_and_speed"
STAGES = (
    measured("memory", "memory", 70),
    measured("memory, 24 GB", "memory", 45, "--cap-gb", "24"),
    measured("memory, 12 GB", "memory", 45, "--cap-gb", "12"),
    measured("memory, 6 GB", "memory", 45, "--cap-gb", "6"),
    measured("SD 1.5", "speed", 110, "--families", "sd15", "--rows", "step", "sampling"),
    measured("SDXL", "speed", 110, "--families", "sdxl", "--rows", "step", "sampling"),
    measured("people", "speed", 90, "--families", "sd15", "--rows", "person", "batch", "flat"),
)


if __name__ == "__main__":
    try:
        sys.exit(run_check(NAME, STAGES, __doc__))
    except KeyboardInterrupt:
        sys.exit(130)
