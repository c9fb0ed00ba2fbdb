"""What a saved person shows: name, picture, how they were made, for which model."""

import base64
import time
from dataclasses import replace
from io import BytesIO

import pytest
import torch
from PIL import Image

from hdb_core import card
from hdb_core.files import lidb as lidb_file
from hdb_core.lidb import About
from hdb_core.recommended import FROM_PHOTO, FROM_PHOTOS, FROM_PREDICTION, IN_LEARNED_BASIS


def gradient(height, width):
    """RGB (3, height, width): red grows downwards, green to the right."""
    red, green = torch.linspace(0, 1, height)[:, None], torch.linspace(0, 1, width)
    return torch.stack([red.expand(-1, width), green.expand(height, -1), torch.full((height, width), 0.5)])


def encoded(image, kind):
    file = BytesIO()
    image.save(file, kind)
    return base64.b64encode(file.getvalue()).decode()


def test_a_thumbnail_is_the_middle_square_through_the_file(tmp_path, make_lidb):
    lidb = card.labelled(make_lidb(0), picture=gradient(600, 300))
    lidb_file.save(lidb, tmp_path / "p.safetensors")
    shown = card.picture_of(lidb_file.load(tmp_path / "p.safetensors").about)
    assert shown.shape == (256, 256, 3)
    expected = gradient(600, 300)[:, 150:450]
    torch.testing.assert_close(shown[::64, ::64].movedim(-1, 0)[:2], expected[:2, ::75, ::75], atol=0.03, rtol=0)
    assert len(lidb.about.thumbnail) < 20_000


def test_without_a_picture_the_file_has_none(make_lidb):
    assert make_lidb(0).about.thumbnail == "" and card.picture_of(make_lidb(0).about) is None
    assert "thumbnail" not in lidb_file.about_fields(card.labelled(make_lidb(0), "Ben").about)


@pytest.mark.parametrize(
    "text",
    ["no base64!", base64.b64encode(b"no picture").decode(), "é", encoded(Image.new("RGB", (8, 8)), "PNG"),
     encoded(Image.new("RGB", (1025, 8)), "JPEG"), encoded(Image.new("RGB", (64, 64)), "JPEG")[:200]],
    ids=["letters", "bytes", "not ASCII", "another format", "too large", "cut off"],
)  # fmt: skip
def test_a_strangers_thumbnail_that_is_none_is_not_shown(text):
    assert card.picture_of(About(thumbnail=text)) is None


def test_a_strangers_thumbnail_with_exif_is_not_shown():
    """Pillow before 13 reads every entry of it, of which thousands can be the same megabyte."""
    (exif := Image.Exif())[0x010E] = "a description"
    Image.new("RGB", (8, 8)).save(file := BytesIO(), "JPEG", exif=exif)
    assert card.picture_of(About(thumbnail=base64.b64encode(file.getvalue()).decode())) is None


def test_a_strangers_thumbnail_of_several_pictures_is_not_shown():
    """Pillow before 13 reads the list of them as it reads EXIF."""
    pictures = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    pictures[0].save(file := BytesIO(), "MPO", save_all=True, append_images=pictures[1:])
    assert b"MPF\0" in file.getvalue() and b"Exif\0\0" not in file.getvalue()
    assert card.picture_of(About(thumbnail=base64.b64encode(file.getvalue()).decode())) is None


def test_a_strangers_thumbnail_of_endless_scans_is_not_shown():
    """A scan is a few bytes that go over the whole picture once more: with 50,000 of them it takes half a minute."""
    Image.new("RGB", (1024, 1024)).save(file := BytesIO(), "JPEG", progressive=True)
    honest = file.getvalue()
    last = honest[honest.rindex(b"\xff\xda") : -2]
    assert card.picture_of(About(thumbnail=base64.b64encode(honest).decode())) is not None
    endless = honest[:-2] + 3000 * last + honest[-2:]
    begun = time.process_time()
    shown = card.picture_of(About(thumbnail=base64.b64encode(endless).decode()))
    assert shown is None and time.process_time() - begun < 0.5


def test_a_name_and_a_picture_stay_until_there_are_others(make_lidb):
    first = card.labelled(make_lidb(0), "  Anna  Maria\n", gradient(64, 64))
    assert first.about.name == "Anna Maria"
    again = card.labelled(first, " ")
    assert again.about == first.about
    other = card.labelled(first, "Ben")
    assert (other.about.name, other.about.thumbnail) == ("Ben", first.about.thumbnail)
    assert torch.equal(first.up, make_lidb(0).up)


@pytest.mark.parametrize(
    ("about", "text"),
    [
        (About(FROM_PHOTO, photos=1, steps=57), "learned from one photo in 57 steps"),
        (About(FROM_PHOTOS, photos=3, steps=1), "learned from 3 photos in one step"),
        (About(IN_LEARNED_BASIS, photos=1, steps=8), "learned from one photo in 8 steps, in a learned basis"),
        (About(FROM_PREDICTION, photos=2, steps=0), "predicted from 2 photos"),
        (About(FROM_PREDICTION, photos=1, steps=12), "predicted from one photo, then 12 steps"),
    ],
)
def test_how_a_person_was_made(about, text):
    assert card.made(about) == text


def test_the_lines_of_a_person(make_lidb):
    lidb = make_lidb(0, 2)
    about = replace(lidb.about, model="SD15")
    made = "learned from 2 photos in 40 steps"
    assert card.lines(replace(lidb, about=about)) == ["Anna", made, "for SD 1.x (SD15), rank 2", "prompt: a [v] face"]
    assert card.lines(replace(lidb, about=replace(about, name="", model="")))[:2] == [made, "for SD 1.x, rank 2"]


def test_a_strangers_texts_are_a_line_each(make_lidb):
    about = About(name="Anna\nlearned from no photo\x1b[2J\u202egpj", prompt="a [v] face " + "x" * 10_000, model="a\0b")
    name, _, model, prompt = card.lines(replace(make_lidb(0), about=about))
    assert name == "Anna learned from no photo [2J gpj" and "(a b)" in model
    assert prompt.startswith("prompt: a [v] face x") and len(prompt) == card.LONGEST + 1
