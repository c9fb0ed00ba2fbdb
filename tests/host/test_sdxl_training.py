"""SDXL in training, read by diffusers, computes what ComfyUI computes: random and small, both text encoders."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

PROMPTS = ["a [v] face, smiling", "a face, wearing a red hoodie, at the beach"]
SIZE, STEPS, GUIDANCE = (4, 16, 12), 6, 3.0  # of the latents; of the sampler


@pytest.fixture(scope="module")
def checkpoint_file(host, sdxl, loaded, tmp_path_factory):
    """What ComfyUI saves of the model."""
    import comfy.sd

    path = tmp_path_factory.mktemp("sdxl") / "sdxl.safetensors"
    with torch.inference_mode():
        comfy.sd.save_checkpoint(str(path), sdxl.model, sdxl.clip, loaded.vae)
    return path


@pytest.fixture(scope="module")
def trained(host, checkpoint_file):
    with torch.inference_mode(False):
        module = host.module("hdb_core.train.base.denoiser")
        words = host.module("hdb_core.train.base.single_file").find_tokenizer(checkpoint_file)
        return module.load_base_model(checkpoint_file, torch.device("cpu"), torch.float32, words, convolutions=True)


@pytest.fixture(scope="module")
def from_folder(host, trained, tmp_path_factory):
    """The same as a diffusers folder."""
    folder, denoiser = tmp_path_factory.mktemp("folder"), trained.denoiser
    parts = {"unet": denoiser.unet, "vae": trained.vae}
    for end, text in zip(("", "_2"), denoiser.texts, strict=True):
        parts |= {f"text_encoder{end}": text.model, f"tokenizer{end}": text.tokenizer}
    with torch.inference_mode(False):
        from diffusers import DDPMScheduler

        schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
        for name, part in (parts | {"scheduler": DDPMScheduler(**schedule)}).items():
            part.save_pretrained(folder / name)
        module = host.module("hdb_core.train.base.denoiser")
        return module.load_base_model(folder, torch.device("cpu"), torch.float32, convolutions=True)


def someone(host, layout, people=1):
    """Random factors of some people, whose effect is plainly visible."""
    basis, generator = host.module("hdb_core.basis").BasisRecipe(), torch.Generator().manual_seed(0)
    down, up = (
        0.5 * torch.randn(people, len(layout.layers), *shape, generator=generator)
        for shape in ((1, basis.down_dim), (basis.up_dim, 1))
    )
    return basis, down, up


def test_same_layers_under_the_same_names(host, trained, from_folder, sdxl):
    modules, family = host.module("nodes.host.targets").target_modules(sdxl.model, sdxl.clip, convolutions=True)
    layout = host.module("hdb_core.layout").layout_of(modules, family)
    assert trained.denoiser.layout == from_folder.denoiser.layout == layout
    assert {layer.name.split(".")[0] for layer in layout.layers} == {"unet", "text_encoder", "text_encoder_2"}


def test_same_prediction_with_the_same_people(host, trained, from_folder, sdxl):
    layout = trained.denoiser.layout
    basis, down, up = someone(host, layout)
    factors = host.module("hdb_core.adapters").Adapters(basis, layout).expand(down, up)
    attach = host.module("hdb_core.adapters").attach
    latents, noise = torch.randn(2, 2, *SIZE, generator=torch.Generator().manual_seed(1))
    found = []
    with (
        host.module("nodes.host.differentiable").differentiable(sdxl.model, sdxl.clip, convolutions=True) as there,
        torch.no_grad(),
    ):
        sigma = there.sigmas()[torch.tensor([150, 700])].clone()
        for denoiser in (there, trained.denoiser, from_folder.denoiser):
            noisy = denoiser.add_noise(latents, noise, sigma)
            plain = denoiser.denoise(noisy, sigma, denoiser.encode_prompts(PROMPTS))
            own = {n: (u[0], d[0]) for n, (u, d) in factors.items()} if denoiser is there else factors
            both = own if denoiser is there else {n: tuple(f.repeat(2, 1, 1) for f in p) for n, p in own.items()}
            with attach(denoiser.modules, both):
                found.append((plain, denoiser.denoise(noisy, sigma, denoiser.encode_prompts(PROMPTS))))
    change = (found[0][1] - found[0][0]).abs().mean()
    assert change > 0.01
    for plain, with_person in found[1:]:
        # The host computes in bfloat16 where that is fast.
        assert (plain - found[0][0]).abs().mean() < 0.05 * change
        assert (with_person - found[0][1]).abs().mean() < 0.05 * change


def test_same_latents(host, trained, sdxl, loaded, photo):
    expected = host.module("nodes.host.photos").encode(sdxl.model, loaded.vae, photo.movedim(-1, 1))
    found = trained.encode(photo.movedim(-1, 1))
    assert (found - expected).abs().mean() < 1e-3 * expected.std()


def test_a_person_predicted_in_training_looks_the_same_in_the_host(host, run, apply, trained, sdxl, photo):
    """Both predict a person from the file of a hypernetwork and draw it, alike to a fiftieth of what it changes."""
    import comfy.sample
    import comfy.samplers

    hypernet, samples = host.module("hdb_core.hypernet"), host.module("hdb_core.train.samples")
    photos, faces = host.module("hdb_core.train.data.photos"), host.module("hdb_core.train.data.faces")
    layout, picture = trained.denoiser.layout, host.extra / "photo.png"
    Image.fromarray((photo[0] * 255).round().to(torch.uint8).numpy()).save(picture)
    someone = photos.Person("someone", (photos.Photo(picture),))
    encoder = hypernet.EncoderConfig(image_size=64, token_width=32, patch_size=16, stem=((16, 1),), depth=1, heads=2)
    config = hypernet.HyperNetConfig(layout, encoder=encoder, width=32, depth=1, heads=2)
    with torch.inference_mode(False), torch.no_grad():
        net = hypernet.HyperNet.create(config)
        net.offset.normal_(generator=torch.Generator().manual_seed(0))
        host.module("hdb_core.files.hypernet").save(net, host.extra_hypernets / "sdxl.safetensors", {})
        pixels = faces.PhotoPixels(encoder).read([(someone, 0)])[None]
        factors = host.module("hdb_core.train.predicted").FromFaces(net)(pixels)
        own = host.module("hdb_core.adapters").Adapters(config.basis, layout).expand(*factors)
        noise = torch.randn(1, *SIZE, generator=torch.Generator().manual_seed(0))
        expected, without = (
            samples.sample(trained.denoiser, noise, PROMPTS[:1], f, STEPS, GUIDANCE) for f in (own, {})
        )
    (loaded_net,) = run("LoadHyperNet", hypernet_name="sdxl.safetensors")
    lidb, _ = run("PredictLiDB", hypernet=loaded_net, image=someone.photos[0].whole().movedim(0, -1)[None])
    model, clip, *_ = apply(lidb, model=sdxl.model, clip=sdxl.clip)
    encode = host.stock["CLIPTextEncode"]().encode
    positive, negative = encode(clip, PROMPTS[0])[0], encode(clip, "")[0]
    table = model.get_model_object("model_sampling").sigmas
    index = torch.linspace(len(table) - 1, 0, STEPS + 1)[:-1].round().long()
    euler, sigmas = comfy.samplers.sampler_object("euler"), torch.cat([table[index], table.new_zeros(1)])
    empty = torch.zeros_like(noise)
    found = comfy.sample.sample_custom(model, noise, GUIDANCE, euler, sigmas, positive, negative, empty)
    found = sdxl.model.model.process_latent_in(found)
    change = (expected - without).abs().mean()
    assert change > 0.05
    assert (found - expected).abs().mean() < 0.02 * change
