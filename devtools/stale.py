"""Which kept tables, pictures and recommendations were made with other weights; run by `python dev.py stale`.

Whatever writes such a file calls `record`, which notes the hashes of the weights in ``benchmarks/results/made_with.json``.
A picture that was copied, or numbers that were chosen from a table, are noted by ``dev.py stale --record FILE …``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path

from filelock import FileLock

from hdb_core.files.atomic import write_text

from .environment import ROOT

RECORDS = ROOT / "benchmarks" / "results" / "made_with.json"
MANIFEST = ROOT / "weights" / "manifest.json"
_BASE, _VAE, _HYPERNET = "miniature_base.safetensors", "miniature_vae.safetensors", "miniature_hypernet.safetensors"
_CONTROL = "miniature_control.safetensors"
_JUDGES = ("judge_a.safetensors", "judge_b.safetensors")
# What a file depends on, by the first pattern that fits; files that fit none are no results.
DEPENDS_ON: Mapping[str, tuple[str, ...]] = {
    "benchmarks/results/made_with.json": (),
    "benchmarks/results/*.lock": (),
    "benchmarks/results/scale.*": (),
    "benchmarks/results/speed.*": (),  # of random weights
    "benchmarks/results/judge.*": (_VAE, *_JUDGES),
    "benchmarks/results/base.*": (_BASE, _VAE, *_JUDGES),
    "benchmarks/results/control.*": (_BASE, _VAE, _HYPERNET, _CONTROL, *_JUDGES),
    # Rows of predictions have the hypernetwork's hash in their key.
    "benchmarks/results/cells.jsonl": (_BASE, _VAE, *_JUDGES),
    "benchmarks/results/people.*": (_BASE, _VAE, *_JUDGES),
    "benchmarks/results/tune_*_hyper.*": (_BASE, _VAE, _HYPERNET, *_JUDGES),
    "benchmarks/results/tune_*": (_BASE, _VAE, *_JUDGES),
    "benchmarks/results/*": (_BASE, _VAE, _HYPERNET, *_JUDGES),
    "example_workflows/* with Z-Image.jpg": (),
    "example_workflows/0[14] *.jpg": (_BASE, _VAE),  # nobody is predicted there
    "example_workflows/* with ControlNet.jpg": (_BASE, _VAE, _HYPERNET, _CONTROL),
    "example_workflows/*.jpg": (_BASE, _VAE, _HYPERNET),
    "hdb_core/recommended.py": (_BASE, _VAE, _HYPERNET, *_JUDGES),
}


def weights_of(path: Path) -> tuple[str, ...]:
    """The files of ``weights/`` that a result depends on; none for any other file."""
    if not path.is_relative_to(ROOT):
        return ()
    name = path.relative_to(ROOT).as_posix()
    return next((weights for pattern, weights in DEPENDS_ON.items() if fnmatch(name, pattern)), ())


def results() -> list[Path]:
    """Every result that depends on weights."""
    found = {path for pattern in DEPENDS_ON for path in ROOT.glob(pattern)}
    return sorted(path for path in found if weights_of(path))


def record(path: Path) -> None:
    """Notes that a result was made with the present weights; files that are no results are left alone."""
    if weights := weights_of(path.resolve()):
        present = hashes()
        made = {path.resolve().relative_to(ROOT).as_posix(): {w: present[w] for w in weights}}
        with FileLock(RECORDS.with_name(f"{RECORDS.name}.lock")):  # or two could read before either writes
            text = json.dumps(dict(sorted((read_records() | made).items())), indent=1) + "\n"
            write_text(RECORDS, text)


def hashes() -> dict[str, str]:
    """The beginning of every weights file's SHA-256, from the manifest."""
    files = json.loads(MANIFEST.read_text(encoding="utf-8"))["files"]
    return {name: entry["sha256"][:12] for name, entry in files.items()}


def read_records() -> dict[str, dict[str, str]]:
    """What `record` has noted: path of a result → weights file → hash."""
    return json.loads(RECORDS.read_text(encoding="utf-8")) if RECORDS.is_file() else {}


def stale(paths: Iterable[Path], records: Mapping[str, Mapping[str, str]], present: Mapping[str, str]) -> list[str]:
    """A line for every result that was made with other weights, or of which that is not known."""
    lines = []
    for path in paths:
        name = path.relative_to(ROOT).as_posix()
        known = records.get(name)
        if known is None:
            lines.append(f"{name}: nobody noted which weights made it")
        elif other := [w for w in weights_of(path) if known.get(w) != present[w]]:
            lines.append(f"{name}: made with another {', '.join(other)}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(prog="dev.py stale", description=__doc__)
    parser.add_argument("--record", type=Path, nargs="+", default=[], metavar="FILE", help="made with today's weights")
    for path in parser.parse_args().record:
        record(path)
    found = stale(results(), read_records(), hashes())
    print("\n".join(found) or "Nothing is stale.")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
