"""A package that the host imports and does not need: names without content stand for it, and only while it is absent."""

import importlib
import sys

import pytest

from devtools.inprocess import Placeholders


@pytest.fixture
def absent(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Placeholders("hdb_absent"), Placeholders("json")])
    yield
    for name in [name for name in sys.modules if name.startswith("hdb_absent")]:
        del sys.modules[name]


def test_every_name_of_an_absent_package_can_be_imported(absent):
    module = importlib.import_module("hdb_absent.subtitles.stream")
    assert isinstance(module.SubtitleStream, type)
    with pytest.raises(AttributeError):
        module.__version__  # noqa: B018


def test_a_package_that_is_there_is_itself(absent):
    assert importlib.import_module("json.tool").main
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("another_absent")
