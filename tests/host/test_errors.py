"""Bad input: a plain sentence that says what to do, before heavy work, and nothing is lost."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch


def image(height=128, width=128, batch=1, channels=3):
    return torch.rand(batch, height, width, channels, generator=torch.Generator().manual_seed(0))


def mask(height=128, width=128, value=0.0):
    return torch.full((1, height, width), value)


BAD_INPUT = {
    "no photo": ({"image": image(batch=0)}, "There is no photo"),
    "1 x 1 photo": ({"image": image(1, 1)}, "1 × 1 pixels.*larger photo"),
    "thin photo": ({"image": image(100, 4000), "resolution": 128}, "Crop the photo"),
    "two channels": ({"image": image(channels=2)}, "batch, height, width, 3"),
    "NaN photo": ({"image": image() * float("nan")}, "NaN"),
    "empty mask": ({"mask": mask()}, "mask is empty.*Mask Editor"),
    "empty mask of Load Image": ({"mask": mask(64, 64)}, "mask is empty"),
    "mask of another size": ({"mask": mask(64, 64, 1.0)}, "128 × 128 pixels, the mask 64 × 64"),
    "two masks for one photo": ({"mask": mask(value=1.0).expand(2, -1, -1)}, "1 photos and 2 masks"),
    "words for two photos": ({"photo_words": "smiling\nat the beach"}, "line of photo_words or one for each of the 1"),
    "empty prompt": ({"prompt": "  "}, "prompt"),
    "rank 0": ({"rank": 0}, "rank"),
    "rank above the basis": ({"rank": 51}, r"got 51 for rank\. Give it 1 to 50\."),
    "steps below 0": ({"steps": -1}, "steps"),
    "batch 0": ({"batch_size": 0}, "batch_size"),
    "learning rate 0": ({"learning_rate": 0.0}, "learning_rate"),
    "prior with an empty class prompt": (
        {"prior_weight": 1.0, "class_prompt": "", "class_images": image()},
        "class_prompt",
    ),
}


@pytest.mark.parametrize(("inputs", "message"), BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_fast_finetune_refuses(train, host, monkeypatch, inputs, message):
    errors = host.module("hdb_core.errors")
    monkeypatch.setattr(host.module("nodes.host.finetune"), "encode", None)  # is not reached
    with pytest.raises(errors.HDBError, match=message):
        train(**inputs)


BAD_MASKS = {
    "a number": (torch.tensor(1.0), "batch, height, width"),
    "a row": (torch.ones(64), "batch, height, width"),
    "none": (mask()[:0], "batch, height, width"),
    "no height": (torch.ones(1, 0, 128), "batch, height, width"),
    "NaN": (mask(value=float("nan")), "NaN"),
    "infinity": (mask(value=float("inf")), "NaN or infinite"),
}


@pytest.mark.parametrize(("given", "message"), BAD_MASKS.values(), ids=BAD_MASKS)
@pytest.mark.parametrize("node_id", ["FastFinetune", "CropToFace", "PasteFace"])
def test_a_mask_that_is_none(train, run, host, node_id, given, message):
    with pytest.raises(host.module("hdb_core.errors").HDBError, match=message):
        if node_id == "FastFinetune":
            train(mask=given)
        else:
            others = {"face": image(), "box": {"x": 0, "y": 0, "width": 64, "height": 64}}
            run(node_id, image=image(), mask=given, **others if node_id == "PasteFace" else {})


@pytest.mark.parametrize("kind", [torch.bool, torch.int32, torch.float16])
def test_a_mask_of_another_type(run, kind):
    marked = torch.zeros(1, 128, 128, dtype=kind)
    marked[:, 40:90, 40:90] = 1
    _, _, (box,) = run("CropToFace", image=image(), mask=marked)
    assert box["width"] == round(1.34 * 50)


def test_rank_below_the_connected_lidb(train, person):
    assert train(lidb=person(1, rank=4), rank=2, steps=1).rank == 4


def test_huge_photo_is_made_smaller(train):
    assert train(image=image(4000, 6000), resolution=128, steps=1).up.isfinite().all()


def test_another_family_trains_too(train, sd2):
    lidb = train(model=sd2.model, clip=sd2.clip, steps=1)
    assert lidb.layout.describe() == "SD 2.x, 52 UNet + 8 text layers"
    assert (lidb.up.flatten(1).norm(dim=1) > 0).sum() >= 52 + 4


@pytest.mark.parametrize("node_id", ["FastFinetune", "ApplyLiDBToModel"])
def test_model_of_another_family(run, train, host, loaded, sd2, person, node_id, monkeypatch):
    errors = host.module("hdb_core.errors")
    monkeypatch.setattr(host.module("nodes.host.finetune"), "encode", None)  # is not reached
    inputs = {"model": sd2.model, "clip": sd2.clip, "lidb": person(1)}
    with pytest.raises(errors.LayoutError, match=r"SD 1\.x, 32 UNet \+ 8 text layers.*SD 2\.x"):
        train(**inputs) if node_id == "FastFinetune" else run(node_id, **inputs)


@pytest.mark.parametrize("node_id", ["FastFinetune", "ApplyLiDBToModel"])
def test_clip_of_another_family(run, train, host, loaded, sd2, person, node_id):
    errors = host.module("hdb_core.errors")
    inputs = {"model": loaded.model, "clip": sd2.clip, "lidb": person(1)}
    with pytest.raises(errors.LayoutError, match=r"needs a CLIP with clip_l.*clip_h.*same checkpoint"):
        train(**inputs) if node_id == "FastFinetune" else run(node_id, **inputs)


@pytest.mark.parametrize("node_id", ["FastFinetune", "ApplyLiDBToModel"])
def test_checkpoint_without_clip(run, train, host, loaded, person, node_id):
    errors = host.module("hdb_core.errors")
    inputs = {"model": loaded.model, "clip": None, "lidb": person(1)}
    with pytest.raises(errors.LayoutError, match="no text encoder"):
        train(**inputs) if node_id == "FastFinetune" else run(node_id, **inputs)


def test_model_of_a_family_without_a_unet(run, host, loaded, person):
    errors, models = host.module("hdb_core.errors"), host.load_file("random_models.py")
    flux = models.random_model("Flux.1")
    with pytest.raises(errors.LayoutError, match=r"SD 1\.x, 32 UNet \+ 8 text layers.*Flux, \d+ layers.*40 of its 40"):
        run("ApplyLiDBToModel", model=flux, clip=loaded.clip, lidb=person(1))


def test_lidb_of_a_larger_model_of_the_same_family(run, host, loaded, person):
    layout = host.module("hdb_core.layout")
    errors = host.module("hdb_core.errors")
    lidb = host.module("hdb_core.lidb")
    small = person(1)
    extra = layout.Layer("unet.down_blocks.2.attentions.1.transformer_blocks.0.attn1.to_q", 1280, 1280)
    larger = layout.Layout("sd1", (*small.layout.layers, extra))
    down, up = torch.cat([small.down, small.down[:1]]), torch.cat([small.up, small.up[:1]])
    with pytest.raises(errors.LayoutError, match="1 of its 41 layers"):
        run("ApplyLiDBToModel", model=loaded.model, clip=loaded.clip, lidb=lidb.LiDB(larger, small.basis, down, up))


def test_blend_of_other_models(run, host, person):
    errors = host.module("hdb_core.errors")
    with pytest.raises(errors.LiDBError, match="different models"):
        run("BlendLiDB", lidb_a=person(1), lidb_b=person(2, layers=8))


def test_vae_of_another_family(train, host, loaded, monkeypatch):
    import comfy.sd
    import comfy.taesd.taesd

    errors = host.module("hdb_core.errors")
    other = comfy.taesd.taesd.TAESD(latent_channels=16)
    with pytest.raises(errors.FinetuneError, match=r"4 channels.*VAE that belongs"):
        train(vae=comfy.sd.VAE(sd=other.state_dict()))


def test_a_checkpoint_without_a_vae(train, host):
    import comfy.sd

    with pytest.raises(host.module("hdb_core.errors").FinetuneError, match=r"comes from has none.*Load VAE"):
        train(vae=comfy.sd.VAE(sd={}))


@pytest.mark.parametrize("name", ["SVD_img2vid", "SD_X4Upscaler"])
def test_models_with_the_text_width_of_sd2_are_none(host, name):
    import comfy.supported_models

    described = getattr(comfy.supported_models, name)
    config = described(dict(described.unet_config))
    model = SimpleNamespace(model=SimpleNamespace(model_config=config, latent_format=config.latent_format))
    assert host.module("nodes.host.targets").family_of(model) == name


SOCKETS = {
    "SaveLiDB": "lidb", "SaveLiDBAsLoRA": "lidb", "BlendLiDB": "lidb_b", "PredictLiDB": "hypernet", "FastFinetune": "vae",
    "ApplyLiDBToModel": "options", "LiDBHook": "options", "CropToFace": "mask",
}  # fmt: skip


JSON = [
    (node_id, value) for node_id, name in SOCKETS.items() for value in ("x", 3, True, {}, None)
    if value is not None or name not in ("options", "mask")  # null stands for an optional input that is not connected
]  # fmt: skip


@pytest.mark.parametrize(("node_id", "value"), JSON)
def test_json_in_place_of_a_wire(run, host, person, node_id, value):
    """As a prompt over HTTP can hold it."""
    inputs = {
        "image": image(),
        "lidb": person(1),
        "lidb_a": person(1),
        "model": object(),
        "clip": object(),
        SOCKETS[node_id]: value,
    }
    schema = host.nodes[node_id].GET_SCHEMA()
    own = {i.id: inputs[i.id] for i in schema.inputs if i.id in inputs}
    got = "null" if value is None else repr(value)
    with pytest.raises(host.module("hdb_core.errors").HDBError) as caught:
        run(node_id, **own)
    assert str(caught.value).startswith(f"{schema.display_name} got {got} for {SOCKETS[node_id]}. Connect an output of")


@pytest.mark.parametrize("node_id", SOCKETS)
def test_another_type_in_place_of_a_wire(run, host, person, node_id):
    """A prompt over HTTP can wrap a wire as a value, and the host then does not look at its type."""
    name = SOCKETS[node_id]
    schema = host.nodes[node_id].GET_SCHEMA()
    kind = next(i.get_io_type() for i in schema.inputs if i.id == name)
    other = image() if kind not in ("IMAGE", "MASK") else person(1)
    with pytest.raises(host.module("nodes.host.sockets").SocketError) as caught:
        run(node_id, **{name: other})
    got = f"{schema.display_name} got {type(other).__name__} for {name}. Connect an output of the type {kind} to it."
    assert str(caught.value) == got


def test_an_input_of_another_version(run, host, person):
    """The host checks only the inputs that a node has, and passes on what else is wired to it."""
    with pytest.raises(
        host.module("nodes.host.sockets").SocketError, match=r"^Blend LiDB \(mix people\) has no input weight\. Update"
    ):
        run("BlendLiDB", lidb_a=person(1), lidb_b=person(2), weight=1.0)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_no_number_in_a_widget(run, host, number):
    """The host compares numbers with limits, and NaN is neither below nor above."""
    found = 0
    for node_id, node in host.nodes.items():
        for one in (i for i in node.GET_SCHEMA().inputs if i.get_io_type() == "FLOAT"):
            with pytest.raises(host.module("nodes.host.sockets").SocketError, match=f"got {number} for {one.id}"):
                run(node_id, **{one.id: number})
            found += 1
    assert found >= 10


def test_numbers_beyond_the_limits_of_a_widget(run, host):
    """Over a wire, where the host does not compare them."""
    found = 0
    for node_id, node in host.nodes.items():
        schema = node.GET_SCHEMA()
        for one in (i for i in schema.inputs if i.get_io_type() in ("INT", "FLOAT")):
            for number in (one.min - 1, one.max + 1):
                given = [number] if schema.is_input_list else number
                says = re.escape(f"got {number} for {one.id}. Give it {one.min} to {one.max}.")
                with pytest.raises(host.module("nodes.host.sockets").SocketError, match=says):
                    run(node_id, **{one.id: given})
                found += 1
    assert found >= 30


def test_numbers_of_other_nodes(run, train, person):
    """numpy's, which a file or a generator does not take."""
    blended = run("BlendLiDB", lidb_a=person(1), lidb_b=person(2), blend=np.float32(0.25))[0]
    (path,) = run("SaveLiDB", lidb=blended, filename_prefix="a", name="", rank=np.int64(3))
    assert Path(path).is_file()
    assert train(seed=np.uint8(1), steps=np.int64(1)).about.steps == 1


def test_half_a_character_in_a_text(run, host, person):
    with pytest.raises(
        host.module("nodes.host.sockets").SocketError, match=r"got text that is not valid Unicode for name\."
    ):
        run("SaveLiDB", lidb=person(7), filename_prefix="a", name="\ud800")


@pytest.mark.parametrize("null", ["None", None])
def test_null_in_a_text_is_its_default(run, host, person, null):
    """Of which the host makes the word None; other nodes give it over a wire."""
    (path,) = run("SaveLiDB", lidb=person(7), filename_prefix=null, name=null)
    assert Path(path).parent.name == "lidb" and Path(path).name.startswith("person_")
    assert host.module("hdb_core.files.lidb").load(path).about.name == ""


@pytest.mark.parametrize("other", [[], {}, b"x", torch.ones(2)], ids=str)
@pytest.mark.parametrize(
    ("node_id", "name"),
    [
        ("FastFinetune", "photo_words"),
        ("FastFinetune", "steps"),
        ("SaveLiDB", "filename_prefix"),
        ("BlendLiDB", "blend"),
    ],
)
def test_another_type_in_a_widget(run, host, node_id, name, other):
    """As a node of any type can give it."""
    schema = host.nodes[node_id].GET_SCHEMA()
    kind = next(i.get_io_type() for i in schema.inputs if i.id == name)
    given = [other] if schema.is_input_list else other
    with pytest.raises(
        host.module("nodes.host.sockets").SocketError, match=rf"for {name}\. Connect an output of the type {kind}"
    ):
        run(node_id, **{name: given})


def test_a_list_of_texts_may_hold_nothing(train):
    """Where a node that describes photos found no words."""
    assert train(image=image(batch=2), photo_words=["smiling", None], steps=1).rank == 4
