"""Scores in the repository: what comes back, in which order, and a report whose pictures were made elsewhere."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.common import grid
from benchmarks.common.bench import Bench, judge_keys
from benchmarks.common.cells import Cell
from benchmarks.common.kept import KeptScores, Place
from benchmarks.common.methods import Base, FastFinetuning, LearnedBasis, Predicted, fill
from benchmarks.common.results import Table, make_and_report
from benchmarks.common.studio import Sampling
from benchmarks.common.subjects import CLASS_PROMPT, Subject
from miniature.judge import Readings, true_readings
from miniature.people import SPLITS

ROOT = Path(__file__).resolve().parents[2]
PLACE = Place("base", "0123", 7, "a-1")
VALUES = {"scores": {"identity": 0.123456}, "kinds": {"plain": {"adherence": 1.0}}, "facts": {"flops": 10**14}}


def test_values_come_back_rounded(tmp_path):
    kept = KeptScores(tmp_path / "new" / "cells.jsonl", {"a": "a-1"})
    kept.add(PLACE, VALUES)
    kept.save()
    again = KeptScores(kept.path, {"a": "a-1"})
    assert again.get(PLACE) == {**VALUES, "scores": {"identity": 0.1235}}
    assert again.get(PLACE._replace(key="4567")) is None


def test_a_cell_needs_every_judge(tmp_path):
    kept = KeptScores(tmp_path / "cells.jsonl", {"a": "a-1", "b": "b-1"})
    kept.add(PLACE, VALUES)
    assert not kept.has("base", "0123", 7)
    kept.add(PLACE._replace(judge="b-1"), VALUES)
    assert kept.has("base", "0123", 7)
    assert not KeptScores(tmp_path / "cells.jsonl", {}).has("base", "0123", 7)


def test_the_file_has_one_order_and_what_another_process_wrote(tmp_path):
    one, two = (KeptScores(tmp_path / "cells.jsonl", {"a": "a-1"}) for _ in range(2))
    two.add(PLACE._replace(person=10), VALUES)
    two.add(PLACE._replace(person=9), VALUES)
    two.save()
    one.add(PLACE, VALUES)
    one.save()
    lines = [json.loads(line) for line in one.path.read_text().splitlines()]
    assert [line["person"] for line in lines] == [7, 9, 10]


WRITER = """
import sys
from pathlib import Path
from benchmarks.common.kept import KeptScores, Place

kept = KeptScores(Path(sys.argv[1]), {})
print("ready", flush=True)
input()
for person in range(int(sys.argv[2]), 120, 2):
    kept.add(Place("base", "0123", person, "a-1"), {"scores": {}})
    kept.save()
"""


def test_two_processes_lose_no_line(tmp_path):
    path, pipes = tmp_path / "cells.jsonl", {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, path, str(n)], cwd=ROOT, **pipes) for n in range(2)]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("\n")
        writer.stdin.flush()
    assert [writer.communicate() and writer.returncode for writer in writers] == [0, 0]
    assert [json.loads(line)["person"] for line in path.read_text().splitlines()] == list(range(120))


class Judge:
    """Reads a person of its own off every picture: that of its first pixel."""

    def read(self, pictures: np.ndarray) -> Readings:
        subjects = [Subject(SPLITS["dev"].start + int(picture[0, 0, 0])) for picture in pictures]
        return true_readings([(subject.person, subject.context) for subject in subjects])


class BlindJudge:
    def read(self, pictures: np.ndarray) -> Readings:
        raise AssertionError("there is nothing to read")


@pytest.fixture
def table(tmp_path):
    """A function that opens the same table as a process of its own would."""
    (tmp_path / "base.safetensors").write_bytes(b"weights")
    (tmp_path / "judge_a.safetensors").write_bytes(b"judge")

    def opened() -> Table:
        kept = KeptScores(tmp_path / "cells.jsonl", judge_keys(tmp_path))
        bench = Bench(tmp_path / "base.safetensors", Sampling(), 2, tmp_path / "runs", kept, short=True)
        method = FastFinetuning("lidb_40")
        return Table(bench, [Base(), method], ["base", "lidb_40"], [Subject(SPLITS["dev"].start, True)])

    return opened


def write(table: Table, row: str, shade: int) -> None:
    (subject,) = table.subjects
    texts = [*(prompt.text() for prompt in subject.prompts), CLASS_PROMPT]
    pictures = np.full((len(texts), 2, 128, 128, 3), shade, np.uint8)
    table.bench.cells.write(row, table.settings[row], subject.seed, Cell(pictures, {"prompts": texts, "seconds": 2.5}))


def test_a_report_is_the_same_where_the_pictures_are_not(table, tmp_path):
    here = table()
    assert list(here.bench.kept.judges) == ["a"]
    key = here.bench.kept.judges["a"]
    write(here, "base", 3)
    write(here, "lidb_40", 0)
    first = here.objects({key: Judge()})
    assert first[1]["drift"] > 0 and first[1]["pull"] > 0 and first[1]["identity"] > first[0]["identity"]
    here.bench.kept.save()
    shutil.rmtree(tmp_path / "runs")
    elsewhere = table()
    assert elsewhere.objects({key: BlindJudge()}) == first
    assert elsewhere.grid(elsewhere.subjects[:0]) is None


def test_another_device_has_keys_of_its_own(table):
    here = table()
    there = replace(here.bench, device="cuda")
    assert here.bench.key("base", {}) != there.key("base", {})
    assert here.bench.key("base", {}) == replace(here.bench, device="cpu").key("base", {})


def test_a_row_whose_file_is_gone_is_reported_and_not_made(table, tmp_path):
    basis = tmp_path / "basis.safetensors"
    basis.write_bytes(b"vectors")

    def opened() -> Table:
        bench, row = table().bench, "learned"
        return Table(bench, [Base(), FastFinetuning(row, {}, LearnedBasis(basis))], ["base", row], table().subjects)

    here = opened()
    key = here.bench.kept.judges["a"]
    write(here, "base", 3)
    write(here, "learned", 0)
    first = here.objects({key: Judge()})
    here.bench.kept.save()
    basis.unlink()
    elsewhere = opened()
    assert elsewhere.objects({key: BlindJudge()}) == first
    lines: list[str] = []
    fill(elsewhere.bench, elsewhere.methods, ["learned"], Subject(SPLITS["dev"].start + 1, True), lines.append)
    assert not lines and opened().bench.kept.key("another") == ""


def test_rows_that_cannot_be_made_are_named(table, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.common.results.load_judges", lambda _: {"a": Judge()})
    args = Namespace(weights=tmp_path, results=tmp_path, name="tune", share=(0, 1), report_only=False, grid_people=1)
    here = table()
    write(here, "base", 3)
    method = Predicted("hyper", tmp_path / "gone.safetensors")
    make_and_report(args, Table(here.bench, [Base(), method], ["base", "hyper"], here.subjects), 1)
    assert "Not made, as a file is not on this machine, and reported as far as kept: hyper." in capsys.readouterr().out


@pytest.mark.parametrize(("part", "rows"), [(0, {"base", "lidb_40"}), (1, set())])
def test_a_share_judges_and_keeps_its_own_people_and_reports_nothing(table, tmp_path, monkeypatch, part, rows):
    monkeypatch.setattr("benchmarks.common.results.load_judges", lambda _: {"a": Judge()})
    made = table()
    for row in made.rows:
        write(made, row, 3)
    args = Namespace(weights=tmp_path, results=tmp_path, name="hypernet", share=(part, 2), report_only=False)
    make_and_report(args, made, 0)
    (subject,), kept = made.subjects, table().bench.kept
    assert {row for row in made.rows if kept.has(row, made.bench.key(row, made.settings[row]), subject.seed)} == rows
    assert not list(tmp_path.glob("hypernet.*"))


def test_a_grid_stays_where_its_pictures_are_not(table, tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.common.results.load_judges", lambda _: {"a": Judge()})
    args = Namespace(weights=tmp_path, results=tmp_path, name="hypernet", share=(0, 1), report_only=True, grid_people=1)
    here = table()
    write(here, "base", 3)
    write(here, "lidb_40", 0)
    make_and_report(args, here, 1)
    files = [tmp_path / f"hypernet.{suffix}" for suffix in ("json", "md", "png")]
    first = [path.read_bytes() for path in files]
    shutil.rmtree(tmp_path / "runs")
    elsewhere = table()
    write(elsewhere, "base", 9)
    make_and_report(args, elsewhere, 1)
    assert [path.read_bytes() for path in files] == first


def test_without_any_score_the_table_stays(table, tmp_path, monkeypatch, capsys):
    """As where time ended before the first person, or all scores are of other weights."""
    monkeypatch.setattr("benchmarks.common.results.load_judges", lambda _: {"a": Judge()})
    args = Namespace(weights=tmp_path, results=tmp_path, name="hypernet", share=(0, 1), report_only=True, grid_people=1)
    files = [tmp_path / f"hypernet.{suffix}" for suffix in ("json", "md", "png")]
    for file in files:
        file.write_text("as it was")
    make_and_report(args, table(), 1)
    assert [file.read_text() for file in files] == 3 * ["as it was"]
    assert "hypernet stays as it is" in capsys.readouterr().out


def test_a_picture_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "record", lambda _: None)
    sheet = grid.grid([("row", [np.zeros((8, 8, 3), np.uint8)])])
    grid.save(sheet, path := tmp_path / "table.png")
    before = path.read_bytes()

    def full(file, *_, **__):
        file.write_bytes(b"a part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(sheet), "save", lambda self, file, *how, **options: full(file))
    with pytest.raises(OSError, match="No space left"):
        grid.save(sheet, path)
    assert path.read_bytes() == before and [path] == list(tmp_path.iterdir())


def test_drift_is_that_of_the_kept_base(table, tmp_path):
    here = table()
    key = here.bench.kept.judges["a"]
    write(here, "base", 3)
    here.objects({key: Judge()})
    here.bench.kept.save()
    shutil.rmtree(tmp_path / "runs")
    elsewhere = table()
    write(elsewhere, "lidb_40", 0)
    assert elsewhere.objects({key: Judge()})[1]["drift"] > 0


def test_scores_without_a_base_are_not_kept(table):
    here = table()
    key = here.bench.kept.judges["a"]
    write(here, "lidb_40", 0)
    assert here.objects({key: Judge()})[0]["drift"] is None
    assert here.bench.kept.get(here.place("lidb_40", here.subjects[0], key)) is None
