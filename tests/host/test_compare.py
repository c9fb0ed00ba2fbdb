"""Compare LiDB, Similarity to Photo: numbers against those that are known, and what cannot be compared."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch


def test_a_person_is_like_themselves_and_unlike_another(run, person, said):
    one, other = person(1, rank=4), person(2)
    number, text = run("CompareLiDB", lidb_a=one, lidb_b=one)
    assert number == pytest.approx(1) and said[-1] == text
    assert text.splitlines() == [
        "cosine 1.00",
        *(f"{name}: 1.00" for name in ("down 1", "mid", "text encoder", "up 0")),
    ]
    assert abs(run("CompareLiDB", lidb_a=one, lidb_b=other)[0]) < 0.05
    opposite, _ = run("CompareLiDB", lidb_a=one, lidb_b=replace(one, up=-2 * one.up))
    assert opposite == pytest.approx(-1)


def test_a_blend_is_between_the_two(run, person):
    one, other = person(1), person(2)
    (both,) = run("BlendLiDB", lidb_a=one, lidb_b=other, blend=0.25)
    number, _ = run("CompareLiDB", lidb_a=both, lidb_b=one)
    assert number == pytest.approx(0.75 / (0.75**2 + 0.25**2) ** 0.5, abs=0.03)


def test_a_person_with_convolutions_is_compared_with_one_without(run, person):
    wide = person(1, convolutions=True)
    small = replace(wide, layout=wide.layout.without_convolutions(), down=wide.down[:40], up=wide.up[:40])
    number, text = run("CompareLiDB", lidb_a=wide, lidb_b=small)
    assert 0 < number < 1 and text == run("CompareLiDB", lidb_a=small, lidb_b=wide)[1]


def test_a_strangers_layer_is_shown_in_one_line(run, person, said):
    lidb = person(1, layers=1)
    (layer,) = lidb.layout.layers
    lidb = replace(lidb, layout=replace(lidb.layout, layers=(replace(layer, name="unet.\x1b[2J\n\u202e"),)))
    _, text = run("CompareLiDB", lidb_a=lidb, lidb_b=lidb)
    assert said[-1] == text == "cosine 1.00\n[2J: 1.00"


def test_people_of_different_models_are_refused(run, host, person):
    with pytest.raises(host.module("hdb_core.errors").LiDBError, match="made for different models"):
        run("CompareLiDB", lidb_a=person(1), lidb_b=person(2, layers=8))


@pytest.fixture
def clip_vision(host, tmp_path):
    """A random image encoder of the host's own class."""
    import comfy.clip_vision

    config = {
        "model_type": "clip_vision_model", "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 56,
        "patch_size": 14, "intermediate_size": 96, "projection_dim": 32, "hidden_act": "quick_gelu", "num_channels": 3,
        "layer_norm_eps": 1e-5, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    made = comfy.clip_vision.ClipVisionModel(str(tmp_path / "config.json"))
    generator = torch.Generator().manual_seed(1)
    for weight in made.model.parameters():
        weight.data = (torch.randn(weight.shape, generator=generator)).to(weight.dtype)
    return made


def test_pictures_are_compared_with_a_photo(run, clip_vision, photo, said):
    other = torch.rand(photo.shape, generator=torch.Generator().manual_seed(4))
    number, text = run("SimilarityToPhoto", clip_vision=clip_vision, photo=photo, pictures=torch.cat([photo, other]))
    each = [run("SimilarityToPhoto", clip_vision=clip_vision, photo=photo, pictures=one)[0] for one in (photo, other)]
    assert each[0] == pytest.approx(1, abs=1e-3) and each[1] < 0.99
    assert number == pytest.approx(sum(each) / 2, abs=1e-3)
    assert f"(pictures: {each[0]:.2f}, {each[1]:.2f})" in text and text.endswith("of whole pictures, not of faces")
    (embedding,) = clip_vision.encode_image(other)["image_embeds"]
    (reference,) = clip_vision.encode_image(photo)["image_embeds"]
    assert each[1] == pytest.approx(float(torch.nn.functional.cosine_similarity(embedding, reference, dim=0)), abs=1e-3)
    of_two, _ = run("SimilarityToPhoto", clip_vision=clip_vision, photo=torch.cat([photo, other]), pictures=photo)
    assert each[1] < of_two < 1


def test_an_encoder_that_gives_an_embedding_for_each_part(run, photo):
    parts = torch.eye(4).repeat(2, 1)[None]

    class Siglip:
        def encode_image(self, image):
            return {"image_embeds": parts.expand(len(image), -1, -1)}

    assert run("SimilarityToPhoto", clip_vision=Siglip(), photo=photo, pictures=photo)[0] == pytest.approx(1)


def test_no_picture_is_said(run, host, clip_vision, photo):
    with pytest.raises(host.module("hdb_core.errors").FaceError, match="There is no photo"):
        run("SimilarityToPhoto", clip_vision=clip_vision, photo=photo, pictures=photo[:0])
