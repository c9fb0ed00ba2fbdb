"""The manifest speaks of the files that are there."""

import hashlib
import json

import pytest

from miniature.make import MADE_BY, STAGES, WEIGHTS

MANIFEST = json.loads((WEIGHTS / "manifest.json").read_text())["files"]


@pytest.mark.parametrize("name", sorted(MADE_BY))
def test_file_is_the_one_in_the_manifest(name):
    content = (WEIGHTS / name).read_bytes()
    assert MANIFEST[name]["sha256"] == hashlib.sha256(content).hexdigest()
    assert MANIFEST[name]["bytes"] == len(content) <= 95_000_000


def test_nothing_else_is_shipped():
    shipped = {path.name for path in WEIGHTS.glob("*.safetensors")}
    assert shipped == set(MADE_BY) == set(MANIFEST)
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) <= 180_000_000


@pytest.mark.parametrize("name", sorted(MADE_BY))
def test_every_stage_exists(name):
    assert set(MADE_BY[name]) <= set(STAGES)
    assert MANIFEST[name]["made_by"] == [f"python -m {STAGES[stage]}" for stage in MADE_BY[name]]
