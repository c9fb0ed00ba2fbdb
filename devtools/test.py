"""Lint and all tests, a process a tier; run by `python dev.py test [TIER …] [pytest options]`."""

from __future__ import annotations

import subprocess
import sys
import time

from .environment import ROOT

# From pure functions in milliseconds to a browser. One process each: what a tier imports or patches stays in it.
TIERS = ("devtools", "core", "miniature", "host", "server", "browser")
LINT = ("check", "format --check")
NO_TESTS_COLLECTED = 5


def main() -> int:
    arguments = sys.argv[1:]
    if arguments in (["-h"], ["--help"]):
        print(f"usage: dev.py test [TIER …] [pytest options]\ntiers: lint {' '.join(TIERS)}")
        return 0
    tiers = [a for a in arguments if a in ("lint", *TIERS)]
    options = [a for a in arguments if a not in tiers]
    failed = []
    for tier in tiers or ("lint", *TIERS):
        if tier == "lint":
            commands = [["-m", "ruff", *lint.split(), "."] for lint in LINT]
        elif (ROOT / "tests" / tier).is_dir():
            # -P keeps the repository's `nodes` from hiding the host's.
            commands = [["-P", "-m", "pytest", f"tests/{tier}", *options]]
        else:
            continue
        print(f"\n== {tier}", flush=True)
        since = time.monotonic()
        codes = [subprocess.run([sys.executable, *command], cwd=ROOT, check=False).returncode for command in commands]
        good = all(code == 0 or (tier != "lint" and options and code == NO_TESTS_COLLECTED) for code in codes)
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
