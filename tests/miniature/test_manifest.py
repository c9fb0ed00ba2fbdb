"""The manifest speaks of the files that are there."""

import hashlib
import json

import pytest

from miniature.make import MADE_BY, STAGES, WEIGHTS

MANIFEST = json.loads((WEIGHTS / "manifest.json").read_text())["files"]


# Everything in benchmarks/results stands on these four; with another one, all of it has to be made again.
FROZEN = {
    "miniature_vae.safetensors": "645dd7ac84237c1fff6e395017bd2d1ab33171b22a34d5e154ae5b554f960843",
    "miniature_base.safetensors": "690db9983db83789704f21dc28015ffe2950344b07570f869780e4c3f636caf6",
    "judge_a.safetensors": "d9320f31f29f68212f39c85e4e6046414e3edcee1bd5471cdb04677a2d3859bd",
    "judge_b.safetensors": "2118af6adc07390b6173d69fb260ee34965602504ac9359b61986c8b34320afa",
}


@pytest.mark.parametrize("name", sorted(FROZEN))
def test_what_results_stand_on_is_frozen(name):
    assert MANIFEST[name]["sha256"] == FROZEN[name]


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
