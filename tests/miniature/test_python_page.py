"""The example of docs/python.md runs as it stands, on the miniature."""

import re
import runpy
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "python.md"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with what the page names: a base model, a photo, a hypernetwork."""
    from miniature.checkpoint import HYPERNET_FILE, write_diffusers

    write_diffusers(ROOT / "weights", tmp_path / "model")
    (tmp_path / "hypernet.safetensors").symlink_to(ROOT / "weights" / HYPERNET_FILE)
    (tmp_path / "anna.png").write_bytes((ROOT / "example_workflows" / "input" / "hdb_photo.png").read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_ten_lines_run(folder):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (folder / "page.py").write_text(code, encoding="utf-8")
    made = runpy.run_path(str(folder / "page.py"))
    person, hdb_core = made["person"], made["hdb_core"]
    loaded = hdb_core.load(folder / "anna.safetensors")
    assert (
        loaded.about == person.about
        and 0 < person.about.steps <= hdb_core.recommended.RECOMMENDED[person.about.made_from].most_steps
    )
    assert not torch.equal(person.up, made["start"].up)
    assert not any(module._forward_hooks for module in made["base"].denoiser.modules.values())
