"""Means, paired differences, the share of a reference's gain, and the tables."""

import json

import pytest

from benchmarks.common import files, report
from benchmarks.common.report import Row, as_object, best_checkpoint, difference, gain_share, rank_correlation, table


def row(name: str, identity: dict[int, float], joint: float = 0.5, **facts: float) -> Row:
    made = Row(name)
    for person, value in identity.items():
        made.add(person, {"identity": value, "joint": joint}, {"plain": {"edit": joint}}, facts)
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


def test_the_best_checkpoint_has_the_best_joint_score():
    rows = [row(f"dreambooth@{n}", {1: 0.5}, joint, steps=n) for n, joint in ((50, 0.2), (100, 0.6), (200, 0.4))]
    best = best_checkpoint([BASE, *rows], "dreambooth")
    assert (best.name, best.fact("steps")) == ("dreambooth", 100)
    assert best_checkpoint([BASE], "dreambooth") is None


def test_an_object_has_what_the_result_file_promises():
    tuned = row("lidb_40", {1: 0.4, 2: 0.7}, steps=40, seconds=3.0, bytes=40_000, flops=2e12)
    made = as_object(tuned, BASE, REFERENCE, tuned, BASE)
    promised = [
        "row",
        "identity",
        "retrieval",
        "edit",
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
    assert made["second_judge"]["identity"] == pytest.approx(0.2)
    assert made["kinds"] == {"plain": {"edit": 0.5}}
    json.dumps(made)


def test_tables_have_a_cell_for_each_column():
    rows = [as_object(r, BASE, REFERENCE, None, None) for r in (BASE, REFERENCE, row("lidb_40", {1: 0.4}, steps=40))]
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
