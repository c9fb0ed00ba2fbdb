"""Faces: squares, orders, masks; and one cut for the trainer's folder and the node."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from hdb_core.errors import FaceError
from hdb_core.faces import (
    Box,
    box_of_mask,
    cut_out,
    in_order,
    leaves_out_the_middle,
    oval,
    reaches_beyond,
    resized_to,
    rivals,
    square_of,
    without_doubles,
)
from hdb_core.hypernet import EncoderConfig, preprocess
from hdb_core.images import as_rgb
from hdb_core.train.data.photos import Photo, find_people
from hdb_core.train.data.prepare import Checks, prepare


def noise(height, width, channels=3):
    return (np.random.default_rng(0).random((height, width, channels)) * 255).astype(np.uint8)


def test_the_square_stands_above_the_middle_of_the_face():
    assert square_of(Box(200, 150, 75, 100)) == (170, 126, 134)
    assert square_of(Box(200, 150, 100, 75)).side == 134  # cut off below, a face is as tall as wide
    assert square_of(Box(200, 150, 75, 100), margin=0.25).side == 201
    with pytest.raises(FaceError, match="20 × 31 pixels; at least 32"):
        square_of(Box(0, 0, 20, 31))


def test_orders():
    left, large, middle = Box(0, 0, 20, 20), Box(60, 60, 40, 40), Box(45, 40, 10, 10)
    faces = [middle, large, left]
    assert in_order(faces, "largest first", 100, 100) == [large, left, middle]
    assert in_order(faces, "left to right", 100, 100) == [left, middle, large]
    assert in_order(faces, "most central first", 100, 100) == [middle, large, left]
    for order in ("x", None, {}):  # over HTTP
        with pytest.raises(FaceError, match="Expected order: largest first or"):
            in_order(faces, order, 100, 100)


def test_one_face_found_twice_is_one():
    face, again, other = Box(10, 10, 40, 50), Box(14, 8, 44, 50), Box(80, 10, 40, 50)
    assert without_doubles([face, again, other, Box(0, 0, 200, 100)]) == [face, other]


def test_a_face_that_is_nowhere_is_none():
    """As a detector with absurd weights gives them."""
    face, infinite = Box(10, 10, 40, 50), float("inf")
    nowhere = [Box(0, 0, infinite, infinite), Box(float("nan"), 0, 40, 50), Box(-infinite, 0, 40, 50)]
    assert without_doubles([*nowhere, face]) == [face]


def test_a_face_more_than_half_as_high_is_a_rival():
    person, friend, passer_by = Box(0, 0, 60, 80), Box(100, 0, 33, 44), Box(200, 0, 29, 39)
    assert rivals([person, friend, passer_by]) == [friend]
    assert rivals([person]) == rivals([]) == []


def test_shares_and_edges():
    assert Box(-50, 0, 100, 100).share(100, 100) == 0.5
    assert Box(200, 200, 10, 10).share(100, 100) == 0
    assert reaches_beyond(Box(-20, 0, 100, 100), 100, 100) and not reaches_beyond(Box(-10, 0, 100, 100), 100, 100)


def test_masks():
    mask = torch.zeros(100, 80)
    mask[20:60, 10:50] = 1
    assert box_of_mask(mask) == (10, 20, 40, 40)
    assert not leaves_out_the_middle(mask) and leaves_out_the_middle(1 - mask)
    cut_out_png = torch.ones(100, 80)
    cut_out_png[15:, 20:60] = cut_out_png[70:] = 0  # head and shoulders are opaque, down to the lower edge
    assert leaves_out_the_middle(cut_out_png)
    for bad, message in ((1 - mask, "Invert Mask"), (0 * mask, "is empty")):
        with pytest.raises(FaceError, match=message):
            box_of_mask(bad)


def test_shrinking_says_by_how_much():
    small, factor = resized_to(torch.rand(3, 400, 1000), 500)
    assert small.shape == (3, 200, 500) and factor == 2
    assert resized_to(torch.rand(3, 40, 10), 500)[1] == 1


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("face", [Box(60, 50, 60, 80), Box(-10, -15, 90, 110)])
def test_the_trainer_and_the_node_cut_alike(tmp_path, face, channels):
    """What Crop to Face gives of a photo, and what the trainer reads of its file once prepared, are the same picture."""
    picture = noise(200, 170, channels)
    folder = tmp_path / "photos" / "anna"
    folder.mkdir(parents=True)
    Image.fromarray(picture.squeeze()).save(folder / "1.png")
    small = Box(0, 0, 30, 39)  # no rival
    prepare(tmp_path / "photos", tmp_path / "data", Checks(200, 32, 0), lambda _: [small, face])
    ((photo,),) = (person.photos for person in find_people(tmp_path / "data" / "photos"))
    encoder = EncoderConfig(image_size=32, cut="face")
    trained = preprocess(photo.pixels(32)[None], encoder)
    (whole,) = as_rgb(torch.from_numpy(picture.astype(np.float32) / 255)[None], FaceError)
    square = square_of(face)

    def error_of(square):
        shown = preprocess(cut_out(whole, square).movedim(0, -1)[None], encoder)
        return float((trained - shown).abs().mean())

    assert photo.size() == (square.side, square.side)
    assert error_of(square) < 0.005  # the trainer's file is a JPEG
    assert error_of(square._replace(x=square.x + 1)) > 0.02
    mask = Photo(photo.mask).whole()[0]
    torch.testing.assert_close(mask, oval(face, square), atol=1 / 255, rtol=0)
