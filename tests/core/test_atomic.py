"""Files that are whole or not there, whatever happens while they are written."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hdb_core.files.atomic import OLD, creating, replacing, sweep, write_text

ROOT = Path(__file__).resolve().parents[2]
WRITE = {"replacing": replacing, "creating": creating}


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name == "nt", reason="modes are POSIX")
@pytest.mark.parametrize("write", WRITE)
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_new_file_has_the_mode_that_the_umask_gives(tmp_path, write, umask):
    before = os.umask(umask)
    try:
        with WRITE[write](tmp_path / "file.txt") as temporary:
            assert temporary.stat().st_mode & 0o777 == 0o666 & ~umask
    finally:
        os.umask(before)
    assert (tmp_path / "file.txt").stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.skipif(os.name == "nt", reason="modes are POSIX")
@pytest.mark.parametrize("mode", [0o600, 0o664, 0o444])
def test_a_file_that_is_replaced_keeps_its_mode(tmp_path, mode):
    path = tmp_path / "file.txt"
    path.touch()
    path.chmod(mode)
    with replacing(path) as temporary:
        assert temporary.stat().st_mode & 0o777 == 0o600  # nobody else reads it before
        temporary.write_text("new")
    assert path.stat().st_mode & 0o777 == mode and path.read_text() == "new"


@pytest.mark.parametrize("write", WRITE)
def test_an_error_leaves_what_was_there(tmp_path, write):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), WRITE[write](path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "no hard links"])
def test_a_new_file_never_replaces_another(tmp_path, monkeypatch, links):
    def refused(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", refused)
    path = tmp_path / "file.txt"
    with creating(path) as temporary:
        temporary.write_text("first")
    with pytest.raises(FileExistsError), creating(path) as temporary:
        temporary.write_text("second")
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("write", WRITE)
def test_a_full_disk_is_said_of_the_file_itself(tmp_path, write):
    path = tmp_path / "file.txt"
    with pytest.raises(OSError, match=r"No space left on device: '.*file\.txt'$"), WRITE[write](path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not list(tmp_path.iterdir())


def test_a_name_that_was_taken_in_vain_is_given_back(tmp_path, monkeypatch):
    def refused(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)  # no hard links
    monkeypatch.setattr(os, "replace", refused)  # and a scanner that holds the file
    with pytest.raises(PermissionError), creating(tmp_path / "file.txt") as temporary:
        temporary.write_text("text")
    assert not list(tmp_path.iterdir())


WRITER = """
import sys
from pathlib import Path
from hdb_core.files.atomic import replacing
text = "x" * 1_000_000
print("ready", flush=True)
while True:
    with replacing(Path(sys.argv[1])) as temporary:
        temporary.write_text(text)
"""


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is POSIX")
def test_a_kill_at_any_moment_leaves_a_whole_file(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    for delay in (0.0, 0.003, 0.01, 0.03):
        with subprocess.Popen([sys.executable, "-c", WRITER, path], cwd=ROOT, stdout=subprocess.PIPE) as writer:
            writer.stdout.readline()
            time.sleep(delay)
            writer.send_signal(signal.SIGKILL)
        assert path.read_text() in ("old", "x" * 1_000_000)
    assert len(list(tmp_path.iterdir())) > 1  # what was being written
    sweep(tmp_path, tmp_path / "missing")
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_kill_left_yesterday_goes(tmp_path):
    old, new = (tmp_path / f".hdb-{name}.partial" for name in ("old", "new"))
    for path in (old, new):
        path.touch()
    yesterday = time.time() - 100_000
    os.utime(old, (yesterday, yesterday))
    sweep(tmp_path, older_than=OLD)
    assert not old.exists() and new.exists()  # somebody may be writing to this one


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege")
def test_what_cannot_go_stays(tmp_path):
    """In a shared folder it may be another user's."""
    (mine := tmp_path / ".hdb-mine.partial").touch()
    (folder := tmp_path / ".hdb-folder.partial").mkdir()
    os.symlink(loop := tmp_path / ".hdb-loop.partial", loop)
    sweep(tmp_path)
    assert not mine.exists() and folder.is_dir() and loop.is_symlink()


@pytest.mark.parametrize("write", WRITE)
def test_a_drive_with_modes_of_its_own(tmp_path, monkeypatch, write):
    """As one of a network, or of Windows in WSL, where nobody can change them."""

    def refused(*_, **__):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "chmod", refused)
    for text in ("new", "newer")[: 1 + (write == "replacing")]:
        with WRITE[write](tmp_path / "file.txt") as temporary:
            temporary.write_text(text)
        assert (tmp_path / "file.txt").read_text() == text
