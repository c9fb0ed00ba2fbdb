"""The device that a tool computes on, and what its numbers were made with."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

WHAT_IS_THERE = "auto"
VERSIONS = ("transformers", "diffusers")  # beside torch's own


def add_option(parser: argparse.ArgumentParser, default: str = WHAT_IS_THERE) -> None:
    """Adds ``--device``, whose value is a device of this machine such as "cpu" or "cuda".

    Args:
        default: a device, or `WHAT_IS_THERE`: CUDA if there is a card, the CPU otherwise.
    """
    parser.add_argument(
        "--device",
        type=available,
        default=default,
        metavar="NAME",
        help=f"cpu, cuda or another of torch; {WHAT_IS_THERE} is cuda if there is a card (default: {default}). "
        "CUDA_VISIBLE_DEVICES chooses among several cards",
    )


def available(name: str) -> str:
    """The device of a name, "auto" resolved.

    Raises:
        argparse.ArgumentTypeError: torch cannot use such a device here.
    """
    import torch

    if name == WHAT_IS_THERE:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).splitlines() or ["unknown"])[0]
        raise argparse.ArgumentTypeError(f"torch has no device {name!r} here ({reason}). Use --device cpu.") from None
    return name


def host_options(device: str) -> tuple[str, ...]:
    """What ComfyUI's command line needs to compute there: without an option it takes the card."""
    return ("--cpu",) if device == "cpu" else ()


def synchronize(device: str) -> None:
    """Waits for all work that was queued on a device; on the CPU nothing waits."""
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def made_on(device: str, dtype: str = "") -> dict[str, str]:
    """What numbers were made with: device, card, versions, and the dtype if one is given."""
    import torch

    found = {"device": device, "card": card(device), "python": platform.python_version(), "torch": torch.__version__}
    found |= {name: version for name in VERSIONS if (version := _version(name))}
    return found | ({"dtype": dtype} if dtype else {})


def card(device: str) -> str:
    """The name of a GPU, or of the processor and on how many of its cores this process computes."""
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name()
    used = min(torch.get_num_threads(), cores())
    return f"{_processor()}, {used} core{'s' * (used > 1)}"


def cores() -> int:
    """How many cores this process may use."""
    allowed: Callable[[int], Any] | None = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return ""
