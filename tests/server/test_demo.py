"""The demonstration's session on a live server."""

import os
import shutil
import signal
import subprocess
import sys

import psutil
import pytest

from devtools import demo


def test_a_session_learns_once_and_paints_with_and_without_the_person(server):
    shutil.copy(demo.PHOTO, server.input)
    session = demo.Session(server, steps=2, seeds=2, seconds={})
    after = session.pictures("a [v] face", "after")
    assert session.saved.parent == server.output / "lidb"
    assert demo.sizes(session.saved)["steps"] == 2
    learned = session.seconds["finetune"]
    others = [session.pictures("a [v] face", column) for column in ("before", "predicted")]
    assert session.seconds["finetune"] == learned
    assert [picture.size for own in (after, *others) for picture in own] == [(128, 128)] * 6
    for own in others:
        assert all(a.tobytes() != b.tobytes() for a, b in zip(after, own, strict=True))


@pytest.fixture
def ctrl_c_is_heard():
    """Processes that are started in the background ignore it, and so would theirs."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c_is_heard")
@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C is sent in another way there")
def test_ctrl_c_ends_the_demonstration_and_its_server():
    """The console sends it to the demonstration alone: the server is of another group."""
    command = [sys.executable, "-u", "-m", "devtools.demo"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=demo.ROOT, start_new_session=True, **pipes) as started:
        assert "Starting ComfyUI" in started.stdout.readline()
        found = psutil.Process(started.pid)
        while not (children := found.children(recursive=True)):
            assert started.poll() is None
        os.killpg(started.pid, signal.SIGINT)
        output, _ = started.communicate(timeout=60)
    assert started.returncode == 130
    assert output.strip() == "Stopped, and the server with it."
    assert not psutil.wait_procs(children, timeout=20)[1]
