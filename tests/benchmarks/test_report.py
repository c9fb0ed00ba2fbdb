"""Means, paired differences, the share of a reference's gain, and the tables."""

import json
import re

import pytest

from benchmarks.common import files, report
from benchmarks.common.bench import RESULTS, ROOT
from benchmarks.common.report import (
    Row,
    against_goal,
    as_object,
    best_checkpoint,
    compared,
    cost_of_most,
    difference,
    gain_share,
    rank_correlation,
    reached_table,
    short_table,
    speed_table,
    table,
)


def row(name: str, identity: dict[int, float], joint: float = 0.5, **facts: float) -> Row:
    made = Row(name)
    for person, value in identity.items():
        made.add(person, {"identity": value, "joint": joint}, {"plain": {"adherence": joint}}, facts)
    return made


BASE = row("base", {1: 0.1, 2: 0.3, 3: 0.2})
REFERENCE = row("dreambooth", {1: 0.9, 2: 0.9})


def test_differences_are_paired_over_common_people():
    tuned = row("lidb_40", {2: 0.7, 3: 0.6, 4: 9.0})
    found = difference(tuned, BASE, "identity")
    assert found.value == pytest.approx(0.4)
    assert found.error == pytest.approx(0.0, abs=1e-9)
    assert difference(tuned, BASE, "drift") is None


def test_share_of_the_gain_is_a_ratio_of_means():
    half = row("lidb_40", {1: 0.4, 2: 0.7, 3: 5.0})
    share = gain_share(half, BASE, REFERENCE)
    assert share.value == pytest.approx((0.55 - 0.2) / (0.9 - 0.2))
    assert 0 < share.error < 0.2
    assert gain_share(REFERENCE, BASE, REFERENCE).value == pytest.approx(1)
    assert gain_share(row("one", {1: 0.5}), BASE, REFERENCE) is None


def test_seconds_of_two_cards_are_never_averaged():
    made = Row("lidb_40")
    for person, (card, seconds) in enumerate((("H", 1.0), ("H", 3.0), ("A", 50.0))):
        made.add(
            person, {"identity": 0.5, "joint": 0.5}, {}, {"seconds": seconds, "steps": 40, "made_on": {"card": card}}
        )
    assert (made.timed_on, made.fact("seconds"), made.fact("steps")) == ("H", 2.0, 40)
    slow = [
        row(f"dreambooth@{n}", {0: 0.5}, joint, steps=n, seconds=n, flops=n) for n, joint in ((50, 0.2), (100, 0.6))
    ]
    reached = cost_of_most(slow, "dreambooth")
    assert compared(made, reached)["seconds"] is None
    assert compared(made, reached)["steps"] > 1


def test_the_best_checkpoint_has_the_best_joint_score():
    rows = [row(f"dreambooth@{n}", {1: 0.5}, joint, steps=n) for n, joint in ((50, 0.2), (100, 0.6), (200, 0.4))]
    best = best_checkpoint([BASE, *rows], "dreambooth")
    assert (best.name, best.fact("steps")) == ("dreambooth", 100)
    assert best_checkpoint([BASE], "dreambooth") is None


def checkpoint(steps: int, joint: float, people: tuple[int, ...] = (1, 2)) -> Row:
    name = f"dreambooth@{steps}"
    return row(name, dict.fromkeys(people, 0.5), joint, steps=steps, seconds=2.0 * steps, flops=3.0 * steps)


def test_most_of_the_best_score_lies_between_checkpoints():
    base, none = row("base", {1: 0.1, 2: 0.1, 3: 0.1}, 0.0), row("lidb_40", {1: 0.1})
    rows = [base, none, checkpoint(400, 0.8), checkpoint(100, 0.4), checkpoint(200, 1.0)]
    found = cost_of_most(rows, "dreambooth")
    assert found[1:] == pytest.approx(
        (100 + 100 * 0.55 / 0.6, 2 * (100 + 100 * 0.55 / 0.6), 3 * (100 + 100 * 0.55 / 0.6))
    )
    assert (found.best.name, found.best.fact("steps")) == ("dreambooth", 200)
    first = cost_of_most([base, checkpoint(100, 0.4), checkpoint(200, 0.3)], "dreambooth")
    assert first.steps == pytest.approx(95)
    assert cost_of_most([checkpoint(100, 0.4), checkpoint(200, 0.3)], "dreambooth").steps == 100
    dip = [checkpoint(100, 0.4), checkpoint(200, 0.3), checkpoint(400, 0.4)]
    assert cost_of_most(dip, "dreambooth").steps == 100
    assert cost_of_most([base], "dreambooth") is None
    assert cost_of_most([checkpoint(100, 0.4), checkpoint(200, 0.3, (3,))], "dreambooth") is None


def test_how_many_times_less_a_row_costs():
    reached = cost_of_most([checkpoint(100, 0.8), checkpoint(200, 0.4)], "dreambooth")
    fast = row("hyper_5", {2: 0.5, 3: 0.5}, 0.6, steps=5, seconds=4.0)
    assert compared(fast, reached) == {"steps": 20, "seconds": 50, "flops": None, "joint": pytest.approx(0.75)}
    best = reached.best
    rows = (fast, best, BASE)
    objects = [as_object(r, None, {"dreambooth": best}, None, None, {"dreambooth": reached}) for r in rows]
    assert objects[0]["times_less"]["dreambooth"]["seconds"] == 50
    assert objects[1]["reached"] == {"steps": 100, "seconds": 200, "flops": 300}
    assert [made["times_less"] is None for made in objects] == [False, True, True]
    assert "| dreambooth | 80.0 ± 0.0 | 100 | 100 | 200 |" in reached_table(objects)
    text = speed_table(objects)
    assert "| hyper_5 | 5 | 4 |  | 75.0 | 50 (≥ 25) | 20 |  |" in text
    assert len({line.count("|") for line in text.splitlines()}) == 1


@pytest.mark.parametrize(
    ("value", "goal", "text"), [(31.4, 25, "31.4 (≥ 25)"), (12, 25, "12 (< 25)"), (12, None, "12"), (None, 25, "")]
)
def test_goals(value, goal, text):
    assert against_goal(value, goal) == text


def test_an_object_has_what_the_result_file_promises():
    tuned = row("lidb_40", {1: 0.4, 2: 0.7}, steps=40, seconds=3.0, bytes=40_000, flops=2e12)
    made = as_object(tuned, BASE, {"dreambooth": REFERENCE, "other": tuned}, tuned, BASE)
    promised = [
        "row",
        "identity",
        "retrieval",
        "adherence",
        "joint",
        "leak",
        "drift",
        "diversity",
        "steps",
        "seconds",
        "bytes",
    ]
    assert promised == list(made)[: len(promised)]
    assert made["identity"] == pytest.approx(0.55)
    assert made["drift"] is None
    assert made["steps"] == 40
    assert made["minus_base"]["identity"][0] == pytest.approx(0.35)
    assert made["minus_unsaved"] is None
    assert made["minus_reference"]["identity"][0] == pytest.approx(-0.35)
    assert [value for value, _ in made["share_of_gain"].values()] == pytest.approx([0.5, 1])
    assert made["second_judge"]["identity"] == pytest.approx(0.2)
    assert made["kinds"] == {"plain": {"adherence": 0.5}}
    json.dumps(made)


def test_tables_have_a_cell_for_each_column():
    rows = [
        as_object(r, BASE, {"dreambooth": REFERENCE}, None, None)
        for r in (BASE, REFERENCE, row("lidb_40", {1: 0.4}, steps=40))
    ]
    for text in (table(rows), report.difference_table(rows, "base")):
        assert len({line.count("|") for line in text.splitlines()}) == 1
    assert "20.0 ± 5.8" in table(rows).splitlines()[2]
    assert "+30.0 ± 0.0" in report.difference_table(rows, "base")


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(None, 1, ""), (0.25, 1, "0.25"), (40, 1, "40"), (123456, 1, "123,456"), (3.2e12, 1e12, "3.2")],
)
def test_numbers(value, unit, text):
    assert report.number(value, unit) == text


def test_rounding_reaches_everything():
    assert files.rounded({"a": [1.23456, {"b": 12345.6}], "c": None, "d": 7}) == {
        "a": [1.2346, {"b": 12346}], "c": None, "d": 7
    }  # fmt: skip


def test_rank_correlation():
    assert rank_correlation([1, 2, 3], [10, 20, 15]) == pytest.approx(0.5)
    assert rank_correlation([1, 1, 1], [1, 2, 3]) is None


def test_json_lists_have_an_object_a_line(tmp_path):
    files.write_json(tmp_path / "new" / "people.json", [{"row": "base"}, {"row": "caption"}])
    lines = (tmp_path / "new" / "people.json").read_text().splitlines()
    assert lines == ["[", '{"row": "base"},', '{"row": "caption"}', "]"]


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_a_page_shows_the_report(page):
    objects = json.loads((RESULTS / "hypernet.json").read_text())
    readme = (ROOT / page).read_text(encoding="utf-8")
    assert short_table(readme, objects) == readme
    for row in objects:
        row["adherence"] += 0.01
    lines = zip(readme.split("\n"), short_table(readme, objects).split("\n"), strict=True)
    assert sum(old != new for old, new in lines) >= 5
    with pytest.raises(KeyError, match=r"caption|hyper"):
        short_table(readme, objects[:1])


@pytest.mark.parametrize("page", ["README.md", "docs/results.md", "benchmarks/README.md"])
def test_every_error_that_a_page_names_is_in_a_report(page):
    """Typed by hand, rounded as the author liked, but never invented and never older than the reports."""
    measured = re.compile(r"(\d+(?:\.\d+)?) ± (\d+(?:\.\d+)?)")
    reported = [pair for path in RESULTS.glob("*.md") for pair in measured.findall(path.read_text(encoding="utf-8"))]

    def same(shown: str, exact: str) -> bool:
        return f"{float(exact):.{len(shown.partition('.')[2])}f}" == shown

    shown = measured.findall((ROOT / page).read_text(encoding="utf-8"))
    unknown = [pair for pair in shown if not any(all(map(same, pair, known)) for known in reported)]
    assert shown and not unknown


def test_the_kept_scores_of_a_row_are_of_one_setting():
    """Where a row's file is missing, its most frequent setting is reported: an abandoned one would be as good."""
    lines = map(json.loads, (RESULTS / "cells.jsonl").read_text(encoding="utf-8").splitlines())
    keys: dict[str, set[str]] = {}
    for line in lines:
        keys.setdefault(line["row"], set()).add(line["key"])
    assert not [row for row, found in keys.items() if len(found) != 1]
