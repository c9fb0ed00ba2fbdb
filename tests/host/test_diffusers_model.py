"""The miniature as a diffusers folder, which training reads, computes what ComfyUI computes from the checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from miniature.checkpoint import expand, write_diffusers

WEIGHTS = Path(__file__).resolve().parents[2] / "weights"
HYPERNET = WEIGHTS / "miniature_hypernet.safetensors"
PHOTO = WEIGHTS.parent / "example_workflows" / "input" / "hdb_photo.png"
PROMPTS = ["a [v] face, smiling", "a face, wearing a red hoodie, at the beach"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    target = tmp_path_factory.mktemp("diffusers")
    with torch.inference_mode(False):
        write_diffusers(WEIGHTS, target)
    return target


@pytest.fixture(scope="module")
def trained(host, folder):
    with torch.inference_mode(False):
        module = host.module("hdb_core.training.base_model")
        return module.load_base_model(folder, torch.device("cpu"), torch.float32, convolutions=True)


@pytest.fixture(scope="module")
def in_host(host, base_directory):
    expand(WEIGHTS, base_directory / "models" / "checkpoints" / "shipped.safetensors")
    with torch.inference_mode():
        return host.stock["CheckpointLoaderSimple"]().load_checkpoint("shipped.safetensors")


def test_same_layers_under_the_same_names(host, trained, in_host):
    model, clip, _ = in_host
    modules, family = host.module("nodes.host.targets").target_modules(model, clip, convolutions=True)
    assert host.module("hdb_core.layout").layout_of(modules, family) == trained.denoiser.layout


def test_same_prediction_with_the_same_people(host, trained, in_host, person):
    """One person in the host, the same one in every sample of a batch in training."""
    model, clip, _ = in_host
    lidb = person(3, rank=2, convolutions=True)
    attach, expand_person = host.module("hdb_core.adapters").attach, host.module("hdb_core.lidb").expand
    training = host.module("nodes.host.training").training
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 2, 4, 16, 16, generator=generator)
    outputs, changes = [], []
    with training(model, clip, 512, convolutions=True) as there, torch.no_grad():
        sigma = there.sigmas()[torch.tensor([150, 700])].clone()
        people = {
            name: (up[None].repeat(2, 1, 1), down[None].repeat(2, 1, 1))
            for name, (up, down) in expand_person(lidb).items()
        }
        for denoiser, factors in ((there, expand_person(lidb)), (trained.denoiser, people)):
            noisy = denoiser.add_noise(latents, noise, sigma)
            plain = denoiser.denoise(noisy, sigma, denoiser.encode_prompts(PROMPTS))
            with attach(denoiser.modules, factors):
                outputs.append(denoiser.denoise(noisy, sigma, denoiser.encode_prompts(PROMPTS)))
            changes.append((outputs[-1] - plain).abs().mean())
    assert changes[0] > 0.01
    # The host computes in bfloat16 where that is fast.
    assert (outputs[0] - outputs[1]).abs().mean() < 0.05 * changes[0]


def test_same_latents(host, trained, in_host, photo):
    model, _, vae = in_host
    expected = host.module("nodes.host.images").encode(model, vae, photo.movedim(-1, 1))
    torch.testing.assert_close(trained.encode(photo.movedim(-1, 1)), expected, atol=2e-2, rtol=0)


@pytest.mark.parametrize("made", ["predicted", "fitted"])
def test_people_of_the_training_look_the_same_in_the_host(host, run, trained, in_host, base_directory, made):
    """A person whom the shipped hypernetwork predicts, and one fitted there, from their files, by the host's sampler."""
    import comfy.sample
    import comfy.samplers

    faces, loop, people = (host.module(f"hdb_core.training.{name}") for name in ("faces", "loop", "photos"))
    lidb, prompt, start = host.module("hdb_core.lidb"), "a [v] face, at the beach", trained.denoiser.layout
    someone = people.Person("somebody", (people.Photo(PHOTO),))
    with torch.inference_mode(False):
        if made == "predicted":
            net = host.module("hdb_core.hypernet_file").load(HYPERNET)
            config = net.config
            with torch.no_grad():
                factors = loop.FromFaces(net)(faces.PhotoPixels(config.encoder).read([(someone, 0)])[None])
            basis = config.basis
        else:
            fit = host.module("hdb_core.training.fit")
            config = fit.FitConfig(steps=12, rank=2)
            latents = trained.encode(someone.photos[0].pixels(128).movedim(-1, 0)[None])
            up = fit.fit_people(trained.denoiser, [latents], [[""]], [torch.ones_like(latents[:, :1])], config, torch.Generator().manual_seed(0))  # fmt: skip
            basis, factors = config.basis, (lidb.start_down(config.basis, start, 2)[None], up)
        noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        bases = host.module("hdb_core.basis").bases_of(basis, start)
        adapters = {
            n: tuple(f.expand(2, -1, -1) for f in own) for n, own in lidb.expand_factors(bases, *factors).items()
        }
        there = host.module("hdb_core.training.samples").sample(trained.denoiser, noise, [prompt] * 2, adapters, 8, 3.0)
        nobody = host.module("hdb_core.training.samples").sample(trained.denoiser, noise, [prompt] * 2, {}, 8, 3.0)
        expected, without = trained.decode(there), trained.decode(nobody)
    model, clip, vae = in_host
    if made == "predicted":
        (host.extra_hypernets / HYPERNET.name).symlink_to(HYPERNET)
        (hypernet,) = run("LoadHyperNet", hypernet_name=HYPERNET.name)
        same, _ = run("PredictLiDB", hypernet=hypernet, image=someone.photos[0].whole().movedim(0, -1)[None])
    else:
        path = host.extra / "fitted.safetensors"
        person = lidb.LiDB(start, basis, *(f[0].float() for f in factors), {"prompt": "a [v] face", "token": "[v]"})
        host.module("hdb_core.lidb_file").save(person, path)
        same, _ = run("LoadLiDB", lidb_name=path.name)
    model, clip, *_ = run("ApplyLiDBToModel", model=model, clip=clip, lidb=same, strength_model=1.0, strength_clip=1.0, person_guidance=1.0)  # fmt: skip
    encode = host.stock["CLIPTextEncode"]().encode
    positive, negative = encode(clip, prompt)[0], encode(clip, "")[0]
    table = model.get_model_object("model_sampling").sigmas
    index = torch.linspace(len(table) - 1, 0, 9)[:-1].round().long()
    euler, sigmas = comfy.samplers.sampler_object("euler"), torch.cat([table[index], table.new_zeros(1)])
    latents = comfy.sample.sample_custom(model, noise, 3.0, euler, sigmas, positive, negative, torch.zeros_like(noise))
    found = vae.decode(latents).movedim(-1, 1)
    assert (expected - without).abs().mean() > 0.05
    assert (found - expected).abs().mean() < 1 / 255


def test_an_incomplete_folder_says_what_is_missing(host, folder):
    with pytest.raises(FileNotFoundError, match=r"lacks unet.*--model"):
        host.module("hdb_core.training.base_model").load_base_model(folder / "unet", torch.device("cpu"), torch.float32)
