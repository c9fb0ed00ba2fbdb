"""A thousand damaged files of each kind: refused with one sentence, or a file that a writer could have written."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from devtools import fuzz
from hdb_core.errors import HyperNetError
from hdb_core.files import container


@pytest.mark.parametrize("kind", sorted(fuzz.TARGETS))
def test_damaged_files_do_no_harm(kind, tmp_path):
    counts = fuzz.run(kind, 1000, number=20, folder=tmp_path)
    assert sum(counts.values()) >= 1000 and counts["refused"] > 800


@pytest.mark.parametrize(
    ("name", "value"),
    [("step.0.weight", -1.0), ("exp_avg_sq.0.weight", -1.0), ("exp_avg.1.bias", float("nan")), ("net.0.bias", float("inf")),
     ("exp_avg.0.weight", torch.zeros(2, 2)), ("step.0.bias", torch.ones(2)), ("exp_avg_sq.0.bias", torch.ones(2).double())],
)  # fmt: skip
def test_numbers_that_no_training_has_are_refused(tmp_path, name, value):
    path = tmp_path / "state.safetensors"
    fuzz.TARGETS["state"].make(path)
    header, _ = fuzz.split(path.read_bytes())
    fields, tensors = json.loads(header["__metadata__"]["training"]), load_file(path)
    tensors[name] = value if isinstance(value, torch.Tensor) else torch.full_like(tensors[name], value)
    fields["checksum"] = container.checksum(fields, tensors)
    save_file(tensors, path, {"training": json.dumps(fields)})
    with pytest.raises(HyperNetError, match=r"below 0|NaN or infinity|trains other weights"):
        fuzz.TARGETS["state"].load(path)


def test_an_error_that_is_not_ours_is_found(tmp_path):
    honest = tmp_path / "lidb.safetensors"
    fuzz.TARGETS["lidb"].make(honest)

    def load(path):
        raise KeyError("up")

    target = replace(fuzz.TARGETS["lidb"], load=load)
    with pytest.raises(fuzz.Broken, match="KeyError"):
        fuzz.judge(target, honest.read_bytes(), tmp_path / "damaged.safetensors")
