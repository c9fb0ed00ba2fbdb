"""The code of docs/files.md, which is not ours to import, reads the people of version 1.0 as we do."""

import re
import runpy
from pathlib import Path

import pytest
import torch

from hdb_core.files.lidb import load
from hdb_core.lidb import delta_weight

from .make_frozen import BITS, LAYOUT

PAGE = Path(__file__).resolve().parents[2] / "docs" / "files.md"
FROZEN = Path(__file__).with_name("frozen")


@pytest.mark.parametrize("name", BITS)
def test_the_page_reads_a_person(name, tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "page.py").write_text(code, encoding="utf-8")
    path = FROZEN / f"{name}.safetensors"
    found, person = runpy.run_path(str(tmp_path / "page.py"))["changes"](path), load(path)
    assert list(found) == [layer.name for layer in LAYOUT.layers]
    for i, change in enumerate(found.values()):
        torch.testing.assert_close(torch.from_numpy(change).float(), delta_weight(person, i), rtol=0, atol=1e-5)
