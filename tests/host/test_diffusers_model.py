"""The miniature as a diffusers folder, which training reads, computes what ComfyUI computes from the checkpoint."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from miniature.checkpoint import HYPERNET_FILE, expand, write_diffusers

WEIGHTS = Path(__file__).resolve().parents[2] / "weights"
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
        module = host.module("hdb_core.train.base.denoiser")
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
    differentiable = host.module("nodes.host.differentiable").differentiable
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 2, 4, 16, 16, generator=generator)
    outputs, changes = [], []
    with differentiable(model, clip, convolutions=True) as there, torch.no_grad():
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
    expected = host.module("nodes.host.photos").encode(model, vae, photo.movedim(-1, 1))
    torch.testing.assert_close(trained.encode(photo.movedim(-1, 1)), expected, atol=2e-2, rtol=0)


@pytest.mark.parametrize("made", ["predicted", "fitted"])
def test_people_of_the_training_look_the_same_in_the_host(host, run, apply, trained, in_host, made):
    """A person whom the shipped hypernetwork predicts, and one fitted there, from their files, by the host's sampler."""
    import comfy.sample
    import comfy.samplers

    train = {name: host.module(f"hdb_core.train.{name}") for name in ("predicted", "fit", "samples")}
    faces, encoding, people = (host.module(f"hdb_core.train.data.{name}") for name in ("faces", "latents", "photos"))
    adapters_of = host.module("hdb_core.adapters").Adapters
    lidb, prompt, layout = host.module("hdb_core.lidb"), "a [v] face, at the beach", trained.denoiser.layout
    someone = people.Person("somebody", (people.Photo(PHOTO),))
    with torch.inference_mode(False):
        if made == "predicted":
            net = host.module("hdb_core.files.hypernet").load(WEIGHTS / HYPERNET_FILE)
            config = net.config
            with torch.no_grad():
                pixels = faces.PhotoPixels(config.encoder).read([(someone, 0)])[None]
                factors = train["predicted"].FromFaces(net)(pixels)
            adapters = adapters_of(config.basis, layout)
        else:
            adapters = adapters_of(host.module("hdb_core.basis").BasisRecipe(), layout)
            fitter = train["fit"].Fitter(trained.denoiser, adapters, train["fit"].FitConfig(steps=12), rank=2)
            up = fitter.fit([encoding.encode(trained, someone, 128)], torch.Generator().manual_seed(0))
            factors = (lidb.start_down(adapters.recipe, layout, 2)[None], up)
        noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        both = {n: tuple(f.expand(2, -1, -1) for f in own) for n, own in adapters.expand(*factors).items()}
        there, base = (train["samples"].sample(trained.denoiser, noise, [prompt] * 2, f, 8, 3.0) for f in (both, {}))
        expected, without = trained.decode(there), trained.decode(base)
    model, clip, vae = in_host
    if made == "predicted":
        (host.extra_hypernets / HYPERNET_FILE).symlink_to(WEIGHTS / HYPERNET_FILE)
        (hypernet,) = run("LoadHyperNet", hypernet_name=HYPERNET_FILE)
        same, _ = run("PredictLiDB", hypernet=hypernet, image=someone.photos[0].whole().movedim(0, -1)[None])
    else:
        path = host.extra / "fitted.safetensors"
        person = lidb.LiDB(layout, adapters.recipe, *(f[0].float() for f in factors))
        host.module("hdb_core.files.lidb").save(person, path)
        same, _ = run("LoadLiDB", lidb_name=path.name)
    model, clip, *_ = apply(same, model=model, clip=clip)
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
        host.module("hdb_core.train.base.denoiser").load_base_model(folder / "unet", torch.device("cpu"), torch.float32)


def cut(path):
    path.write_bytes(path.read_bytes()[:1000])


def without_a_weight(path):
    tensors = load_file(path)
    save_file({name: tensors[name] for name in sorted(tensors)[1:]}, path, {"format": "pt"})


def pickled(path):
    """The same weights in the older form, which is not read."""
    torch.save(load_file(path), path.with_name("pytorch_model.bin"))
    path.unlink()


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("text_encoder/model.safetensors", pickled, r"text_encoder holds no weights called model\.safetensors"),
        ("text_encoder/model.safetensors", cut, r"model\.safetensors cannot be read \("),
        ("text_encoder/model.safetensors", without_a_weight, "text_encoder lacks 1 weights, '.*' among them"),
        ("vae/diffusion_pytorch_model.safetensors", without_a_weight, "vae lacks 1 weights, '.*' among them"),
        ("vae/config.json", lambda path: path.write_text("{}"), r"A part of .* is damaged \("),
        ("tokenizer/tokenizer.json", cut, r"The tokenizer in .* is damaged \("),
    ],
)
def test_a_damaged_folder_is_no_model_with_random_weights(host, folder, tmp_path, name, damage, said):
    whole = tmp_path / "model"
    shutil.copytree(folder, whole, copy_function=os.link)
    (whole / name).unlink()
    shutil.copyfile(folder / name, whole / name)
    damage(whole / name)
    with pytest.raises(host.module("hdb_core.errors").LayoutError, match=said):
        host.module("hdb_core.train.base.denoiser").load_base_model(whole, torch.device("cpu"), torch.float32)
