"""Load HyperNet and Predict LiDB in the host, with an untrained hypernetwork for the random miniature."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import replace

import pytest
import torch


@pytest.fixture(scope="module")
def name(write_hypernet, hypernet_config):
    return write_hypernet(hypernet_config)


def test_photo_to_picture(run, sample, loaded, photo, name):
    (hypernet,) = run("LoadHyperNet", hypernet_name=name)
    lidb, prompt = run("PredictLiDB", hypernet=hypernet, image=photo, model=loaded.model)
    assert prompt == "a [v] face" and lidb.rank == 1
    before = sample(loaded.model, loaded.clip)
    after = sample(*run("ApplyLiDBToModel", model=loaded.model, clip=loaded.clip, lidb=lidb))
    assert (after - before).abs().mean() > 0
    again, _ = run("PredictLiDB", hypernet=hypernet, image=photo)
    assert torch.equal(again.up, lidb.up)


def test_every_input_counts(run, photo, name):
    (hypernet,) = run("LoadHyperNet", hypernet_name=name)
    images = (photo, 1 - photo, torch.cat([photo, 1 - photo]))
    person, other, batch = (run("PredictLiDB", hypernet=hypernet, image=image)[0] for image in images)
    assert (person.about.photos, batch.about.photos, batch.about.made_from) == (1, 2, "a prediction")
    assert not any(torch.equal(person.up, one.up) for one in (other, batch))


def test_the_base_model_is_noted(run, photo, loaded, name):
    (hypernet,) = run("LoadHyperNet", hypernet_name=name)
    with_model, without = (run("PredictLiDB", hypernet=hypernet, image=photo, model=m)[0] for m in (loaded.model, None))
    assert (with_model.about.model, without.about.model) == ("SD15", "")


def test_grey_and_transparent_photos(run, photo, name):
    (hypernet,) = run("LoadHyperNet", hypernet_name=name)
    grey, rgb, rgba = (
        run("PredictLiDB", hypernet=hypernet, image=image)[0].up
        for image in (photo[..., :1], photo[..., :1].expand(-1, -1, -1, 3), torch.cat([photo, 0 * photo[..., :1]], -1))
    )
    torch.testing.assert_close(grey, rgb)
    white = run("PredictLiDB", hypernet=hypernet, image=torch.ones_like(photo))[0].up
    torch.testing.assert_close(rgba, white)  # what is transparent is white, whatever lies under it


def test_takes_less_than_a_second(run, photo, name):
    (hypernet,) = run("LoadHyperNet", hypernet_name=name)
    run("PredictLiDB", hypernet=hypernet, image=photo)
    start = time.perf_counter()
    run("PredictLiDB", hypernet=hypernet, image=photo)
    assert time.perf_counter() - start < 1


def test_fast_finetune_goes_on_from_a_prediction(run, train, photo, name):
    (hypernet,) = run("LoadHyperNet", hypernet_name=name)
    lidb, _ = run("PredictLiDB", hypernet=hypernet, image=photo)
    trained = train(lidb=lidb, steps=2, rank=3)
    assert trained.rank == 3 and trained.about.made_from == "a prediction"


def test_only_the_header_is_read_at_first(run, host, base_directory, name, photo):
    folder = base_directory / "models" / "hyperdreambooth"
    path = folder / "cut.safetensors"
    shutil.copy(folder / name, path)
    (hypernet,) = run("LoadHyperNet", hypernet_name="cut.safetensors")
    os.truncate(path, path.stat().st_size - 10)
    with pytest.raises(host.module("hdb_core.errors").HyperNetFileError, match="incomplete"):
        run("PredictLiDB", hypernet=hypernet, image=photo)


def test_a_file_that_is_replaced_before_its_weights_are_read_is_refused(
    run, host, base_directory, name, photo, write_hypernet, hypernet_config
):
    folder = base_directory / "models" / "hyperdreambooth"
    shutil.copy(folder / name, folder / "before.safetensors")
    (hypernet,) = run("LoadHyperNet", hypernet_name="before.safetensors")
    other = write_hypernet(replace(hypernet_config, depth=1), "other.safetensors")
    os.replace(folder / other, folder / "before.safetensors")
    with pytest.raises(host.module("hdb_core.errors").HyperNetFileError, match="was replaced while the prompt ran"):
        run("PredictLiDB", hypernet=hypernet, image=photo)


def test_extra_model_paths_and_bad_names(run, host, base_directory, name):
    shutil.copy(base_directory / "models" / "hyperdreambooth" / name, host.extra_hypernets / "mine.safetensors")
    assert "mine.safetensors" in host.folder_paths.get_filename_list("hyperdreambooth")
    run("LoadHyperNet", hypernet_name="mine.safetensors")
    error = host.module("hdb_core.errors").HyperNetFileError
    for bad, message in (("../net.safetensors", "no name of a HyperNet"), ("gone.safetensors", "There is no HyperNet")):
        assert message in host.nodes["LoadHyperNet"].validate_inputs(bad)
        with pytest.raises(error, match=message):
            run("LoadHyperNet", hypernet_name=bad)


def test_a_model_of_other_layers_is_refused_early(run, host, write_hypernet, hypernet_config, loaded, photo):
    layout = host.module("hdb_core.layout")
    extra = layout.Layer("unet.down_blocks.2.attentions.0.transformer_blocks.0.attn1.to_q", 1280, 1280)
    config = hypernet_config
    wider = type(config)(**{**vars(config), "layout": layout.Layout("sd1", (extra, *config.layout.layers))})
    (hypernet,) = run("LoadHyperNet", hypernet_name=write_hypernet(wider, "wider.safetensors"))
    with pytest.raises(host.module("hdb_core.errors").LayoutError, match=r"This hypernetwork.*1 of its 41 layers"):
        run("PredictLiDB", hypernet=hypernet, image=photo, model=loaded.model)


@pytest.fixture
def vision(tmp_path):
    """The host's own image encoder of a width, with random weights."""

    def make(width):
        import comfy.clip_vision

        sizes = {"model_type": "clip_vision_model", "hidden_size": width, "intermediate_size": 64, "projection_dim": 16, "num_hidden_layers": 3,
                 "num_attention_heads": 4, "num_channels": 3, "image_size": 56, "patch_size": 14,
                 "hidden_act": "gelu"}  # fmt: skip
        path = tmp_path / "vision.json"
        path.write_text(json.dumps(sizes))
        model = comfy.clip_vision.ClipVisionModel(path)
        generator = torch.Generator().manual_seed(width)
        state = {
            name: 0.1 * torch.randn(t.shape, generator=generator)
            for name, t in model.get_sd().items()
            if t.is_floating_point()
        }
        model.load_sd(state)
        return model

    return make


def test_an_encoder_of_the_user(run, host, write_hypernet, hypernet_config, photo, vision):
    hypernet = host.module("hdb_core.hypernet")
    errors = host.module("hdb_core.errors")
    encoder = hypernet.EncoderConfig("clip_vision", 56, 48, name="ViT-H-14", num_tokens=17)
    name = write_hypernet(type(hypernet_config)(**{**vars(hypernet_config), "encoder": encoder}), "vision.safetensors")
    with pytest.raises(errors.HyperNetError, match=r"ViT-H-14.*clip_vision is not connected"):
        run("LoadHyperNet", hypernet_name=name)
    (right,) = run("LoadHyperNet", hypernet_name=name, clip_vision=vision(48))
    assert run("PredictLiDB", hypernet=right, image=photo)[0].up.any()
    (wrong,) = run("LoadHyperNet", hypernet_name=name, clip_vision=vision(32))
    with pytest.raises(errors.HyperNetError, match=r"17 tokens of width 48.*17 of width 32"):
        run("PredictLiDB", hypernet=wrong, image=photo)


@pytest.mark.parametrize(
    "image", [torch.zeros(0, 64, 64, 3), torch.zeros(1, 1, 1, 3), torch.full((1, 64, 64, 3), torch.nan)]
)
def test_unusable_photos(run, host, name, image):
    (hypernet,) = run("LoadHyperNet", hypernet_name=name)
    with pytest.raises(host.module("hdb_core.errors").HyperNetError):
        run("PredictLiDB", hypernet=hypernet, image=image)


def test_a_list_of_photos_is_one_person(run, host, photo, name):
    (hypernet,) = run("LoadHyperNet", hypernet_name=name)
    batch = torch.cat([photo, 1 - photo])
    of_batch, of_list = (run("PredictLiDB", hypernet=hypernet, image=image)[0] for image in (batch, [photo, 1 - photo]))
    torch.testing.assert_close(of_batch.up, of_list.up)
    assert of_list.about.photos == 2
    sizes = run("PredictLiDB", hypernet=hypernet, image=[photo, photo[:, :100], batch])[0]
    assert sizes.about.photos == 4
    with pytest.raises(host.module("hdb_core.errors").HyperNetError, match="hypernet got a list of 2"):
        run("PredictLiDB", hypernet=[hypernet, hypernet], image=photo)


def test_photos_unlike_those_of_the_training_are_named(run, host, base_directory, hypernet_config, photo, name, said):
    (hypernet,) = run("LoadHyperNet", hypernet_name=name)
    run("PredictLiDB", hypernet=hypernet, image=photo)
    assert "unlike" not in said[-1]  # this file does not know
    net = host.module("hdb_core.hypernet").HyperNet.create(hypernet_config)
    noise = torch.randn(400, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    net.set_seen(net.look(noise))
    host.module("hdb_core.files.hypernet").save(
        net, base_directory / "models" / "hyperdreambooth" / "seen.safetensors", {}
    )
    (hypernet,) = run("LoadHyperNet", hypernet_name="seen.safetensors")
    run("PredictLiDB", hypernet=hypernet, image=[photo, photo])
    assert "of these photos, 1, 2 are unlike those that this hypernetwork was trained on" in said[-1]
    run("PredictLiDB", hypernet=hypernet, image=photo)
    assert said[-1].startswith("predicted from one photo\nthis photo is unlike")


@pytest.mark.parametrize(
    ("cut", "box", "size", "uncut"),
    [
        ("face", (50, 48, 75, 100), (175, 175), True),  # of half the picture
        ("face", (22, 19, 71, 95), (128, 128), False),  # as Crop to Face makes it
        ("face", (22, 19, 71, 95), (128, 160), True),
        ("face", None, (128, 128), False),
        ("face", None, (128, 160), True),
        ("face", "no detector", (128, 160), True),
        ("face", "no detector", (128, 128), False),
        ("centre", (50, 48, 75, 100), (175, 175), False),
        ("centre", "no detector", (128, 160), False),
    ],
)  # fmt: skip
def test_a_photo_that_was_not_cut_as_in_training_is_named(
    run, host, write_hypernet, hypernet_config, said, monkeypatch, cut, box, size, uncut
):
    config = replace(hypernet_config, encoder=replace(hypernet_config.encoder, cut=cut))
    (hypernet,) = run("LoadHyperNet", hypernet_name=write_hypernet(config, f"{cut}.safetensors"))
    faces = host.module("nodes.host.faces")
    found = [] if box is None else [host.module("hdb_core.faces").Box(*box)] if box != "no detector" else None
    monkeypatch.setattr(faces, "detector", lambda: None if found is None else ("a detector", lambda picture: found))
    picture = torch.rand(1, *size, 3, generator=torch.Generator().manual_seed(0))
    run("PredictLiDB", hypernet=hypernet, image=picture)
    assert (
        "trained on photos that were cut by Crop to Face, and this one is not: put Crop to Face" in said[-1]
    ) == uncut
    assert said[-1].startswith("predicted from one photo")
