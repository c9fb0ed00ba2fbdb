"""Cached cells: what they keep, and that results of other settings are never mixed in."""

import numpy as np
import pytest

from benchmarks.common.cells import Cell, Cells

COMMON = {"checkpoint": "abc", "sampling": {"steps": 20}, "seeds": 4}


def random_cell(prompts: int = 3, seeds: int = 2, width: int = 16) -> Cell:
    pictures = np.random.default_rng(0).integers(0, 256, (prompts, seeds, 8, width, 3), dtype=np.uint8)
    return Cell(pictures, {"prompts": ["a", "b", "c"][:prompts], "seconds": 1.5})


@pytest.mark.parametrize(("prompts", "seeds", "width"), [(3, 2, 16), (1, 5, 8), (2, 1, 8)])
def test_pictures_and_facts_come_back(tmp_path, prompts, seeds, width):
    cells, cell = Cells(tmp_path, COMMON), random_cell(prompts, seeds, width)
    cells.write("lidb_40", {"rank": 4}, 7, cell)
    again = cells.read("lidb_40", {"rank": 4}, 7)
    np.testing.assert_array_equal(again.pictures, cell.pictures)
    assert {name: again.facts[name] for name in cell.facts} == dict(cell.facts)


@pytest.mark.parametrize(
    ("common", "row", "settings", "person"),
    [
        (COMMON | {"checkpoint": "other"}, "lidb_40", {"rank": 4}, 7),
        (COMMON | {"sampling": {"steps": 21}}, "lidb_40", {"rank": 4}, 7),
        (COMMON | {"seeds": 5}, "lidb_40", {"rank": 4}, 7),
        (COMMON, "lidb_150", {"rank": 4}, 7),
        (COMMON, "lidb_40", {"rank": 1}, 7),
        (COMMON, "lidb_40", {"rank": 4}, 8),
    ],
)
def test_anything_else_is_another_cell(tmp_path, common, row, settings, person):
    Cells(tmp_path, COMMON).write("lidb_40", {"rank": 4}, 7, random_cell())
    assert Cells(tmp_path, common).read(row, settings, person) is None


def test_the_order_of_settings_does_not_matter(tmp_path):
    cells = Cells(tmp_path, COMMON)
    assert cells.key({"a": 1, "b": {"c": 2, "d": 3}}) == cells.key({"b": {"d": 3, "c": 2}, "a": 1})


def test_an_interrupted_write_leaves_no_cell(tmp_path, monkeypatch):
    cells = Cells(tmp_path, COMMON)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        cells.write("base", {}, 1, random_cell())
    assert cells.read("base", {}, 1) is None
