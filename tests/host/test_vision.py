"""Tokens of a frozen image encoder: those of training are those that the host's own encode_image gives the node."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

TOLERANCE = 1e-5  # of the largest token: both compute at float32, in another order
SIZES = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
CLIP = {**SIZES, "image_size": 56, "patch_size": 14, "intermediate_size": 96}
DINO = {**SIZES, "image_size": 518, "patch_size": 14, "mlp_ratio": 4}
CASES = {
    "clip, quick_gelu": ("CLIPVision", CLIP, ("clip", 56, "quick_gelu", 1e-5)),
    "clip, gelu": ("CLIPVision", CLIP, ("clip", 56, "gelu", 1e-5)),
    "siglip": ("SiglipVision", CLIP, ("siglip", 56, "gelu_pytorch_tanh", 1e-5)),
    "dinov2": ("Dinov2", DINO, ("dinov2", 518, "gelu", 1e-6)),
    "dinov2, swiglu": ("Dinov2", {**DINO, "use_swiglu_ffn": True}, ("dinov2", 518, "gelu", 1e-6)),
}
KINDS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model", "dinov2": "dinov2"}


@pytest.fixture
def photos():
    """Of several shapes, larger and smaller than an encoder's square, (3, H, W) in 0..1."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 80, 60), (3, 50, 91), (3, 56, 56), (3, 700, 600))
    return [torch.rand(shape, generator=generator) for shape in shapes]


@pytest.fixture(params=CASES)
def encoders(request, host, tmp_path, monkeypatch):
    """A random encoder as training loads it and as the host does."""
    family, sizes, (architecture, image_size, activation, epsilon) = CASES[request.param]
    vision = host.module("hdb_core.train.base.vision")
    colors = {row.architecture: row.colors for row in vision.HOST_ENCODERS}[architecture]
    row = vision.HostEncoder("small", architecture, 48, 3, image_size, 14, activation, epsilon, colors)
    monkeypatch.setattr(vision, "HOST_ENCODERS", [row])
    # What the folder itself says of activation and norms does not count in the host.
    config = getattr(transformers, f"{family}Config")(**sizes, hidden_act="relu", layer_norm_eps=0.1)
    with torch.inference_mode(False), torch.random.fork_rng():
        model = getattr(transformers, f"{family}Model")(config)
        generator = torch.Generator().manual_seed(1)
        for weight in model.parameters():
            weight.data = 0.2 * torch.randn(weight.shape, generator=generator)
        model.save_pretrained(tmp_path / "encoder")
    as_published(tmp_path / "encoder" / "model.safetensors", architecture)
    return vision.load_vision_encoder(tmp_path / "encoder", torch.device("cpu")), of_host(row, sizes, tmp_path)


def as_published(path, architecture):
    """Files of CLIP and SigLIP name the tower, which newer transformers leave out."""
    prefix = "" if architecture == "dinov2" else "vision_model."
    weights = {prefix + name.removeprefix(prefix): weight for name, weight in load_file(path).items()}
    save_file(weights, path, {"format": "pt"})


def of_host(row, sizes, folder):
    import comfy.clip_vision
    import comfy.utils

    described = {**sizes, "model_type": KINDS[row.architecture], "num_channels": 3, "hidden_act": row.activation,
                 "image_mean": row.colors[0], "image_std": row.colors[1], "layer_norm_eps": row.epsilon,
                 "use_swiglu_ffn": sizes.get("use_swiglu_ffn", False)}  # fmt: skip
    (folder / "host.json").write_text(json.dumps(described))
    model = comfy.clip_vision.ClipVisionModel(folder / "host.json")
    missing, _ = model.load_sd(comfy.utils.load_torch_file(str(folder / "encoder" / "model.safetensors")))
    assert not missing
    return model


def test_training_sees_what_the_node_sees(encoders, photos):
    trained, hosted = encoders
    assert trained.config.name == "encoder" and trained.config.kind == "clip_vision"
    for photo in photos[-2:] if trained.config.image_size > 500 else photos:
        expected = hosted.encode_image(photo[None].movedim(1, -1))["penultimate_hidden_states"]
        tokens = trained.encode([photo])
        assert tokens.shape[1:] == (trained.config.num_tokens, trained.config.token_width)
        torch.testing.assert_close(tokens, expected.float(), atol=TOLERANCE * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("encoders", ["clip, gelu"], indirect=True)
def test_a_person_of_several_photos_is_the_same_to_training_and_node(run, host, loaded, base_directory, encoders):
    """Tokens side by side; the IMAGE batch in the node, the photos one by one in training."""
    trained, hosted = encoders
    hypernet, layout = host.module("hdb_core.hypernet"), host.module("hdb_core.layout")
    modules, family = host.module("nodes.host.targets").target_modules(loaded.model, loaded.clip)
    sizes = {"encoder": trained.config, "width": 32, "depth": 2, "heads": 2}
    net = hypernet.HyperNet.create(hypernet.HyperNetConfig(layout.layout_of(modules, family), **sizes))
    folder = base_directory / "models" / "hyperdreambooth"
    folder.mkdir(parents=True, exist_ok=True)
    host.module("hdb_core.files.hypernet").save(net, folder / "vision_pair.safetensors", {}, torch.float32)
    batch = torch.rand(2, 3, 90, 70, generator=torch.Generator().manual_seed(2))
    (node,) = run("LoadHyperNet", hypernet_name="vision_pair.safetensors", clip_vision=hosted)
    person, _ = run("PredictLiDB", hypernet=node, image=batch.movedim(1, -1))
    tokens = torch.cat([trained.encode([photo]) for photo in batch])
    torch.testing.assert_close(person.up, net.eval()(tokens.flatten(0, 1)[None])[1][0], atol=1e-6, rtol=1e-4)
    assert not torch.allclose(person.up, net(tokens[:1])[1][0], atol=1e-4)


def test_the_list_is_the_hosts(host):
    """Every row of the list against the host's JSON files."""
    import comfy.clip_vision

    folder = comfy.clip_vision.__file__.rsplit("/", 1)[0]
    found = {}
    for name in ("clip_vision_config_vitl", "clip_vision_config_vitl_336", "clip_vision_config_h", "clip_vision_config_g",
                 "clip_vision_siglip_384", "clip_vision_siglip_512", "image_encoders/dino2_large",
                 "image_encoders/dino2_giant"):  # fmt: skip
        with open(f"{folder}/{name}.json") as file:
            found[name] = json.load(file)
    rows = host.module("hdb_core.train.base.vision").HOST_ENCODERS
    assert len(rows) == len(found)
    for row, sizes in zip(rows, found.values(), strict=True):
        read = [sizes[k] for k in ("hidden_size", "num_hidden_layers", "image_size", "patch_size", "hidden_act")]
        assert read == [row.width, row.depth, row.image_size, row.patch_size, row.activation]
        assert sizes["model_type"] == KINDS[row.architecture]
        if "image_mean" in sizes:
            assert (tuple(sizes["image_mean"]), tuple(sizes["image_std"])) == row.colors
