"""The development entry point: python dev.py demo | test | serve | bench. Standard library only."""

import sys

if sys.version_info < (3, 11):
    sys.exit(f"dev.py needs Python 3.11 or newer; this is {sys.version.split()[0]} ({sys.executable}).")

import argparse
import os
import subprocess
from pathlib import Path

from devtools.environment import ROOT, Host, SetupError, prepare


def parse(arguments: list[str]) -> argparse.Namespace:
    host = argparse.ArgumentParser(add_help=False)
    host.add_argument("--comfyui", type=Path, metavar="PATH", help="use this ComfyUI with its own Python")
    host.add_argument("--python", type=Path, metavar="PATH", help="the Python of that ComfyUI, if it is not found")
    parser = argparse.ArgumentParser(prog="dev.py", description="Makes what is missing, then runs the command.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("demo", "one photo in, that person's pictures out; results in output/"),
        ("serve", "ComfyUI with this pack, for a browser"),
        ("test", "lint and all tests; options after the tiers go to pytest"),
        ("bench", "run benchmarks by name; options after the names go to them"),
    ):
        command = commands.add_parser(name, help=text, parents=[host], add_help=name not in ("test", "bench"))
        command.set_defaults(rest=[])
    known, rest = parser.parse_known_args(arguments)
    known.rest = rest
    return known


def command_line(args: argparse.Namespace, host: Host) -> list[str]:
    return [str(host.python), "-m", f"devtools.{args.command}", *args.rest]


def main() -> int:
    args = parse(sys.argv[1:])
    try:
        host = prepare(args.comfyui, args.python)
    except SetupError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(
            f"Could not prepare the environment: {error}. Correct this and run the same command again.", file=sys.stderr
        )
        return 1
    command = command_line(args, host)
    environ = {**os.environ, **host.environ()}
    os.chdir(ROOT)
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
