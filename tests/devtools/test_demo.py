"""The demonstration's fixed parts: whom its photo shows, what it asks for, what it counts."""

import numpy as np
import torch
from PIL import Image

from devtools import demo
from hdb_core.basis import BasisRecipe
from hdb_core.files.lidb import save
from hdb_core.layout import Layer, Layout
from hdb_core.lidb import About, LiDB
from miniature.drawing import photo
from miniature.examples import control_picture, picture
from miniature.prompts import evaluation_photo

from ..example_photos import SHOWN


def test_the_photos_are_those_that_are_drawn():
    files = {path.name: Image.open(path) for path in demo.PHOTO.parent.iterdir()}
    assert files.keys() == {*SHOWN, "hdb_picture.png", "hdb_silhouette.png"}
    for name, shown in SHOWN.items():
        assert np.array_equal(np.asarray(files[name].convert("RGB")), photo(*shown))
    assert np.array_equal(np.asarray(files["hdb_picture.png"]), picture())
    assert np.array_equal(np.asarray(files["hdb_silhouette.png"]), control_picture())
    assert SHOWN[demo.PHOTO.name][0].seed == demo.PERSON_SEED


def test_scenes_contradict_the_photo():
    _, context = evaluation_photo(demo.PERSON_SEED)
    for scene in demo.scene_prompts(demo.PERSON_SEED, demo.SCENES):
        assert demo.TOKEN in scene.text(demo.TOKEN)
        for name in ("expression", "clothing", "background"):
            assert scene.expected[name] != getattr(context, name)


def test_the_size_on_sd15_is_counted(tmp_path):
    layers = tuple(Layer(f"text_encoder.text_model.encoder.layers.{i}.self_attn.q_proj", 768, 768) for i in range(3))
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(3, 2, 100, generator=generator), torch.randn(3, 50, 2, generator=generator)
    path = tmp_path / "person.safetensors"
    size = save(LiDB(Layout("sd1", layers), BasisRecipe(), down, up, About(steps=12)), path)
    counted = demo.sizes(path)
    assert counted["lidb_bytes"] == size and counted["steps"] == 12
    assert counted["lidb_bytes_sd15"] - size == (176 - 3) * 2 * (150 * 2 + 2 * 2)  # rank 2, float16 and a scale a row


def test_a_person_has_as_many_components_a_layer_on_sd15(tmp_path):
    linear = Layer("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q", 320, 320)
    layout = Layout("sd1", (linear, Layer("unet.mid_block.resnets.0.conv1", 2880, 320)))
    strength = torch.tensor([100.0, 1.0])[:, None, None]  # the linear layer keeps all four, the convolution two
    person = LiDB(layout, BasisRecipe(), torch.randn(2, 4, 100) * strength, torch.randn(2, 50, 4))
    size = save(person, tmp_path / "person.safetensors", rank=3)
    assert demo.sizes(tmp_path / "person.safetensors")["lidb_bytes_sd15"] - size == (3 * 234 - 6) * (150 * 2 + 2 * 2)


def test_without_a_judge_there_are_no_scores():
    report = {"lidb_bytes": 1, "lidb_bytes_sd15": 1, "sd15_layers": 1, "rank": 1, "steps": 1, "seconds": {}}
    assert "Identity" not in demo.summary(report)
    assert "Identity: 0.10 before" in demo.summary({**report, "identity": dict.fromkeys(demo.COLUMNS, 0.1)})


def test_the_sheet_holds_every_picture_and_label():
    colors = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255))
    tiles = [Image.new("RGB", (128, 128), color) for color in colors]
    sheet = demo.sheet([["the base model", *tiles[:2]], tiles[2:]], ["", "a [v] face, laughing, in a forest"])
    assert {*colors, (0, 0, 0)} <= {color for _, color in sheet.getcolors(1 << 24)}
    assert sheet.width > 3 * demo.TILE and sheet.height > 2 * demo.TILE + 2 * demo.LINE
    black = np.argwhere((np.asarray(sheet) == 0).all(2))
    first, last = black[:, 0].min(), black[:, 0].max()  # a text among the pictures, and one below them
    assert first < demo.TILE < 2 * (demo.TILE + demo.GAP) < last


def test_people_stand_in_two_halves():
    rows = [[Image.new("RGB", (8, 8), (n, n, n))] * 2 for n in range(5)]
    halves = demo.side_by_side(rows)
    assert [[tile.getpixel((0, 0))[0] for tile in row] for row in halves] == [[0, 0, 3, 3], [1, 1, 4, 4], [2, 2]]
