"""The development entry point: python dev.py demo | test | serve | bench | thumbnails | stale | gpu. Standard library only."""

import sys

if sys.version_info < (3, 11):
    sys.exit(f"dev.py needs Python 3.11 or newer; this is {sys.version.split()[0]} ({sys.executable}).")

import argparse
import os
import subprocess
from pathlib import Path

from devtools.environment import ROOT, SetupError, module, prepare

EPILOG = """
commands:
  demo        one photo in, that person's pictures out; results in output/
  serve       ComfyUI with this pack, for a browser
  test        lint and all tests, or the tiers that are named; other options go to pytest
  bench       benchmarks by name
  thumbnails  the example workflows' pictures in the template browser
  stale       kept tables, pictures and recommendations that older weights made
  gpu         checks on a GPU, also where there is no network: benchmarks/gpu.md
`dev.py COMMAND --help` shows the options of a command."""


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="dev.py",
        description="Prepares the environment, then runs a command.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("command", nargs="?", choices=("demo", "serve", "test", "bench", "thumbnails", "stale", "gpu"))
    parser.add_argument(
        "--comfyui", type=_absolute, metavar="PATH", help="use this ComfyUI with its own Python, change nothing in it"
    )
    parser.add_argument(
        "--python", type=_absolute, metavar="PATH", help="the Python of that ComfyUI, if it is not found"
    )
    parser.add_argument(
        "--wheels",
        type=_absolute,
        metavar="FOLDER",
        help="work offline: this Python's torch, other packages from wheels",
    )
    args, rest = parser.parse_known_args(arguments)
    if args.command is None:
        parser.print_help()
        raise SystemExit(0 if rest in (["-h"], ["--help"]) else 2)
    return args, rest


def _absolute(path: str) -> Path:
    """As the user means it, from where they are; a link stays one, which makes a Python that of its environment."""
    return Path(path).expanduser().absolute()


def main() -> int:
    args, rest = parse(sys.argv[1:])
    os.chdir(ROOT)
    if rest[:1] in (["-h"], ["--help"]) or args.command == "gpu":  # which prepares by itself
        try:
            return subprocess.run([sys.executable, "-m", f"devtools.{args.command}", *rest], check=False).returncode
        except KeyboardInterrupt:
            sys.exit("\nStopped.")
    try:
        host = prepare(args.comfyui, args.python, args.wheels)
    except SetupError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(
            f"Could not prepare the environment: {error}. Correct this and run the same command again.", file=sys.stderr
        )
        return 1
    command = module(host.python, f"devtools.{args.command}", *rest)
    environ = {**os.environ, **host.environ()}
    if os.name == "posix":  # no process in between that could leave an orphan
        sys.stdout.flush()
        os.execve(command[0], command, environ)
    with subprocess.Popen(command, env=environ) as process:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                continue  # the console sent it to the child, too; it is stopping


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("\nStopped. The next run continues from here.")
