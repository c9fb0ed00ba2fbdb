"""SDXL: two text encoders, pooled text in the UNet. Random and small, through the nodes and the stock sampler."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="module")
def learned(host, sdxl, loaded, photo):
    inputs = {"model": sdxl.model, "clip": sdxl.clip, "vae": loaded.vae, "image": photo}
    with torch.inference_mode():
        (options,) = host.run("FastFinetuneOptions", batch_size=1, train_text_encoder=True, learning_rate=0.3)
        return host.run("FastFinetune", **inputs, steps=2, options=options)[0]


def test_a_person_is_learned_in_unet_and_both_text_encoders(learned):
    assert learned.layout.describe() == "SDXL, 52 UNet + 20 text layers"
    # Pictures are made from the last layer but one; the last one of CLIP-G alone reaches them, in the pooled text.
    assert learned.up.flatten(1).any(1).all()


def test_applied_and_as_a_lora_of_the_host(learned, run, apply, sdxl, sample):
    import comfy.sd
    import comfy.utils

    before = sample(sdxl.model, sdxl.clip)
    person = sample(*apply(learned, sdxl.model, sdxl.clip))
    assert (person - before).abs().mean() > 0.05
    assert torch.equal(sample(sdxl.model, sdxl.clip), before)
    (path,) = run("SaveLiDBAsLoRA", lidb=learned)
    with_lora = comfy.sd.load_lora_for_models(sdxl.model, sdxl.clip, comfy.utils.load_torch_file(path), 1.0, 1.0)
    assert (sample(*with_lora) - person).abs().mean() < 0.05 * (person - before).abs().mean()


def test_saved_and_loaded(learned, host, run):
    host.module("hdb_core.files.lidb").save(learned, host.extra / "sdxl.safetensors")
    again, _ = run("LoadLiDB", lidb_name="sdxl.safetensors")
    assert again.layout == learned.layout
    core = host.module("hdb_core.lidb").core
    assert (core(again) - core(learned)).norm() < 1e-3 * core(learned).norm()
