"""The server object itself: how it starts, fails, runs prompts and ends."""

import io
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time

import pytest
from PIL import Image

from devtools.comfy_client import PromptError, PromptInterrupted, ServerError
from devtools.comfy_server import ComfyServer
from devtools.environment import ROOT


def test_stock_sampling_reports_progress_and_pictures(server, sampling_prompt):
    events = []
    result = server.run(sampling_prompt, events.append)
    (picture,) = server.images(result, "7")
    assert Image.open(io.BytesIO(picture)).size == (128, 128)
    assert [(e.class_type, e.value, e.maximum) for e in events if e.node == "5"][-1] == ("KSampler", 4, 4)
    assert result.seconds["5"] > 0


def test_second_run_comes_from_the_cache(server, sampling_prompt):
    server.run(sampling_prompt)
    assert "5" not in server.run(sampling_prompt).seconds


def test_refused_prompt_names_node_and_input(server, sampling_prompt):
    sampling_prompt["5"]["inputs"]["steps"] = 0
    with pytest.raises(PromptError, match=r"KSampler.*steps"):
        server.run(sampling_prompt)


def test_error_in_a_node_is_reported(server, sampling_prompt):
    sampling_prompt["5"]["inputs"]["seed"] = 1
    sampling_prompt["4"] = {"class_type": "VAEEncode", "inputs": {"pixels": ["8", 0], "vae": ["1", 2]}}
    sampling_prompt["8"] = {
        "class_type": "EmptyImage",
        "inputs": {"width": 1, "height": 1, "batch_size": 1, "color": 0},
    }
    with pytest.raises(PromptError) as caught:
        server.run(sampling_prompt)
    assert caught.value.details["traceback"]


def test_interrupt_then_sample_again(server, sampling_prompt):
    sampling_prompt["5"]["inputs"].update(steps=200, seed=2)
    with pytest.raises(PromptInterrupted):
        server.run(sampling_prompt, lambda event: event.node == "5" and server.interrupt())
    sampling_prompt["5"]["inputs"].update(steps=2)
    assert server.images(server.run(sampling_prompt), "7")


def test_taken_port_is_named(prepared_host, tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ServerError, match=f"Port {port} is taken"):
            ComfyServer(prepared_host, tmp_path, port=port).start()


def test_server_that_cannot_start_shows_its_log(prepared_host, tmp_path):
    with pytest.raises(ServerError, match="unrecognized arguments: --no-such-option"):
        ComfyServer(prepared_host, tmp_path, options=("--no-such-option",)).start()


def test_server_that_dies_is_noticed(prepared_host, tmp_path, sampling_prompt):
    sampling_prompt["5"]["inputs"]["steps"] = 1000
    with ComfyServer(prepared_host, tmp_path) as victim, pytest.raises(ServerError, match="ended with code"):
        victim.run(sampling_prompt, lambda event: victim._process.kill())


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is POSIX")
def test_server_ends_with_a_killed_caller(prepared_host, tmp_path):
    script = f"""
        from pathlib import Path
        from devtools.comfy_server import ComfyServer
        from devtools.environment import Host
        server = ComfyServer(Host.from_environ(), Path({str(tmp_path)!r}))
        server.start()
        print(server.port, flush=True)
        input()
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=ROOT,
        env={**os.environ, **prepared_host.environ()},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as caller:
        port = int(caller.stdout.readline())
        caller.send_signal(signal.SIGKILL)
    for _ in range(50):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return
        time.sleep(0.2)
    pytest.fail("The server outlived the process that started it.")
