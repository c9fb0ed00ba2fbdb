"""Models from Load Diffusion Model, Load CLIP and Load VAE: a tiny SD3 with the host's own CLIP and TAESD, in every form that
its weights come in."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

FORMS = ("float32", "float8", "scaled float8")
BLOCKS = ("joint_blocks.", "double_blocks.", "single_blocks.", "layers.")


@pytest.fixture(scope="module")
def parts(host, base_directory, sd3_files):
    """CLIP and VAE, loaded; the files of the model in every form."""
    folder = base_directory / "models" / "diffusion_models"
    unet = load_file(folder / sd3_files.model)
    for form in FORMS:
        save_file(in_form(unet, form), folder / f"sd3 {form}.safetensors")
    with torch.inference_mode():
        return SimpleNamespace(
            clip=host.stock["CLIPLoader"]().load_clip(sd3_files.clip, "sd3")[0],
            vae=host.stock["VAELoader"]().load_vae(sd3_files.vae)[0],
        )


def in_form(weights, form):
    """A file of the weights: as they are, or those of blocks in eight bits, with a scale for each or without."""
    if form == "float32":
        return weights
    found = {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)} if form == "scaled float8" else {}
    for name, weight in weights.items():
        if not (name.startswith(BLOCKS) and name.endswith(".weight") and weight.ndim == 2):
            found[name] = weight.bfloat16()
        elif form == "float8":
            found[name] = weight.to(torch.float8_e4m3fn)
        else:
            scale = weight.abs().amax() / 448
            found[name] = (weight / scale).to(torch.float8_e4m3fn)
            found[name.replace(".weight", ".scale_weight")] = scale
    return found


@pytest.mark.parametrize("form", FORMS)
def test_a_person_is_trained_applied_and_sampled(host, run, apply, parts, photo, form):
    (model,) = host.stock["UNETLoader"]().load_unet(f"sd3 {form}.safetensors", "default")
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    (options,) = run("FastFinetuneOptions", batch_size=1)
    inputs = {"model": model, "clip": parts.clip, "vae": parts.vae, "image": photo}
    lidb, _ = run("FastFinetune", **inputs, steps=3, options=options)
    assert lidb.layout.describe() == "SD3, 4 layers"
    assert lidb.up.flatten(1).any(1).all()
    after = model.model.state_dict()
    assert all(torch.equal(after[name].float(), tensor.float()) for name, tensor in before.items())

    encode = host.stock["CLIPTextEncode"]().encode
    blank = {"samples": torch.zeros(1, 16, 8, 8)}

    def sample(model, clip):
        positive, negative = encode(clip, "a [v] face")[0], encode(clip, "")[0]
        return host.stock["KSampler"]().sample(model, 3, 2, 4.0, "euler", "simple", positive, negative, blank)[0]

    base, person = sample(model, parts.clip), sample(*apply(lidb, model, parts.clip))
    assert not torch.equal(person["samples"], base["samples"])
    assert host.stock["VAEDecode"]().decode(parts.vae, person)[0].isfinite().all()


@pytest.mark.parametrize("name", ["Flux.1", "Z-Image"])
def test_a_person_of_scaled_weights_is_that_of_ordinary_ones(host, run, photo, monkeypatch, name):
    """The form in which most people have these models; newer hosts keep it while they compute."""
    import comfy.model_detection
    import comfy.sd
    import comfy.supported_models

    models = host.load_file("random_models.py")
    if name not in models.available():
        pytest.skip(f"this ComfyUI has no {name}")
    family, ordinary = models.FAMILIES[name], models.random_model(name)
    monkeypatch.setattr(comfy.model_detection, "detect_unet_config", lambda *_, **__: models.sizes(family))
    if "dim" in (known := getattr(comfy.supported_models, family.supported).unet_config):
        monkeypatch.setitem(known, "dim", family.unet["dim"])
    weights = in_form(ordinary.model.diffusion_model.state_dict(), "scaled float8")
    scaled = comfy.sd.load_diffusion_model_state_dict(weights)
    (options,) = run("FastFinetuneOptions", batch_size=1)

    def train(model):
        inputs = {"clip": models.Encoder(family), "vae": models.Vae(name, model), "image": photo}
        return run("FastFinetune", model=model, **inputs, steps=2, options=options)[0]

    one, other = train(scaled), train(ordinary)
    assert one.layout == other.layout
    assert (one.up - other.up).norm() < 0.4 * other.up.norm()


class Packed(torch.nn.Module):
    """A linear layer as of GGUF loaders: bytes of another shape than its sizes, ordinary numbers on the way."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale, self.bias = linear.weight.abs().amax().item() / 127, linear.bias
        codes = (linear.weight / self.scale).round().to(torch.int8)
        self.weight = torch.nn.Parameter(codes.view(2 * self.out_features, -1), requires_grad=False)

    def ordinary(self) -> torch.Tensor:
        return (self.weight * self.scale).view(self.out_features, self.in_features)

    def forward(self, x):
        return torch.nn.functional.linear(x, self.ordinary().to(x), self.bias)


def test_layers_of_a_foreign_class(host, run, photo):
    models = host.load_file("random_models.py")
    clip = models.Encoder(models.FAMILIES["Z-Image"])

    def train(model):
        vae = models.Vae("Z-Image", model)
        (options,) = run("FastFinetuneOptions", batch_size=1)
        return run("FastFinetune", model=model, clip=clip, vae=vae, image=photo, steps=2, options=options)[0]

    packed, ordinary = models.random_model("Z-Image"), models.random_model("Z-Image")
    for one, other in zip(*(m.model.diffusion_model.layers for m in (packed, ordinary)), strict=True):
        one.attention.qkv = Packed(one.attention.qkv)
        other.attention.qkv.weight.data = one.attention.qkv.ordinary()
    there, here = train(packed), train(ordinary)
    assert there.layout == here.layout
    assert (there.up - here.up).norm() < 0.1 * here.up.norm()


def test_a_clip_of_another_family_is_refused(host, run, parts, photo, monkeypatch):
    models = host.load_file("random_models.py")
    model = models.random_model("Z-Image")
    monkeypatch.setattr(host.module("nodes.host.finetune"), "encode", None)  # is not reached
    inputs = {"clip": parts.clip, "vae": models.Vae("Z-Image", model), "image": photo}
    with pytest.raises(
        host.module("hdb_core.errors").LayoutError, match=r"\(ZImage\) does not run with this CLIP.*Connect"
    ):
        run("FastFinetune", model=model, **inputs)
