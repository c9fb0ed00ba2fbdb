"""Every table that README and docs stand on, made on the weights at hand by several processes, for as long as there is time.

``python dev.py bench all --workers 8`` runs the others one after another: what is there already is not made again, and
scores are kept person by person, so that a stopped run goes on where it was. A table of which time left nothing stays as
it is. ``--minutes`` is shared out: what one does not need is left to the next.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from devtools import device
from devtools.environment import ROOT

from .common.bench import RESULTS, RUNS
from .gpu import process

REPORTING = 30.0  # seconds that are left of a table's time for its report
TOLD = 8000  # characters of the log's end that a failure shows


class Job(NamedTuple):
    """A benchmark with its options.

    Attributes:
        name: of the module.
        options: besides those of `shared`.
        toy: instead of these, for a rehearsal.
        weight: of its time, in comparison to the others'.
        shares: whether several processes can share its people.
    """

    name: str
    options: Sequence[str]
    toy: Sequence[str]
    weight: float
    shares: bool = False


TEST = ("--split", "test")
JOBS = (
    Job("base", TEST, (*TEST, "--people", "8", "--faces", "2", "--seeds-per-prompt", "1"), 1),
    Job("control", TEST, (*TEST, "--people", "2", "--seeds-per-prompt", "1"), 1),
    Job("pairs", (*TEST, "--seeds-per-prompt", "2"), (*TEST, "--people", "2", "--seeds-per-prompt", "1"), 1),
    Job(
        "hypernet",
        (*TEST, "--short", "--people", "100", "--reference-people", "50"),
        (*TEST, "--short", "--people", "2", "--seeds-per-prompt", "1", "--rows", "base", "hyper", "photo"),
        8,
        shares=True,
    ),
)


def run(job: Job, options: Sequence[str], workers: int, seconds: float, log: Path) -> str:
    """Makes a table's cells, in so many processes, and then the table; how it ended.

    Args:
        job: the benchmark.
        options: of all benchmarks.
        workers: at most so many processes.
        seconds: for all of it.
        log: gets what they print.
    """
    command = [sys.executable, "-m", f"benchmarks.{job.name}", *job.options, *options]
    if not job.shares:
        return process.run(command, log, seconds)
    until = time.monotonic() + max(0.0, seconds - REPORTING)
    with ExitStack() as stack:
        started = [process.start([*command, "--share", f"{i}/{workers}"], log) for i in range(1, workers + 1)]
        for each in started:
            stack.callback(process.stop, each)
        for each in started:
            try:
                each.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                break
        codes = [each.poll() for each in started]
    report = process.run([*command, "--report-only"], log, 10 * REPORTING)
    return report if not any(codes) or report != "finished" else f"{sum(map(bool, codes))} processes failed: {log.name}"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="dev.py bench all", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", nargs="+", choices=[job.name for job in JOBS], help="only these")
    parser.add_argument("--workers", type=int, default=device.cores(), help="processes (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=24 * 60.0, help="for everything (default: a day)")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder of finished cells")
    parser.add_argument("--toy", action="store_true", help="a few people, for a rehearsal")
    device.add_option(parser)
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    args.results.mkdir(parents=True, exist_ok=True)
    args.runs.mkdir(parents=True, exist_ok=True)
    log, until = (args.runs / "all.log").resolve(), time.monotonic() + 60 * args.minutes
    log.unlink(missing_ok=True)
    shared = ["--device", args.device, "--results", str(args.results.resolve()), "--runs", str(args.runs.resolve())]
    jobs = [job._replace(options=job.toy) if args.toy else job for job in JOBS if job.name in (args.jobs or [job.name])]
    ends = {}
    for index, job in enumerate(jobs):
        seconds = (until - time.monotonic()) * job.weight / sum(other.weight for other in jobs[index:])
        print(f"{job.name}: {seconds:.0f} s …", flush=True)
        since = time.monotonic()
        ends[job.name] = run(job, shared, args.workers, seconds, log)
        print(f"{job.name}: {ends[job.name]}, {time.monotonic() - since:.0f} s", flush=True)
    failed = any(end != "finished" for end in ends.values())
    if failed and log.is_file():  # which stays on this machine
        print(log.read_text(encoding="utf-8", errors="replace")[-TOLD:])
    print(f"The log: {log.relative_to(ROOT) if log.is_relative_to(ROOT) else log}")
    return int(failed)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
