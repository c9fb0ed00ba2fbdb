"""Rows of the hypernetwork's benchmark, and which of them another benchmark's cells serve."""

import pytest

from benchmarks import hypernet, people
from benchmarks.common.bench import Bench
from benchmarks.common.dreambooth import DreamBoothConfig
from benchmarks.common.methods import chosen_rows
from benchmarks.common.textual_inversion import TextualInversionConfig


def settings_of(methods):
    return {row: made for method in methods for row, made in method.rows.items()}


@pytest.fixture
def methods(tmp_path, write_hypernet):
    path = write_hypernet(tmp_path / "net.safetensors")

    def make(narrow=path, **settings):
        inversion = TextualInversionConfig(checkpoints=(10, 20))
        return hypernet.all_methods(path, settings, DreamBoothConfig(checkpoints=(50,)), inversion, narrow)

    return make


def test_rows(methods, tmp_path):
    assert chosen_rows(methods(), None, "_saved") == [
        "base", "caption", "hyper", "hyper_as_lora", "hyper_3photos",
        "hyper_5_described", "hyper_10_described", "hyper_14_described", "hyper_20_described", "hyper_40_described",
        "hyper_14", "hyper_14_3photos_described", "hyper_40_3photos_described",
        "hyper_narrow", "hyper_14_described_narrow", "hyper_40_described_narrow",
        "lidb_24_described", "lidb_40_described", "lidb_400_described",
        "lidb_40_described_guided", "lidb_56_described_guided", "lidb_56_3photos_described_guided",
        "lidb_100_3photos_described", "lidb_24", "lora1",
        "lora4", "dreambooth@50", "dreambooth_described@50", "dreambooth_described_base_negative@50",
        "textual_inversion@10", "textual_inversion@20", "stranger", "photo", "render",
    ]  # fmt: skip
    missing = settings_of(methods(narrow=tmp_path / "missing"))
    assert {row for row, made in missing.items() if Bench.misses_file(made)} == {
        "hyper_narrow", "hyper_14_described_narrow", "hyper_14_described_narrow_saved",
        "hyper_40_described_narrow", "hyper_40_described_narrow_saved",
    }  # fmt: skip
    assert chosen_rows(methods(), ["hyper_20_described_saved", "textual_inversion"], "_saved") == [
        "base", "hyper_20_described_saved", "textual_inversion@10", "textual_inversion@20"
    ]  # fmt: skip


def test_rows_of_both_benchmarks_have_the_same_settings(methods):
    here = settings_of(methods())
    there = settings_of(people.all_methods([24, 40, 150, 400], DreamBoothConfig(checkpoints=(50,))))
    shared = {
        "base",
        "caption",
        "lidb_24",
        "lidb_24_described",
        "lidb_40_described",
        "lidb_40_described_guided",
        "lidb_400_described",
        "dreambooth@50",
        "photo",
        "render",
    }
    assert {row for row in here if here[row] == there.get(row)} >= shared
    assert here["stranger"] != there["stranger"]


def test_settings_are_those_of_the_steps_after_the_prediction(methods):
    plain, changed = settings_of(methods()), settings_of(methods(learning_rate=0.005))
    differing = {row.removesuffix("_saved") for row in plain if plain[row] != changed[row]}
    assert differing == {
        "hyper_14",
        "hyper_14_3photos_described",
        "hyper_40_3photos_described",
        "hyper_14_described_narrow",
        "hyper_40_described_narrow",
        *(f"hyper_{n}_described" for n in hypernet.STEPS),
    }
    assert hypernet.single_settings(["learning_rate=0.005", "rank=2"]) == {"learning_rate": 0.005, "rank": 2}
    for wrong in ("learning_rate=0.1,0.2", "steps=3"):
        with pytest.raises(SystemExit, match="one value"):
            hypernet.single_settings([wrong])
