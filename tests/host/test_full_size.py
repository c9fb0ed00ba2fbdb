"""A checkpoint of the full SD 1.5 shapes, with random weights, through the stock loader."""

from __future__ import annotations

import gc
import hashlib
import re
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow
NAME = "full_size.safetensors"


@pytest.fixture
def full_size(host, base_directory):
    """MODEL, CLIP, VAE; the file (2 GB) and the weights are gone afterwards."""
    builder = host.load_file("random_checkpoint.py")
    path = base_directory / "models" / "checkpoints" / NAME
    builder.write_checkpoint(path, full_size=True, identity_text_layers=())
    try:
        yield host.stock["CheckpointLoaderSimple"]().load_checkpoint(NAME)
    finally:
        import comfy.model_management

        comfy.model_management.unload_all_models()
        gc.collect()
        path.unlink()


def digest(*roots: torch.nn.Module) -> str:
    total = hashlib.sha256()
    for root in roots:
        for name, tensor in root.state_dict(keep_vars=True).items():
            total.update(f"{name} {id(tensor)}".encode())
            total.update(tensor.detach().flatten().view(torch.uint8).numpy())
    return total.hexdigest()


@contextmanager
def peak_memory():
    """Yields a function that gives the highest resident memory since the start, in GB; 0 where Linux is absent."""
    if not Path("/proc/self/clear_refs").exists():
        yield lambda: 0.0
        return
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    yield lambda: int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**20


def test_sd15_trains_saves_and_applies(full_size, run, host, photo, sample, capsys):
    model, clip, vae = full_size
    before = digest(model.model, clip.cond_stage_model)
    inputs = {"model": model, "clip": clip}
    since = time.monotonic()
    with peak_memory() as peak:
        (lidb, _) = run("FastFinetune", **inputs, vae=vae, image=photo, steps=3, batch_size=2)
        gigabytes, seconds = peak(), time.monotonic() - since
    assert digest(model.model, clip.cond_stage_model) == before
    assert lidb.layout.describe() == "SD 1.x, 128 UNet + 48 text layers"
    assert torch.isfinite(lidb.up).all()
    assert (lidb.up.flatten(1).norm(dim=1) > 0).all()

    (path,) = run("SaveLiDB", lidb=lidb, filename_prefix="lidb/full_size", rank=2)
    size = Path(path).stat().st_size
    assert size <= 120_000
    person_model, person_clip = run(
        "ApplyLiDBToModel", **inputs, lidb=run("LoadLiDB", lidb_name="full_size_00001_.safetensors")[0]
    )
    assert (len(person_model.patches), len(person_clip.patcher.patches)) == (128, 48)
    person, base = sample(person_model, person_clip), sample(model, clip)
    assert torch.isfinite(person).all()
    assert not torch.equal(person, base)
    report = (
        f"3 steps of 2 at 128 px: {seconds:.0f} s, peak {gigabytes:.1f} GB with the loaded model; {size / 1000:.1f} KB"
    )
    with capsys.disabled():
        sys.stdout.write(f"\nSD 1.5 shapes, {report}\n")
