"""The benchmarks' runner."""

import subprocess
import sys

from devtools import bench


def test_names_end_where_options_begin(monkeypatch):
    commands = []
    monkeypatch.setattr(
        bench.subprocess,
        "run",
        lambda command, **_: commands.append(command) or subprocess.CompletedProcess(command, 0),
    )
    monkeypatch.setattr(sys, "argv", ["bench", "hypernet", "tune", "--rows", "base"])
    assert bench.main() == 0
    assert [command[2:] for command in commands] == [
        [f"benchmarks.{n}", "--rows", "base"] for n in ("hypernet", "tune")
    ]


def test_without_a_name_they_are_listed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", "--rows", "base"])
    assert bench.main() == 2
    assert "hypernet" in capsys.readouterr().out
