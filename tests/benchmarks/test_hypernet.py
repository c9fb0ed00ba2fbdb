"""Rows of the hypernetwork's benchmark."""

import pytest

from benchmarks import hypernet
from benchmarks.common.bench import Bench
from benchmarks.common.dreambooth import DreamBoothConfig
from benchmarks.common.methods import chosen_rows


@pytest.fixture
def net(tmp_path, write_hypernet):
    return write_hypernet(tmp_path / "net.safetensors")


def test_rows(net, tmp_path):
    methods = hypernet.all_methods(net, narrow=net)
    assert chosen_rows(methods, None, "_saved") == [
        "base", "caption", "hyper", "hyper_as_lora", "hyper_3photos",
        "hyper_14_described", "hyper_40_described",
        "hyper_narrow", "hyper_14_described_narrow", "hyper_40_described_narrow",
        "lidb_56_described_guided", "lidb_100_3photos_described", "lora4",
        *(f"dreambooth{how}@{n}" for how in ("", "_described") for n in DreamBoothConfig().checkpoints),
        "textual_inversion@100", "textual_inversion@300", "stranger", "photo", "render",
    ]  # fmt: skip
    missing = hypernet.all_methods(net, narrow=tmp_path / "missing")
    assert {row for m in missing for row, made in m.rows.items() if Bench.misses_file(made)} == {
        "hyper_narrow", "hyper_14_described_narrow", "hyper_14_described_narrow_saved",
        "hyper_40_described_narrow", "hyper_40_described_narrow_saved",
    }  # fmt: skip
    assert chosen_rows(methods, ["hyper_40_described_saved", "textual_inversion"], "_saved") == [
        "base", "hyper_40_described_saved", "textual_inversion@100", "textual_inversion@300"
    ]  # fmt: skip
    with pytest.raises(SystemExit, match="hyper_41"):
        chosen_rows(methods, ["hyper_41"], "_saved")
