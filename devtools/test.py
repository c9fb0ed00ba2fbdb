"""Lint and all tests, a process a tier; run by `python dev.py test [TIER …] [pytest options]`."""

from __future__ import annotations

import subprocess
import sys
import time

from .environment import OF_THE_MINIATURE, ROOT, lacking

# From pure functions in milliseconds to a browser. One process each: what a tier imports or patches stays in it.
_LAST = ("host", "server", "browser")
_FOUND = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
TIERS = (*sorted(_FOUND - set(_LAST)), *(tier for tier in _LAST if tier in _FOUND))
LINT = ("ruff check .", "ruff format --check .", "mypy")
NO_TESTS_COLLECTED = 5


def main() -> int:
    arguments = sys.argv[1:]
    if arguments in (["-h"], ["--help"]):
        print(f"usage: dev.py test [TIER …] [pytest options]\ntiers: lint {' '.join(TIERS)}")
        return 0
    if lack := lacking(("pytest", "ruff", "mypy", *OF_THE_MINIATURE)):
        print(lack)
        return 1
    tiers = [a for a in arguments if a in ("lint", *TIERS)]
    options = [a for a in arguments if a not in tiers]
    failed = []
    for tier in tiers or ("lint", *TIERS):
        if tier == "lint":
            commands = [["-m", *lint.split()] for lint in LINT]
        else:
            # -P keeps the repository's `nodes` from hiding the host's.
            commands = [["-P", "-m", "pytest", f"tests/{tier}", *options]]
        print(f"\n== {tier}", flush=True)
        since = time.monotonic()
        codes = [subprocess.run([sys.executable, *command], cwd=ROOT, check=False).returncode for command in commands]
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
