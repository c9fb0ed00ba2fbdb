"""Trainings in one command: each has its share of the time, a failing one stops nothing, and what is made travels."""

import argparse
import json
from dataclasses import replace

import pytest
from filelock import FileLock

from benchmarks.gpu import base, check, first_contact, memory_and_speed, person, process, tables, training_rates
from benchmarks.gpu.check import Context, Stage, Visit, seconds_of
from devtools import parcel
from devtools.parcel import unpack


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A function that makes a visit of stages given as source code, in which `folder` is the stage's own."""
    monkeypatch.setattr(process, "LOOK_EVERY", 0.1)
    monkeypatch.setattr(process, "ROOT", tmp_path)
    monkeypatch.setattr(check, "RETRY", 0.0)
    monkeypatch.setattr(check, "made_on", lambda device: {"device": device})
    monkeypatch.setattr(parcel, "PIECE", 1000)

    def make(seconds: float = 30, **codes: str) -> Visit:
        def command(code: str, context: Context) -> list[str]:
            begin = (
                f"import pathlib, time; folder = pathlib.Path({str(context.folder)!r}); attempt = {context.attempt}\n"
            )
            (tmp_path / "stage.py").write_text(begin + code)
            return ["stage"]

        stages = [
            Stage(
                name, lambda context, code=code: command(code, context), share=1, keeps=("w.safetensors",), again=True
            )
            for name, code in codes.items()
        ]
        args = argparse.Namespace(
            out=tmp_path / "out",
            minutes=(seconds + check.RESERVE) / 60,
            parts=None,
            toy=True,
            device="cpu",
            slower=1.0,
            go_on=False,
        )
        return Visit("check", stages, args, tmp_path / "work")

    return make


def test_what_an_earlier_visit_packed_stays(made, tmp_path):
    assert made(good=WRITE).run() == 0
    with pytest.raises(SystemExit, match="is of an earlier run: move its results"):
        made(good="pass")
    assert unpack(tmp_path / "out", tmp_path / "back") == ["good/w.safetensors", "good/log.csv"]


def test_a_second_visit_waits_for_the_first(made):
    first, second = made(good=WRITE), made(good="pass")
    with FileLock(first.work / "lock"), pytest.raises(SystemExit, match="Another check runs in"):
        second.run()
    assert first.run() == 0


WRITE = "(folder / 'w.safetensors').write_bytes(bytes(2500)); (folder / 'log.csv').write_text('step,loss\\n1,2\\n9,0.5\\n')\n"


def test_what_is_made_travels_in_pieces(made, tmp_path):
    one = made(good=WRITE, other="pass")
    assert one.run() == 0
    assert unpack(tmp_path / "out", tmp_path / "back") == ["good/w.safetensors", "good/log.csv"]
    assert (tmp_path / "back" / "good" / "w.safetensors").stat().st_size == 2500
    written = json.loads((tmp_path / "out" / "check.json").read_text())
    assert [part["end"] for part in written["parts"]] == ["finished", "finished"]
    assert written["parts"][0]["rows"] == [{"what": "log", "step": "9", "loss": "0.5"}]


def test_results_are_there_while_a_stage_runs_and_a_hanging_one_is_stopped(made, tmp_path, monkeypatch):
    one = made(seconds=3, hangs=WRITE + "time.sleep(60)", after="pass")
    monkeypatch.setattr(check, "RESERVE", 0.0)
    seen = []
    publish = one.publish
    monkeypatch.setattr(one, "publish", lambda: seen.append(one.results[0]["end"]) or publish())
    assert one.run() == 1
    assert seen.count("running") > 2
    assert one.results[0]["end"].startswith("stopped") and one.results[1]["end"] == "finished"
    assert unpack(tmp_path / "out", tmp_path / "back")


def test_scores_travel_while_more_of_them_are_made(made, tmp_path, monkeypatch):
    line = "(folder / 'cells.jsonl').open('a').write('1\\n'); time.sleep(1)\n"
    one = made(table=line * 3)
    one.stages[0] = replace(one.stages[0], keeps=("cells.jsonl",))
    publish, brought = one.publish, set()

    def look() -> None:
        publish()
        if one.results[-1]["end"] == "running" and parcel.pieces(one.out):
            unpack(one.out, tmp_path / "back")
            brought.add((tmp_path / "back" / "table" / "cells.jsonl").read_text())

    monkeypatch.setattr(one, "publish", look)
    assert one.run() == 0 and {"1\n", "1\n1\n"} <= brought


def test_results_that_cannot_be_written_stop_nothing(made, tmp_path, monkeypatch):
    one = made(first="pass", second=WRITE)
    monkeypatch.setattr(one, "_publish", lambda: 1 / 0)
    assert one.run() == 0 and (one.work / "second" / "w.safetensors").is_file()


def test_a_failed_stage_is_tried_once_more(made):
    one = made(sick="raise SystemExit(0 if attempt else 3)", dead="raise SystemExit(4)", after="pass")
    assert one.run() == 1
    ends = [(result["part"], result["end"]) for result in one.results]
    assert ends == [("sick", "failed with code 3: check.log"), ("sick", "finished"), ("dead", "failed with code 4: check.log"),
                    ("dead", "failed with code 4: check.log"), ("after", "finished")]  # fmt: skip


def test_a_stage_without_a_command_stops_nothing(made):
    one = made(first="pass", second="pass")
    one.stages[0] = replace(one.stages[0], command=lambda context: 1 / 0)
    assert one.run() == 1 and [result["end"] for result in one.results] == [
        "ZeroDivisionError: division by zero",
        "finished",
    ]


def test_time_is_shared_out_and_what_is_saved_goes_to_the_later_ones():
    stages = [Stage("a", list, share=1), Stage("b", list, seconds=60), Stage("c", list, share=3)]
    assert seconds_of(stages, 460) == 100
    assert seconds_of(stages[1:], 400) == 60
    assert seconds_of(stages[2:], 340) == 340
    assert seconds_of(stages[1:], 30) == 30 and seconds_of(stages[2:], -5) == 0


@pytest.mark.parametrize("module", [base, person, first_contact, memory_and_speed, tables, training_rates])
@pytest.mark.parametrize("toy", [True, False])
@pytest.mark.parametrize(("attempt", "go_on"), [(0, False), (1, False), (0, True)])
def test_commands_are_understood(module, toy, attempt, go_on, tmp_path, monkeypatch):
    """Every stage's options are those of its program."""
    monkeypatch.setattr(
        argparse.ArgumentParser, "parse_args", lambda self: parsed.append(self.parse_known_args(given)) or quit_()
    )
    parsed: list = []

    def quit_() -> None:
        raise SystemExit

    for name in {"VAE", "BASE"} & set(vars(module)):
        monkeypatch.setattr(module, name, getattr(module, name)._replace(folder=f"none_{name}"))
    for stage in module.STAGES:
        folder = tmp_path / stage.name
        folder.mkdir()
        program, *given = stage.command(Context("cpu", toy, 100, folder, attempt, go_on))
        with pytest.raises(SystemExit):
            __import__(program, fromlist=["main"]).main()
        assert parsed.pop()[1] == [], program
        if attempt and "--rate" in given:
            assert float(given[given.index("--rate") + 1]) < 2e-3


def test_minutes_leave_time_to_start_and_to_end():
    assert float(Context("cpu", False, 340, None).minutes) == pytest.approx(5)
    assert float(Context("cpu", False, 10, None).minutes) > 0
