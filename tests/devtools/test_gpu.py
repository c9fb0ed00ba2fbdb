"""Bundles for a GPU without a network: loads that fit, nothing missing, and a page that names every check."""

import re

import pytest

from devtools import gpu
from devtools.environment import ROOT, SetupError
from devtools.gpu import CHECKS, Check, bundle, pinned, split, unpacked

SIZES = {"a": 50, "b": 30, "c": 20, "d": 10}


def test_loads_hold_everything_once_and_fit():
    loads = split(SIZES, 60)
    assert sorted(name for load in loads for name in load) == sorted(SIZES)
    assert len(loads) == 2 and all(sum(SIZES[name] for name in load) <= 60 for load in loads)


def test_a_file_that_no_load_holds_is_named():
    with pytest.raises(SetupError, match=r"^a has .*--limit-mib"):
        split(SIZES, 40)


def test_packages_have_the_versions_of_the_environment():
    assert pinned(["b_c"], "a==1\nb_c==2.3\n") == ["b_c==2.3"]
    for check in CHECKS.values():
        assert len(pinned(check.packages)) == len(check.packages)


@pytest.fixture
def there(tmp_path, monkeypatch):
    """A bundle of two small weights and a wheel in two loads, and the folder of the repository on the other machine."""
    here, elsewhere = tmp_path / "here", tmp_path / "there"
    (here / "weights").mkdir(parents=True)
    elsewhere.mkdir()
    for name in ("one", "two"):
        (here / "weights" / name).write_text(name * 100)
    monkeypatch.setattr(gpu, "ROOT", here)
    monkeypatch.setattr(gpu, "commit", lambda: "0123")
    monkeypatch.setattr(gpu, "fetch", lambda packages, folder, python: (folder / "x.whl").write_text("wheel"))
    loads = bundle(Check("module", ("one", "two"), ()), tmp_path / "bundle", 310, "3.12")
    monkeypatch.setattr(gpu, "ROOT", elsewhere)
    return loads, elsewhere


def test_a_bundle_brings_its_weights(there, tmp_path):
    loads, elsewhere = there
    assert len(loads) == 2
    assert unpacked(tmp_path / "bundle")["commit"] == "0123"
    assert (elsewhere / "weights" / "one").read_text() == "one" * 100
    assert (elsewhere / "weights" / "two").is_file()


def test_a_load_that_is_missing_is_named(there):
    loads, elsewhere = there
    with pytest.raises(SetupError, match=r"lacks .*(one|two).*Copy the other loads"):
        unpacked(loads[0])
    assert not (elsewhere / "weights").exists()
    with pytest.raises(SetupError, match="No bundle in"):
        unpacked(elsewhere)


@pytest.mark.parametrize(
    "text",
    ["", '{"commit": "0123", "fi', "\udc80", "[]", "null", '{"files": {}}', '{"commit": "", "files": {"a": null}}'],
)
def test_a_damaged_list_of_contents_is_named(there, text):
    loads, _ = there
    (loads[0] / gpu.CONTENTS).write_text(text, errors="surrogateescape")
    with pytest.raises(SetupError, match=r"bundle\.json is damaged .*Copy the load again"):
        unpacked(loads[0])


def test_a_bundle_replaces_an_earlier_one_and_nothing_else(there, tmp_path, monkeypatch):
    loads, _ = there
    monkeypatch.setattr(gpu, "ROOT", tmp_path / "here")
    target = loads[0].parent
    assert bundle(Check("module", ("one",), ()), target, 1000, "3.12") == [target / "1"] == list(target.iterdir())
    (target / "1" / "note.txt").write_text("mine")
    with pytest.raises(SetupError, match="holds 1, which is no load of a bundle"):
        bundle(Check("module", ("two",), ()), target, 1000, "3.12")
    (target / "1" / "note.txt").rename(target.parent / "note.txt")
    (note := target / "thesis" / "note.txt").parent.mkdir()
    note.write_text("mine")
    (target / "thesis" / gpu.CONTENTS).write_text("{}")
    with pytest.raises(SetupError, match="holds thesis, which is no load of a bundle"):
        bundle(Check("module", ("two",), ()), target, 1000, "3.12")
    assert note.read_text() == "mine" and (target / "1" / "weights" / "one").is_file()


def test_a_bundle_that_fails_leaves_the_earlier_one(there, tmp_path, monkeypatch):
    loads, _ = there
    monkeypatch.setattr(gpu, "ROOT", tmp_path / "here")
    with pytest.raises(SetupError, match="No weights/three"):
        bundle(Check("module", ("three",), ()), loads[0].parent, 1000, "3.12")
    assert all((load / gpu.CONTENTS).is_file() for load in loads)
    assert sorted(path.name for path in loads[0].parent.parent.iterdir()) == ["bundle", "here", "there"]


def test_weights_that_are_there_stay(there, tmp_path):
    _, elsewhere = there
    (elsewhere / "weights").mkdir()
    (elsewhere / "weights" / "one").write_text("mine")
    unpacked(tmp_path / "bundle")
    assert (elsewhere / "weights" / "one").read_text() == "mine"


def test_the_page_names_every_check_and_its_modules_exist():
    page = (ROOT / "benchmarks" / "gpu.md").read_text(encoding="utf-8")
    assert set(re.findall(r"gpu run (\w+) --bundle FOLDER", page)) - {"CHECK"} == set(CHECKS)
    for check in CHECKS.values():
        assert (ROOT / check.module.replace(".", "/")).with_suffix(".py").is_file()
        assert all((ROOT / "weights" / name).is_file() for name in check.weights)
