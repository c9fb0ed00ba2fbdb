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
    cost_of_equal,
    difference,
    gain_share,
    rank_correlation,
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
    slow = [row(f"dreambooth@{n}", {0: n / 100}, steps=n, seconds=n, flops=n, bytes=n) for n in (40, 90)]
    equal = cost_of_equal(made, [row("base", {0: 0.1}), *slow], "dreambooth")
    assert equal.seconds is None and equal.steps == pytest.approx(50)


def test_the_best_checkpoint_has_the_best_joint_score():
    rows = [row(f"dreambooth@{n}", {1: 0.5}, joint, steps=n) for n, joint in ((50, 0.2), (100, 0.6), (200, 0.4))]
    best = best_checkpoint([BASE, *rows], "dreambooth")
    assert (best.name, best.fact("steps")) == ("dreambooth", 100)
    assert best_checkpoint([BASE], "dreambooth") is None


def checkpoint(steps: int, identity: float, people: tuple[int, ...] = (1, 2), **facts: float) -> Row:
    costs = {"seconds": 2.0 * steps, "flops": 3.0 * steps, "bytes": 1e6, **facts}
    return row(f"dreambooth@{steps}", dict.fromkeys(people, identity), steps=steps, **costs)


def test_a_reference_reaches_an_identity_between_checkpoints():
    base, aim = row("base", {1: 0.1, 2: 0.1, 3: 0.1}), row("hyper", {1: 0.5, 2: 0.7, 3: 9.0})
    rows = [base, aim, checkpoint(400, 0.8), checkpoint(100, 0.4), checkpoint(200, 0.8)]
    found = cost_of_equal(aim, rows, "dreambooth")
    assert found == pytest.approx((150, 300, 450, 1e6, True))
    assert cost_of_equal(aim, [base, checkpoint(100, 1.1)], "dreambooth").steps == pytest.approx(50)
    assert cost_of_equal(aim, [base, checkpoint(100, 0.4)], "dreambooth") == (100, 200, 300, 1e6, False)
    assert cost_of_equal(base, rows, "dreambooth").steps == 0
    for lacking in ([base], [checkpoint(100, 0.4)], [base, checkpoint(100, 0.4, (4,))]):
        assert cost_of_equal(aim, lacking, "dreambooth") is None


def test_how_many_times_less_a_row_costs():
    base = row("base", {1: 0.1, 2: 0.1})
    fast = row("hyper_5", {1: 0.6, 2: 0.6}, steps=5, seconds=4.0, flops=1.0, bytes=100)
    for steps, more in ((150, ""), (100, "> ")):
        slow = [checkpoint(n, n / 250) for n in (100, steps)]
        equal = {"dreambooth": cost_of_equal(fast, [base, *slow], "dreambooth")}
        made = as_object(fast, base, {"dreambooth": slow[-1]}, None, None, equal)
        text = speed_table([made, as_object(base, base, {}, None, None)])
        seconds = "75 (≥ 25)" if steps == 150 else "50 (≥ 25)"
        flops = "450" if steps == 150 else "300"
        assert f"| 5 | 4 | {more}{steps} | {more}{seconds} | {more}{flops} | 10,000 (≥ 10,000) |" in text
        assert len({line.count("|") for line in text.splitlines()}) == 1 and "base" not in text


def test_a_table_takes_the_place_of_the_one_before():
    old = "Text.\n\n| row | people | identity |\n| --- | --- | --- |\n| x | 1 | 2 |\n\n| row | steps |\n| y | 1 |"
    made = "| row | people | identity |\n| --- | --- | --- |\n| x | 3 | 4 |\n| z | 5 | 6 |"
    assert report.with_table(old, made) == old.replace("| x | 1 | 2 |", "| x | 3 | 4 |\n| z | 5 | 6 |")
    assert report.with_table("Text.", made) == "Text."


@pytest.mark.parametrize(
    ("value", "goal", "reached", "text"),
    [
        (31.4, 25, True, "31.4 (≥ 25)"), (12, 25, True, "12 (< 25)"), (12, None, True, "12"), (None, 25, True, ""),
        (31.4, 25, False, "> 31.4 (≥ 25)"), (12, 25, False, "> 12 (25 is open)"), (12, None, False, "> 12"),
        (None, 25, False, ""),
    ],
)  # fmt: skip
def test_goals(value, goal, reached, text):
    assert against_goal(value, goal, reached) == text


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


def test_the_page_of_results_has_the_speeds_of_the_report():
    objects = json.loads((RESULTS / "hypernet.json").read_text(encoding="utf-8"))
    page, made = (ROOT / "docs" / "results.md").read_text(encoding="utf-8"), speed_table(objects)
    assert made in page and report.with_table(page, made) == page


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
