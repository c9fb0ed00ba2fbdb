"""One cut for training and nodes: covering, central, antialiased; a photo's file and its IMAGE give the same pixels."""

from __future__ import annotations

import struct
import time

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image

from hdb_core.errors import HyperNetError
from hdb_core.hypernet import EncoderConfig, preprocess
from hdb_core.images import resize_to_cover
from hdb_core.train.data import photos
from hdb_core.train.data.photos import Photo


def noise(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(40, 64), (64, 40), (33, 33), (16, 300), (9, 7)])
@pytest.mark.parametrize("size", [(32, 32), (24, 48)])
def test_covers_and_takes_the_centre(shape, size):
    ramp = torch.linspace(0, 1, shape[1]).expand(2, 3, *shape)
    resized = resize_to_cover(ramp, size)
    assert resized.shape == (2, 3, *size)
    torch.testing.assert_close(resized + resized.flip(-1), torch.ones_like(resized), atol=2 / min(shape), rtol=0)


def test_bytes_are_no_picture():
    """Every person was the same one."""
    with pytest.raises(HyperNetError, match=r"from 0 to 1, got torch\.uint8. Divide"):
        preprocess((255 * noise(1, 20, 20, 3)).byte(), EncoderConfig(image_size=32))


def test_equal_size_changes_nothing_and_values_stay_in_range():
    picture = noise(1, 3, 20, 30)
    assert torch.equal(resize_to_cover(picture, (20, 30)), picture)
    checks = (torch.arange(40) % 8 < 4).float().expand(1, 1, 40, 40)
    for size in ((17, 17), (90, 90)):
        assert resize_to_cover(checks, size).aminmax() == (0, 1)


@pytest.mark.parametrize("wide", [False, True])
def test_a_thin_picture_takes_no_memory(wide):
    """Resized as a whole, it would take 800 GB."""
    picture = torch.zeros(1, 3, 1, (1 << 20) + 1)
    picture[..., 1 << 19] = 1  # the middle, with a soft edge
    short = picture[..., (1 << 19) - 5 : (1 << 19) + 6]
    resized, same = (resize_to_cover(one if wide else one.mT, (256, 256)) for one in (picture, short))
    torch.testing.assert_close(resized, same)
    assert resized[..., 100:156, 100:156].min() > 0.9


def test_shrinking_averages():
    assert resize_to_cover(noise(1, 1, 512, 512), (8, 8)).std() < 0.02


def test_a_picture_starts_no_program(tmp_path, monkeypatch):
    """Pillow gives PostScript to Ghostscript, whatever the file is called."""
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: pytest.fail("Ghostscript was started"))
    (path := tmp_path / "a.jpg").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 30 30\n%%EndComments\nshowpage\n"
    )
    with pytest.raises(HyperNetError, match="cannot be read as a picture"):
        Photo(path).whole()


def test_a_turned_photo_whose_exif_is_garbled(tmp_path):
    """Pillow writes the EXIF anew without the turn, and cannot write a width that is a text."""
    entries = struct.pack("<HHIHHHHI4s", 0x112, 3, 1, 6, 0, 0x100, 2, 4, b"wide")
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4)
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", exif=exif)
    with pytest.raises(HyperNetError, match="cannot be read as a picture"):
        Photo(tmp_path / "a.jpg").whole()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_a_picture_may_have_the_ending_of_another_kind(tmp_path, kind):
    Image.new("RGB", (30, 20), "red").save(tmp_path / "a.jpg", kind)
    assert Photo(tmp_path / "a.jpg").whole().shape == (3, 20, 30)


def test_a_photo_of_endless_scans(tmp_path):
    """Of a few bytes each: a photo of 1 MB kept a training for minutes."""
    Image.new("RGB", (2000, 2000)).save(path := tmp_path / "a.jpg", progressive=True)
    honest = path.read_bytes()
    assert Photo(path).whole().shape == (3, 2000, 2000)
    path.write_bytes(honest[:-2] + 1000 * honest[honest.rindex(b"\xff\xda") : -2] + honest[-2:])
    begun = time.process_time()
    with pytest.raises(HyperNetError, match="cannot be read as a picture"):
        Photo(path).whole()
    assert time.process_time() - begun < 0.5


def test_a_grey_picture_of_16_bits(tmp_path):
    grey = np.linspace(0, 65535, 30 * 20).reshape(30, 20)
    Image.fromarray(grey.astype(np.uint16)).save(tmp_path / "a.png")
    expected = torch.from_numpy(grey / 65535).float().expand(3, -1, -1)
    torch.testing.assert_close(Photo(tmp_path / "a.png").whole(), expected, atol=1 / 255, rtol=0)


@pytest.mark.parametrize("shape", [(70, 50), (50, 70), (32, 32), (20, 24)])
def test_a_file_and_its_image_are_the_same_to_the_encoder(tmp_path, shape):
    """Training reads the file, Predict LiDB the IMAGE that Load Image makes of it."""
    picture = (noise(*shape, 3).numpy() * 255).astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.png")
    encoder = EncoderConfig(image_size=32)
    trained = preprocess(Photo(tmp_path / "a.png").pixels(32)[None], encoder)
    shown = preprocess(torch.from_numpy(picture.astype(np.float32) / 255.0)[None], encoder)
    assert torch.equal(trained, shown)


@pytest.mark.parametrize("kind", ["L", "RGB", "RGBA", "P", "LA", "jpg", "turned"])
def test_a_very_large_picture_is_reduced_on_the_way(tmp_path, monkeypatch, kind):
    """To the same pixels; each of them took 20 bytes, on every core."""
    monkeypatch.setattr(photos, "LARGE", 10_000)
    small = Image.fromarray((noise(8, 10, 3).numpy() * 255).astype(np.uint8))
    large = small.resize((500, 400), Image.Resampling.BICUBIC)
    path, exif = tmp_path / "a.png", Image.Exif()
    if kind == "turned":
        exif[0x0112] = 6
    if kind in ("jpg", "turned"):
        large.save(path, "JPEG", exif=exif)
    else:
        large.convert(kind).save(path, compress_level=1)
    photo = Photo(path)
    assert min(photo.whole(32).shape[1:]) == 4 * 32
    expected = resize_to_cover(photo.whole()[None], (32, 32))[0].movedim(0, -1)
    torch.testing.assert_close(photo.pixels(32), expected, atol=0.01, rtol=0)


@pytest.mark.parametrize("mode", ["1", "L"])
def test_few_bytes_of_very_many_pixels(tmp_path, mode):
    """A picture of 21 KB took 3.4 GB, on every core."""
    Image.new(mode, (7100, 7100)).save(path := tmp_path / "a.png")
    with pytest.raises(HyperNetError, match=r"pixels in .* bytes; make it smaller"):
        Photo(path).pixels(64)
    path.write_bytes(path.read_bytes() + bytes(1_100_000))  # as many as a real one has
    assert Photo(path).pixels(64).shape == (64, 64, 3)
