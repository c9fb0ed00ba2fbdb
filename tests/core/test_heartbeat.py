"""Two processes of which one is killed, hangs, fails, is slow, or ends before the other."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROCESS = """
import os, sys, time
from datetime import timedelta
import torch.distributed as dist
from hdb_core.train.heartbeat import Heartbeat, address, lost_another

rank, does = int(os.environ["RANK"]), sys.argv[1]
dist.init_process_group("gloo", timeout=timedelta(hours=2))
with Heartbeat(rank, 2, address(), every=0.2, patience=3):
    dist.barrier()
    print("ready", flush=True)
    if does == "waits":
        try:
            dist.barrier()
        except RuntimeError as error:
            raise SystemExit(f"lost another: {lost_another(error)}")
    elif does == "fails":
        raise ValueError("as planned")
    elif does == "works":
        time.sleep(60)
    elif does == "is slow":
        time.sleep(8)  # longer than the patience
        dist.barrier()
"""


@pytest.fixture
def start():
    """A function that starts two processes that do this and that, and waits until they do."""
    processes = []

    def execute(*does):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        environment = {
            **os.environ,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "WORLD_SIZE": "2",
            "OMP_NUM_THREADS": "1",
        }
        for rank, what in enumerate(does):
            own = {**environment, "RANK": str(rank), "PYTHONPATH": str(ROOT)}
            command = [sys.executable, "-c", PROCESS, what]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            processes.append(subprocess.Popen(command, env=own, cwd=ROOT, **pipes))
        for process in processes:
            assert process.stdout.readline() == "ready\n", process.stderr.read()
        return processes

    yield execute
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX")
@pytest.mark.parametrize(
    ("how", "victim", "other"),
    [
        ("SIGKILL", 0, "works"),
        ("SIGKILL", 1, "works"),
        ("SIGKILL", 1, "waits"),
        ("SIGSTOP", 0, "works"),
        ("SIGSTOP", 1, "waits"),
    ],
)
def test_a_dead_process_ends_the_other(start, how, victim, other):
    does = [other, other]
    does[victim] = "works"  # never reaches the barrier at which the other one waits
    processes = start(*does)
    processes[victim].send_signal(getattr(signal, how))
    since = time.monotonic()
    _, said = processes[1 - victim].communicate(timeout=30)
    assert processes[1 - victim].returncode and time.monotonic() - since < 30
    if how == "SIGKILL" and other == "waits":  # there torch notices the closed connection first
        assert "lost another: True" in said
    else:
        assert f"Process {victim} of 2 has ended or hangs, so process {1 - victim} ends, too. Give the same" in said


@pytest.mark.parametrize("victim", [0, 1])
def test_one_that_fails_ends_the_other(start, victim):
    does = ["works", "works"]
    does[victim] = "fails"
    processes = start(*does)
    _, said = processes[1 - victim].communicate(timeout=30)
    assert processes[1 - victim].returncode and f"Process {victim} of 2 has ended" in said


@pytest.mark.parametrize("slow", [0, 1])
def test_a_slow_one_is_waited_for(start, slow):
    does = ["waits", "waits"]
    does[slow] = "is slow"
    assert [process.communicate(timeout=40) and process.returncode for process in start(*does)] == [0, 0]


def test_one_that_is_done_does_not_end_the_other(start):
    processes = start("works", "is done")
    assert processes[1].communicate(timeout=30) and processes[1].returncode == 0
    time.sleep(6)
    assert processes[0].poll() is None
