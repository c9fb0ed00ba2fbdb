"""Files that are whole or not there, whatever happens while they are written."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hdb_core.files.atomic import creating, replacing, write_text

ROOT = Path(__file__).resolve().parents[2]
WRITE = {"replacing": replacing, "creating": creating}


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


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
