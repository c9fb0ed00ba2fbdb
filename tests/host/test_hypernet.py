"""Load HyperNet and Predict LiDB in the host, with an untrained hypernetwork for the random miniature."""

from __future__ import annotations

import json
import os
import shutil
import time

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
        for image in (photo[..., :1], photo[..., :1].expand(-1, -1, -1, 3), photo[..., [0, 0, 0, 1]])
    )
    torch.testing.assert_close(grey, rgb)
    torch.testing.assert_close(grey, rgba)


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
