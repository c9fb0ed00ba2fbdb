"""Lint and all tests, a process a tier; run by `python dev.py test [TIER …] [pytest options]`."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence

import psutil

from .device import cores
from .environment import OF_THE_MINIATURE, ROOT, lacking

# From pure functions in milliseconds to a browser. Processes of their own: what a tier imports or patches stays in it.
_LAST = ("host", "server", "browser")
_ONE_SERVER = {"server", "browser"}  # that all of their tests share
_FOUND = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
TIERS = (*sorted(_FOUND - set(_LAST)), *(tier for tier in _LAST if tier in _FOUND))
LINT = ("ruff check .", "ruff format --check .", "mypy")
NO_TESTS_COLLECTED = 5
MOST_WORKERS = 4  # each holds models of its own
GB_OF_A_WORKER = 6
_LARGE = {"host"}  # tiers with tests that take twice as much, and so run alone


def commands(tier: str, options: Sequence[str]) -> list[list[str]]:
    """The arguments of Python that run a tier, one after another."""
    if tier == "lint":
        return [["-m", *lint.split()] for lint in LINT]
    if tier not in _LARGE or "-m" in options:  # of which pytest takes the last one
        return [_pytest(tier, options, spread=tier not in _ONE_SERVER | _LARGE)]
    return [
        _pytest(tier, ["-m", "not large", *options], spread=True),
        _pytest(tier, ["-m", "large", *options], spread=False),
    ]


def _pytest(tier: str, options: Sequence[str], spread: bool) -> list[str]:
    fit = psutil.virtual_memory().total // (GB_OF_A_WORKER * 2**30)
    workers = max(1, min(cores(), MOST_WORKERS, fit)) if spread else 1
    spreading = ["-n", str(workers), "--dist", "loadfile"] if workers > 1 else []
    # -P keeps the repository's `nodes` from hiding the host's.
    return ["-P", "-m", "pytest", f"tests/{tier}", *spreading, *options]


def environ(tier: str) -> dict[str, str]:
    """The variables of a tier: a thread for each process, as small tensors gain nothing by more and wait for them."""
    own = {} if tier in _ONE_SERVER else {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return {**os.environ, **own}


def main() -> int:
    arguments = sys.argv[1:]
    if arguments in (["-h"], ["--help"]):
        print(f"usage: dev.py test [TIER …] [pytest options]\ntiers: lint {' '.join(TIERS)}")
        return 0
    if lack := lacking(("pytest", "xdist", "hypothesis", "ruff", "mypy", *OF_THE_MINIATURE)):
        print(lack)
        return 1
    tiers = [a for a in arguments if a in ("lint", *TIERS)]
    options = [a for a in arguments if a not in tiers]
    failed = []
    for tier in tiers or ("lint", *TIERS):
        print(f"\n== {tier}", flush=True)
        since = time.monotonic()
        runs = (
            subprocess.run([sys.executable, *c], cwd=ROOT, env=environ(tier), check=False)
            for c in commands(tier, options)
        )
        codes = [run.returncode for run in runs]
        # Options can select no test of a tier; without Playwright there is no browser tier.
        none_is_fine = tier != "lint" and bool(options or tier == "browser")
        good = all(code == 0 or (code == NO_TESTS_COLLECTED and none_is_fine) for code in codes)
        print(f"== {tier}: {'passed' if good else 'FAILED'} in {time.monotonic() - since:.0f} s", flush=True)
        if not good:
            failed.append(tier)
    print(f"\nFailed: {', '.join(failed)}" if failed else "\nAll passed.")
    return bool(failed)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
