"""What the registry's archive holds: the tracked files without those that `.comfyignore` names."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from tests.host.conftest import COMFYUI, ROOT

MOST_MB = 2  # with the thumbnails
LOADS = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from devtools import inprocess
inprocess.ROOT = Path(sys.argv[3])
host = inprocess.boot(Path(sys.argv[2]), Path(sys.argv[4]))
ours = sorted(name for name, node in host.nodes.items() if node.__module__.startswith(host.package))
host.module("hdb_core.train.__main__")
print(json.dumps(ours))
"""


@pytest.fixture
def archive(tmp_path):
    def listed(*options):
        found = subprocess.run(["git", "ls-files", "-z", *options], cwd=ROOT, capture_output=True, check=False)
        if found.returncode:
            pytest.skip("this is no git checkout")
        return set(found.stdout.decode().split("\0")) - {""}

    folder = tmp_path / "custom_nodes" / "hyperdreambooth"
    for name in listed("-c") - listed("-ci", "--exclude-from=.comfyignore"):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    return folder


def test_it_is_small_and_loads(host, archive, tmp_path):
    assert sum(path.stat().st_size for path in archive.rglob("*") if path.is_file()) < MOST_MB * 2**20
    (tmp_path / "base").mkdir()
    command = [sys.executable, "-P", "-c", LOADS, ROOT, COMFYUI, archive, tmp_path / "base"]
    loaded = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert loaded.returncode == 0, loaded.stderr[-2000:]
    assert set(json.loads(loaded.stdout.splitlines()[-1])) == set(host.nodes)
