"""Checks on a GPU: a part that fails or hangs stops nothing and keeps what it measured, and all fit into nine minutes."""

import textwrap

import pytest

from benchmarks.gpu import check, first_contact, memory_and_speed, process
from benchmarks.gpu.check import Visit, measured, table
from benchmarks.gpu.nodes import agreement
from benchmarks.gpu.part import Part, interleaved

PREPARING = 20  # seconds before the first part


@pytest.fixture
def part(tmp_path):
    return Part(tmp_path / "part.json", "cpu", 60, toy=True)


@pytest.mark.parametrize("stages", [first_contact.STAGES, memory_and_speed.STAGES])
def test_all_stages_fit_into_nine_minutes(stages):
    assert sum(stage.seconds for stage in stages) + PREPARING <= 9 * 60


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A function that runs source code as a measurement, with a time limit in seconds; its result."""
    folder = tmp_path / "benchmarks" / "gpu"
    folder.mkdir(parents=True)
    monkeypatch.setattr(process, "ROOT", tmp_path)

    def run(code: str, limit: float) -> dict:
        begin = "import json, sys, time\npath = sys.argv[sys.argv.index('--json') + 1]\n"
        (folder / "sick.py").write_text(begin + textwrap.dedent(code))
        stages = [measured("sick", "sick", limit, "--cap-gb", "12")]
        args = check.parser("check", None, stages).parse_args(["--out", str(tmp_path / "out"), "--device", "cpu"])
        visit = Visit("check", stages, args, tmp_path / "work")
        assert visit.run() == 1
        assert {path.name for path in (tmp_path / "out").iterdir()} == {"check.json", "check.md", "check.log"}
        return visit.results[0]

    return run


WRITE = "open(path, 'w').write(json.dumps({'rows': [{'what': 'x', 'value': 1.5}]}))\n"


def test_a_part_that_hangs_is_stopped_and_keeps_its_rows(written):
    result = written(WRITE + "time.sleep(60)", limit=2)  # the last part has no time beyond its own
    assert result["end"] == "stopped after 2 s" and result["seconds"] < 10
    assert result["rows"] == [{"what": "x", "value": 1.5}]
    assert "| | x | value 1.5 |" in table([result])


def test_a_part_that_fails_says_so(written):
    result = written("raise SystemExit(3)", limit=30)
    assert result["end"].startswith("failed with code 3") and result["rows"] == []


def test_a_failure_is_a_result(part, capsys):
    with part.attempt("loading"):
        raise RuntimeError("first line\nin between\nthe cause")
    assert part.rows[0]["failed"] == "RuntimeError: first line … the cause"
    assert '"failed"' in part.path.read_text()
    assert "Traceback" in capsys.readouterr().err


def test_works_take_turns_and_a_broken_one_leaves(part):
    seen = []

    def work(name: str) -> list[float]:
        seen.append(name)
        if name == "broken":
            raise ValueError("no")
        return [9.0] if seen.count(name) == 1 else [1.0, 2.0, 3.0]  # the first warms up

    works = {name: lambda name=name: work(name) for name in ("one", "broken", "two")}
    interleaved(part, works, rounds=3, until=0)
    assert seen == ["one", "broken", "two", "one", "two", "one", "two"]
    rows = {row["what"]: row for row in part.rows}
    assert "failed" in rows["broken"]
    assert (rows["one"]["median"], rows["one"]["lower"], rows["one"]["times"]) == (2.0, 1.25, 6)


def test_agreement_is_paired_over_people():
    near = agreement([(0.5, 0.52), (0.9, 0.88), (0.1, 0.1)])
    assert near["agree"] and near["people"] == 3 and near["difference"] == pytest.approx(0)
    assert not agreement([(0.5, 0.4), (0.9, 0.79), (0.1, 0.0)])["agree"]


def test_a_result_of_the_same_name_is_replaced(part):
    part.add("x", value=1)
    part.add("y", value=2)
    part.add("x", value=3)
    assert [(row["what"], row["value"]) for row in part.rows] == [("y", 2), ("x", 3)]
