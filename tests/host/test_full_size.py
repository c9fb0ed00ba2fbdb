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

pytestmark = [pytest.mark.slow, pytest.mark.large]
NAME = "full_size.safetensors"


@pytest.fixture(scope="module")
def full_size(host, base_directory):
    """MODEL, CLIP, VAE; the file (2 GB) and the weights are gone afterwards."""
    builder = host.load_file("random_checkpoint.py")
    path = base_directory / "models" / "checkpoints" / NAME
    builder.write_checkpoint(path, full_size=True, identity_text_layers=())
    try:
        with torch.inference_mode():
            loaded = host.stock["CheckpointLoaderSimple"]().load_checkpoint(NAME)
        yield loaded
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
        (options,) = run("FastFinetuneOptions", batch_size=2, train_text_encoder=True)
        (lidb, _) = run("FastFinetune", **inputs, vae=vae, image=photo, steps=3, options=options)
        gigabytes, seconds = peak(), time.monotonic() - since
    assert digest(model.model, clip.cond_stage_model) == before
    assert lidb.layout.describe() == "SD 1.x, 186 UNet + 48 text layers"
    assert torch.isfinite(lidb.up).all()
    assert (lidb.up.flatten(1).norm(dim=1) > 0).all()

    (path,) = run("SaveLiDB", lidb=lidb, filename_prefix="lidb/full_size")
    size = Path(path).stat().st_size
    assert size <= 120_000
    person_model, person_clip = run(
        "ApplyLiDBToModel", **inputs, lidb=run("LoadLiDB", lidb_name="full_size_00001_.safetensors")[0]
    )
    assert (len(person_model.patches), len(person_clip.patcher.patches)) == (186, 48)
    person, base = sample(person_model, person_clip), sample(model, clip)
    assert torch.isfinite(person).all()
    assert not torch.equal(person, base)
    report = (
        f"3 steps of 2 at 128 px: {seconds:.0f} s, peak {gigabytes:.1f} GB with the loaded model; {size / 1000:.1f} KB"
    )
    with capsys.disabled():
        sys.stdout.write(f"\nSD 1.5 shapes, {report}\n")


def test_training_reads_the_same_model(full_size, host, base_directory):
    model, clip, vae = full_size
    module = host.module("hdb_core.train.base.denoiser")
    path = base_directory / "models" / "checkpoints" / NAME
    tokenizer = Path(sys.modules["comfy.sd1_clip"].__file__).parent / "sd1_tokenizer"
    with torch.inference_mode(False):
        read = module.load_base_model(path, torch.device("cpu"), torch.float32, tokenizer)
    noisy = 5 * torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with host.module("nodes.host.differentiable").differentiable(model, clip) as there, torch.no_grad():
        assert there.layout == read.denoiser.layout
        sigma = there.sigmas()[torch.tensor([400])].clone()
        one, other = (d.denoise(noisy, sigma, d.encode_prompts(["a [v] face"])) for d in (there, read.denoiser))
    change = (other - noisy).std()
    # The host computes in bfloat16 where that is fast.
    assert (one - other).std() < 0.03 * change
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    expected = host.module("nodes.host.photos").encode(model, vae, pixels)
    assert (read.encode(pixels) - expected).std() < 0.03 * expected.std()
