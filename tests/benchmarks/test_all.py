"""All tables in one command: what failed is shown where the command prints."""

import sys

import pytest

from benchmarks import all as every


@pytest.mark.parametrize("end", ["finished", "2 processes failed: all.log"])
def test_a_failure_shows_the_end_of_the_log(end, tmp_path, monkeypatch, capsys):
    def run(job, options, workers, seconds, log):
        log.write_text("the reason", encoding="utf-8")
        return end

    folders = ["--results", str(tmp_path / "results"), "--runs", str(tmp_path / "runs")]
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # which it sets
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(sys, "argv", ["all", *folders, "--device", "cpu"])
    monkeypatch.setattr(every, "run", run)
    assert every.main() == (end != "finished")
    assert ("the reason" in capsys.readouterr().out) == (end != "finished")
