"""Every kept table, picture and recommendation was made with the weights that are shipped."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from devtools import stale

ROOT = Path(__file__).resolve().parents[2]


def test_nothing_that_is_kept_is_stale():
    assert stale.stale(stale.results(), stale.read_records(), stale.hashes()) == []


def test_no_record_speaks_of_a_file_that_is_gone():
    assert {ROOT / name for name in stale.read_records()} == set(stale.results())


@pytest.mark.parametrize("changed", ["miniature_base.safetensors", "judge_a.safetensors"])
def test_other_weights_make_what_depends_on_them_stale(changed):
    present = stale.hashes() | {changed: "0" * 12}
    lines = stale.stale(stale.results(), stale.read_records(), present)
    names = {line.split(":")[0] for line in lines}
    assert "benchmarks/results/base.md" in names and all(changed in line for line in lines)
    assert ("hdb_core/recommended.py" in names) and "benchmarks/results/scale.md" not in names
    assert ("benchmarks/results/judge.json" in names) == changed.startswith("judge")


def test_a_result_that_nobody_recorded_is_listed():
    path = ROOT / "benchmarks" / "results" / "base.md"
    assert stale.stale([path], {}, stale.hashes()) == ["benchmarks/results/base.md: nobody noted which weights made it"]


RECORDING = """
import sys
from pathlib import Path
from devtools import stale

stale.ROOT = Path(sys.argv[1])
results = stale.ROOT / "benchmarks" / "results"
stale.RECORDS = results / "made_with.json"
for i in range(50):
    stale.record(results / f"{sys.argv[2]}_{i}.json")
"""


def test_two_benchmarks_record_at_once(tmp_path):
    (results := tmp_path / "benchmarks" / "results").mkdir(parents=True)
    both = [subprocess.Popen([sys.executable, "-c", RECORDING, tmp_path, name], cwd=ROOT) for name in "ab"]
    assert [process.wait() for process in both] == [0, 0]
    assert len(json.loads((results / "made_with.json").read_text())) == 100


def test_writers_record_what_they_write(tmp_path, monkeypatch):
    from benchmarks.common.files import write_text

    results = tmp_path / "benchmarks" / "results"
    monkeypatch.setattr(stale, "ROOT", tmp_path)
    monkeypatch.setattr(stale, "RECORDS", results / "made_with.json")
    write_text(results / "base.md", "| a |\n")
    write_text(tmp_path / "notes.md", "no result\n")
    assert json.loads(stale.RECORDS.read_text()) == {
        "benchmarks/results/base.md": {name: stale.hashes()[name] for name in stale.weights_of(results / "base.md")}
    }
