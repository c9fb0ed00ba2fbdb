"""A thousand damaged files of each kind: refused with one sentence, or a file that a writer could have written."""

from dataclasses import replace

import pytest

from devtools import fuzz


@pytest.mark.parametrize("kind", sorted(fuzz.TARGETS))
def test_damaged_files_do_no_harm(kind, tmp_path):
    counts = fuzz.run(kind, 1000, number=20, folder=tmp_path)
    assert sum(counts.values()) >= 1000 and counts["refused"] > 800


def test_an_error_that_is_not_ours_is_found(tmp_path):
    honest = tmp_path / "lidb.safetensors"
    fuzz.TARGETS["lidb"].make(honest)

    def load(path):
        raise KeyError("up")

    target = replace(fuzz.TARGETS["lidb"], load=load)
    with pytest.raises(fuzz.Broken, match="KeyError"):
        fuzz.judge(target, honest.read_bytes(), tmp_path / "damaged.safetensors")
