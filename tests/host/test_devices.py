"""The nodes on a device that is not the CPU: nothing mixes the two, half-precision weights, persons that come back."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from ..second_device import SecondDevice

pytestmark = pytest.mark.large  # both devices are this machine's memory
GPU = torch.device("mps")  # of all kinds the one that the host asks least about


@pytest.fixture(scope="module")
def gpu(host, checkpoint, loaded):
    """MODEL, CLIP and VAE that the host keeps on a second device, which is active; `loaded` was made before, on the CPU."""
    import comfy.model_management as management

    with pytest.MonkeyPatch.context() as patch, SecondDevice(GPU), torch.inference_mode():
        patch.setattr(management, "cpu_state", management.CPUState.MPS)
        for name in ("vram_state", "set_vram_to"):
            patch.setattr(management, name, management.VRAMState.NORMAL_VRAM)
        patch.setattr(management, "mac_version", lambda: (15,))
        patch.setattr(management, "soft_empty_cache", lambda force=False: None)
        management.unload_all_models()
        model, clip, vae = host.run("CheckpointLoaderSimple", ckpt_name=checkpoint)
        yield SimpleNamespace(model=model, clip=clip, vae=vae)
        management.unload_all_models()


@pytest.fixture
def train(train, gpu):
    return partial(train, model=gpu.model, clip=gpu.clip, vae=gpu.vae, resolution=64)


def test_devices_do_not_mix(gpu):
    here, there = torch.ones(2), torch.ones(2, device=GPU)
    assert (here.device, there.device, there.view(1, 2).device, there.cpu().device) == (
        torch.device("cpu"),
        GPU,
        GPU,
        here.device,
    )
    assert (2 * there + torch.tensor(1.0)).device == here.to(GPU).device == GPU
    for mixed in (lambda: here + there, lambda: torch.cat([here, there]), lambda: there.numpy()):
        with pytest.raises((RuntimeError, TypeError)):
            mixed()


def test_the_host_keeps_its_models_there(gpu):
    assert gpu.model.load_device == gpu.clip.patcher.load_device == gpu.vae.device == GPU
    assert gpu.model.model.get_dtype() == torch.float16


@pytest.mark.parametrize(
    "inputs",
    [
        {"rank": 2, "photo_words": "smiling"},
        {"convolutions": False, "train_text_encoder": False, "mask": torch.ones(1, 128, 128)},
        {"prior_weight": 1.0, "class_images": torch.rand(2, 128, 128, 3)},
    ],
    ids=["free", "mask", "prior"],
)
def test_fast_finetune(train, gpu, inputs):
    before = [weight.cpu().clone() for weight in gpu.model.model.state_dict().values()]
    person = train(**inputs)
    assert person.up.device.type == person.down.device.type == "cpu"
    assert person.up.any() and person.up.isfinite().all()
    after = gpu.model.model.state_dict().values()
    assert all(torch.equal(weight.cpu(), old) for weight, old in zip(after, before, strict=True))


def test_goes_on_from_a_prediction(run, train, gpu, sample, photo, write_hypernet, hypernet_config):
    (hypernet,) = run("LoadHyperNet", hypernet_name=write_hypernet(hypernet_config, "there.safetensors"))
    predicted, _ = run("PredictLiDB", hypernet=hypernet, image=photo, model=gpu.model)
    assert predicted.up.device.type == "cpu" and predicted.up.any()
    person = train(lidb=predicted, rank=3)
    assert person.rank == 3
    model, clip = run("ApplyLiDBToModel", model=gpu.model, clip=gpu.clip, lidb=person)
    latents = sample(model, clip)
    assert (latents.cpu() - sample(gpu.model, gpu.clip).cpu()).abs().max() > 0
    run("VAEDecode", vae=gpu.vae, samples={"samples": latents})


def test_a_hypernetwork_that_stays_on_the_cpu(run, gpu, photo, write_hypernet, hypernet_config, monkeypatch):
    """With ``--novram`` the host does not move it."""
    import comfy.model_management as management

    monkeypatch.setattr(management, "vram_state", management.VRAMState.NO_VRAM)
    monkeypatch.setattr(management, "set_vram_to", management.VRAMState.NO_VRAM)
    (hypernet,) = run("LoadHyperNet", hypernet_name=write_hypernet(hypernet_config, "novram.safetensors"))
    predicted, _ = run("PredictLiDB", hypernet=hypernet, image=photo, model=gpu.model)
    assert predicted.up.any()
    assert next(hypernet._patcher.model.parameters()).device.type == "cpu"
