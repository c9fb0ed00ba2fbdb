"""Where a tool computes: what is named, what is there, and what the host is told."""

import argparse

import pytest
import torch

from devtools.device import add_option, available, cores, host_options, made_on


def test_auto_is_what_is_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert available("auto") == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert available("auto") == "cpu"


def test_a_device_that_is_not_there_is_refused(capsys):
    parser = argparse.ArgumentParser()
    add_option(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--device", "abacus"])
    assert "no device 'abacus' here" in capsys.readouterr().err
    assert parser.parse_args(["--device", "cpu"]).device == "cpu"


def test_only_the_cpu_needs_an_option_of_the_host():
    assert host_options("cpu") == ("--cpu",)
    assert host_options("cuda") == ()


def test_numbers_say_what_made_them():
    found = made_on("cpu", "float32")
    assert (found["device"], found["dtype"], found["torch"]) == ("cpu", "float32", torch.__version__)


def test_a_processor_is_named_with_the_cores_that_compute():
    """Or seconds of a process that was given one core would be compared with those of all."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert made_on("cpu")["card"].endswith(", 1 core")
    finally:
        torch.set_num_threads(before)
    many = min(before, cores())
    assert made_on("cpu")["card"].endswith(f", {many} cores" if many > 1 else ", 1 core")
