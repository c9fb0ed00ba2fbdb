"""Every model family that the host has, tiny and random: trained, saved, applied, sampled, exported.

`docs/families.md` is the table of what works; a test compares it with what is tested here.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

FAMILIES = (
    "SD 1.x", "SD 2.x", "SDXL", "SD3", "Flux.1", "Flux.2", "Chroma", "Lumina 2", "Z-Image", "Qwen-Image", "HiDream", "AuraFlow", "Wan", "HunyuanImage",
    "Cosmos-Predict2",
)  # fmt: skip
PROMPT = "a [v] face"
STEPS = 16  # in which random UNets lose 5 % of their loss, transformers more; in 8 they lose less than 3 %
TABLE = Path(__file__).parents[2] / "docs" / "families.md"
NAMES = {"SD 1.x": "sd1", "SD 2.x": "sd2", "SDXL": "sdxl"}  # of the others, the host's class


@pytest.fixture(scope="module", params=FAMILIES)
def family(host, request):
    """A model of a family with its text and its VAE, as one object."""
    models = host.load_file("random_models.py")
    if request.param not in models.available():
        pytest.skip(f"this ComfyUI has no {request.param}")
    model = models.random_model(request.param)
    return SimpleNamespace(
        name=request.param,
        models=models,
        model=model,
        clip=models.Encoder(models.FAMILIES[request.param]),
        vae=models.Vae(request.param, model),
        cfg=models.FAMILIES[request.param].cfg,
        side=8 * models.FAMILIES[request.param].downscale,  # pixels
    )


@pytest.fixture
def doubles(host, monkeypatch):
    """The host in float64, where it casts to float32, too; and no autocast."""
    to, single = torch.Tensor.to, torch.Tensor.float

    def kept(tensor, *args, **kwargs):
        if tensor.dtype is torch.float64 and (torch.float32 in args or kwargs.get("dtype") is torch.float32):
            args = tuple(a for a in args if a is not torch.float32)
            kwargs.pop("dtype", None)
        return to(tensor, *args, **kwargs) if args or kwargs else tensor

    monkeypatch.setattr(torch.Tensor, "to", kept)
    monkeypatch.setattr(torch.Tensor, "float", lambda t, *a, **k: t if t.dtype is torch.float64 else single(t))
    monkeypatch.setattr(host.module("nodes.host.denoiser"), "autocast_dtype", lambda device: None)


def noise(model, count: int, generator, side: int = 8, dtype=torch.float32):
    form = model.model.latent_format
    frames = (1,) * (form.latent_dimensions - 2)
    return torch.randn(count, form.latent_channels, *frames, side, side, generator=generator, dtype=dtype)


def test_gradients_are_those_of_central_differences(host, family, doubles):
    adapters, diffusion = host.module("hdb_core.adapters"), host.module("hdb_core.diffusion")
    model = family.models.random_model(family.name, torch.float64)
    model.model.diffusion_model.double()  # some of the host's layers are float32 whatever the model is
    generator = torch.Generator().manual_seed(0)
    with host.module("nodes.host.differentiable").differentiable(model, family.clip, prompts=[PROMPT]) as denoiser:
        latents, noises = (noise(model, 2, generator, dtype=torch.float64) for _ in range(2))
        sigmas = denoiser.sigmas()
        sigma = sigmas[[len(sigmas) // 3, len(sigmas) // 2]].clone().double()
        batch = diffusion.Batch(latents, noises, sigma, torch.ones_like(latents[:, :1]), torch.ones(2))
        text = denoiser.encode_prompts(["a face", PROMPT])
        shapes = [((layer.out_features, 2), (2, layer.in_features)) for layer in denoiser.layout.layers]
        sides = [[0.1 * torch.randn(s, generator=generator).double() for s in pair] for pair in shapes]
        factors = [side.requires_grad_() for pair in sides for side in pair]
        with adapters.attach(denoiser.modules, dict(zip(denoiser.modules, sides, strict=True))):
            gradients = torch.autograd.grad(diffusion.diffusion_loss(denoiser, batch, text), factors)
            with torch.no_grad():
                for part in range(4):  # up and down sides of the even and of the odd layers
                    chosen = range(part, len(factors), 4)
                    way = {i: torch.randn(factors[i].shape, generator=generator).double() for i in chosen}
                    ends = []
                    for step in (1e-4, -2e-4):
                        for i in chosen:
                            factors[i] += step * way[i]
                        ends.append(diffusion.diffusion_loss(denoiser, batch, text))
                    for i in chosen:
                        factors[i] += 1e-4 * way[i]
                    size = sum(gradients[i].square().sum() for i in chosen).sqrt()
                    expected = (ends[0] - ends[1]) / 2e-4
                    assert abs(sum((gradients[i] * way[i]).sum() for i in chosen) - expected) < 1e-5 * size


@pytest.fixture(scope="module")
def learned(host, family):
    """A person of a family, how well it denoises the photo before and after, and the model before and after."""
    photo = torch.rand(1, 128, 128, 3, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        before = fingerprint(family.model)
        inputs = {
            "model": family.model,
            "clip": family.clip,
            "vae": family.vae,
            "image": photo,
            "resolution": family.side,
        }
        (options,) = host.run("FastFinetuneOptions", batch_size=2)
        lidb, _ = host.run("FastFinetune", **inputs, steps=STEPS, options=options)
        after = fingerprint(family.model)
        return SimpleNamespace(lidb=lidb, losses=losses(host, family, lidb, photo), before=before, after=after)


def fingerprint(model) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.model.state_dict(keep_vars=True).items():
        digest.update(
            f"{name} {id(tensor)} {tensor.dtype}".encode() + tensor.flatten().view(torch.uint8).numpy().tobytes()
        )
    for module in model.model.modules():
        digest.update(f"{len(module._forward_hooks)} {'forward' in module.__dict__} {module.training}".encode())
    return digest.hexdigest() + f"{model.patches} {model.model_options}"


def losses(host, family, lidb, photo):
    """The loss of the photo on the base model and with the person, under the same noise at the same levels."""
    diffusion, adapters = host.module("hdb_core.diffusion"), host.module("hdb_core.adapters")
    pixels = torch.nn.functional.interpolate(photo.movedim(-1, 1), (family.side, family.side), mode="area")
    latents = host.module("nodes.host.photos").encode(family.model, family.vae, pixels)
    factors = host.module("hdb_core.lidb").expand(lidb)
    found = []
    given = {"convolutions": lidb.layout.has_convolutions, "prompts": [PROMPT], "layout": lidb.layout}
    with host.module("nodes.host.differentiable").differentiable(family.model, family.clip, **given) as side:
        many = latents.clone().repeat(4, *[1] * (latents.ndim - 1))
        levels = diffusion.NoiseLevels(max_timestep=0.8).of(side.sigmas())
        batch = diffusion.draw(levels, many, torch.full((4,), 0.25), torch.Generator().manual_seed(5))
        text = side.encode_prompts([PROMPT] * 4)
        for chosen in ({}, factors):
            with adapters.attach(side.modules, chosen), torch.no_grad():
                found.append(diffusion.diffusion_loss(side, batch, text).item())
    return found


def test_a_fine_tune_lowers_its_loss(learned):
    base, person = learned.losses
    assert person < 0.97 * base


def test_the_model_stays_as_it_was(learned):
    assert learned.after == learned.before


def test_every_layer_is_trained_under_the_name_that_the_host_has_for_it(host, family, learned):
    host_key = host.module("hdb_core.layout").host_key
    modules = dict(family.model.model.named_modules())
    assert learned.lidb.up.flatten(1).any(1).all()
    assert learned.lidb.layout.family == NAMES.get(family.name, type(family.model.model.model_config).__name__)
    for layer in learned.lidb.layout.layers:
        module = modules[host_key(layer.name, 1).removesuffix(".weight")]
        assert module.weight.shape[0] == layer.out_features and module.weight[0].numel() == layer.in_features


@pytest.fixture
def sample(host, family):
    """Latents of two steps of the stock sampler, as the family's workflows use it."""

    def execute(model, cfg=None):
        positive, negative = (family.clip.encode_from_tokens_scheduled(text) for text in (PROMPT, "ugly"))
        blank = {"samples": torch.zeros_like(noise(family.model, 1, None, side=16))}
        sampler = host.stock["KSampler"]()
        cfg = family.cfg if cfg is None else cfg
        return sampler.sample(model, 3, 2, cfg, "euler", "simple", positive, negative, blank)[0]["samples"]

    return execute


def test_saved_loaded_applied_and_sampled(family, learned, run, host, apply, sample):
    (path,) = run("SaveLiDB", lidb=learned.lidb, filename_prefix=f"lidb/{family.name}", rank=0)
    again, _ = run("LoadLiDB", lidb_name=Path(path).name)
    assert again.layout == learned.lidb.layout
    base, person, loaded = (
        sample(model)
        for model in (
            family.model,
            *(apply(lidb, family.model, family.clip, person_guidance=2.0)[0] for lidb in (learned.lidb, again)),
        )
    )
    assert person.isfinite().all()
    assert (loaded - person).abs().mean() < 0.05 * (person - base).abs().mean()
    assert torch.equal(sample(family.model), base)


def test_exported_lora_gives_the_same_latents(family, learned, run, apply, sample):
    import comfy.sd
    import comfy.utils

    (path,) = run("SaveLiDBAsLoRA", lidb=learned.lidb, filename_prefix=f"loras/{family.name}")
    lora = comfy.utils.load_torch_file(path)
    with_lora, _ = comfy.sd.load_lora_for_models(family.model, None, lora, 1.0, 1.0)
    assert len(with_lora.patches) == len(learned.lidb.layout.layers)
    base, person = sample(family.model), sample(apply(learned.lidb, family.model, family.clip)[0])
    assert (sample(with_lora) - person).abs().mean() < 0.02 * (person - base).abs().mean()


def test_predicted_for_a_hypernetwork_of_its_layers(family, learned, host, run, apply, sample, write_hypernet):
    hypernet = host.module("hdb_core.hypernet")
    encoder = hypernet.EncoderConfig(image_size=64, token_width=32, patch_size=16, stem=((16, 1),), depth=1, heads=2)
    config = hypernet.HyperNetConfig(learned.lidb.layout, encoder=encoder, width=32, depth=1, heads=2)
    (net,) = run("LoadHyperNet", hypernet_name=write_hypernet(config, f"{family.name}.safetensors"))
    lidb, _ = run("PredictLiDB", hypernet=net, image=torch.rand(1, 96, 96, 3), model=family.model)
    assert lidb.layout == learned.lidb.layout
    assert sample(apply(lidb, family.model, family.clip)[0]).isfinite().all()


def test_a_person_of_another_family_is_refused(host, family, learned, apply, run):
    other = "SD3" if family.name != "SD3" else "AuraFlow"
    model, clip = family.models.random_model(other), family.models.Encoder(family.models.FAMILIES[other])
    with pytest.raises(host.module("hdb_core.errors").LayoutError, match="made for another model"):
        apply(learned.lidb, model, clip)


def test_the_table_says_what_is_tested(host):
    models = host.load_file("random_models.py")
    said = {name: cells[:5] for name, cells in table().items()}
    assert said == {name: ["yes"] * 4 + [f"{models.FAMILIES[name].cfg:g}"] for name in FAMILIES}


def table() -> dict[str, list[str]]:
    """The cells of each family in the page's table."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in TABLE.read_text(encoding="utf-8").splitlines()
        if line.startswith("|")
    ]
    return {name: cells for name, *cells in rows[2:]}


def test_the_table_says_which_hosts_have_a_family(host):
    from comfyui_version import __version__

    since = {name: version(cells[5]) for name, cells in table().items()}
    here = version(__version__)
    found = set(host.load_file("random_models.py").available())
    assert {name for name in since if since[name] <= here} <= found
    if here in since.values():
        assert {name for name in since if since[name] > here} & found == set()


def version(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))


def test_what_was_found_does_not_depend_on_who_asked_first(host):
    models, layout = host.load_file("random_models.py"), host.module("hdb_core.layout")
    differentiable = host.module("nodes.host.differentiable").differentiable
    model, clip = models.random_model("Flux.1"), models.Encoder(models.FAMILIES["Flux.1"])
    targets = host.module("nodes.host.targets").block_linears(model)
    few = layout.layout_of({name: targets[name] for name in list(targets)[:2]}, "Flux")
    with differentiable(model, clip, layout=few) as denoiser:
        assert denoiser.layout == few
    with differentiable(model, clip) as denoiser:
        assert denoiser.layout.describe() == "Flux, 12 layers"


def test_a_distilled_model_is_trained_at_the_guidance_of_the_stock_node(host):
    from comfy_extras.nodes_flux import FluxGuidance

    models, guidances = host.load_file("random_models.py"), []
    model, clip = models.random_model("Flux.1"), models.Encoder(models.FAMILIES["Flux.1"])

    def watch(module, arguments, inputs):
        guidances.append(inputs["guidance"].item())

    handle = model.model.diffusion_model.register_forward_pre_hook(watch, with_kwargs=True)
    with host.module("nodes.host.differentiable").differentiable(model, clip):
        handle.remove()
    assert set(guidances) == {FluxGuidance.INPUT_TYPES()["required"]["guidance"][1]["default"]}
