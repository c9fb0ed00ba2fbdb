"""The first contact with a GPU, within nine minutes; run by `python dev.py gpu run first_contact`.

Every part is a process with a time limit: one that fails or hangs stops no other. After each, ``first_contact.json`` has
all that is known so far, also of parts that did not finish; a table comes last. ``--toy`` rehearses it on a CPU.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from devtools.device import add_option, made_on
from devtools.environment import ROOT

from ..common.files import write_json, write_text

NAME = "first_contact"
STOPPING = 12  # seconds between the time that a part is given and the time at which it is stopped


class PartOf(NamedTuple):
    """A part: the module that is run, until when it is stopped, in seconds, and its options."""

    name: str
    module: str
    limit: int
    options: tuple[str, ...] = ()


PARTS = (
    PartOf("nodes", "nodes", 100),
    PartOf("memory", "memory", 75),
    PartOf("memory, 12 GB", "memory", 55, ("--cap-gb", "12")),
    PartOf("memory, 6 GB", "memory", 55, ("--cap-gb", "6")),
    PartOf("speed", "speed", 135),
    PartOf("rates", "rates", 100),
)


def run_part(part: PartOf, work: Path, common: Sequence[str], limit: float) -> dict[str, Any]:
    """The results of a part, finished or not, beside how it ended and what it took."""
    result, log = work / f"{part.module}{''.join(part.options[1:])}.json", work / "log.txt"
    result.unlink(missing_ok=True)
    own = ("--json", str(result), "--seconds", str(limit - STOPPING), *part.options)
    command = [sys.executable, "-m", f"benchmarks.gpu.{part.module}", *own, *common]
    since = time.monotonic()
    with log.open("a", encoding="utf-8") as out:
        out.write(f"\n== {part.name}\n")
        out.flush()
        # A session of its own, so that what it started ends with it.
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out, start_new_session=True)
        try:
            code = process.wait(limit)
            end = "finished" if code == 0 else f"failed with code {code}: log.txt"
        except subprocess.TimeoutExpired:
            end = f"stopped after {limit:.0f} s"
        finally:
            stop(process)
    return {"part": part.name, "end": end, "seconds": round(time.monotonic() - since, 1), **read(result)}


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and all that it started."""
    if process.poll() is None:
        kill = getattr(os, "killpg", None)
        kill(process.pid, signal.SIGKILL) if kill else process.kill()
        process.wait()


def read(path: Path) -> dict[str, Any]:
    """What a part wrote, or nothing."""
    import json

    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"rows": []}


def table(parts: Sequence[Mapping[str, Any]]) -> str:
    """A line for each result."""
    lines = ["| part | what | result |", "|---|---|---|"]
    for part in parts:
        lines.append(f"| **{part['part']}** | {part['end']} | {part['seconds']} s |")
        for row in part["rows"]:
            values = ", ".join(f"{k} {shown(v)}" for k, v in row.items() if k not in ("what", "at_second"))
            lines.append(f"| | {row['what']} | {values} |")
    return "\n".join(lines) + "\n"


def shown(value: Any) -> str:
    """A number in three digits, anything else as it is."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main() -> int:
    parser = argparse.ArgumentParser(prog=f"dev.py gpu run {NAME}", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--parts", nargs="+", choices=sorted({p.module for p in PARTS}), help="only these")
    parser.add_argument("--toy", action="store_true", help="the smallest sizes, for a rehearsal on a CPU")
    parser.add_argument("--slower", type=float, default=1.0, help="all time limits times this, for a slow machine")
    add_option(parser)
    args = parser.parse_args()
    work = ROOT / ".runs" / NAME
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    args.out.mkdir(parents=True, exist_ok=True)
    common = ["--device", args.device, *(["--toy"] if args.toy else [])]
    about = {"check": NAME, "commit": os.environ.get("HDB_COMMIT", ""), "toy": args.toy, **made_on(args.device)}
    parts: list[dict[str, Any]] = []
    for part in PARTS:
        if args.parts and part.module not in args.parts:
            continue
        print(f"{part.name}: at most {part.limit * args.slower:.0f} s …", flush=True)
        parts.append(run_part(part, work, common, part.limit * args.slower))
        print(f"{part.name}: {parts[-1]['end']}, {parts[-1]['seconds']} s", flush=True)
        write_json(args.out / f"{NAME}.json", {**about, "parts": parts})
        write_text(args.out / f"{NAME}.md", f"{', '.join(map(str, about.values()))}\n\n{table(parts)}")
        shutil.copy(work / "log.txt", args.out / f"{NAME}.log")
    print((args.out / f"{NAME}.md").read_text(encoding="utf-8"))
    return 0 if all(part["end"] == "finished" for part in parts) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
